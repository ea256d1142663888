"""Pure protocol: frames, control messages and the sans-IO session machines of peer and miner."""
