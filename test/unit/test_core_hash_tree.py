"""The hash tree: one root whatever the runs, every block opens to it, nothing else does."""

from __future__ import annotations

import functools
import random

import pytest
from blake3 import blake3
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mapreduce.core.hash_tree import (
    DIGEST_BYTES,
    BlockTree,
    RootHasher,
    block_bytes,
    block_count,
    path_bytes,
    root_from,
)
from mapreduce.core.partition import BLOCK_BYTES

MAX_BLOCKS = 70
BYTES = random.Random(1).randbytes(MAX_BLOCKS * BLOCK_BYTES)
TAILS = (1, 40, BLOCK_BYTES - 1, BLOCK_BYTES)


def tree_of(data: bytes) -> BlockTree:
    tree = BlockTree()
    tree.add(memoryview(data))
    return tree


def block_of(data: bytes, block: int) -> bytes:
    return data[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]


# The reference: what the module's docstring says, written down a second time.


def _hash(context: str, data: bytes) -> bytes:
    return blake3(data, derive_key_context=f"mapreduce 1 {context}").digest()


_leaf = functools.lru_cache(maxsize=None)(functools.partial(_hash, "leaf"))


def _top(nodes: list[bytes]) -> bytes:
    if len(nodes) < 2:
        return nodes[0] if nodes else bytes(32)
    pairs = [nodes[i : i + 2] for i in range(0, len(nodes), 2)]
    return _top([_hash("node", b"".join(pair)) if len(pair) == 2 else pair[0] for pair in pairs])


def reference_root(data: bytes) -> bytes:
    leaves = [_leaf(data[i : i + 16384]) for i in range(0, len(data), 16384)]
    return _hash("root", len(data).to_bytes(8, "little") + _top(leaves))


# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "root"),
    [
        (b"", "353f2a708609e6d38330dc0729c800d471bbcb1cb75267b9269bca056ea9cc20"),
        (b"mapreduce", "e34696a54afe6961c4924fd10285c644019bc9d09aa6e8899b82f2c8afa4a9d0"),
        (
            bytes(i * i // 256 % 256 for i in range(4 * 16384 + 1)),  # five blocks, one of 1 byte
            "d947aa0edeaceb3aee7abcd8247454bcb343a7f24e8ecb94f4c59f106f4dbedd",
        ),
    ],
    ids=["empty", "short", "five blocks"],
)
def test_golden_roots(data: bytes, root: str) -> None:
    assert tree_of(data).root().hex() == root
    assert reference_root(data).hex() == root


@given(
    runs=st.lists(st.integers(0, 9), max_size=7),
    tail=st.none() | st.sampled_from(TAILS) | st.integers(1, BLOCK_BYTES),
)
@example(runs=[], tail=None)
@example(runs=[0, 0], tail=1)
@example(runs=[1] * 7, tail=None)
@settings(max_examples=60, deadline=None)
def test_the_root_does_not_depend_on_the_runs(runs: list[int], tail: int | None) -> None:
    """The short block at the end comes alone or with whole ones before it."""
    nbytes = sum(runs) * BLOCK_BYTES + (tail or 0)
    expected = reference_root(BYTES[:nbytes])
    for glued in (False, True):
        hasher, tree = RootHasher(), BlockTree()
        lengths = [run * BLOCK_BYTES for run in runs]
        if tail and glued and lengths:
            lengths[-1] += tail
        elif tail:
            lengths.append(tail)
        at = 0
        for length in lengths:
            run = memoryview(BYTES)[at : at + length]
            hasher.add(run)
            tree.add(run)
            at += length
            assert hasher.root() == tree.root()  # asking in between disturbs nothing
        assert hasher.root() == tree.root() == expected
        assert hasher.nbytes == tree.nbytes == nbytes


@pytest.mark.parametrize("count", range(MAX_BLOCKS + 1))
def test_every_block_opens_to_the_root(count: int) -> None:
    for tail in TAILS if count else (0,):
        nbytes = max(0, count - 1) * BLOCK_BYTES + tail
        assert block_count(nbytes) == count
        data = BYTES[:nbytes]
        root = reference_root(data)
        tree = tree_of(data)
        assert tree.root() == root
        paths = tree.paths(tuple(range(count)))
        assert [len(path) for path in paths] == [path_bytes(nbytes, b) for b in range(count)]
        # Tails change the last block only, so one tail is enough for the others.
        for block in range(count) if tail == TAILS[-1] else range(count)[-1:]:
            opened = block_of(data, block)
            assert len(opened) == block_bytes(nbytes, block)
            assert root_from(nbytes, block, memoryview(opened), paths[block]) == root


def test_paths_of_some_blocks_are_those_of_all() -> None:
    tree = tree_of(BYTES[: 23 * BLOCK_BYTES - 5])
    every = tree.paths(tuple(range(23)))
    for some in ((), (22,), (3, 4, 5), (21, 0, 22, 0)):
        assert tree.paths(some) == [every[block] for block in some]
    assert tree.paths(tuple(range(23))) == every


def test_a_path_has_at_most_one_digest_per_level() -> None:
    for count in (1, 2, 3, 5, 8, 33, 1000, 16384):
        longest = (count - 1).bit_length() * DIGEST_BYTES
        assert path_bytes(count * BLOCK_BYTES, 0) == longest
        assert all(path_bytes(count * BLOCK_BYTES, block) <= longest for block in range(count))


def test_any_flipped_byte_of_a_short_block_or_its_path_changes_the_root() -> None:
    nbytes = 10 * BLOCK_BYTES + 40
    tree = tree_of(BYTES[:nbytes])
    data = bytearray(block_of(BYTES[:nbytes], 10))
    path = bytearray(tree.paths((10,))[0])
    assert len(data) == 40
    assert len(path) > 0
    roots = {tree.root()}
    for buffer in (data, path):
        for at in range(len(buffer)):
            buffer[at] ^= 1
            roots.add(root_from(nbytes, 10, bytes(data), bytes(path)))
            buffer[at] ^= 1
    assert len(roots) == 1 + len(data) + len(path)


@given(
    count=st.integers(1, 20),
    where=st.tuples(st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True)),
    flip=st.integers(1, 255),
)
@settings(max_examples=60, deadline=None)
def test_any_flipped_byte_of_a_whole_block_changes_the_root(
    count: int, where: tuple[float, float], flip: int
) -> None:
    nbytes = count * BLOCK_BYTES
    tree = tree_of(BYTES[:nbytes])
    block, at = int(where[0] * count), int(where[1] * BLOCK_BYTES)
    data = bytearray(block_of(BYTES, block))
    (path,) = tree.paths((block,))
    assert root_from(nbytes, block, bytes(data), path) == tree.root()
    data[at] ^= flip
    assert root_from(nbytes, block, bytes(data), path) != tree.root()


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7, 8, 13])
def test_another_index_or_size_does_not_open_to_the_root(count: int) -> None:
    nbytes = count * BLOCK_BYTES
    tree = tree_of(BYTES[:nbytes])
    paths = tree.paths(tuple(range(count)))
    tried = 0
    for block in range(count):
        sizes = (nbytes - BLOCK_BYTES, nbytes - 1, nbytes + 1, nbytes + BLOCK_BYTES, 2 * nbytes)
        claims = [(nbytes, other) for other in range(-1, count + 2) if other != block]
        claims += [(size, block) for size in sizes]
        for size, index in claims:
            tried += 1
            try:
                root = root_from(size, index, block_of(BYTES, block), paths[block])
            except ValueError:
                continue
            assert root != tree.root()
    assert tried == count * (count + 2 + 5)


def test_the_length_is_bound_even_where_the_path_stays_the_same() -> None:
    shorter, longer = 2 * BLOCK_BYTES + 1, 3 * BLOCK_BYTES
    (path,) = tree_of(BYTES[:longer]).paths((0,))
    data = block_of(BYTES, 0)
    assert root_from(shorter, 0, data, path) != root_from(longer, 0, data, path)
    assert tree_of(bytes(1)).root() != tree_of(bytes(2)).root() != tree_of(b"").root()


def test_a_node_cannot_be_passed_off_as_a_block() -> None:
    """Two digests, or a digest alone, are not the block under which they stand."""
    tree = tree_of(BYTES[: 2 * BLOCK_BYTES])
    children = _leaf(block_of(BYTES, 0)) + _leaf(block_of(BYTES, 1))
    assert tree_of(children).root() != tree.root()
    assert root_from(len(children), 0, children, b"") == reference_root(children) != tree.root()
    assert _hash("leaf", children) != _hash("node", children) != _hash("root", children)


@pytest.mark.parametrize(
    ("nbytes", "block", "data_bytes", "path_length"),
    [
        (0, 0, 0, 0),
        (-1, 0, 0, 0),
        (5 * BLOCK_BYTES, -1, BLOCK_BYTES, 96),
        (5 * BLOCK_BYTES, 5, BLOCK_BYTES, 96),
        (5 * BLOCK_BYTES, 0, BLOCK_BYTES - 1, 96),
        (5 * BLOCK_BYTES, 0, BLOCK_BYTES + 1, 96),
        (5 * BLOCK_BYTES, 0, 0, 96),
        (5 * BLOCK_BYTES, 0, BLOCK_BYTES, 95),
        (5 * BLOCK_BYTES, 0, BLOCK_BYTES, 64),
        (5 * BLOCK_BYTES, 0, BLOCK_BYTES, 128),
        (5 * BLOCK_BYTES, 4, BLOCK_BYTES, 96),
        (5 * BLOCK_BYTES, 4, BLOCK_BYTES, 0),
        (4 * BLOCK_BYTES + 9, 4, BLOCK_BYTES, 32),
        (4 * BLOCK_BYTES + 9, 4, 8, 32),
        (9, 0, 9, 32),
    ],
)
def test_wrong_lengths_raise(nbytes: int, block: int, data_bytes: int, path_length: int) -> None:
    with pytest.raises(ValueError, match=r"block -?\d"):
        root_from(nbytes, block, bytes(data_bytes), bytes(path_length))


def test_nothing_follows_a_short_block() -> None:
    hasher = RootHasher()
    hasher.add(memoryview(b"short"))
    with pytest.raises(AssertionError):
        hasher.add(memoryview(b"more"))
