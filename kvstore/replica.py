"""One replica of one range on this node: its state, its leader's evaluator while it leads, and what it has proposed.

The store drives it. P1 rows and the applied index change in the same write batch (pitfall 1). P2 an own entry's latches are
held from evaluation until that entry is applied, or the term is over.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any, NamedTuple

import msgspec

from kvstore import logs
from replication.codec import decode_membership, encode_membership
from replication.types import Entry, EntryKind, Membership
from replication.wal import GroupLog
from txn import keycode
from txn.apply import Overlay, apply_batch
from txn.closed import Heard, safe_ts
from txn.commands import Batch, Command, decode_batch, size_bytes
from txn.evaluate import Evaluator
from txn.latches import Pending
from txn.messages import Reply, Request
from txn.state import Answer, RangeRow, RangeState, encode_row

BATCH_BYTES_MAX = 1 << 20  # of an entry's commands and what apply adds; one command at least
BATCH_COMMANDS_MAX = 512  # of an entry: small ones that each look through a key's history

log = logs.logger("kvstore.replica")


class ReplicaConfig(msgspec.Struct, array_like=True):
    """The CONFIG row: who the members are, and which replica is this one."""

    membership: bytes
    replica_id: int
    installed_index: int  # where the last snapshot, or the range's creation, set the state
    installed_term: int
    preferred_node: int = 0  # where its leader should be, when nothing speaks against it


class Applied(NamedTuple):
    """An own entry that was applied: what waits for it, and what it answered."""

    pendings: Sequence[Pending]
    answers: list[Answer]


def tell_damage(range_id: int, found: GroupLog | None, refused: Container[int]) -> None:
    """Damage is named, also where it costs nothing, for the disk that did it has other rows. A refusal names itself."""
    if found is None or not found.faulty or range_id in refused:
        return
    fault = found.faulty[0]
    log.warning(
        "entries of the log are damaged, but the engine has them",
        range=range_id,
        entries=found.damaged,
        segment=fault.segment,
        offset=fault.offset,
    )


class Replica:
    def __init__(self, row: RangeRow, config: ReplicaConfig) -> None:
        self.range_id = row.range_id
        self.state = RangeState(row)
        self.config = config
        self.membership: Membership = decode_membership(config.membership)
        self.evaluator: Evaluator | None = None
        self.output = ReplicaOutput()
        self.inflight: dict[
            int, tuple[Batch, Sequence[Pending]]
        ] = {}  # index -> own entries, this term
        self.applied_now: list[Applied] = []  # since the last finish
        self.term_started = False  # an entry of the evaluator's term was applied
        self.receiving = False  # a snapshot is being installed
        self.heard = Heard()  # of closed timestamps
        self.proposed = False  # an entry since the last round of closing (kvstore/closing.py)
        self.told_closed, self.told_at = 0, 0.0  # as the leader: what its followers were told last

    @property
    def safe_ts(self) -> int:
        """Everything at or below it is here, and stays as it is."""
        state = self.state
        return safe_ts(state, self.heard.closed(state.row))

    @property
    def applied(self) -> tuple[int, int]:
        return self.state.row.applied_index, self.state.row.applied_term

    def apply(self, entry: Entry, overlay: Overlay) -> None:
        """Stage one committed entry's rows. The range row itself is staged by `stage_row`, once a batch."""
        row = self.state.row
        assert entry.index == row.applied_index + 1, "entries are applied in order, without gaps"
        own = None
        evaluator = self.evaluator
        if evaluator is not None and entry.term == evaluator.term:
            own = self.inflight.pop(entry.index, None)
            self.term_started = True
        if entry.kind == EntryKind.COMMAND:
            if own is None:
                apply_batch(self.state, overlay, decode_batch(entry.data))
            else:
                batch, pendings = own
                for pending in pendings:
                    if pending.seen:
                        overlay.seen.update(pending.seen)
                self.applied_now.append(Applied(pendings, apply_batch(self.state, overlay, batch)))
        elif entry.kind == EntryKind.CONFIG:
            self.membership = decode_membership(entry.data)
            self.config.membership = entry.data
            overlay.put(keycode.node_row(keycode.CONFIG, self.range_id), encode_row(self.config))
        row.applied_index, row.applied_term = entry.index, entry.term

    def stage_row(self, overlay: Overlay) -> None:
        overlay.put(keycode.node_row(keycode.RANGE, self.range_id), encode_row(self.state.row))

    def take_batches(self) -> list[tuple[Batch, Sequence[Pending]]]:
        """What the evaluator wants in the log, cut into entries of bounded size."""
        evaluator = self.evaluator
        assert evaluator is not None
        pendings, evaluator.proposals = evaluator.proposals, []
        version, closed_ts = self.state.row.version, evaluator.closing.promised
        batches: list[tuple[Batch, Sequence[Pending]]] = []
        part: list[Pending] = []
        commands: list[Command] = []
        size = 0
        for pending in pendings:
            assert pending.command is not None
            cost = size_bytes(pending.command) + pending.adds_bytes
            full = size + cost > BATCH_BYTES_MAX or len(commands) >= BATCH_COMMANDS_MAX
            if commands and full:
                batches.append((Batch(closed_ts, version, commands), part))
                commands, part, size = [], [], 0
            commands.append(pending.command)
            part.append(pending)
            size += cost
        if commands:
            batches.append((Batch(closed_ts, version, commands), part))
        return batches


class ReplicaOutput:
    """What the evaluator asks for; the store takes it once a turn."""

    __slots__ = ("calls", "confirm", "replies")

    def __init__(self) -> None:
        self.replies: list[tuple[Any, Reply]] = []
        self.confirm: list[tuple[Any, Reply]] = []  # only once leadership is confirmed
        self.calls: list[tuple[bytes, Request, int]] = []

    def reply(self, origin: Any, reply: Reply, confirm: bool) -> None:
        (self.confirm if confirm else self.replies).append((origin, reply))

    def call(self, key: bytes, request: Request, call_id: int) -> None:
        self.calls.append((key, request, call_id))


def new_config(
    membership: Membership, replica_id: int, index: int, term: int, preferred_node: int
) -> ReplicaConfig:
    return ReplicaConfig(encode_membership(membership), replica_id, index, term, preferred_node)
