"""What runs: the miner, the coordinator of a validator, wired from the layers below."""
