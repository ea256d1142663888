"""What either end refuses because the protocol forbids it, and whom it names."""

from __future__ import annotations

import numpy as np
import pytest

from mapreduce.core.dtypes import DType
from mapreduce.core.hash_tree import RootHasher
from mapreduce.core.reduce import ReduceOp
from mapreduce.errors import BadFrame, CollectiveMismatch
from mapreduce.net.auth import signer
from mapreduce.wire.bodies import VERSION_PREFIX, Ack, Commit, Open, TensorSpec
from mapreduce.wire.frames import Header, Kind, encode_frame
from mapreduce.wire.proofs import Claim, ProofInvalid, ProofKind, Signed, check_claim
from mapreduce.wire.statements import NO_ROOT, Certificate, Receipt, open_statement
from test.memory_job import MemoryJob
from test.parties import Parties
from test.unit.test_sessions import KIB, gradients, terms

NO_ACK = Ack(segment_us=0, nonce=bytes(32), step_digest=bytes(32), signature=bytes(64))


def peer_frame(kind: Kind, *, body: bytes = b"", **fields: int) -> bytes:
    header = Header(kind=kind, length=fields.pop("length", len(body)), **fields)
    return encode_frame(header, body) if body or not header.length else header.encode()


def signed_open(opened: Open) -> bytes:
    """The frame of a rank that opens step 1 as it says, with its signature."""
    parties = Parties(terms(1, 1))
    body = opened.encode()
    statement = open_statement(parties.keys.place(1, 0), 0, body)
    return peer_frame(Kind.OPEN, step=1, body=body + signer(parties.sessions[0])(statement))


def opened(count: int = 8) -> bytes:
    job = MemoryJob(terms(1, 1))
    job.begin(0, ReduceOp.AVG, np.zeros(count, dtype=np.float32))
    return b"".join(job.peers[0].take_control(0))


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (b"GET / HTTP/1.1\r\n\r\n" + bytes(40), "lost its framing"),
        (peer_frame(Kind.DATA, step=1, length=16), "not opened"),
        (opened() + peer_frame(Kind.DATA, step=1, length=64), "up to 64 in a segment of 32"),
        (opened() + peer_frame(Kind.DATA, step=1, offset=4, length=4), "expected at 0"),
        (opened() + peer_frame(Kind.DATA, step=1, length=16), "whole blocks"),
        (opened() + peer_frame(Kind.DATA, step=1, length=64 * KIB), "1 to 32768 are granted"),
        (opened() + peer_frame(Kind.DATA, step=1, length=0), "DATA of 0 bytes"),
        (opened() + opened(), "after step 1"),
        (opened() + peer_frame(Kind.CLOSE, step=1, body=VERSION_PREFIX), "CLOSE after 0 of 32"),
        (opened() + peer_frame(Kind.ACK, step=1, body=NO_ACK.encode()), "no certificate"),
        (
            opened() + peer_frame(Kind.CLOSE, step=1, segment=3, body=VERSION_PREFIX),
            "for segment 3",
        ),
        (
            opened() + peer_frame(Kind.CLOSE, step=1, rank=1, body=VERSION_PREFIX),
            "of rank 2 on the",
        ),
        (peer_frame(Kind.OPEN, step=1, body=b"\x01"), "too short"),
        (peer_frame(Kind.OPEN, step=1, body=b"\x09" + bytes(90)), "version 9"),
        (peer_frame(Kind.COMMIT, body=VERSION_PREFIX), "may not send COMMIT"),
        (peer_frame(Kind.RESULT, length=5), "may not send RESULT"),
        (Header(kind=Kind.PING, length=1 << 20).encode(), "at most 65536"),
        (
            signed_open(
                Open(
                    op=ReduceOp.AVG,
                    tensor=TensorSpec(dtype=DType.FLOAT32, shape=(1 << 62, 1 << 62)),
                )
            ),
            "are granted",
        ),
        (
            signed_open(Open(op=ReduceOp.AVG, tensor=TensorSpec(dtype=DType.INT32, shape=(4,)))),
            "no miner can reduce",
        ),
        (
            signed_open(
                Open(
                    op=ReduceOp.SUM,
                    tensor=TensorSpec(dtype=DType.INT32, shape=(4,)),
                    segment_bytes=17,
                )
            ),
            "a segment of 17 bytes in 16",
        ),
        (opened()[:-1] + bytes([opened()[-1] ^ 1]), "OPEN that is not signed"),
    ],
)
def test_a_miner_refuses_what_the_protocol_forbids(stream: bytes, message: str) -> None:
    job = MemoryJob(terms(1, 1))
    job.streams[0, 0].to_miner += stream + bytes(1)
    job.run()
    assert [message in str(error) for error in job.violations] == [True], job.violations


def test_a_peer_that_ignores_its_window_is_stopped() -> None:
    job = MemoryJob(terms(2, 1))
    job.begin(0, ReduceOp.AVG, np.zeros(100_000, dtype=np.float32))
    job.peers[0].terms = terms(2, 1, window=128 * KIB)
    job.run()
    assert "exceeds the window of 65536" in str(job.violations[0])


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (peer_frame(Kind.RESULT, step=1, length=64 * KIB), "32768 are granted"),
        (peer_frame(Kind.RESULT, step=1, length=32 * KIB), "0 were sent"),
        (peer_frame(Kind.PING, step=1), "only answers PING"),
        (peer_frame(Kind.RESULT, step=1, offset=16, length=16), "0 of"),
        (peer_frame(Kind.RESULT, step=2, length=16), "for step 2"),
        (
            peer_frame(Kind.COMMIT, step=1, body=Commit(acks=(NO_ACK,) * 2).encode() + bytes(64)),
            "without this rank's acknowledgement",
        ),
        (peer_frame(Kind.RECEIPT, step=1, body=VERSION_PREFIX + bytes(64)), "before CLOSE"),
        (peer_frame(Kind.REJECT, step=1, body=VERSION_PREFIX + bytes(96)), "before CLOSE"),
        (peer_frame(Kind.CERTIFICATE, step=1, body=VERSION_PREFIX + bytes(64)), "0 bytes"),
        (peer_frame(Kind.CREDIT, step=1, offset=1 << 30), "CREDIT for"),
        (peer_frame(Kind.DATA, step=1, length=16), "may not send DATA"),
        (peer_frame(Kind.ABORT, step=1, body=VERSION_PREFIX + b"{"), "cannot be read"),
        (peer_frame(Kind.ABORT, step=1, body=VERSION_PREFIX + b'{"code": "x"}'), "cannot be read"),
        (
            peer_frame(
                Kind.ABORT,
                step=1,
                body=VERSION_PREFIX + b'{"code": [], "message": "", "rank": null, "miner": null, '
                b'"differences": {}, "proof": ""}',
            ),
            "impossible values",
        ),
    ],
)
def test_a_peer_refuses_what_the_protocol_forbids_and_names_the_miner(
    frame: bytes, message: str
) -> None:
    job = MemoryJob(terms(2, 1))
    job.begin(0, ReduceOp.AVG, np.zeros(100_000, dtype=np.float32))
    job.streams[0, 0].to_peer += frame + bytes(1)
    while not job.violations:
        job._deliver_to_peer((0, 0))
    assert job.violations[0].who == str(job.parties.keys.miners[0])
    assert message in str(job.violations[0])


def test_a_result_for_bytes_that_have_not_left_the_peer_is_refused() -> None:
    """It would overwrite what is still to be sent, and the rank would contradict itself."""
    job = MemoryJob(terms(1, 1))
    job.begin(0, ReduceOp.SUM, np.ones(100_000, dtype=np.float32))
    assert job.peers[0].next_upload(lambda _: True, patient=False) is not None
    early = peer_frame(Kind.RESULT, step=1, length=16 * KIB) + bytes(1)
    with pytest.raises(BadFrame, match="0 were sent"):
        job.peer_readers[0, 0].feed(early)
    job.peers[0].flushed(0)
    job.peer_readers[0, 0].feed(early)


def test_ranks_whose_segments_differ_learn_it() -> None:
    """As when a miner had told them different times: nothing is reduced."""
    job = MemoryJob(terms(2, 2))
    job.peers[1].weights = (1, 3)
    steps = job.all_reduce(gradients(2, 500_000))
    job.run()
    for step in steps:
        assert isinstance(step.error, CollectiveMismatch)
        assert "segments" in str(step.error)


def test_a_receiver_of_a_broadcast_gets_no_receipt() -> None:
    """A receipt for nothing beside an honest certificate would convict an honest miner."""
    job = MemoryJob(terms(2, 1))
    job.begin(0, ReduceOp.BROADCAST, np.ones(20_000, dtype=np.float32))
    step = job.begin(1, ReduceOp.BROADCAST, None, contribute=False)
    stream = b"".join(job.peers[1].take_control(0))
    body = step.trust.close_body(0)
    job.streams[1, 0].to_miner += stream + peer_frame(Kind.CLOSE, step=1, rank=1, body=body)
    job.run()
    assert "CLOSE from a rank that receives this broadcast" in str(job.violations[0])
    assert not step.trust._receipts


def test_a_receipt_for_nothing_proves_nothing() -> None:
    """As a miner of an older version might have signed it."""
    parties = Parties(terms(2, 1))
    place = parties.keys.place(1, 0)
    receipt = Receipt(place=place, rank=1, nbytes=0, root=RootHasher().root(), nonce_hash=bytes(32))
    certificate = Certificate(
        place=place,
        op=ReduceOp.BROADCAST,
        dtype=DType.FLOAT32,
        sender=0,
        nbytes=8,
        root=bytes(32),
        entries=((bytes(32), bytes(32)), (NO_ROOT, bytes(32))),
    )
    sign = signer(parties.miners[0])
    signed = tuple(
        Signed(statement=said.statement(), signature=sign(said.statement()))
        for said in (receipt, certificate)
    )
    claim = Claim(kind=ProofKind.BROKEN_RECEIPT, statements=signed)
    with pytest.raises(ProofInvalid, match="rank 2 contributes nothing"):
        check_claim(claim, parties.keys)


def test_a_rank_that_sends_and_does_not_read_is_ended() -> None:
    job = MemoryJob(terms(1, 1))
    job.streams[0, 0].to_miner += opened()
    while job.streams[0, 0].to_miner:
        job._deliver_to_miner((0, 0))
    ping = peer_frame(Kind.PING)
    for _ in range(100_000):
        job.miner_readers[0, 0].feed(ping)
    assert len(job.miners[0]._streams[0].control) <= 64
    job.miners[0]._streams[0].control.extend([b""] * 1000)
    with pytest.raises(BadFrame, match="sends and does not read"):
        job.miner_readers[0, 0].feed(ping)


def test_a_segment_that_takes_more_than_an_hour_has_the_longest_time_there_is() -> None:
    job = MemoryJob(terms(2, 1))
    steps = job.all_reduce(gradients(2, 40_000))
    while job.run_some(1):
        job.now += 600.0
    assert all(step.error is None for step in steps)
    assert steps[0].segment_us == [(1 << 32) - 1]
