"""The operations of the SDK's `Substrate` that a chain in a file does not offer. Knows only that.

Each refuses by name, so that whoever needs one learns to use a node.
"""

from __future__ import annotations

from typing import Any, NoReturn


class Unserved:
    """Base of the embedded chain: no SCALE, no signing in another process, no multisig."""

    async def estimate_weight(self, call: Any, keypair: Any) -> dict[str, Any]:
        """Not served."""
        _refuse("estimate_weight")

    async def decode_scale(self, type_string: str, data: Any) -> Any:
        """Not served."""
        _refuse("decode_scale")

    async def prepare(self, call: Any, *, address: str, **options: Any) -> Any:
        """Not served."""
        _refuse("prepare")

    async def submit_signature(self, unsigned: Any, signature: Any, **options: Any) -> Any:
        """Not served."""
        _refuse("submit_signature")

    def multisig_account(self, signatories: list[str], threshold: int) -> Any:
        """Not served."""
        _refuse("multisig_account")

    async def submit_multisig(
        self, call: Any, keypair: Any, multisig_account: Any, **options: Any
    ) -> Any:
        """Not served."""
        _refuse("submit_multisig")


def _refuse(operation: str) -> NoReturn:
    raise NotImplementedError(
        f"the embedded chain does not serve {operation}; use a node (--subtensor.network local)"
    )
