"""What replication needs from the world, as protocols owned by this package. Adapters live in kvstore."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, TypeVar

from replication.messages import Message
from replication.types import Entry, SnapshotMeta

T = TypeVar("T")


class LogFiles(Protocol):
    """The segment files of one node's log. Blocking calls; the host chooses the thread.

    Every failing write or sync raises LogWriteFailed, after which no call is made on these files again.
    """

    def segments(self) -> list[int]:
        """Ids of the segments that exist, ascending."""

    def read(self, segment: int) -> bytes:
        """The whole file. Raises: LogUnreadable, with what can be read, if the disk fails for a part of it; OSError."""

    def create(self, segment: int, size_bytes: int) -> None:
        """Make a preallocated, zero-filled segment; durable (file and directory entry) when this returns."""

    def write(self, segment: int, offset: int, data: bytes) -> None:
        """Write at an offset. Not durable before `sync`."""

    def sync(self, segment: int) -> None:
        """Make every write so far to this segment durable (fdatasync)."""

    def delete(self, segment: int) -> None:
        """Remove a segment; durable when this returns."""

    def close(self) -> None: ...


class Clock(Protocol):
    """Monotonic seconds. The only clock that replication reads, and only its host."""

    def monotonic(self) -> float: ...


class RunInThread(Protocol):
    def __call__(self, work: Callable[[], T], /) -> Awaitable[T]:
        """Await `work()` done elsewhere. Cancelling the wait does not stop the work."""


class Machine(Protocol):
    """What the host drives: the state machines of all groups of a node. All calls come from the host's turn, in order.

    `apply` stages rows into one write batch for the whole node; the machine may write a full batch by itself between
    two entries. `finish` writes what is staged and only then lets answers go out.
    """

    def drain(self, now: float) -> None:
        """Start of a turn: evaluate what the world has asked; may call Host.propose and Host.read_index."""

    def apply(self, group: int, entries: Sequence[Entry]) -> int:
        """Apply committed entries that are durable here, in index order, without gaps. NOOP and CONFIG included.
        Returns how many bytes of rows that staged, which may be many for a small entry."""

    def finish(self) -> None:
        """End of a turn's applies: write the batch, answer."""

    def settled(self) -> None:
        """All that a turn led to at once is done, its sync and a slice of applies included: answers leave, in one batch."""

    def applied(self, group: int) -> tuple[int, int]:
        """(index, term) last applied, as the engine has it."""

    def leadership(self, group: int, term: int, is_leader: bool) -> None:
        """This replica became leader of `term` (no entry of that term is applied yet), or stopped leading it."""

    def read_confirmed(self, group: int, contexts: Sequence[int], ok: bool) -> None:
        """Read-index rounds asked for with these contexts are confirmed, and the state is applied far enough; or failed."""

    def snapshot_open(self, group: int) -> SnapshotSource:
        """A consistent view of a group's rows at its applied index, to be streamed. Closed by the host."""

    def snapshot_sink(self, group: int, meta: SnapshotMeta) -> SnapshotSink:
        """Where an arriving snapshot goes. The group applies nothing from here to `finish` or `abort`."""


class SnapshotSource(Protocol):
    meta: SnapshotMeta

    def chunk(self) -> bytes | None:
        """The next chunk (bounded, at most 256 KiB unless one row is larger), or None at the end. Must be quick (<1 ms)."""

    def close(self) -> None: ...


class SnapshotSink(Protocol):
    """Installs by ordinary batches (DESIGN.md section 7): wipe and mark; rows; finish with the marker gone."""

    def chunk(self, data: bytes) -> None: ...

    def finish(self) -> None:
        """All rows are in; write the last batch: applied is (meta.index, meta.term), the marker is gone. Not yet flushed."""

    def flush(self) -> None:
        """Blocks, called in another thread: what was written before is durable after it. RESET goes to the log next."""

    def abort(self) -> None:
        """The stream failed: the state is lost, the marker stays until another snapshot is installed."""


class Peers(Protocol):
    """The way to other nodes. Never blocks: what does not fit the bounded queue of a node is dropped and counted."""

    def send(self, node: int, messages: Sequence[Message]) -> None:
        """One frame (or few) to a node with all messages of this turn for it."""

    def send_snapshot_chunk(self, node: int, payload: bytes) -> bool:
        """Over the node's second connection; False when its queue is full: try again after a pause."""
