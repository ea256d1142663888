"""What verification is compared with: a miner, or a rank, that neither hashes nor signs.

`python -m bench.unverified ...` runs `neurons/miner.py` so; `...` are its flags. The frames are the
same, with zeros for roots and signatures. Knows which few functions to replace; nothing else can
reach this.
"""

from __future__ import annotations

from typing import Any


def neither_hash_nor_sign() -> None:
    """Makes this process skip hashing, signing, checking and sampling, for good."""
    from mapreduce.core.hash_tree import DIGEST_BYTES, RootHasher
    from mapreduce.services import miner, peer_job
    from mapreduce.wire.keys import JobKeys
    from mapreduce.wire.peer_record import PeerRecord
    from mapreduce.wire.statements import SIGNATURE_BYTES

    def count(tree: RootHasher, run: memoryview) -> None:
        tree.nbytes += len(run)

    def yes(*_: Any) -> bool:
        return True

    def no_signer(_: Any) -> Any:
        return lambda statement: bytes(SIGNATURE_BYTES)

    replaced: Any = {
        (RootHasher, "add"): count,
        (RootHasher, "root"): lambda tree: bytes(DIGEST_BYTES),
        (JobKeys, "signed_by_rank"): yes,
        (JobKeys, "signed_by_miner"): yes,
        (PeerRecord, "step_over"): lambda record, step: False,
        (miner, "signer"): no_signer,
        (peer_job, "signer"): no_signer,
    }
    for (owner, name), replacement in replaced.items():
        assert hasattr(owner, name)
        setattr(owner, name, replacement)


if __name__ == "__main__":
    from mapreduce.config import run_cli
    from neurons.miner import main

    neither_hash_nor_sign()
    run_cli(main)
