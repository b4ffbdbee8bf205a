"""Invariants that are checked while a simulation runs, at every node (protocol.md section 14, architecture.md section 2).

- V1 a term of a range has one leader. V2 at equal index, replicas apply equal entries. V3 within one process, commit and
  applied indexes never go back. V4 the oracle issues no timestamp twice, and never one below what was handed out before it
  was issued. V5 no transaction has two outcomes. V6 applying an entry looks at rows of its own range and at no others: the
  rows of a neighbour differ from node to node.
What is broken becomes a problem of the cluster; the run goes on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

from crc32c import crc32c

import kvstore.replica
from kvstore.sim.cluster import Server, SimCluster
from kvstore.sim.process import outside
from kvstore.snapshots import spans_of
from replication.types import Entry
from txn.apply import Overlay
from txn.commands import Batch
from txn.messages import Timestamps
from txn.ports import Rows
from txn.state import Answer, RangeState
from txn.types import PartStatus

LOOK_S: Final = 0.05
MISTAKES_MAX: Final = 10


class OwnRows(Overlay):
    """An overlay that tells which rows are looked at. It shares the rows of the one that it stands for."""

    def __init__(self, overlay: Overlay, below: Rows, look: Callable[[bytes], None]) -> None:
        super().__init__(below)
        self.rows = overlay.rows
        self._look = look

    def get(self, key: bytes, /) -> bytes | None:
        self._look(key)
        return super().get(key)

    def scan(
        self, start: bytes, end: bytes | None, *, reverse: bool = False
    ) -> Iterator[tuple[bytes, bytes]]:
        self._look(start)
        return super().scan(start, end, reverse=reverse)


class Observers:
    """Attach them before the cluster starts."""

    def __init__(self, cluster: SimCluster) -> None:
        self.cluster = cluster
        self.entries = 0
        self._leaders: dict[tuple[int, int], str] = {}
        self._applied: dict[tuple[int, int], tuple[int, int]] = {}  # (range, index) -> (term, crc)
        self._seen: dict[tuple[str, int], tuple[int, int, int]] = {}
        self._issued_upto = 0
        self._issued: dict[
            int, int
        ] = {}  # first of a batch -> highest handed out when it was issued
        self._handed_out = 0
        self._outcomes: dict[bytes, tuple[int, int]] = {}
        self._mistakes = 0
        cluster.on_open.append(self._attach)

    def mistake(self, text: str) -> None:
        self._mistakes += 1
        if self._mistakes <= MISTAKES_MAX:
            outside(self.cluster.problem, text)

    def _attach(self, server: Server) -> None:
        assert server.node is not None
        store: Any = server.node.store
        oracle: Any = store.oracle
        apply, leadership, issue, answer = (
            store.apply,
            store.leadership,
            oracle.issue,
            store.answer,
        )
        name = server.name

        def checked_apply(group: int, entries: Sequence[Entry]) -> None:
            self._entries(name, group, entries)
            apply(group, entries)

        def checked_leadership(group: int, term: int, is_leader: bool) -> None:
            self.cluster.trace.note("leads" if is_leader else "follows", name, group, term)
            if is_leader:
                other = self._leaders.setdefault((group, term), name)
                if other != name:
                    self.mistake(f"V1: {other} and {name} lead range {group} in term {term}")
            leadership(group, term, is_leader)

        def checked_issue(count: int, wall_ms: int, now: float) -> int:
            first: int = issue(count, wall_ms, now)
            if first:
                if first <= self._issued_upto:
                    self._deposed_issue(first, count)
                self._issued_upto = max(self._issued_upto, first + count - 1)
                self._issued[first] = self._handed_out
            return first

        def checked_answer(asker: Any, reply: Any) -> None:
            if type(reply) is Timestamps and reply.first:
                self._hand_out(reply.first, reply.count)
            answer(asker, reply)

        store.apply, store.leadership, store.answer = (
            checked_apply,
            checked_leadership,
            checked_answer,
        )
        oracle.issue = checked_issue
        client: Any = store._oracle_client  # noqa: SLF001 - the simulator looks inside
        give = client._give  # noqa: SLF001

        def checked_give(wants: Any, reply: Timestamps, now: float) -> None:
            if reply.first and reply.id == 0 and reply.first in self._issued:
                self._hand_out(reply.first, reply.count)
            give(wants, reply, now)

        client._give = checked_give  # noqa: SLF001

    # -- V2

    def _entries(self, name: str, group: int, entries: Sequence[Entry]) -> None:
        self.entries += len(entries)
        applied = self._applied
        for entry in entries:
            mine = (entry.term, crc32c(entry.data))
            other = applied.setdefault((group, entry.index), mine)
            if other != mine:
                self.mistake(
                    f"V2: {name} applies entry {entry.index} of range {group} in term {entry.term}, not as others {other}"
                )

    # -- V4

    def _deposed_issue(self, first: int, count: int) -> None:
        """A leader that is deposed may still draw from its window, in vain; but no value twice."""
        last = first + count - 1
        for other in self._issued:
            if first <= other <= last:
                self.mistake(f"V4: the oracle issued {other} twice")

    def _hand_out(self, first: int, count: int) -> None:
        floor = self._issued.get(first)
        if floor is None:
            self.mistake(f"V4: {first} was handed out and never issued")
        elif first <= floor:
            self.mistake(f"V4: {first} was issued when {floor} was handed out already")
        self._handed_out = max(self._handed_out, first + count - 1)

    # -- V5

    def outcome(self, txn_id: bytes, answer: Answer) -> None:
        if answer.status not in {PartStatus.COMMITTED, PartStatus.ABORTED, PartStatus.FENCED}:
            return
        mine = (answer.ts if answer.status == PartStatus.COMMITTED else 0, 0)
        other = self._outcomes.setdefault(txn_id, mine)
        if other != mine:
            self.mistake(f"V5: {txn_id.hex()} has the outcomes {other[0]} and {mine[0]}")

    # -- V1, V3

    async def watch(self) -> None:
        """Look at every running node again and again."""
        while True:
            await asyncio.sleep(LOOK_S)
            for server in self.cluster.running():
                self._look(server)

    def _look(self, server: Server) -> None:
        node = server.node
        if node is None or node.host is None:
            return
        boots = server.machine.boots
        for group in node.host.groups():
            raft = node.host.raft(group)
            now = (boots, raft.commit_index, raft.applied_index)
            before = self._seen.get((server.name, group), (0, 0, 0))
            if before[0] == boots and (now[1] < before[1] or now[2] < before[2]):
                self.mistake(f"V3: range {group} of {server.name} went back from {before} to {now}")
            self._seen[server.name, group] = now

    # -- V6

    def _owned(self, state: RangeState, key: bytes) -> None:
        if not any(start <= key < end for start, end in spans_of(state.row)):
            if key[1:] != state.row.range_id.to_bytes(8, "big"):
                self.mistake(f"V6: range {state.row.range_id} looks at a row of another: {key!r}")

    @contextmanager
    def watching_outcomes(self) -> Iterator[None]:
        """V5 needs the answers of apply, which nobody else sees whole."""
        module: Any = kvstore.replica
        apply_batch = module.apply_batch

        def checked(state: RangeState, overlay: Any, batch: Batch) -> list[Answer]:
            own = OwnRows(overlay, overlay._below, lambda key: self._owned(state, key))  # noqa: SLF001
            answers: list[Answer] = apply_batch(state, own, batch)
            overlay.bytes += own.bytes
            for command, answer in zip(batch.commands, answers, strict=True):
                txn_id = getattr(command, "txn_id", None)
                if txn_id is not None:
                    self.outcome(txn_id, answer)
            return answers

        module.apply_batch = checked
        try:
            yield
        finally:
            module.apply_batch = apply_batch
