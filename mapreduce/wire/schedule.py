"""Which miner gets the peer's next frame, and how long that frame is. Pure arithmetic on byte
counts.

Peers that all send to the same miner at once queue behind each other at its link, so peer k starts
with miner k and goes round: at any moment the peers talk to different miners. The round is in
proportion to the segments' sizes. It may wait for the next miner's socket, briefly; it never waits
for one miner's credit while another has some (with unequal segments such a wait closes a cycle, and
the job stands still).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mapreduce.core.partition import BLOCK_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

FRAME_SECONDS = (
    0.002  # of the measured rate: short enough to take turns, long enough to cost little per byte
)
MIN_FRAME_BYTES = BLOCK_BYTES
FIRST_FRAME_BYTES = 4 * BLOCK_BYTES  # before anything has been measured


def frame_bytes_for(bytes_per_s: float, largest: int) -> int:
    """The payload, in whole blocks, that a link of this rate carries in `FRAME_SECONDS`."""
    blocks = int(bytes_per_s * FRAME_SECONDS) // BLOCK_BYTES
    return max(MIN_FRAME_BYTES, min(blocks * BLOCK_BYTES, largest))


@dataclass(slots=True)
class Upload:
    """One segment on its way to its miner. Bytes; `released` is what the miner no longer holds."""

    length: int
    sent: int = 0
    released: int = 0

    def sendable(self, window_bytes: int, frame_bytes: int) -> int:
        """Bytes of the next frame: whole blocks, or the rest; 0 without credit or when all is
        sent."""
        credit = window_bytes - (self.sent - self.released)
        rest = self.length - self.sent
        nbytes = min(rest, credit, frame_bytes)
        return nbytes if nbytes == rest else nbytes - nbytes % BLOCK_BYTES


def next_upload(
    uploads: Sequence[Upload],
    *,
    rank: int,
    window_bytes: int,
    frame_bytes: int,
    writable: Callable[[int], bool],
    patient: bool,
) -> tuple[int, int] | None:
    """The miner (index) whose turn it is and the bytes to send it; None if there is nothing to send
    now.

    The turn is the least advanced segment's, in proportion to its length; ties go round from the
    peer's own rank. While `patient`, None is also the answer when that miner's socket is not
    writable; otherwise the next writable one in turn is taken.
    """
    count = len(uploads)
    turns = []
    for turn in range(count):
        miner = (rank + turn) % count
        upload = uploads[miner]
        nbytes = upload.sendable(window_bytes, frame_bytes)
        if nbytes > 0:
            turns.append((upload.sent / upload.length, turn, miner, nbytes))
    turns.sort()
    for _, _, miner, nbytes in turns:
        if writable(miner):
            return miner, nbytes
        if patient:
            return None
    return None
