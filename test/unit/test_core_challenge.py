"""Which blocks are audited: as many as the budget pays for, and nobody can tell which before."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest

from mapreduce.core.challenge import (
    DEFAULT_BUDGET,
    MAX_SAMPLES,
    NONCE_BYTES,
    affordable_samples,
    challenge_seed,
    choose_blocks,
    nonce_hash,
    sample_count,
)
from mapreduce.core.hash_tree import DIGEST_BYTES, block_count, path_bytes
from mapreduce.core.partition import BLOCK_BYTES

MIB = 1024 * 1024

# trust.md, section 3: the share of cheats found, by share of corrupted blocks and by samples
SAMPLES = (8, 16, 32, 64, 128, 256, 512)
DETECTION = {
    0.001: (0.008, 0.016, 0.032, 0.062, 0.120, 0.226, 0.401),
    0.01: (0.077, 0.149, 0.275, 0.474, 0.724, 0.924, 0.994),
    0.05: (0.337, 0.560, 0.806, 0.963, 0.999, 1, 1),
    0.1: (0.570, 0.815, 0.966, 0.999, 1, 1, 1),
    0.25: (0.900, 0.990, 1, 1, 1, 1, 1),
    0.5: (0.996, 1, 1, 1, 1, 1, 1),
}
BLOCKS = 16_000  # of a segment of 250 MiB; every share above is a whole number of them


def seed(number: int) -> bytes:
    return challenge_seed(number.to_bytes(DIGEST_BYTES, "little"), [])


def nonces(count: int) -> list[bytes]:
    return [bytes([rank]) * NONCE_BYTES for rank in range(count)]


# How many --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mebibytes", "samples", "overhead"),
    [(1, 1, 0.0089), (4, 4, 0.009), (16, 17, 0.0095), (64, 64, 0.0090), (256, 64, 0.0023)],
)
def test_the_counts_of_trust_md_for_eight_peers(
    mebibytes: int, samples: int, overhead: float
) -> None:
    nbytes = mebibytes * MIB
    assert sample_count(nbytes, 8, 8, DEFAULT_BUDGET) == samples
    share = opening_bytes(nbytes, 8, samples) / (2 * 8 * nbytes)
    assert share == pytest.approx(overhead, abs=1e-4)


def opening_bytes(nbytes: int, peers: int, samples: int) -> int:
    """The most that `samples` openings take: the first blocks have the longest paths."""
    return samples * (peers + 1) * (BLOCK_BYTES + path_bytes(nbytes, 0))


def audit_bytes(nbytes: int, peers: int, samples: int) -> int:
    """With what is signed (`test_audit` counts the real bytes)."""
    return opening_bytes(nbytes, peers, samples) + peers * (320 + 196 * peers)


@pytest.mark.parametrize("peers", range(2, 17))
def test_an_audit_keeps_to_one_percent_and_uses_it(peers: int) -> None:
    for nbytes in (4 * MIB, 4 * MIB + 1, 5 * MIB - 7, 16 * MIB, 33 * MIB, 64 * MIB, 1024 * MIB):
        samples = sample_count(nbytes, peers, peers, DEFAULT_BUDGET)
        budget = 0.01 * 2 * peers * nbytes
        assert audit_bytes(nbytes, peers, samples) <= budget
        chosen = choose_blocks(seed(peers), block_count(nbytes), samples)
        paths = sum(path_bytes(nbytes, block) for block in chosen)
        assert (peers + 1) * (len(chosen) * BLOCK_BYTES + paths) <= budget
        assert samples == MAX_SAMPLES or audit_bytes(nbytes, peers, samples + 1) > budget


def test_the_count_at_its_bounds() -> None:
    assert sample_count(0, 8, 8, DEFAULT_BUDGET) == 0
    assert sample_count(64 * MIB, 8, 8, 0) == 0
    assert sample_count(64 * MIB, 8, 8, -1) == 0
    assert sample_count(1, 8, 8, DEFAULT_BUDGET) == 1  # at least one, whatever it costs
    assert affordable_samples(1, 8, 8, DEFAULT_BUDGET) < 0.001
    assert sample_count(3 * BLOCK_BYTES - 1, 8, 8, 100.0) == 3  # no more than there are
    assert sample_count(1024 * MIB, 8, 8, 1.0) == MAX_SAMPLES == 64
    assert sample_count(16 * MIB, 8, 8, 2 * DEFAULT_BUDGET) == 35
    # A broadcast has one contributor: a sample is two blocks, and the traffic nine times.
    assert sample_count(4 * MIB, 1, 8, DEFAULT_BUDGET) == int(0.09 * 4 * MIB / (2 * (16384 + 256)))


# Which -----------------------------------------------------------------------------------------


def test_the_choice_is_part_of_the_protocol() -> None:
    """Pinned: every peer must come to the same blocks, whatever version it runs."""
    chosen = challenge_seed(bytes(32), nonces(3))
    assert chosen.hex() == "61512682e446077727629aed6c54c467aea9b26a871db1bcb0eb2ca3395733df"
    assert choose_blocks(chosen, 1000, 5) == (79, 118, 266, 568, 997)
    assert nonce_hash(bytes(NONCE_BYTES)).hex() == (
        "c50847c06f40059c00dde1ecb87846f3490ef4bcf7bd012d3a99949e4cffa3a5"
    )


def test_the_seed_binds_the_certificate_every_nonce_and_their_order() -> None:
    certificate = bytes(32)
    seeds = {challenge_seed(certificate, order) for order in itertools.permutations(nonces(4))}
    assert len(seeds) == 24
    seeds.add(challenge_seed(b"\x01" + bytes(31), nonces(4)))
    for rank, at in itertools.product(range(4), range(NONCE_BYTES)):
        changed = nonces(4)
        flipped = bytearray(changed[rank])
        flipped[at] ^= 0x80
        changed[rank] = bytes(flipped)
        seeds.add(challenge_seed(certificate, changed))
    assert len(seeds) == 24 + 1 + 4 * NONCE_BYTES
    assert challenge_seed(certificate, []) != nonce_hash(certificate)


@pytest.mark.parametrize("blocks", [0, 1, 2, 3, 17, 64, 65, 1000, 1 << 20])
def test_the_choice_is_distinct_ascending_in_range_and_repeatable(blocks: int) -> None:
    for number, count in itertools.product(range(20), (0, 1, 2, 16, 63, 64)):
        chosen = choose_blocks(seed(number), blocks, count)
        assert len(chosen) == min(count, blocks)
        assert list(chosen) == sorted(set(chosen))
        assert all(0 <= block < blocks for block in chosen)
        assert choose_blocks(seed(number), blocks, count) == chosen


def test_all_blocks_are_chosen_where_the_count_reaches_them() -> None:
    for blocks, more in itertools.product((0, 1, 5, 64), (0, 1, 1000)):
        assert choose_blocks(seed(1), blocks, blocks + more) == tuple(range(blocks))


def test_every_block_is_equally_likely() -> None:
    blocks, count, trials = 13, 4, 2000
    seen = Counter(block for n in range(trials) for block in choose_blocks(seed(n), blocks, count))
    expected = trials * count / blocks
    statistic = sum((seen[block] - expected) ** 2 for block in range(blocks)) / expected
    statistic *= (blocks - 1) / (blocks - count)  # the draws of one trial are distinct
    assert statistic < 32.9  # chi-square of 12 degrees of freedom, 99.9 %


def test_every_set_of_blocks_is_equally_likely() -> None:
    trials = 2000
    sets = list(itertools.combinations(range(5), 2))
    seen = Counter(choose_blocks(seed(n), 5, 2) for n in range(trials))
    expected = trials / len(sets)
    statistic = sum((seen[chosen] - expected) ** 2 for chosen in sets) / expected
    assert sum(seen[chosen] for chosen in sets) == trials
    assert statistic < 27.9  # chi-square of 9 degrees of freedom, 99.9 %


def test_remainders_favour_no_block() -> None:
    """Of 3/4 of the range, plain remainders would fall into the first third half of the time."""
    trials = 1000
    low = sum(choose_blocks(seed(n), 3 << 62, 1)[0] < 1 << 62 for n in range(trials))
    assert abs(low / trials - 1 / 3) < 4 * math.sqrt(2 / 9 / trials)


# What it finds (A5) ----------------------------------------------------------------------------


def exact_detection(corrupted: int, samples: int) -> float:
    return 1 - math.comb(BLOCKS - corrupted, samples) / math.comb(BLOCKS, samples)


def test_the_table_of_trust_md_is_right() -> None:
    """It is written for few samples of many blocks; of 16 000 it is a little off for 512."""
    for share, row in DETECTION.items():
        for samples, listed in zip(SAMPLES, row, strict=True):
            assert 1 - (1 - share) ** samples == pytest.approx(listed, abs=0.001)
            exact = exact_detection(round(share * BLOCKS), samples)
            assert exact == pytest.approx(listed, abs=0.0075)


def detected(trials: int) -> dict[tuple[float, int], float]:
    """The share of trials in which the shipped choice hits one of the first blocks."""
    found: Counter[tuple[float, int]] = Counter()
    for number, samples in itertools.product(range(trials), SAMPLES):
        lowest = choose_blocks(seed(number), BLOCKS, samples)[0]
        found.update((share, samples) for share in DETECTION if lowest < share * BLOCKS)
    return {cell: found[cell] / trials for cell in itertools.product(DETECTION, SAMPLES)}


def test_a_cheat_is_found_as_often_as_computed() -> None:
    trials = 1000
    for (share, samples), observed in detected(trials).items():
        exact = exact_detection(round(share * BLOCKS), samples)
        error = math.sqrt(exact * (1 - exact) / trials)
        assert abs(observed - exact) <= 4 * error + 1 / trials, (share, samples)


@pytest.mark.slow
def test_a_cheat_is_found_as_often_as_the_table_says() -> None:
    for (share, samples), observed in detected(10_000).items():
        listed = DETECTION[share][SAMPLES.index(samples)]
        assert abs(observed - listed) <= 0.02, (share, samples)
