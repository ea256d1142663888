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

MIN_FRAME_BYTES = BLOCK_BYTES
FIRST_FRAME_BYTES = 4 * BLOCK_BYTES  # before anything has been measured
# Of the link's and of a flow's rate. Measured on shaped links: with half as much again a step comes
# further from its floor, with less it takes more processor time.
FRAME_S = 0.00075
QUEUE_S = 0.002


def frame_bytes_for(bytes_per_s: float, largest: int) -> int:
    """The payload, in whole blocks, that a link of this rate carries in `FRAME_S`."""
    blocks = int(bytes_per_s * FRAME_S) // BLOCK_BYTES
    return max(MIN_FRAME_BYTES, min(blocks * BLOCK_BYTES, largest))


def queue_bytes_for(bytes_per_s: float, round_trip_s: float) -> int:
    """What the kernel may hold of a flow of this rate: twice what is on its way, so that a flow
    which is limited by its queue can grow, and `QUEUE_S` behind it."""
    return max(MIN_FRAME_BYTES, int(bytes_per_s * (2 * round_trip_s + QUEUE_S)))


@dataclass(slots=True)
class Upload:
    """One segment on its way to its miner. Bytes: `sent` were given to the transport, of which
    `flushed` have left it; `released` is what the miner no longer holds."""

    length: int
    sent: int = 0
    flushed: int = 0
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
    chosen: tuple[int, int] | None = None
    least = 2.0  # more than any share sent
    for turn in range(rank, rank + count):
        miner = turn % count
        upload = uploads[miner]
        if upload.sent == upload.length or not (patient or writable(miner)):
            continue
        share = upload.sent / upload.length
        if share < least and (nbytes := upload.sendable(window_bytes, frame_bytes)) > 0:
            least, chosen = share, (miner, nbytes)
    if chosen is None or not patient or writable(chosen[0]):
        return chosen
    return None
