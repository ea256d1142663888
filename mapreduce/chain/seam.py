"""Where the SDK's exceptions become this project's. Knows both kinds, and nothing of the work."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import bittensor as bt

from mapreduce.chain import open_chain
from mapreduce.errors import ChainUnavailable, Refused

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator


@contextlib.asynccontextmanager
async def connected(network: str, endpoint: str | None = None) -> AsyncIterator[bt.Client]:
    """A connected client of the chain, closed at the end; see `open_chain` for the names.

    Raises:
        ConfigError: an unknown name.
        ChainUnavailable: no answer.
    """
    client = open_chain(network, endpoint=endpoint)
    with reading(client, "connecting"):
        await client.connect()
    try:
        yield client
    finally:
        await client.close()


@contextlib.contextmanager
def reading(client: bt.Client, what: str) -> Iterator[None]:
    """Around reads: whatever the chain does not answer is `ChainUnavailable`, naming `what`."""
    try:
        yield
    except (bt.BittensorError, OSError, TimeoutError) as error:
        raise _unavailable(client, what, error) from error


@contextlib.contextmanager
def writing(client: bt.Client, what: str) -> Iterator[None]:
    """Around writes: also the chain's refusals, as `Refused` with the chain's own code.

    The SDK reports some of them by raising before it submits, others in the result; this is for the
    former, `require_success` for the latter.
    """
    try:
        yield
    except bt.ChainError as error:
        raise _refused(what, error) from error
    except bt.PolicyError as error:
        raise Refused(f"{what}: {error}", code=error.code.value) from error
    except (bt.BittensorError, OSError, TimeoutError) as error:
        raise _unavailable(client, what, error) from error


def require_success(result: bt.ExtrinsicResult, what: str) -> bt.ExtrinsicResult:
    """The result, if the chain carried it out.

    Raises:
        Refused: it did not; the message says why and what helps.
    """
    if result.success:
        return result
    raise _refused(
        what, result.error or bt.ChainError(result.message or "the chain gave no reason")
    )


def _refused(what: str, error: bt.ChainError) -> Refused:
    name = f" ({error.name})" if error.name else ""
    reason = error.message.rstrip(".")
    return Refused(
        f"{what}: the chain refused: {reason}{name}; {error.remediation}", code=error.code.value
    )


def _unavailable(client: bt.Client, what: str, error: Exception) -> ChainUnavailable:
    reason = str(error) or type(error).__name__
    return ChainUnavailable(f"{what}: no answer from the chain at {client.endpoint}: {reason}")
