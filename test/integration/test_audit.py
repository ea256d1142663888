"""Peers and their validator after the steps: completions, openings, proofs, and what neither
believes the other."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from mapreduce.core.dtypes import DType
from mapreduce.core.partition import map_digest
from mapreduce.core.reduce import ReduceOp
from mapreduce.errors import (
    BadMessage,
    JobRefused,
    LocalError,
    MinerFraud,
    Refused,
    ResultDisputed,
)
from mapreduce.net.auth import new_session_key, signer, verify_signature
from mapreduce.services import miner_job, peer_audit
from mapreduce.services.grants import AcceptedGrants, job_keys
from mapreduce.wire.bodies import Abort, Open, TensorSpec
from mapreduce.wire.frames import Kind
from mapreduce.wire.messages import CompletionBatch, Dispute, SignedCompletion
from mapreduce.wire.openings import Part
from mapreduce.wire.proofs import Claim, ProofKind, Signed, check_proof, encode_proof
from mapreduce.wire.statements import Upload, open_statement
from mapreduce.wire.terms import Terms
from test.integration.fleet import (
    Fleet,
    all_reduce,
    all_reduce_everywhere,
    errors_of,
    in_loop,
    integers,
    tensors,
    until,
)
from test.integration.raw_stream import jobs_and_raw
from test.liars.miners import miner_session
from test.parties import Parties

if TYPE_CHECKING:
    from pathlib import Path

    from mapreduce.services.peer_job import PeerJob

pytestmark = pytest.mark.usefixtures("quick_contacts")


@pytest.fixture
def quick_contacts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_audit, "CONTACT_S", 0.05)


def audit_of(fleet: Fleet, job: PeerJob) -> Any:
    return fleet.auditor._jobs[job.grant.job].audit


@in_loop
async def test_every_step_of_an_honest_job_is_reported_and_audited() -> None:
    async with Fleet(2, audit_budget=1.0) as fleet:
        jobs = await fleet.open_jobs(3)
        for _ in range(4):
            await all_reduce_everywhere(jobs, tensors(jobs, 300_000))
        await until(lambda: fleet.auditor._jobs, "the first contact")
        audit = audit_of(fleet, jobs[0])
        await until(lambda: audit.audited_steps == 4, "four audits")
        assert not fleet.ledger.proofs()
        assert not fleet.ledger.unavailable()
        assert all(job.audit._record._samples.kept_bytes == 0 for job in jobs)


@in_loop
async def test_a_job_that_closes_at_once_still_tells_its_validator() -> None:
    async with Fleet(1, audit_budget=1.0) as fleet:
        jobs = await fleet.open_jobs(2)
        await all_reduce_everywhere(jobs, tensors(jobs, 100_000))
        await asyncio.gather(*(job.close() for job in jobs))
        assert audit_of(fleet, jobs[0]).audited_steps == 1


@in_loop
async def test_a_restarted_validator_knows_its_jobs_and_audits_on() -> None:
    async with Fleet(1, audit_budget=1.0) as fleet:
        jobs = await fleet.open_jobs(2)
        await all_reduce_everywhere(jobs, tensors(jobs, 100_000))
        port = fleet.validator.port
        await fleet.stop_coordinator()
        await all_reduce_everywhere(jobs, tensors(jobs, 100_000))  # no step needs it
        await asyncio.sleep(0.2)
        await fleet.start_coordinator(port)
        await all_reduce_everywhere(jobs, tensors(jobs, 100_000))
        await until(lambda: fleet.auditor._jobs, "contact")
        await until(lambda: audit_of(fleet, jobs[0]).audited_steps >= 2, "two audits")
        assert not fleet.ledger.proofs()


@in_loop
async def test_a_validator_that_is_gone_delays_nobody() -> None:
    async with Fleet(1) as fleet:
        jobs = await fleet.open_jobs(2)
        await fleet.stop_coordinator()
        await all_reduce_everywhere(jobs, tensors(jobs, 100_000))
        await asyncio.gather(*(job.close() for job in jobs))
        # It gave up at the first refusal, instead of trying until its time is up.
        assert all(job.audit._failures >= 1 and job.audit._pending for job in jobs)


@in_loop
async def test_who_opts_out_shows_no_data_but_tells_how_steps_ended() -> None:
    async with Fleet(1, audit_budget=1.0) as fleet:
        jobs = await fleet.open_jobs(2, audit=False)
        await all_reduce_everywhere(jobs, tensors(jobs, 100_000))
        assert all(job.session.step.sample is None for job in jobs)  # type: ignore[union-attr]
        await until(lambda: fleet.auditor._jobs, "the first contact")
        audit = audit_of(fleet, jobs[0])
        await until(lambda: audit.completed_steps == 1, "both completions")
        assert audit.wants(0) == ([], [])
        assert audit.audited_steps == 0


@in_loop
async def test_ranks_must_agree_on_opting_out() -> None:
    async with Fleet(1) as fleet:
        waiting = asyncio.create_task(fleet.open_job(0, 2, audit=False))
        await until(lambda: fleet.coordinator.waiting_ranks, "the first rank")
        with pytest.raises(JobRefused, match="disagree on audit: rank 1 says False"):
            await fleet.open_job(1, 2)
        waiting.cancel()


# A liar among the miners --------------------------------------------------------------------------


@in_loop
async def test_a_wrong_sum_is_proven_filed_and_ends_the_job_and_the_miner(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(miner_job, "MinerSession", miner_session("one_ulp"))
    async with Fleet(1, audit_budget=1.0) as fleet:
        jobs = await fleet.open_jobs(2, proof_directory=tmp_path)
        data = [np.full(70_000, rank + 1, dtype=np.float32) for rank in range(2)]
        results = await asyncio.gather(*(all_reduce(j, t) for j, t in zip(jobs, data, strict=True)))
        assert any((result != 3).any() for result in results)  # returned before anyone could know
        await until(lambda: all(job.audit.fraud for job in jobs), "the proof")
        for error in await errors_of(jobs):
            assert isinstance(error, MinerFraud)
            assert (error.uid, error.step) == (fleet.miners[0].uid, 1)
            assert error.proof_path is not None
            assert error.proof_path in str(error)
        (entry,) = fleet.ledger.proofs()
        assert entry.culprit == fleet.miners[0].remote.hotkey
        # One file for all ranks of a machine: it is named by its content.
        assert os.listdir(tmp_path) == [f"{entry.id}.proof"]
        with pytest.raises(JobRefused, match=rf"proven to have lied \(proof {entry.id}\)"):
            await fleet.open_job(0, 1)


@in_loop
async def test_a_proof_that_cannot_be_written_is_still_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(miner_job, "MinerSession", miner_session("other_input"))
    taken = tmp_path / "taken"
    taken.write_text("a file, no directory")
    async with Fleet(1) as fleet:
        jobs = await fleet.open_jobs(2, proof_directory=taken)
        for error in await errors_of(jobs):
            assert isinstance(error, MinerFraud)
            assert error.proof_path is None
            assert "its proof could not be saved" in str(error)
        await until(fleet.ledger.proofs, "the report to the validator")


# What a validator does not take -------------------------------------------------------------------


@in_loop
async def test_a_validator_believes_only_what_is_signed_and_fits() -> None:
    async with Fleet(1, audit_budget=1.0) as fleet:
        jobs = await fleet.open_jobs(2)
        await all_reduce_everywhere(jobs, tensors(jobs, 100_000))
        await until(lambda: fleet.auditor._jobs, "the first contact")
        job, other = jobs
        record = job.audit._record
        assert job.session.step is not None
        assert record.step_over(job.session.step)
        completion, signature = record.told(record.completions.pop())
        path = f"/v1/jobs/{job.grant.job}"

        async def refused(key: Any, route: str, message: object) -> tuple[int, str, str]:
            answer: tuple[int, str, str] = await fleet.refusal(
                key, fleet.validator, "POST", path + route, message
            )
            return answer

        def batch(rank: int, content: bytes, signed: bytes, *disputes: Dispute) -> CompletionBatch:
            said = SignedCompletion(content=content.hex(), signature=signed.hex())
            return CompletionBatch(rank=rank, completions=[said], disputes=list(disputes))

        good = completion.content()
        stranger = new_session_key()
        assert (await refused(stranger, "/completions", batch(0, good, signature)))[0] == 403
        path = "/v1/jobs/" + "0" * 32
        assert (await refused(job._key, "/completions", batch(0, good, signature)))[:2] == (
            404,
            "no_such_job",
        )
        path = f"/v1/jobs/{job.grant.job}"
        later = replace(completion, step=99).content()
        dispute = Dispute(step=1, segment=0, rank=1, what="x", reject="00" * 200)
        for message, says in (
            (batch(1, good, signature), "the report is of rank 2, the caller 1"),
            (batch(0, later, signature), "not signed by its rank"),
            (batch(0, good[:-1], signature), "completion of"),
            (batch(0, good, signature, dispute), "has not signed this reject"),
            (batch(0, good, signature, replace(dispute, segment=9)), "no such rank or segment"),
        ):
            status, code, text = await refused(job._key, "/completions", message)
            assert (status, code) == (400, "bad_message")
            assert says in text
        # Another rank's completion is not this rank's.
        assert (await refused(other._key, "/completions", batch(0, good, signature)))[0] == 400
        for body, says in (
            (b"", "end in the middle"),
            (b"\x01" * 40, "end in the middle"),
        ):
            status, code, text = await refused(job._key, "/openings", body)
            assert (status, code) == (400, "bad_message"), text
            assert says in text
        # Openings of a step that nobody asked about change nothing.
        await fleet.request(
            job._key,
            fleet.validator,
            "POST",
            f"{path}/openings",
            Part(step=77, segment=0, first=0).encode(),
        )
        status, code, _ = await refused(job._key, "/proofs", b"\x04" + bytes(300))
        assert (status, code) == (400, "bad_message")
        status, code, _ = await fleet.refusal(
            job._key, fleet.validator, "GET", f"{path}/proofs/{'a' * 32}"
        )
        assert (status, code) == (404, "no_such_proof")
        assert not fleet.ledger.proofs()
        assert not fleet.ledger.disputes()


@in_loop
async def test_a_rank_that_withholds_its_samples_gets_no_renewal() -> None:
    async with Fleet(1, audit_budget=1.0) as fleet:
        jobs = await fleet.open_jobs(2)
        jobs[1].audit._record.openings = lambda step, segment: []  # type: ignore[method-assign]
        jobs[1].audit._record.drop = lambda step: None  # type: ignore[method-assign]
        for _ in range(8):
            await all_reduce_everywhere(jobs, tensors(jobs, 100_000))
            await asyncio.sleep(0.1)
        await until(fleet.ledger.unavailable, "three asks")
        entries = fleet.ledger.unavailable()
        assert {entry.hotkey for entry in entries} == {fleet.peer_key.ss58_address}
        for job in jobs:
            with pytest.raises(Refused, match="rank 2 withheld its openings") as caught:
                await job._renew()
            assert caught.value.code == "excluded"
        assert not fleet.ledger.proofs()


@in_loop
async def test_no_job_is_granted_that_cannot_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Fleet(1) as fleet:

        def full(*args: object) -> None:
            raise LocalError("the ledger state.sqlite failed: database or disk is full")

        with monkeypatch.context() as patch:
            patch.setattr(fleet.ledger, "add_job", full)
            with pytest.raises(JobRefused, match="disk is full"):
                await fleet.open_job(0, 1)
        (job,) = await fleet.open_jobs(1)
        await all_reduce(job, np.ones(10, dtype=np.float32), ReduceOp.SUM)


# What a miner does not take -----------------------------------------------------------------------


@in_loop
async def test_a_job_is_accepted_once_and_only_if_it_is_younger_than_the_miner() -> None:
    """Else a validator could make an honest miner sign two results of one step."""
    async with Fleet(1) as fleet:
        node = fleet.miners[0]
        grant = fleet.grant([new_session_key()], [node])

        async def offer(**changes: Any) -> tuple[int, str, str]:
            answer: tuple[int, str, str] = await fleet.refusal(
                fleet.validator_key,
                node.remote,
                "POST",
                "/v1/jobs",
                fleet.sign(replace(grant, **changes)),
            )
            return answer

        status, _ = await fleet.request(
            fleet.validator_key, node.remote, "POST", "/v1/jobs", fleet.sign(grant)
        )
        assert status == 200
        assert (await offer())[1] == "duplicate_job"
        node.miner.jobs[grant.job].close("done")
        await until(lambda: not node.miner.jobs, "the job ends")
        assert (await offer())[1] == "duplicate_job"
        stale = {"job": "0" * 32, "created_at": grant.created_at - 3600.0}
        status, code, text = await offer(**stale)
        assert (status, code) == (409, "stale_grant")
        assert "since it started" in text
        assert (await offer(job="1" * 32, created_at=grant.created_at + 60.0))[1] == "stale_grant"


# What a hostile or unlucky world must not do ------------------------------------------------------


@in_loop
async def test_a_proof_survives_a_disk_that_is_full_for_a_while(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(miner_job, "MinerSession", miner_session("one_ulp"))
    async with Fleet(1, audit_budget=1.0) as fleet:
        jobs = await fleet.open_jobs(2, proof_directory=tmp_path)
        keep, tries = fleet.ledger.add_proof, []

        def full_at_first(*args: Any, **kwargs: Any) -> bool:
            tries.append(args)
            if len(tries) < 3:
                raise LocalError("the ledger state.sqlite failed: database or disk is full")
            return keep(*args, **kwargs)

        monkeypatch.setattr(fleet.ledger, "add_proof", full_at_first)
        await asyncio.gather(*(all_reduce(job, integers(job.rank, 70_000)) for job in jobs))
        await until(fleet.ledger.proofs, "the proof")
        await until(lambda: all(job.audit.fraud for job in jobs), "every rank hears of it")


@in_loop
async def test_nobody_speaks_for_another_rank_in_a_dispute() -> None:
    async with Fleet(1) as fleet:
        jobs, raw = await jobs_and_raw(fleet, 2)
        failing = asyncio.create_task(errors_of(jobs))
        await until(lambda: all(job.session.step for job in jobs), "the step begins")
        tensor = TensorSpec(dtype=DType.FLOAT32, shape=(400_000,))
        opened = Open(op=ReduceOp.SUM, tensor=tensor, segment_bytes=1_600_000)
        place = jobs[0].session.signatory.keys.place(1, 0)
        body = replace(opened, map_digest=map_digest(jobs[0].session.step.segments)).encode()  # type: ignore[union-attr]
        signature = signer(raw.key)(open_statement(place, 2, body))
        raw.send(Kind.OPEN, body + signature, step=1, rank=2)
        abort = Abort(code="dispute", message="rank 1 lies \ud800", rank=0, miner=0)
        raw.send(Kind.ABORT, abort.encode(), step=1, rank=2)
        for error in await failing:
            assert isinstance(error, ResultDisputed)
            assert error.rank == 3  # who said it, whomever it named
            assert "\ud800" not in str(error)
        await asyncio.sleep(0.3)
        assert not fleet.ledger.disputes()
        assert all(job.audit._task and not job.audit._task.done() for job in jobs)


@in_loop
async def test_a_proof_of_another_grant_with_the_same_job_is_not_believed(tmp_path: Path) -> None:
    """A validator could sign one that puts its own keys in the ranks' places."""
    async with Fleet(1) as fleet:
        jobs = await fleet.open_jobs(2, proof_directory=tmp_path)
        job = jobs[0]
        keys = [new_session_key() for _ in range(2)]
        grant = replace(job.grant, session_keys=[key.ss58_address for key in keys])
        signed = fleet.sign(grant)
        place = job_keys(signed, grant).place(1, 0)
        statements = sorted(
            Upload(place=place, rank=1, nbytes=4, root=root, nonce_hash=bytes(32)).statement()
            for root in (bytes(32), bytes([1] * 32))
        )
        claim = Claim(
            kind=ProofKind.TWO_UPLOADS,
            statements=tuple(
                Signed(statement=said, signature=signer(keys[1])(said)) for said in statements
            ),
        )
        forged = encode_proof(signed.grant, signed.signature, claim)
        assert check_proof(forged, verify_signature)[1].rank == 1  # it holds, for that grant

        async def answer(*args: Any) -> bytes:
            return forged

        job.audit._call = answer  # type: ignore[method-assign]
        with pytest.raises(BadMessage, match="of another job"):
            await job.audit._fetch("/v1/proofs")
        assert job.audit.fraud is None
        assert not os.listdir(tmp_path)


def test_a_restart_or_a_clock_that_is_set_back_brings_no_job_back() -> None:
    terms = Terms(
        peer_count=1, miner_count=1, bandwidth=1, window_bytes=1 << 16, frame_bytes=1 << 14
    )
    grant = replace(Parties(terms).grant, created_at=1002.0, expires_at=4602.0)
    accepted = AcceptedGrants(900.0)
    accepted.add(grant, 1000.0)  # two seconds ahead, as a clock may be
    with pytest.raises(Refused, match="made"):
        AcceptedGrants(1001.0).add(grant, 1003.0)  # the process has restarted
    accepted.add(replace(grant, job="0" * 32, created_at=5000.0, expires_at=8600.0), 5000.0)
    with pytest.raises(Refused):
        accepted.add(grant, 1000.0)


@in_loop
async def test_one_rank_cannot_fill_the_ledger_with_disputes() -> None:
    async with Fleet(1) as fleet:
        (job,) = await fleet.open_jobs(1)
        path = f"/v1/jobs/{job.grant.job}/completions"
        for start in range(0, 256, 64):
            disputes = [
                Dispute(step=start + n, segment=0, rank=0, what="x", reject="") for n in range(64)
            ]
            status, _ = await fleet.request(
                job._key,
                fleet.validator,
                "POST",
                path,
                CompletionBatch(rank=0, completions=[], disputes=disputes),
            )
            assert status == 200
        assert len(fleet.ledger.disputes()) == 64
        flags = fleet.auditor.flags()
        assert not flags.miners
        assert not flags.peers


@in_loop
async def test_a_job_that_was_excluded_stays_so_after_a_restart() -> None:
    async with Fleet(1) as fleet:
        (job,) = await fleet.open_jobs(1)
        fleet.ledger.add_unavailable(
            role="peer",
            hotkey=fleet.peer_key.ss58_address,
            job=job.grant.job,
            step=1,
            segment=0,
            what="rank 1 withheld its openings",
            now=time.time(),
        )
        with pytest.raises(Refused, match="rank 1 withheld its openings, three times"):
            await job._renew()
