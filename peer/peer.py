"""`Peer`: one rank of a distributed training job, as a training script uses it.

Knows tensors, threads and the user's rank, which counts from 1; everything below counts from 0.
"""

from __future__ import annotations

import concurrent.futures
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from mapreduce.chain.wallets import load_wallet
from mapreduce.core.reduce import ReduceOp, check_reducible, reduce_op
from mapreduce.errors import (
    IntegrityError,
    InvalidArgument,
    JobClosed,
    TensorTooLarge,
    WalletError,
)
from mapreduce.net.loop import LoopThread
from mapreduce.services.joining import find_validator, open_job
from mapreduce.services.peer_job import PROOF_DIRECTORY
from mapreduce.wire.peer_step import Target
from peer.tensors import Tensor, as_bytes, assign, describe, mark_written, new_tensor

if TYPE_CHECKING:
    from types import TracebackType

    from mapreduce.services.peer_job import PeerJob
    from mapreduce.services.step_report import StepReport
    from mapreduce.wire.bodies import TensorSpec
    from mapreduce.wire.messages import MinerAddress
    from mapreduce.wire.peer_step import Step

T = TypeVar("T", bound=Tensor)

ROOT_RANK = 1


class Peer:
    """One rank of a job of `peer_count` ranks that all-reduce and broadcast through miners.

    Every rank calls the same collectives in the same order, with tensors of the same dtype and
    shape. They are blocking and bit-exact: every rank ends with the same bytes, or every rank gets
    an error and every tensor is what it was before. During a call its tensor changes and belongs to
    it alone. Use one Peer from one thread at a time; several may live in one process.

    Args:
        rank: 1 to `peer_count`; rank 1 sends broadcasts.
        peer_count: how many ranks the job has.
        bandwidth: the largest collective, in bytes.
        wallet: a `bittensor.Wallet`, its name (`"name"` or `"name/hotkey"`), or a hotkey's Keypair.
        It
            needs no registration unless the validator's operator wants one.
        validator_uid: the validator that finds the miners.
        netuid: the subnet.
        network: `finney`, `test`, `local`, a `ws://` address or `embedded[:PATH]`.
        miner_count: how many miners share a tensor; by default the validator decides.
        job: a name for ranks to meet by; needed if their hotkeys differ, or if jobs of one hotkey
        are
            opened at the same time.
        join_timeout: seconds that ranks wait for each other in `init_process_group`.
        enter_timeout: seconds that a collective waits for ranks that have not called it.
        audit: whether the validator may look at samples of the data, some blocks of 16 KiB in a
            step, to prove the miners' sums right. All ranks must say the same.
        proof_directory: where proofs against miners that lie go.

    Raises:
        InvalidArgument: a number is out of range.
    """

    def __init__(
        self,
        rank: int,
        peer_count: int,
        bandwidth: int,
        wallet: Any,  # Any: bittensor's Wallet, a Keypair or a name; checked when used
        validator_uid: int,
        netuid: int,
        network: str,
        *,
        miner_count: int | None = None,
        job: str = "",
        join_timeout: float = 60.0,
        enter_timeout: float = 1800.0,
        audit: bool = True,
        proof_directory: str | os.PathLike[str] = PROOF_DIRECTORY,
    ) -> None:
        for name, value, allowed in (
            ("peer_count", peer_count, peer_count >= 1),
            ("rank", rank, 1 <= rank <= peer_count),
            ("bandwidth", bandwidth, bandwidth >= 1),
            ("validator_uid", validator_uid, validator_uid >= 0),
            ("netuid", netuid, netuid >= 0),
            ("miner_count", miner_count, miner_count is None or miner_count >= 1),
            ("join_timeout", join_timeout, 0 < join_timeout <= 3600),
            ("enter_timeout", enter_timeout, enter_timeout > 0),
        ):
            if not allowed:
                within = f": ranks of {peer_count} peers are 1 to {peer_count}"
                raise InvalidArgument(
                    f"{name} = {value} is out of range{within if name == 'rank' else ''}"
                )
        self.rank = rank
        self.peer_count = peer_count
        self.bandwidth = bandwidth
        self.validator_uid = validator_uid
        self.netuid = netuid
        self.network = network
        self._wallet = wallet
        self._miner_count = miner_count
        self._job_name = job
        self._join_timeout = join_timeout
        self._enter_timeout = enter_timeout
        self._audit = audit
        self._proof_directory = Path(proof_directory)
        self._loop: LoopThread | None = None
        self._job: PeerJob | None = None
        self._pid = 0
        self._busy = threading.Lock()
        self._undo = np.empty(0, dtype=np.uint8)

    def __repr__(self) -> str:
        state = "open" if self._job else "closed"
        return f"<Peer rank {self.rank} of {self.peer_count}, {state}>"

    def __enter__(self) -> Peer:
        if self._job is None:
            self.init_process_group()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.destroy_process_group()
        except IntegrityError:
            if error is None:
                raise

    # Life ---------------------------------------------------------------------------------------

    def init_process_group(self) -> None:
        """Joins the job and opens a stream to every miner; returns when all ranks have joined.

        Raises:
            WalletError: the wallet cannot be used.
            ConfigError: an unknown network, netuid or validator uid, or a validator without an
            axon. ChainUnavailable: the chain does not answer. ValidatorUnreachable: the validator
            does not answer. JobRefused: ranks are missing, taken or disagree, or there are too few
            miners. VersionMismatch: another party speaks an incompatible version. Unavailable: a
            miner cannot be reached.
        """
        if self._job is not None:
            self._require_job()  # a forked child gets its own message
            raise JobClosed("the process group is initialised already")
        hotkey = _hotkey(self._wallet)
        loop = LoopThread(f"mapreduce-rank-{self.rank}")
        try:
            self._job = loop.call(self._open(hotkey))
        except BaseException:
            loop.close()
            raise
        self._loop = loop
        self._pid = os.getpid()

    async def _open(self, hotkey: Any) -> PeerJob:  # Any: a Keypair, from a library without types
        return await open_job(
            hotkey,
            await find_validator(self.network, self.netuid, self.validator_uid),
            rank=self.rank - 1,
            peer_count=self.peer_count,
            bandwidth=self.bandwidth,
            miner_count=self._miner_count,
            job=self._job_name,
            audit=self._audit,
            proof_directory=self._proof_directory,
            join_timeout_s=self._join_timeout,
        )

    def destroy_process_group(self) -> None:
        """Leaves the job; no socket or thread of it is left.

        Tells the validator how the last steps went, which takes up to 5 s where it, or another
        rank, does not answer. Idempotent, and harmless in a forked child.

        Raises:
            MinerFraud: a result that a collective returned is proven to be wrong, and no call has
                said so yet.
        """
        job, loop = self._job, self._loop
        self._job = self._loop = None
        self._undo = np.empty(0, dtype=np.uint8)
        if job is None or loop is None or self._pid != os.getpid():
            return
        try:
            loop.call(job.close())
        finally:
            loop.close()
        if job.unheard_fraud is not None:
            raise job.unheard_fraud

    def _require_job(self) -> tuple[PeerJob, LoopThread]:
        if self._job is None or self._loop is None:
            raise JobClosed("there is no process group: call init_process_group() first")
        if self._pid != os.getpid():
            raise JobClosed(
                f"this Peer was initialised in process {self._pid} and does not survive a fork: "
                "make a new Peer in the child, or start workers with the spawn method"
            )
        return self._job, self._loop

    # State --------------------------------------------------------------------------------------

    @property
    def miners(self) -> tuple[MinerAddress, ...]:
        """The job's miners in segment order: uid, hotkey, ip, port. Empty without a job."""
        return () if self._job is None else tuple(self._job.grant.miners)

    @property
    def last_step(self) -> StepReport | None:
        """What the last collective took: bytes, seconds, Mbit/s up and down, per miner."""
        return None if self._job is None else self._job.last_step

    # Collectives --------------------------------------------------------------------------------

    def all_reduce(self, tensor: T, op: str = "avg", *, timeout: float | None = None) -> T:
        """Averages (or sums) the ranks' tensors, in place, and returns the tensor.

        Args:
            tensor: a CPU torch tensor or numpy array of any shape; float32, float64, float16,
            bfloat16,
                or an integer type with `op="sum"`. Sums go in rank order in float32 or better,
                with one rounding; NaN stays NaN.
            op: `"avg"` or `"sum"`.
            timeout: seconds for the whole call; the step then fails on every rank.

        Raises:
            UnsupportedTensor: this tensor or dtype cannot be reduced; says what to pass.
            TensorTooLarge: it has more bytes than the job's `bandwidth`.
            StepFailed: ranks disagree (CollectiveMismatch), one was lost or gave up.
            IntegrityError: a miner (or rank) signed what does not fit the data. MinerFraud names
                the miner and the file with the proof, and ends the job; where it tells of an
                earlier step, that step's result was wrong.
            Unavailable: a miner was lost (MinerLost), or a rank did not come (PeerTimeout).
            JobClosed: there is no process group.
        """
        if op not in ("avg", "sum"):
            hint = "; call broadcast() instead" if op == "broadcast" else ""
            raise InvalidArgument(f'op = {op!r}: "avg" and "sum" are known{hint}')
        reduce = reduce_op(op)
        self._require_job()
        spec = describe(tensor, written=True)
        check_reducible(reduce, spec.dtype)
        self._into(tensor, reduce, spec, timeout, contribute=True)
        return tensor

    def broadcast(
        self, tensor: T | None = None, *, src: int = ROOT_RANK, timeout: float | None = None
    ) -> Any:  # Any: T where a tensor was given, a new torch.Tensor where none was
        """Sends rank `src`'s tensor to every rank, verbatim, and returns it.

        Args:
            tensor: on rank `src` what to send, of any dtype; elsewhere None, or a tensor of the
            same dtype
                and shape to receive into. None makes a new torch tensor.
            src: the sending rank, 1 by default.
            timeout: seconds for the whole call; the step then fails on every rank.

        Raises:
            As `all_reduce`.
        """
        if not 1 <= src <= self.peer_count:
            raise InvalidArgument(f"src = {src} is out of range: 1 to {self.peer_count}")
        self._require_job()
        sending = src == self.rank
        if tensor is None:
            if sending:
                raise InvalidArgument(f"rank {src} sends this broadcast and must pass a tensor")
            return self._receive_new(src, timeout)
        spec = describe(tensor, written=not sending)
        if sending:
            source, _ = as_bytes(tensor)
            self._run(ReduceOp.BROADCAST, spec, source, None, timeout, root=src - 1)
        else:
            self._into(tensor, ReduceOp.BROADCAST, spec, timeout, root=src - 1)
        return tensor

    def _into(
        self,
        tensor: Tensor,
        op: ReduceOp,
        spec: TensorSpec,
        timeout: float | None,
        *,
        contribute: bool = False,
        root: int = 0,
    ) -> None:
        """Runs a collective whose result replaces the tensor, which is its contribution as well.

        The result comes into the tensor's own memory while the rest is still on its way; what it
        overwrites is kept until the step is over.
        """
        memory, own = as_bytes(tensor)

        def allocate(nbytes: int) -> Target:
            # Also what goes into a copy is kept: the step's samples are of the input.
            return Target(memory, self._undo_buffer(nbytes) if own or contribute else None)

        self._run(op, spec, memory if contribute else None, allocate, timeout, root=root)
        if own:
            mark_written(tensor)
        else:
            assign(tensor, memory)

    def _receive_new(self, src: int, timeout: float | None) -> Any:
        received = np.empty(0, dtype=np.uint8)

        def allocate(nbytes: int) -> Target:
            nonlocal received
            received = np.empty(nbytes, dtype=np.uint8)
            return Target(received.data)

        step = self._run(ReduceOp.BROADCAST, None, None, allocate, timeout, root=src - 1)
        assert step.tensor is not None
        return new_tensor(step.tensor, received)

    def _undo_buffer(self, nbytes: int) -> memoryview:
        """One buffer for all steps: fresh memory costs a page fault for every 4 KiB."""
        if len(self._undo) < nbytes:
            self._undo = np.empty(nbytes, dtype=np.uint8)
        return self._undo[:nbytes].data

    def _run(
        self,
        op: ReduceOp,
        spec: TensorSpec | None,
        source: memoryview | None,
        allocate: Any,
        timeout: float | None,
        root: int = 0,
    ) -> Step:
        job, loop = self._require_job()
        if spec is not None and spec.nbytes > self.bandwidth:
            raise TensorTooLarge(spec.nbytes, self.bandwidth)
        if timeout is not None and timeout <= 0:
            raise InvalidArgument(f"timeout = {timeout}: a positive number of seconds, or None")
        if not self._busy.acquire(blocking=False):
            raise JobClosed("another thread is in a collective of this Peer: they go one at a time")
        try:
            return loop.call(
                job.collective(
                    op,
                    root=root,
                    tensor=spec,
                    source=source,
                    allocate=allocate,
                    enter_timeout_s=self._enter_timeout,
                    timeout_s=timeout,
                ),
                on_interrupt=lambda: job.abort("interrupted (Ctrl+C)"),
            )
        except concurrent.futures.CancelledError:
            raise JobClosed("the process group was destroyed during this collective") from None
        finally:
            self._busy.release()


def _hotkey(wallet: Any) -> Any:
    """The Keypair that signs, from whatever the caller has."""
    if isinstance(wallet, str):
        name, _, hotkey = wallet.partition("/")
        return load_wallet(name, hotkey or "default").hotkey
    if hasattr(wallet, "hotkey"):
        if hasattr(wallet, "hotkey_str"):
            return load_wallet(wallet.name, wallet.hotkey_str, wallet.path).hotkey
        return wallet.hotkey
    if hasattr(wallet, "sign") and hasattr(wallet, "ss58_address"):
        return wallet
    raise WalletError(
        f"a bittensor Wallet, its name or a Keypair is needed, not {type(wallet).__name__}"
    )
