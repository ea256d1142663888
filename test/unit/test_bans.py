"""Who is banned along with a proven liar."""

from __future__ import annotations

from mapreduce.services.auditor import spread
from mapreduce.store.records import Known

PROVEN = {"liar": "proof"}


def known(hotkey: str, coldkey: str, ip: str | None) -> Known:
    return Known(hotkey=hotkey, uid=1, coldkey=coldkey, ip=ip, last_seen=0.0)


def test_a_hotkey_of_the_same_coldkey_is_banned_with_the_same_proof() -> None:
    others = [known("liar", "cold", None), known("sister", "cold", None)]
    assert spread(PROVEN, {"liar": None}, others) == {"liar": "proof", "sister": "proof"}


def test_a_hotkey_at_the_address_where_the_liar_served_is_banned() -> None:
    others = [known("liar", "cold", "8.8.4.4"), known("guest", "warm", "8.8.8.8")]
    assert spread(PROVEN, {"liar": "8.8.8.8"}, others) == {"liar": "proof", "guest": "proof"}


def test_the_address_that_a_liar_publishes_afterwards_takes_nobody_down() -> None:
    others = [known("liar", "cold", "8.8.4.4"), known("victim", "warm", "8.8.4.4")]
    assert spread(PROVEN, {"liar": "8.8.8.8"}, others) == PROVEN


def test_a_loopback_address_tells_nothing() -> None:
    for ip in ("127.0.0.1", "127.9.9.9", "::1"):
        assert spread(PROVEN, {"liar": ip}, [known("other", "warm", ip)]) == PROVEN


def test_miners_without_an_address_are_not_at_the_same_one() -> None:
    assert spread(PROVEN, {"liar": None}, [known("other", "warm", None)]) == PROVEN


def test_a_liar_that_is_no_longer_known_stays_banned() -> None:
    assert spread(PROVEN, {"liar": None}, []) == PROVEN


def test_a_miner_with_a_proof_of_its_own_keeps_that() -> None:
    proven = {"liar": "first", "sister": "second"}
    others = [known("liar", "cold", None), known("sister", "cold", None)]
    assert spread(proven, {"liar": None, "sister": None}, others) == proven
