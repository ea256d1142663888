"""The hash tree over a segment's blocks: one root binds every byte, one path opens one block.

Knows blocks and BLAKE3 (https://github.com/BLAKE3-team/BLAKE3-specs); knows no dtype, job or
signature. A leaf is the hash of a block, a node that of its two children, a node without a sibling
moves up as it is; the root binds the number of bytes too. Each of the three has its own context, so
that none can be passed off as another.
"""

from __future__ import annotations

import struct

from blake3 import blake3

from mapreduce.core.partition import BLOCK_BYTES

DIGEST_BYTES = 32
LEAF_CONTEXT = "mapreduce 1 leaf"
NODE_CONTEXT = "mapreduce 1 node"
ROOT_CONTEXT = "mapreduce 1 root"
_EMPTY = bytes(DIGEST_BYTES)  # stands for the top of no block at all
_LENGTH = struct.Struct("<Q")


def block_count(nbytes: int) -> int:
    """Blocks of a segment of `nbytes`, the last perhaps a shorter one."""
    return -(-nbytes // BLOCK_BYTES)


def block_bytes(nbytes: int, block: int) -> int:
    """Length of block `block` in a segment of `nbytes`."""
    return min(BLOCK_BYTES, nbytes - block * BLOCK_BYTES)


def _node(left: bytes, right: bytes) -> bytes:
    return blake3(left + right, derive_key_context=NODE_CONTEXT).digest()


def _root(nbytes: int, top: bytes) -> bytes:
    return blake3(_LENGTH.pack(nbytes) + top, derive_key_context=ROOT_CONTEXT).digest()


class RootHasher:
    """The root of bytes that come in order, in memory that grows with the logarithm of their
    number."""

    def __init__(self) -> None:
        self.nbytes = 0
        self._pending: list[bytes | None] = []  # by level: a left child that waits for its sibling

    def add(self, run: memoryview) -> None:
        """Takes the next blocks. `run` holds whole blocks; only the very last may be shorter."""
        assert self.nbytes % BLOCK_BYTES == 0
        for begin in range(0, len(run), BLOCK_BYTES):
            block = run[begin : begin + BLOCK_BYTES]
            self._push(0, blake3(block, derive_key_context=LEAF_CONTEXT).digest())
        self.nbytes += len(run)

    def _push(self, level: int, node: bytes) -> None:
        pending = self._pending
        while True:
            if level == len(pending):
                pending.append(node)
                return
            left = pending[level]
            if left is None:
                pending[level] = node
                return
            pending[level] = None
            node = _node(left, node)
            level += 1

    def root(self) -> bytes:
        """The root of all that was added so far, 32 bytes."""
        top: bytes | None = None
        for left in self._pending:
            if left is not None:
                top = left if top is None else _node(left, top)
        return _root(self.nbytes, top or _EMPTY)


class BlockTree(RootHasher):
    """The same, keeping what the paths need: 32 bytes per block."""

    def __init__(self) -> None:
        super().__init__()
        self._leaves = bytearray()

    def _push(self, level: int, node: bytes) -> None:
        self._leaves += node
        super()._push(level, node)

    def paths(self, blocks: tuple[int, ...]) -> list[bytes]:
        """What leads from each of these blocks to the root: siblings from the bottom up, 32 bytes
        each."""
        paths = [bytearray() for _ in blocks]
        places = list(blocks)
        level: bytes | bytearray = self._leaves
        while (count := len(level) // DIGEST_BYTES) > 1:
            for path, place in zip(paths, places, strict=True):
                sibling = place ^ 1
                if sibling < count:
                    path += level[sibling * DIGEST_BYTES : (sibling + 1) * DIGEST_BYTES]
            places = [place // 2 for place in places]
            level = _level_above(level)
        return [bytes(path) for path in paths]


def _level_above(level: bytes | bytearray) -> bytearray:
    pair = 2 * DIGEST_BYTES
    above = bytearray()
    for begin in range(0, len(level), pair):
        children = level[begin : begin + pair]
        if len(children) == pair:
            children = blake3(children, derive_key_context=NODE_CONTEXT).digest()
        above += children
    return above


def path_bytes(nbytes: int, block: int) -> int:
    """Length of the path of a block in a segment of `nbytes`."""
    count, siblings = block_count(nbytes), 0
    while count > 1:
        siblings += block ^ 1 < count
        block //= 2
        count = -(-count // 2)
    return siblings * DIGEST_BYTES


def root_from(nbytes: int, block: int, data: bytes | memoryview, path: bytes) -> bytes:
    """The root of the segment of `nbytes` whose block number `block` is `data`.

    Raises ValueError if the segment has no such block, or data or path have another length.
    """
    count = block_count(nbytes)
    if not 0 <= block < count:
        raise ValueError(f"block {block} of {count}")
    if len(data) != block_bytes(nbytes, block) or len(path) != path_bytes(nbytes, block):
        raise ValueError(f"block {block}: {len(data)} bytes with a path of {len(path)}")
    node = blake3(data, derive_key_context=LEAF_CONTEXT).digest()
    at = 0
    while count > 1:
        if block ^ 1 < count:
            sibling = path[at : at + DIGEST_BYTES]
            node = _node(sibling, node) if block & 1 else _node(node, sibling)
            at += DIGEST_BYTES
        block //= 2
        count = -(-count // 2)
    return _root(nbytes, node)
