"""The public API of a training script: `from peer import Peer`, or `from peer.peer import Peer`."""

from peer.peer import Peer

__all__ = ["Peer"]
