"""The host's side of snapshots: when one may replace a replica's state, and the order that a crash cannot harm.

DESIGN.md section 7. Before anything is wiped: the core would take it (`refusal`). Then, by the machine, the
span is wiped and marked, rows come in, the marker goes with the last batch; `flush`; the core decides (`arrived`);
the log is told to begin anew; that is durable; the core hears `installed` and acknowledges; the sender hears of it.

If commit passed the snapshot meanwhile (a new leader had the log), the core declines: the state is good all the same,
and what is committed after it follows from the log. If the core knows less than the snapshot holds, entries that the
state contains are skipped when they come (Replica.take_committed). If the sender's term ended meanwhile, the core takes
the snapshot all the same: the rows are in, and the log must reach as far as they do. That of a leader does.

A replica whose installation was cut short has no state (`stateless`): it goes on voting with its log, applies and
serves nothing, leads only to hand its log over (replica.py, B5), and asks the leader for a snapshot until one is installed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from replication.messages import InstallSnapshot
from replication.ports import Machine
from replication.probes import reached
from replication.replica import Replica
from replication.snapshot import Offer
from replication.transfer import Transfers
from replication.types import SnapshotMeta

Then = Callable[[], None]


class Surroundings(Protocol):
    """What the installer uses of its host."""

    def touch(self, group: int) -> None:
        """The group's core has something to say."""

    def apply_soon(self, group: int) -> None:
        """The group may have entries to apply."""

    def visit(self) -> None:
        """Carry out what touched cores ask for, now."""

    def ask_for_state_soon(self) -> None:
        """Some replica has no state: call `ask_for_state` now and then."""

    def begin_log(self, replica: Replica, meta: SnapshotMeta, then: Then) -> None:
        """RESET to the log; `then` when it is durable."""

    def run_blocking(self, work: Then, then: Then) -> None:
        """As `Owner.run_blocking`."""


class Installer:
    """Implements `transfer.Owner`. See the module."""

    def __init__(
        self,
        host: Surroundings,
        replicas: dict[int, Replica],
        machine: Machine,
        now: Callable[[], float],
    ) -> None:
        self._host, self._replicas, self._machine, self._now = host, replicas, machine, now

    def term(self, group: int) -> int:
        replica = self._replicas.get(group)
        if replica is None or not replica.raft.is_leader or replica.held or replica.unreadable:
            return 0
        return replica.raft.term

    def route(self, group: int, other: int) -> tuple[int, int] | None:
        replica = self._replicas.get(group)
        node = replica.node_of(other) if replica is not None else None
        return None if replica is None or node is None else (replica.id, node)

    def refusal(self, group: int, offer: Offer) -> str:
        replica = self._replicas.get(group)
        if replica is None or offer.to != replica.id:
            return "no such replica"
        raft, index = replica.raft, offer.meta.index
        if offer.term < raft.term:
            return f"term {offer.term} is over"
        if replica.install is not None:
            return "another snapshot is being installed"
        if replica.stateless:
            return "" if index >= raft.applied_index else f"the log begins after {index}"
        return (
            "" if index > max(raft.commit_index, replica.applied) else f"{index} is committed here"
        )

    def begins(self, group: int) -> None:
        self._replicas[group].hold()

    def lost(self, group: int) -> None:
        replica = self._replicas.get(group)
        if replica is not None:
            replica.lose_state()
            self._host.touch(group)
            self._host.ask_for_state_soon()

    def arrived(self, group: int, offer: Offer, done: Then) -> None:
        replica = self._replicas.get(group)
        if replica is None or replica.id != offer.to:
            return  # removed meanwhile
        meta = offer.meta
        message = InstallSnapshot(group, replica.id, offer.sender, offer.term, meta)
        now = self._now()
        replica.raft.step(message, now)
        replica.raft.overtaken(meta, now)
        self._host.touch(group)
        self._host.visit()  # the core's word: Ready.install, or nothing

        def durable() -> None:
            if self._replicas.get(group) is not replica:
                return
            if replica.install is not None:
                replica.install = None
                replica.log_start = meta.index
                replica.raft.installed(meta, self._now())
            replica.has_state(self._machine, meta.index)
            self._host.apply_soon(group)
            self._host.touch(group)
            done()

        if replica.install == meta:
            self._host.begin_log(replica, meta, durable)
        else:
            reached("snapshot_overtaken_by_commit")
            durable()

    def sends(self, group: int, other: int, index: int) -> None:
        self._replicas[group].snapshot_begins(other, index)

    def sent(self, group: int, other: int, ok: bool) -> None:
        replica = self._replicas.get(group)
        if replica is not None:
            replica.raft.snapshot_status(other, ok, self._now())
            replica.snapshot_ends(other, ok)
            self._host.touch(group)

    def unreadable(self, group: int) -> None:
        replica = self._replicas.get(group)
        if replica is not None:
            replica.cannot_read(self._now())
            self._host.touch(group)

    def readable(self, group: int) -> None:
        replica = self._replicas.get(group)
        if replica is not None:
            replica.can_read()
            self._host.touch(group)

    def run_blocking(self, work: Then, then: Then) -> None:
        self._host.run_blocking(work, then)

    def ask_for_state(self, transfers: Transfers) -> bool:
        """Ask for what stateless replicas miss. Returns whether there are any."""
        any_left = False
        for replica in self._replicas.values():
            if not replica.stateless:
                continue
            any_left = True
            raft = replica.raft
            if raft.leader not in {0, replica.id} and not transfers.receiving(replica.group):
                node = replica.node_of(raft.leader)
                if node is not None:
                    reached("snapshot_asked_for")
                    transfers.ask(replica.group, replica.id, raft.leader, node)
        return any_left
