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

from mapreduce.core.reduce import ReduceOp
from mapreduce.errors import JobRefused, LocalError, MinerFraud, Refused
from mapreduce.net.auth import new_session_key
from mapreduce.services import miner_job, peer_audit
from mapreduce.wire.messages import CompletionBatch, Dispute, SignedCompletion
from mapreduce.wire.openings import Part
from test.integration.fleet import (
    Fleet,
    all_reduce,
    all_reduce_everywhere,
    errors_of,
    in_loop,
    tensors,
    until,
)
from test.liars.miners import miner_session

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
        started = time.monotonic()
        await asyncio.gather(*(job.close() for job in jobs))
        assert time.monotonic() - started < peer_audit.LAST_CONTACT_S


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
            with pytest.raises(Refused, match="rank 2 did not show the samples") as caught:
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
        assert "this miner started" in text
        assert (await offer(job="1" * 32, created_at=grant.created_at + 60.0))[1] == "stale_grant"
