"""The embedded chain as the SDK's `Substrate`: the seam at which a file takes the place of a node.

Knows the SDK's protocol; knows nothing of the rules (`runtime`), of the records (`views`) or of the
file and its clock (`connection`). Above it runs the real `bittensor.Client`.

It differs from a real chain. It needs one machine and a local disk; inclusion is immediate and
final; state of past blocks is not kept, so a read pinned to a block sees the head. Accounts it has
never seen hold test TAO, calls are free, one alpha always costs one TAO, a registration always the
same. An epoch writes down what each neuron earns, but no stake grows; dividends come without the
moving average of bonds (`consensus`). A subnet has one mechanism. Weights that are committed are
never revealed, since that takes drand (`runtime_weights`), and timelocked commitments are refused.
Unless it is strict, 127.0.0.1 can be served, nothing is limited in rate, permits follow stake at
once, and weights take no stake beyond a permit.
"""

from __future__ import annotations

import asyncio
import time
import weakref
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import bittensor as bt
from bittensor._generated.errors import ERRORS
from bittensor.error_map import DISPATCH_ERRORS

from mapreduce.chain import executive, runtime, views
from mapreduce.chain import extrinsic as codec
from mapreduce.chain.connection import Connection
from mapreduce.chain.genesis import EXISTENTIAL_DEPOSIT_RAO, new_genesis, write_genesis
from mapreduce.chain.ledger import open_ledger
from mapreduce.chain.unserved import Unserved
from mapreduce.errors import ChainUnavailable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping

    from mapreduce.chain.state import State

EMBEDDED_URL: Final = "ws://embedded"
"""The endpoint that the SDK is told: no host, but a label of its own for the SDK's caches."""
SPEC_VERSION: Final = 425
"""The subtensor runtime whose rules and records this chain follows."""

# A machine that slept for hours wakes up to the newest headers, as after a lost subscription.
_CATCH_UP_BLOCKS: Final = 16
# Each retry means that another extrinsic of the account has gone through.
_STALE_RETRIES: Final = 1000
# The SDK encrypts to any key of this length, and nobody has to decrypt (see `submit`).
_MLKEM_KEY: Final = bytes(1184)
_MESSAGES: Final = {info.name: info.docs for info in ERRORS.values()}


def create_chain(
    path: Path | str,
    *,
    block_time_s: float = 0.25,
    strict: bool = False,
    tempo: int = 360,
    max_uids: int = 256,
    hyperparameters: Mapping[str, int | bool] = MappingProxyType({}),
    clock: Callable[[], float] = time.time,
) -> None:
    """Create a chain; `connect` makes one with these defaults where the file is missing.

    Args:
        path: the file to create.
        block_time_s: seconds from block to block.
        strict: the real chain's refusals and delays: 127.0.0.1 and ::1 cannot be served, 50 blocks
            between servings, 100 between settings of weights (from registration on), permits at
            epochs only and for 1 TAO of stake or more.
        tempo: blocks from epoch to epoch.
        max_uids: neurons of a subnet, beyond which a newcomer takes another's place.
        hyperparameters: others by their names in `client.read("subnet_hyperparameters")`.
        clock: Unix time in seconds.

    Raises:
        ConfigError: the file exists, cannot be written, or a parameter is out of range.
    """
    genesis = new_genesis(
        now_s=clock(),
        block_time_s=block_time_s,
        strict=strict,
        max_uids=max_uids,
        hyperparameters={"tempo": tempo, **hyperparameters},
    )
    open_ledger(
        Path(path).expanduser(), lambda ledger: write_genesis(ledger, genesis), must_be_new=True
    ).close()


class EmbeddedSubstrate(Unserved):
    """One connection to an embedded chain; give it to `bittensor.Client(EMBEDDED_URL,
    substrate=...)`.

    Reads raise `bittensor.ChainError` where a node would, and `ChainUnavailable` when the file
    fails.
    """

    def __init__(self, path: Path | str, *, clock: Callable[[], float] = time.time) -> None:
        self.path = Path(path).expanduser()
        self.token_symbols: dict[int, str] = {}
        self._clock = clock
        self._connection: Connection | None = None
        self._file: tuple[int, int] | None = None
        # The signed extrinsic inside the ciphertext that the same task submits next.
        self._sealed: weakref.WeakKeyDictionary[asyncio.Task[Any], bytes] = (
            weakref.WeakKeyDictionary()
        )

    # Lifecycle -----------------------------------------------------------------------------------

    async def connect(self) -> None:
        """Open the file, creating a chain with the default parameters where there is none, but for
        a second time only the same file.

        Raises:
            ConfigError: the file cannot be opened or is no chain of this version.
            ChainUnavailable: it was removed or replaced since it was opened first.
        """
        if self._connection is None:
            self._connection = Connection(self.path, self._clock, before=self._file)
            self._file = self._connection.file

    async def close(self) -> None:
        """Close the file."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    # Time ----------------------------------------------------------------------------------------

    async def block_number(self) -> int:
        """The newest block."""
        return self._open.head()

    async def finalized_block_number(self) -> int:
        """The newest block: what is included here is final."""
        return self._open.head()

    async def block_hash(self, block: int | None = None) -> str:
        """A block's hash; the newest one's by default."""
        number = self._open.head() if block is None else block
        if not 0 <= number <= self._open.head():
            raise bt.ChainError(f"block {number} does not exist; the newest is {self._open.head()}")
        return self._hash(number)

    async def block_time(self) -> float:
        """Seconds from block to block."""
        return self._open.genesis.block_time_s

    async def spec_version(self) -> int:
        """The version of the runtime whose rules apply."""
        return SPEC_VERSION

    async def get_block(
        self, block_number: int | None = None, block_hash: str | None = None
    ) -> dict[str, Any] | None:
        """Header and extrinsics (of the last `BLOCKS_KEPT` blocks); None for a block to come."""
        head = self._open.head()
        number = head if block_number is None else block_number
        if block_hash is not None:
            number = self._number(block_hash)
        if not 1 <= number <= head:
            return None
        now = {"name": "now", "value": self._timestamp_ms(number)}
        inherent = {"call_module": "Timestamp", "call_function": "set", "call_args": [now]}
        extrinsics: list[dict[str, Any]] = [{"call": inherent}]
        for _, digest, record in self._open.ledger.included(number):
            call = {key: record[key] for key in ("call_module", "call_function", "call_args")}
            extrinsics.append(
                {
                    "extrinsic_hash": digest,
                    "address": record["signer"],
                    "nonce": record["nonce"],
                    "call": call,
                }
            )
        return {"header": self._header(number), "extrinsics": extrinsics}

    async def blocks(self, *, finalized: bool = False) -> AsyncIterator[dict[str, Any]]:
        """The newest header, then each further one as its time comes."""
        seen = self._open.head() - 1
        while True:
            head = self._open.head()
            for number in range(max(seen + 1, head - _CATCH_UP_BLOCKS), head + 1):
                yield {"header": self._header(number)}
            seen = max(seen, head)
            wait_s = self._open.seconds_until(seen + 1)
            await asyncio.sleep(min(max(wait_s, 0.001), self._open.genesis.block_time_s))

    # Reads ---------------------------------------------------------------------------------------

    async def query(
        self,
        module: str,
        storage_function: str,
        params: list[Any] | None = None,
        block_hash: str | None = None,
    ) -> Any:
        """One storage item at the head; None where the chain has no such entry."""
        block = await self._settled(block_hash)
        return self._item(module, storage_function, params or [], block)

    async def query_batch(
        self,
        module: str,
        storage_function: str,
        param_sets: list[list[Any]],
        block_hash: str | None = None,
    ) -> list[Any]:
        """One storage item for many keys, in their order."""
        block = await self._settled(block_hash)
        with self._open.ledger.snapshot():
            return [self._item(module, storage_function, params, block) for params in param_sets]

    async def query_map(
        self,
        module: str,
        storage_function: str,
        params: list[Any] | None = None,
        block_hash: str | None = None,
    ) -> list[tuple[Any, Any]]:
        """A storage map, or what is under a prefix of its keys, as (key, value)."""
        await self._settled(block_hash)
        entries = self._open.ledger.scan(module, storage_function, params or [])
        return [(keys[0] if len(keys) == 1 else keys, value) for keys, value in entries]

    async def map_has_entries(
        self, module: str, storage_function: str, params: list[Any], block_hash: str | None = None
    ) -> bool:
        """Whether a storage map has anything under a prefix of its keys."""
        return bool(await self.query_map(module, storage_function, params, block_hash))

    async def runtime_call(
        self,
        api: str,
        method: str,
        params: list[Any] | dict[str, Any],
        block_hash: str | None = None,
    ) -> Any:
        """A runtime API of the node; see `views` for those that there are."""
        if not views.serves(api, method):
            raise bt.ChainError(f"the embedded chain does not serve the runtime API {api}.{method}")
        block = await self._settled(block_hash)
        with self._open.ledger.snapshot():
            return views.call(views.View(self._open.state, block), api, method, params)

    async def constant(self, module: str, name: str) -> Any:
        """A constant of the runtime."""
        constants = {
            ("Aura", "SlotDuration"): round(self._open.genesis.block_time_s * 1000),
            ("Balances", "ExistentialDeposit"): EXISTENTIAL_DEPOSIT_RAO,
            ("SubtensorModule", "InitialStartCallDelay"): 0,
        }
        if (module, name) not in constants:
            raise bt.ChainError(f"the embedded chain does not serve the constant {module}.{name}")
        return constants[module, name]

    async def events(self, block_hash: str | None = None) -> list[dict[str, Any]]:
        """The events of a block, the newest by default."""
        number = self._open.head() if block_hash is None else self._number(block_hash)
        return [
            event
            for position, _, record in self._open.ledger.included(number)
            for event in executive.event_records(position, record["events"])
        ]

    def balance(self, rao: int, netuid: int = 0) -> bt.Balance:
        """An amount with its subnet's symbol."""
        symbol = self.token_symbols.get(netuid) if netuid else None
        return bt.Balance(int(rao), netuid, symbol)

    # Calls ---------------------------------------------------------------------------------------

    async def compose(self, call: Any) -> codec.Call:
        """A call of `bittensor.calls`, checked and encoded."""
        module, function, params = call
        try:
            return codec.Call(module, function, runtime.check_call(module, function, params))
        except runtime.UnknownCall as error:
            raise bt.ChainError(str(error), code=bt.ErrorCode.INVALID_ARGUMENT) from error

    async def estimate_fee(self, call: Any, keypair: Any) -> bt.Balance:
        """Nothing: calls are free here."""
        return bt.Balance(0)

    async def account_next_index(self, address: str) -> int:
        """The nonce that the account's next extrinsic must carry."""
        return self._open.state.nonce(address)

    async def mev_next_key(self) -> bytes | None:
        """The key to which the SDK encrypts what it shields."""
        return _MLKEM_KEY

    # Writes --------------------------------------------------------------------------------------

    async def sign_extrinsic(
        self, call: Any, keypair: Any, *, nonce: int, period: int
    ) -> tuple[bytes, str]:
        """Sign without submitting: (bytes, hash). The SDK asks for it only to encrypt them."""
        data = (await self._sign(call, keypair, nonce, period)).encode()
        task = asyncio.current_task()
        if task is not None:
            self._sealed[task] = data
        return data, codec.extrinsic_hash(data)

    async def submit(
        self,
        call: Any,
        keypair: Any,
        *,
        nonce: int | None = None,
        period: int | None = 128,
        wait_for_inclusion: bool = True,
        wait_for_finalization: bool = True,
    ) -> bt.ExtrinsicResult:
        """Sign and include a call, at once, whatever there is to wait for. Without an explicit
        nonce, one lost to another process is taken anew.

        The carrier of a shielded call brings the extrinsic inside it into the same block. A block's
        author would decrypt the carrier; here the process that encrypted it still has the plain
        bytes, and they are verified like any other extrinsic.
        """
        task = asyncio.current_task()
        sealed = self._sealed.pop(task, None) if task is not None else None
        is_carrier = (call.module, call.function) == ("MevShield", "submit_encrypted")
        for _ in range(_STALE_RETRIES):
            next_nonce = self._open.state.nonce(keypair.ss58_address) if nonce is None else nonce
            signed = await self._sign(call, keypair, next_nonce, period)
            result = await self._include(signed.encode(), sealed if is_carrier else None)
            if nonce is not None or result.error is None or result.error.name != "Stale":
                break
        return result

    async def submit_signed(
        self,
        extrinsic: Any,
        keypair: Any,
        *,
        wait_for_inclusion: bool = True,
        wait_for_finalization: bool = True,
    ) -> bt.ExtrinsicResult:
        """Include an extrinsic signed elsewhere: its bytes, or an object with them in `data`."""
        return await self._include(bytes(getattr(extrinsic, "data", extrinsic)), None)

    async def find_extrinsic(
        self, extrinsic_hash: str, block_hash: str
    ) -> bt.ExtrinsicResult | None:
        """How an included extrinsic ended; None if the block does not hold it."""
        found = executive.find(self._open.state, extrinsic_hash, self._number(block_hash))
        return None if found is None else self._result(found)

    # ---------------------------------------------------------------------------------------------

    @property
    def _open(self) -> Connection:
        if self._connection is None:
            raise bt.ConnectionNotReady(
                f"the embedded chain {self.path} is not open; use `async with` or `await connect()`"
            )
        return self._connection

    async def _settled(self, block_hash: str | None) -> int:
        """The block that a read is for."""
        head = await self._open.settle()
        return head if block_hash is None else self._number(block_hash)

    def _hash(self, block: int) -> str:
        return f"0x{block:064x}" if block else self._open.genesis.hash

    def _number(self, block_hash: str) -> int:
        if block_hash == self._open.genesis.hash:
            return 0
        try:
            number = int(block_hash, 16)
        except ValueError:
            number = -1
        if not 0 < number <= self._open.head():
            raise bt.ChainError(f"no block has the hash {block_hash}")
        return number

    def _header(self, block: int) -> dict[str, Any]:
        parent = self._hash(block - 1)
        return {"number": block, "hash": self._hash(block), "parentHash": parent}

    def _timestamp_ms(self, block: int) -> int:
        return int(self._open.block_time_unix_s(block) * 1000)

    def _item(self, module: str, item: str, keys: list[Any], block: int) -> Any:
        state = self._open.state
        match module, item:
            case "Timestamp", "Now":
                return self._timestamp_ms(block)
            case "System", "Number":
                return block
            case "System", "Account":
                return state.account(*keys)
            case "SubtensorModule", "BlocksSinceLastStep":
                last = state.get("LastEpochBlock", *keys)
                return None if last is None else block - int(last)
            case "MevShield", "NextKey":
                return _MLKEM_KEY
            case _:
                return state.ledger.get(module, item, keys)

    async def _sign(
        self, call: codec.Call, keypair: Any, nonce: int, period: int | None
    ) -> codec.Extrinsic:
        return await codec.sign(
            call,
            keypair,
            nonce=nonce,
            birth=self._open.head(),
            period=period,
            genesis_hash=self._open.genesis.hash,
        )

    async def _include(self, data: bytes, sealed: bytes | None) -> bt.ExtrinsicResult:
        def apply(state: State, block: int) -> executive.Included:
            included = executive.include(state, data, block)
            if sealed is not None and included.error is None:
                try:
                    executive.include(state, sealed, block)
                except executive.InvalidTransaction as error:
                    # As on a real chain: the carrier stays, what was inside never appears, and the
                    # SDK reports that once its era is over.
                    included.events.extend(
                        executive.event_records(
                            included.position,
                            [("MevShield", "DecryptedRejected", {"reason": error.name})],
                        )
                    )
            return included

        try:
            return self._result(await self._open.write(apply))
        except executive.InvalidTransaction as error:
            failure = bt.ChainError(str(error), error.name)
        except (
            ChainUnavailable
        ) as error:  # a full disk: nothing was written, the nonce is as before
            failure = bt.ChainError(str(error), code=bt.ErrorCode.INTERNAL)
        return bt.ExtrinsicResult(success=False, message=failure.message, error=failure)

    def _result(self, included: executive.Included) -> bt.ExtrinsicResult:
        name = included.error
        error = None if name is None else bt.ChainError(_message(name), name)
        return bt.ExtrinsicResult(
            success=error is None,
            message="Success" if error is None else error.message,
            block_hash=self._hash(included.block),
            extrinsic_id=f"{included.block}-{included.position:04d}",
            fee=bt.Balance(0),
            events=included.events,
            error=error,
        )


def _message(name: str) -> str:
    if name in DISPATCH_ERRORS:
        return DISPATCH_ERRORS[name][1]
    return _MESSAGES.get(name) or name
