"""Miners that share a network or an owner are one cluster, and share its goodput."""

from __future__ import annotations

import itertools

import pytest

from mapreduce.core.clusters import clusters


def together(*ips: str | None) -> bool:
    """Whether miners of different coldkeys at these addresses are all one cluster."""
    found = clusters((f"h{n}", f"c{n}", ip) for n, ip in enumerate(ips))
    return len(set(found.values())) == 1


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("8.8.8.8", "8.8.8.8", True),
        ("8.8.8.8", "8.8.8.200", True),
        ("8.8.8.8", "8.8.9.8", False),
        ("10.0.0.1", "10.0.0.2", True),
        ("2001:db8:1:2::1", "2001:db8:1:2::9", True),
        ("2001:db8:1:2::1", "2001:db8:1:ffff::1", True),
        ("2001:db8:1::1", "2001:db8:2::1", False),
        ("::ffff:8.8.8.8", "8.8.8.9", True),
        ("::ffff:8.8.8.8", "::ffff:8.8.9.8", False),
        ("8.8.8.8", "808:808::", False),  # the same leading bits
    ],
)
def test_which_addresses_are_one_network(one: str, other: str, same: bool) -> None:
    assert together(one, other) is same


@pytest.mark.parametrize(
    "ip", ["127.0.0.1", "127.0.0.2", "::1", "::ffff:127.0.0.1", "0.0.0.0", None]
)
def test_addresses_that_name_no_place_make_no_cluster(ip: str | None) -> None:
    assert not together(ip, ip)


def test_one_coldkey_is_one_cluster_wherever_its_miners_are() -> None:
    found = clusters([("a", "c", "8.8.8.8"), ("b", "c", "9.9.9.9"), ("d", "e", None)])
    assert found == {"a": "a", "b": "a", "d": "d"}


def test_clusters_join_through_a_third_in_any_order() -> None:
    neurons = [
        ("d", "c1", "8.8.8.8"),
        ("b", "c2", "9.9.9.9"),
        ("c", "c1", "9.9.9.1"),
        ("a", "c4", "9.9.9.2"),
        ("e", "c5", "7.7.7.7"),
    ]
    for order in itertools.permutations(neurons):
        assert clusters(order) == {"a": "a", "b": "a", "c": "a", "d": "a", "e": "e"}
