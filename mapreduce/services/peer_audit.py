"""A peer's dealings with its validator about what has happened: completions out, samples opened,
proofs both ways.

Knows when to speak and what to keep until then. Does not know how a step goes (`peer_job.py`) or
what is checked (`wire/audit.py`). A validator that does not answer costs a peer nothing: no step
waits for it, unless the ranks were shown different results.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from blake3 import blake3

from mapreduce.errors import (
    BadMessage,
    CertificateConflict,
    IntegrityError,
    MapReduceError,
    Refused,
    ResultDisputed,
)
from mapreduce.net.client import call
from mapreduce.wire.aborts import fraud_of
from mapreduce.wire.messages import (
    MAX_MESSAGE_BYTES,
    Accepted,
    AuditAnswer,
    CompletionBatch,
    Dispute,
    SignedCompletion,
)
from mapreduce.wire.peer_record import PeerRecord
from mapreduce.wire.proofs import (
    MAX_PROOF_BYTES,
    ProofInvalid,
    check_claim,
    claim_of_job,
    decode_claim,
    encode_proof,
)

if TYPE_CHECKING:
    import aiohttp
    from bittensor.sp_core import Keypair

    from mapreduce.net.client import Remote
    from mapreduce.wire.messages import SignedGrant, WantedOpenings
    from mapreduce.wire.peer_step import Step
    from mapreduce.wire.peer_trust import Signatory

Answer = TypeVar("Answer")

CONTACT_S = 2.0  # between two contacts, while there is something to say
LAST_CONTACT_S = 5.0  # for all that is left to say when the job is closed
CONFLICT_S = 5.0  # for the validator to find out who showed whom what
POLL_S = 0.2
COMPLETION_OVERHEAD_BYTES = 256  # signature, names and quotes in JSON
MAX_BATCH_BYTES = 96 * 1024  # of completions; a request has at most 128 KiB
MAX_BATCHED_COMPLETIONS = 256
# It will not want to hear it later either; others pass, as when it is shutting down.
FINAL_REFUSALS = frozenset({"no_such_job", "not_in_job", "bad_message"})
MAX_POLLS = 20  # then other ranks do not seem to tell their part
MAX_BATCHED_DISPUTES = 8

_log = logging.getLogger(__name__)


class PeerAudit:
    """One job at one peer. Use it from the job's event loop. `fraud` is the first lie in the job
    that the validator has proven."""

    def __init__(
        self,
        http: aiohttp.ClientSession,
        validator: Remote,
        key: Keypair,
        signed: SignedGrant,
        job: str,
        signatory: Signatory,
        proof_directory: Path,
    ) -> None:
        self.fraud: IntegrityError | None = None
        self._http = http
        self._validator = validator
        self._key = key
        self._signed = signed
        self._job = job
        self._signatory = signatory
        self._directory = proof_directory
        self._record = PeerRecord(signatory)
        self._disputes: list[Dispute] = []
        self._claims: list[bytes] = []
        self._reported: set[int] = set()  # steps of which the validator may still want to see more
        self._known: set[str] = set()  # proofs that the validator has told of
        self._polls_left = 0  # contacts to learn of verdicts that are still to come
        self._failures = 0
        self._hurry = asyncio.Event()
        self._something = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._contacting = asyncio.Lock()

    def start(self) -> None:
        """Begins to speak to the validator when there is something to say."""
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Says what is left, within `LAST_CONTACT_S`."""
        if self._task is None:
            return
        self._task.cancel()
        await asyncio.wait([self._task])
        self._task = None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_CONTACT_S):
                while self._pending and await self._try_contact():
                    if self._polls_left:
                        await asyncio.sleep(POLL_S)
        if self._record.completions:
            _log.warning("the validator did not hear how the last steps went")

    # What happens ---------------------------------------------------------------------------------

    def step_over(self, step: Step) -> None:
        """A step has ended: keeps what the validator may ask for."""
        if self._record.step_over(step):
            self._polls_left = MAX_POLLS
            self._something.set()

    async def accuse(self, error: IntegrityError) -> IntegrityError:
        """A step has failed because somebody lied, or may have: files and reports what is known,
        and returns what the caller is to hear."""
        if isinstance(error, ResultDisputed):
            self._dispute(error)
        if isinstance(error, CertificateConflict):
            # The miner's two certificates are a proof; the validator gets to see both.
            return await self.known_fraud(CONFLICT_S) or error
        if error.proof and error.proof_path is None:
            claim = decode_claim(error.proof)
            data = encode_proof(self._signed.grant, self._signed.signature, claim)
            self._save(error, data)
            self._claims.append(error.proof)
            self._something.set()
        return error

    def _dispute(self, error: ResultDisputed) -> None:
        """Only what this rank has seen itself, or what the miner has signed, can be told."""
        if not error.own and not error.reject:
            return
        assert error.segment is not None
        self._disputes.append(
            Dispute(
                step=error.step,
                segment=error.segment,
                rank=error.rank - 1,
                what=error.what[:256],
                reject=error.reject.hex(),
            )
        )
        self._something.set()

    async def known_fraud(self, within_s: float) -> IntegrityError | None:
        """A lie in this job that the validator knows of, or learns of within this time."""
        failures = self._failures
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                while self.fraud is None and self._failures == failures:
                    self._something.set()
                    self._hurry.set()
                    await asyncio.sleep(POLL_S)
        return self.fraud

    def _save(self, error: IntegrityError, data: bytes) -> None:
        try:
            error.saved(str(save_proof(self._directory, data)))
        except OSError as failure:
            error.not_saved(f"{self._directory}: {failure.strerror or failure}")
        except RuntimeError as failure:  # there is no home directory
            error.not_saved(f"{self._directory}: {failure}")

    # Contacts -------------------------------------------------------------------------------------

    @property
    def _pending(self) -> bool:
        told = not (self._record.completions or self._disputes or self._claims or self._reported)
        return not told or self._polls_left > 0

    async def _run(self) -> None:
        while True:
            await self._something.wait()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CONTACT_S):
                    await self._hurry.wait()
            self._hurry.clear()
            self._something.clear()
            await self._try_contact()
            if self._pending:
                self._something.set()

    async def _try_contact(self) -> bool:
        """Says all that there is to say; whether that worked."""
        try:
            await self._contact()
            while self._record.completions:  # small steps: more than one request holds
                await self._contact()
            return True
        except Refused as error:
            _log.warning("the validator takes no completions", extra={"error": str(error)})
            if error.code in FINAL_REFUSALS:
                self._forget()
        except MapReduceError as error:
            _log.info("no contact to the validator", extra={"error": str(error)})
        except Exception:  # the top of this task: training goes on, whatever is wrong here
            _log.exception("contact to the validator failed")
        self._failures += 1
        return False

    def _forget(self) -> None:
        self._record.completions.clear()
        self._disputes.clear()
        self._claims.clear()
        self._drop_reported()

    def _drop_reported(self) -> None:
        for step in self._reported:
            self._record.drop(step)
        self._reported.clear()

    async def _contact(self) -> None:
        async with self._contacting:
            path = f"/v1/jobs/{self._job}"
            while self._claims:
                await self._call("POST", f"{path}/proofs", self._claims[0], Accepted)
                self._claims.pop(0)
            completions = self._next_completions()
            last = completions[-1][0] if completions else 0
            disputes = self._disputes[:MAX_BATCHED_DISPUTES]
            batch = CompletionBatch(
                rank=self._signatory.rank,
                completions=[message for _, message in completions],
                disputes=disputes,
            )
            answer = await self._call("POST", f"{path}/completions", batch, AuditAnswer)
            self._reported.update(step for step, _ in completions)
            while self._record.completions and self._record.completions[0].step <= last:
                self._record.completions.popleft()
            del self._disputes[: len(disputes)]
            for want in answer.wants:
                await self._show(want, f"{path}/openings")
            self._drop_reported()
            self._polls_left = max(0, self._polls_left - 1) if answer.pending else 0
            for proof in answer.proofs:
                if proof not in self._known:
                    await self._fetch(f"{path}/proofs/{proof}")
                    self._known.add(proof)

    def _next_completions(self) -> list[tuple[int, SignedCompletion]]:
        """As many as fit one request, each with its step."""
        batch: list[tuple[int, SignedCompletion]] = []
        size = 0
        for completion in self._record.completions:
            said, signature = self._record.told(completion)
            content = said.content().hex()
            size += len(content) + COMPLETION_OVERHEAD_BYTES
            if len(batch) == MAX_BATCHED_COMPLETIONS or size > MAX_BATCH_BYTES:
                break
            message = SignedCompletion(content=content, signature=signature.hex())
            batch.append((completion.step, message))
        return batch

    async def _show(self, want: WantedOpenings, path: str) -> None:
        shown = self._record.openings if want.openings else self._record.certificate
        try:
            for body in shown(want.step, want.segment):
                await self._call("POST", path, body, Accepted)
        except Refused as error:
            if error.code != "bad_message":
                raise
            _log.warning(
                "the validator does not take what it asked for",
                extra={"step": want.step, "segment": want.segment, "error": str(error)},
            )

    async def _fetch(self, path: str) -> None:
        """A lie in this job is proven: checks it, files it, and stops the job."""
        data = await self._call("GET", path, None, bytes, MAX_PROOF_BYTES)
        try:
            claim = claim_of_job(data, self._signed.grant, self._signed.signature)
            finding = check_claim(claim, self._signatory.keys)
        except ProofInvalid as error:
            raise BadMessage(f"a proof that proves nothing: {error}") from None
        fraud = fraud_of(finding, data)
        if self.fraud is None:
            self._save(fraud, data)
            self.fraud = fraud
            _log.error("a lie in this job is proven", extra={"error": str(fraud)})

    async def _call(
        self,
        method: str,
        path: str,
        message: object,
        answer: type[Answer],
        most_bytes: int = MAX_MESSAGE_BYTES,
    ) -> Answer:
        return await call(
            self._http,
            self._key,
            self._validator,
            method,
            path,
            message,
            answer,
            most_bytes=most_bytes,
        )


def save_proof(directory: Path, data: bytes) -> Path:
    """Writes a proof under a name made from its bytes; whole or not at all. Raises OSError."""
    directory = directory.expanduser()
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{blake3(data).hexdigest()[:32]}.proof"
    handle, name = tempfile.mkstemp(dir=directory, prefix=".writing-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return path
