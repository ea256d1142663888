"""The arithmetic and the arguments of the benchmarks: figures that are quoted must be right."""

from __future__ import annotations

import argparse
import sys

import pytest
import torch

from bench import floor, loopback, report, shaped, steps
from bench.contest import add_contest_flags, choose
from bench.lab import LOOPBACK, host_of
from bench.steps import Case


def test_importing_the_benchmarks_needs_no_matplotlib() -> None:
    assert report.__name__ in sys.modules
    assert "matplotlib" not in sys.modules


def test_a_step_takes_as_long_as_its_slowest_rank_and_the_warm_up_is_left_out() -> None:
    fast, slow = [9.0, *[1.0] * 10], [1.0, *(float(n) for n in range(1, 11))]
    summary = steps.summary([fast, slow], warm_up=1)
    assert summary.all_s == [9.0, *range(1, 11)]
    assert summary.median_s == 5.5
    assert summary.p95_s == 10.0  # the nearest rank: the 10th of 10
    assert summary.steps == 10
    assert steps.summary([[float(n) for n in range(1, 21)]], warm_up=0).p95_s == 19.0


def test_the_floor_is_the_peers_link_or_the_miners_links_together() -> None:
    assert floor.links_floor_s(1000, [100.0] * 4, [100.0] * 4) == 10.0
    assert floor.links_floor_s(1000, [100.0, 50.0], [100.0] * 4) == 20.0
    assert floor.links_floor_s(1300, [100.0] * 4, [100.0, 100.0, 100.0, 25.0]) == 16.0
    assert floor.equal_split_floor_s(1300, [100.0] * 4, [100.0, 100.0, 100.0, 25.0]) == 52.0
    assert floor.loopback_floor_s(1000, 4, 100.0) == 80.0


def test_a_block_in_the_wrong_place_is_noticed() -> None:
    tensor = torch.empty(300_000)
    steps.fill(tensor, 3)
    steps.check(tensor, 3)
    tensor[:8192], tensor[8192:16384] = tensor[8192:16384].clone(), tensor[:8192].clone()
    with pytest.raises(AssertionError, match="of 300000 elements are wrong"):
        steps.check(tensor, 3)


def test_what_every_rank_must_hold() -> None:
    assert steps.outcome(Case(peers=4, miners=4, nbytes=4)) == 1 + 2 + 3 + 4
    assert steps.outcome(Case(peers=4, miners=4, nbytes=4, broadcast=True)) == 1


def test_hosts_of_the_laboratory() -> None:
    host = host_of(7)
    assert (host.ip, host.interface) == ("10.90.7.1", "eth0")
    assert host.prefix == ("ip", "netns", "exec", "h7")
    assert (LOOPBACK.prefix, LOOPBACK.interface) == ((), "lo")


def chosen(monkeypatch: pytest.MonkeyPatch, *argv: str) -> dict[str, Case]:
    monkeypatch.setattr(sys, "argv", ["loopback", *argv])
    parser = argparse.ArgumentParser()
    add_contest_flags(parser, list(loopback.CASES))
    return choose(parser, loopback.CASES, loopback.OWN_FLAGS, loopback.own_case)[1]


def test_cases_by_name_and_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(monkeypatch) == loopback.CASES
    one = chosen(monkeypatch, "--case", "all-reduce-2", "--steps", "3", "--no-rivals")
    assert [(case.peers, case.steps, case.rivals) for case in one.values()] == [(2, 3, ())]
    own = chosen(monkeypatch, "--peers", "16", "--bytes", "1001", "--broadcast")
    assert own["own"] == Case(peers=16, miners=16, nbytes=1000, broadcast=True)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--peers", "1"], "--peers 1: 2 or more"),
        (["--steps", "0"], "--steps 0: 1 or more"),
        (["--case", "all-reduce-2", "--bytes", "8"], "one or the other"),
        (["--case", "unknown"], "invalid choice"),
    ],
)
def test_flags_that_make_no_sense_are_refused_by_name(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    argv: list[str],
    message: str,
) -> None:
    with pytest.raises(SystemExit):
        chosen(monkeypatch, *argv)
    assert message in capsys.readouterr().err


def test_one_rate_for_all_miners_or_one_for_each() -> None:
    flags = dict.fromkeys(shaped.OWN_FLAGS)
    scene = shaped.own_scene(argparse.Namespace(**flags | {"miner_rate": [100.0, 50.0]}))
    assert (scene.peers, scene.miners) == ((400.0,) * 4, (100.0, 50.0))
    with pytest.raises(ValueError, match="2 entries for 3 miners"):
        shaped.own_scene(argparse.Namespace(**flags | {"miner_rate": [1.0, 2.0], "miners": 3}))
