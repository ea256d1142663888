"""The chain's state as accounts, stake and neurons. Knows how they are laid out in the ledger;
knows nothing of extrinsics, of who may change what, or of the shape in which the SDK reads them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

from mapreduce.chain.genesis import (
    EXISTENTIAL_DEPOSIT_RAO,
    FREE_RAO,
    OWN_PALLET,
    ROOT_NETUID,
    TAO_WEIGHT,
)

if TYPE_CHECKING:
    from mapreduce.chain.genesis import Genesis
    from mapreduce.chain.ledger import Key, Ledger

# One value per uid, in one list per subnet, and what a new neuron starts with.
_COLUMNS: Final = {
    "Active": True,
    "ValidatorPermit": False,
    "LastUpdate": 0,
    "Emission": 0,
    "Consensus": 0,
    "Incentive": 0,
    "Dividends": 0,
}


class Stake(NamedTuple):
    """A hotkey's stake on one subnet in rao; `total` counts TAO on root by its weight."""

    alpha: int
    tao: int
    total: int


class State:
    """Typed access to a ledger. Reads see what the running transaction, if any, has written."""

    def __init__(self, ledger: Ledger, genesis: Genesis) -> None:
        self.ledger = ledger
        self.genesis = genesis

    def get(self, item: str, *keys: Key) -> Any:
        """An entry of the pallet SubtensorModule."""
        return self.ledger.get("SubtensorModule", item, keys)

    def put(self, item: str, *keys: Key, value: Any) -> None:
        """Set an entry of the pallet SubtensorModule."""
        self.ledger.put("SubtensorModule", item, keys, value)

    # Accounts ------------------------------------------------------------------------------------

    def account(self, address: str) -> dict[str, Any]:
        """`System.Account`, also for an address that was never used."""
        known = self.ledger.get("System", "Account", [address])
        if known is not None:
            return dict(known)
        return {
            "nonce": 0,
            "consumers": 0,
            "providers": 1,
            "sufficients": 0,
            "data": {"free": FREE_RAO, "reserved": 0, "frozen": 0, "flags": 0},
        }

    def nonce(self, address: str) -> int:
        """The nonce that the account's next extrinsic must carry."""
        return int(self.account(address)["nonce"])

    def use_nonce(self, address: str) -> None:
        """Count one extrinsic of the account."""
        account = self.account(address)
        account["nonce"] += 1
        self.ledger.put("System", "Account", [address], account)

    def can_spend(self, address: str, rao: int) -> bool:
        """Whether that much can be taken without ending the account."""
        return bool(self.account(address)["data"]["free"] >= rao + EXISTENTIAL_DEPOSIT_RAO)

    def credit(self, address: str, rao: int) -> None:
        """Add to the free balance; a negative amount takes away (ask `can_spend` first)."""
        account = self.account(address)
        account["data"]["free"] += rao
        self.ledger.put("System", "Account", [address], account)

    # Stake ---------------------------------------------------------------------------------------

    def position(self, coldkey: str, hotkey: str, netuid: int) -> int:
        """What one coldkey has staked on a hotkey, rao."""
        return int(self.ledger.get(OWN_PALLET, "Stake", [coldkey, hotkey, netuid]) or 0)

    def move_stake(self, coldkey: str, hotkey: str, netuid: int, rao: int) -> None:
        """Add to a position; a negative amount takes away (look at `position` first)."""
        left = self.position(coldkey, hotkey, netuid) + rao
        if left:
            self.ledger.put(OWN_PALLET, "Stake", [coldkey, hotkey, netuid], left)
        else:
            self.ledger.delete(OWN_PALLET, "Stake", [coldkey, hotkey, netuid])
        total = int(self.get("TotalHotkeyAlpha", hotkey, netuid) or 0) + rao
        self.put("TotalHotkeyAlpha", hotkey, netuid, value=total)

    def stakes(self, netuid: int, hotkeys: list[str]) -> list[Stake]:
        """What all coldkeys together have staked on each hotkey."""
        # One scan of all stake is far cheaper than two lookups for each of 256 hotkeys.
        totals = dict(self.ledger.scan("SubtensorModule", "TotalHotkeyAlpha"))
        stakes = []
        for hotkey in hotkeys:
            alpha = int(totals.get((hotkey, netuid), 0)) if netuid != ROOT_NETUID else 0
            tao = int(totals.get((hotkey, ROOT_NETUID), 0))
            weight = 1.0 if netuid == ROOT_NETUID else TAO_WEIGHT
            stakes.append(Stake(alpha, tao, alpha + int(tao * weight)))
        return stakes

    def stake_threshold(self) -> int:
        """What a hotkey must have staked to set weights, rao; only a strict chain asks for any."""
        return int(self.get("StakeThreshold") or 0)

    def owners(self) -> dict[str, str]:
        """The coldkey of every hotkey that was ever registered."""
        entries = self.ledger.scan("SubtensorModule", "Owner")
        return {str(key[0]): str(coldkey) for key, coldkey in entries}

    # Subnets and neurons -------------------------------------------------------------------------

    def subnet_exists(self, netuid: int) -> bool:
        """Whether the netuid is taken by a subnet."""
        return bool(self.get("NetworksAdded", netuid))

    def netuids(self) -> list[int]:
        """Every subnet, in order."""
        return [int(key[0]) for key, _ in self.ledger.scan("SubtensorModule", "NetworksAdded")]

    def uid(self, netuid: int, hotkey: str) -> int | None:
        """The hotkey's uid, None if it is not registered there."""
        found = self.get("Uids", netuid, hotkey)
        return None if found is None else int(found)

    def owner_uid(self, netuid: int) -> int | None:
        """The uid of the hotkey that owns the subnet, None if it is not registered there."""
        owner = self.get("SubnetOwnerHotkey", netuid)
        return None if owner is None else self.uid(netuid, owner)

    def neurons(self, netuid: int) -> list[tuple[int, str]]:
        """(uid, hotkey) in order of uid."""
        entries = self.ledger.scan("SubtensorModule", "Keys", [netuid])
        return [(int(key[0]), str(hotkey)) for key, hotkey in entries]

    def column(self, item: str, netuid: int) -> list[Any]:
        """One value per uid."""
        return list(self.get(item, netuid) or [])

    def set_cell(self, item: str, netuid: int, uid: int, value: Any) -> None:
        """Change one uid's value in a column."""
        column = self.column(item, netuid)
        column[uid] = value
        self.put(item, netuid, value=column)

    def adopt(self, hotkey: str, coldkey: str) -> None:
        """Record who owns a hotkey that nobody owns yet."""
        self.put("Owner", hotkey, value=coldkey)
        owned = list(self.get("OwnedHotkeys", coldkey) or [])
        self.put("OwnedHotkeys", coldkey, value=[*owned, hotkey])

    def place_neuron(self, netuid: int, uid: int, hotkey: str, block: int) -> None:
        """Give a uid to a hotkey: the next free one, or one whose neuron makes way."""
        previous = self.get("Keys", netuid, uid)
        if previous is not None:
            for item in ("Uids", "Axons", "NeuronCertificates"):
                self.ledger.delete("SubtensorModule", item, [netuid, previous])
            self.ledger.delete("SubtensorModule", "IsNetworkMember", [previous, netuid])
            self._forget_weights(netuid, uid)
        self.put("Keys", netuid, uid, value=hotkey)
        self.put("Uids", netuid, hotkey, value=uid)
        self.put("IsNetworkMember", hotkey, netuid, value=True)
        self.put("BlockAtRegistration", netuid, uid, value=block)
        for item, initial in _COLUMNS.items():
            column = self.column(item, netuid)
            if uid == len(column):
                column.append(initial)
            else:
                column[uid] = initial
            self.put(item, netuid, value=column)
        if self.genesis.strict:
            # As on the real chain: a new validator must sit out one weights_rate_limit.
            self.set_cell("LastUpdate", netuid, uid, block)
        if previous is None:
            self.put("SubnetworkN", netuid, value=uid + 1)

    def _forget_weights(self, netuid: int, uid: int) -> None:
        """Drop the weights that a uid's neuron has set, and those set for it."""
        self.ledger.delete("SubtensorModule", "Weights", [netuid, uid])
        for keys, row in self.ledger.scan("SubtensorModule", "Weights", [netuid]):
            kept = [[dest, 0 if dest == uid else weight] for dest, weight in row]
            if kept != row:
                self.put("Weights", netuid, *keys, value=kept)
