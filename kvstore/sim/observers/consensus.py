"""Raft's own invariants, over all replicas of a cluster and across their restarts. Names are the paper's, where it has one.

- one leader: a term of a group has one leader, and one process of it (a restart ends a leadership).
- durable vote: in a term a replica votes for one candidate, told by the votes that left and by what a restart finds.
- durable term: a restart finds no term below one that a vote or an acknowledgement spoke of.
- durable log: a batch counts as synced when the disk has it; an entry is acknowledged when it is durable; a restart
  finds a log that ends no earlier than what was durable, and every committed entry that was.
- log matching: an (index, term) stands for one entry and one entry before it, in every log: so equal ends mean equal logs.
- probe: nobody answers a probe of a term that the leader of that term has not sent to it: leases and reads count on it.
- lease, read index: while a lease holds nobody leads a later term, and nobody did when a read was asked that is confirmed.
- quorum: an index counts as committed when a majority has the entry on disk.
- state machine safety: an index is committed with one entry, and nothing else is applied there, nor before.
- commit: within one process the commit index does not fall.
- truncation: no log loses an entry that anybody reported committed.
- leader completeness: a new leader has every entry that was reported committed in an earlier term.

What is known of disks comes from the syncs that returned, not from the cores: a core that counts too early is seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from crc32c import crc32c

from kvstore.sim.observers.report import Report
from replication.messages import (
    AppendRequest,
    AppendResponse,
    Heartbeat,
    HeartbeatResponse,
    Message,
    VoteRequest,
    VoteResponse,
)
from replication.ready import Ready
from replication.types import Entry


class Log:
    """The terms of one log: all before `start` is settled, then one term for each index."""

    __slots__ = ("start_index", "start_term", "terms")

    def __init__(
        self, start_index: int = 0, start_term: int = 0, terms: Iterable[int] = ()
    ) -> None:
        self.start_index, self.start_term = start_index, start_term
        self.terms = list(terms)

    @property
    def last(self) -> tuple[int, int]:
        """(term, index) of the end: in this order logs are compared."""
        term = self.terms[-1] if self.terms else self.start_term
        return term, self.start_index + len(self.terms)

    def term(self, index: int) -> int | None:
        """None: settled long ago, or beyond the end."""
        place = index - self.start_index - 1
        return self.terms[place] if 0 <= place < len(self.terms) else None

    def holds(self, index: int, term: int) -> bool:
        return index <= self.start_index or self.term(index) == term

    def replace(self, first: int, terms: Sequence[int]) -> None:
        """Entries from `first` on; what stood there goes."""
        place = first - self.start_index - 1
        if place < 0:
            terms, place = terms[-place:], 0
        self.terms[place:] = terms


class _Step(NamedTuple):
    """What one batch of the log does to one group's log. first 0: it begins anew behind (index, term)."""

    key: tuple[int, int]  # group, replica
    first: int
    terms: Sequence[int]


class _Replica:
    """What is known of one replica, whatever its process."""

    __slots__ = ("boots", "commit", "durable", "led_term", "reads", "told_term", "written")

    def __init__(self) -> None:
        self.boots = 0
        self.commit = 0  # the highest that its present process reported
        self.led_term = 0
        self.reads: dict[
            int, int
        ] = {}  # context -> the newest term that anybody led when it was asked
        self.told_term = 0  # that binds it: a vote or an acknowledgement of this term left
        self.written = Log()  # handed to the log
        self.durable = Log()  # synced


class _Group:
    """What is known of one group."""

    __slots__ = (
        "by",
        "committed",
        "committed_upto",
        "entries",
        "leaders",
        "led",
        "probes",
        "votes",
    )

    def __init__(self) -> None:
        self.entries: dict[tuple[int, int], tuple[int, int]] = {}  # (index, term) -> (before, crc)
        self.committed: dict[int, int] = {}  # index -> term
        self.by: dict[int, int] = {}  # index -> the reporter's term
        self.committed_upto = 0
        self.leaders: dict[int, tuple[int, int]] = {}  # term -> (replica, boots)
        self.led = 0  # the newest of these terms
        self.votes: dict[tuple[int, int], int] = {}  # (replica, term) -> candidate
        self.probes: dict[tuple[int, int], int] = {}  # the same -> the highest that was sent there


class NodeDisk:
    """What one process of a node has on its way to its disk."""

    def __init__(self) -> None:
        self.staged: list[_Step] = []
        self.sealed: list[_Step] = []


class Consensus:
    """See the module. `opened` comes first for each process, then its steps as they happen."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._groups: dict[int, _Group] = {}
        self._replicas: dict[tuple[int, int], _Replica] = {}

    # -- a process begins

    def opened(self, node: str, boots: int, raft: Any) -> None:
        """A replica as its log was recovered, before it says anything."""
        group = self._groups.setdefault(raft.group, _Group())
        key = (raft.group, raft.replica)
        seen = self._replicas.get(key)
        log = raft.log
        entries: list[Entry] = log.slice(log.start_index + 1, log.last_index)
        found = Log(log.start_index, log.start_term, [entry.term for entry in entries])
        if seen is None:
            seen = self._replicas[key] = _Replica()
        else:
            self._recovered(node, group, seen, raft, found)
        seen.boots, seen.commit, seen.led_term, seen.reads = boots, raft.commit_index, 0, {}
        seen.durable = found
        seen.written = Log(found.start_index, found.start_term, found.terms)
        self._match(node, raft.group, group, log.start_term, entries)
        if not group.committed_upto:
            group.committed_upto = raft.commit_index  # where the range was created
        elif raft.commit_index > group.committed_upto:
            what = f"it begins with commit index {raft.commit_index}, of which nobody spoke"
            self._report.broken("state machine safety", what, group=raft.group, node=node)

    def _recovered(self, node: str, group: _Group, seen: _Replica, raft: Any, found: Log) -> None:
        broken, number = self._report.broken, raft.group
        if raft.term < seen.told_term:
            what = f"it begins in term {raft.term}, but spoke of term {seen.told_term} before"
            broken("durable term", what, group=number, node=node)
        vote = group.votes.get((raft.replica, raft.term))
        if vote is not None and vote != raft.status()["vote"]:
            what = (
                f"it voted for {vote} in term {raft.term}, and begins with {raft.status()['vote']}"
            )
            broken("durable vote", what, group=number, node=node)
        before = seen.durable
        if found.last < before.last:
            what = f"its log ends at (term, index) {found.last}; {before.last} was durable"
            broken("durable log", what, group=number, node=node)
            return
        for index in range(found.start_index + 1, min(seen.commit, before.last[1]) + 1):
            term = group.committed.get(index)
            if term is not None and before.holds(index, term) and not found.holds(index, term):
                what = f"a committed entry of term {term} was durable, and is gone"
                broken("durable log", what, group=number, index=index, node=node)
                return

    # -- steps of the host

    def ready(self, node: str, disk: NodeDisk, raft: Any, ready: Ready) -> None:
        """A core hands out work."""
        group, seen = self._groups[raft.group], self._replicas[raft.group, raft.replica]
        if ready.entries:
            self._write(node, disk, group, seen, raft, ready.entries)
        if raft.is_leader and seen.led_term != raft.term:
            seen.led_term = raft.term
            self._lead(node, group, seen, raft)
        if raft.commit_index != seen.commit:
            self._commit(node, group, seen, raft)
        if seen.reads:
            for state in ready.read_states:
                self._newest(node, raft, seen.reads.pop(state.context, 0), "read index")
            for context in ready.reads_failed:
                seen.reads.pop(context, None)

    def read_asked(self, raft: Any, context: int) -> None:
        """A linearizable read begins."""
        group = self._groups[raft.group]
        self._replicas[raft.group, raft.replica].reads[context] = group.led

    def lease_holds(self, node: str, raft: Any) -> None:
        """A replica says that it leads, and nobody else can."""
        self._newest(node, raft, self._groups[raft.group].led, "lease")

    def reset(self, disk: NodeDisk, raft: Any, last: tuple[int, int]) -> None:
        """A snapshot is in: the log is to begin anew behind `last`."""
        key = (raft.group, raft.replica)
        disk.staged.append(_Step(key, 0, last))
        self._replicas[key].written = Log(*last)

    def sealed(self, disk: NodeDisk) -> None:
        """What was staged becomes one batch."""
        disk.sealed += disk.staged
        disk.staged = []

    def synced(self, node: str, disk: NodeDisk, batch: int, unsynced: int) -> None:
        """A batch counts as durable from now on. unsynced: how many of its writes the disk has not synced."""
        if unsynced:
            what = f"batch {batch} counts as durable, and {unsynced} of its writes are not"
            self._report.broken("durable log", what, node=node)
        else:
            for key, first, terms in disk.sealed:
                if first:
                    self._replicas[key].durable.replace(first, terms)
                else:
                    self._replicas[key].durable = Log(terms[0], terms[1])
        disk.sealed = []

    def told(self, node: str, messages: Sequence[Message]) -> None:
        """Messages leave."""
        for message in messages:
            kind = type(message)
            if kind is AppendRequest or kind is Heartbeat:
                probes, key = self._groups[message.group].probes, (message.to, message.term)
                probes[key] = max(message.probe, probes.get(key, 0))  # type: ignore[union-attr]
            elif kind is HeartbeatResponse:
                self._answer(node, message)
            elif kind is AppendResponse:
                self._answer(node, message)
                if message.success:  # type: ignore[union-attr]
                    self._acknowledge(node, message)
            elif kind is VoteResponse:
                if message.granted and not message.pre:  # type: ignore[union-attr]
                    self._vote(node, message.group, message.sender, message.term, message.to)
            elif kind is VoteRequest:
                if not message.pre:  # type: ignore[union-attr]
                    self._vote(node, message.group, message.sender, message.term, message.sender)

    def apply(self, node: str, raft: Any, entries: Sequence[Entry]) -> None:
        """Entries reach the machine."""
        group, seen = self._groups[raft.group], self._replicas[raft.group, raft.replica]
        for entry in entries:
            index, term = entry.index, entry.term
            if index > group.committed_upto:
                what = f"an entry of term {term} is applied, and nobody reported it committed"
            elif group.committed.get(index, term) != term:
                what = (
                    f"an entry of term {term} is applied, not that of term {group.committed[index]}"
                )
            elif group.entries.get((index, term), (0, -1))[1] != _crc(entry):
                what = f"an entry of term {term} is applied that stands in no log"
            elif not seen.durable.holds(index, term):
                what = f"an entry of term {term} is applied that is not durable here"
            else:
                continue
            self._report.broken(
                "state machine safety", what, group=raft.group, index=index, node=node
            )

    # -- the rules

    def _write(
        self,
        node: str,
        disk: NodeDisk,
        group: _Group,
        seen: _Replica,
        raft: Any,
        entries: Sequence[Entry],
    ) -> None:
        first, written = entries[0].index, seen.written
        terms = [entry.term for entry in entries]
        for index in range(first, min(written.last[1], group.committed_upto) + 1):
            term = group.committed.get(index)
            if term is None or written.term(index) != term:
                continue
            if index - first >= len(terms) or terms[index - first] != term:
                what = f"a committed entry of term {term} is replaced in the log"
                self._report.broken("truncation", what, group=raft.group, index=index, node=node)
                break
        before = written.start_term if first - 1 == written.start_index else written.term(first - 1)
        if before is None:
            before = raft.log.term(first - 1)
        self._match(node, raft.group, group, before, entries)
        written.replace(first, terms)
        disk.staged.append(_Step((raft.group, raft.replica), first, terms))

    def _match(
        self, node: str, number: int, group: _Group, before: int | None, entries: Sequence[Entry]
    ) -> None:
        known = group.entries
        for entry in entries:
            term = entry.term
            if before is None:  # its log begins here
                before = known.get((entry.index, term), (0, 0))[0]
            mine = (before, _crc(entry))
            other = known.setdefault((entry.index, term), mine)
            if other != mine:
                what = f"of term {term}: (term before, crc) is {mine} here and {other} elsewhere"
                self._report.broken(
                    "log matching", what, group=number, index=entry.index, node=node
                )
            before = term

    def _lead(self, node: str, group: _Group, seen: _Replica, raft: Any) -> None:
        term, me = raft.term, (raft.replica, seen.boots)
        group.led = max(group.led, term)
        other = group.leaders.setdefault(term, me)
        if other != me:
            what = f"replica {me[0]} (boot {me[1]}) leads term {term}, and so did {other}"
            self._report.broken("one leader", what, group=raft.group, node=node)
        index = group.committed_upto
        while group.by.get(index, 0) >= term:  # committed by a later leader, or by itself
            index -= 1
        committed = group.committed.get(index)
        if committed is not None and index > raft.log.start_index:
            if raft.log.term(index) != committed:
                what = f"leader of term {term} without the committed entry of term {committed}"
                self._report.broken(
                    "leader completeness", what, group=raft.group, index=index, node=node
                )

    def _commit(self, node: str, group: _Group, seen: _Replica, raft: Any) -> None:
        first, last = seen.commit + 1, raft.commit_index
        seen.commit = last
        if last < first:
            what = f"the commit index falls from {first - 1} to {last}"
            self._report.broken("commit", what, group=raft.group, node=node)
            return
        log = raft.log
        for index in range(first, last + 1):
            term = log.term(index) if index > log.start_index else None
            known = group.committed.get(index)
            if index > group.committed_upto:
                group.committed_upto = index
                if term is None:
                    what = "it came with a snapshot, and nobody reported it committed"
                    self._report.broken(
                        "state machine safety", what, group=raft.group, index=index, node=node
                    )
                    continue
                group.committed[index], group.by[index] = term, raft.term
                self._count(node, raft, index, term)
            elif known is not None and term is not None and known != term:
                what = f"committed here with term {term}, elsewhere with term {known}"
                self._report.broken(
                    "state machine safety", what, group=raft.group, index=index, node=node
                )

    def _count(self, node: str, raft: Any, index: int, term: int) -> None:
        membership = raft.membership
        for voters in (membership.voters, membership.voters_outgoing):
            holding = 0
            for replica in voters:
                other = self._replicas.get((raft.group, replica))
                holding += other is not None and other.durable.holds(index, term)
            if voters and holding * 2 <= len(voters):
                what = f"committed in term {raft.term}, and durable on {holding} of {len(voters)}"
                self._report.broken("quorum", what, group=raft.group, index=index, node=node)

    def _vote(self, node: str, number: int, replica: int, term: int, candidate: int) -> None:
        group = self._groups[number]
        other = group.votes.setdefault((replica, term), candidate)
        if other != candidate:
            what = f"replica {replica} votes for {candidate} in term {term}, and did for {other}"
            self._report.broken("durable vote", what, group=number, node=node)
        seen = self._replicas[number, replica]
        seen.told_term = max(seen.told_term, term)

    def _newest(self, node: str, raft: Any, led: int, rule: str) -> None:
        if led > raft.term:
            what = f"it counts in term {raft.term}, and somebody leads term {led}"
            self._report.broken(rule, what, group=raft.group, node=node)

    def _answer(self, node: str, message: Any) -> None:
        sent = self._groups[message.group].probes.get((message.sender, message.term), 0)
        if message.probe > sent:
            what = f"replica {message.sender} answers probe {message.probe} of term {message.term}; {sent} was sent"
            self._report.broken("probe", what, group=message.group, node=node)

    def _acknowledge(self, node: str, message: Any) -> None:
        seen = self._replicas[message.group, message.sender]
        seen.told_term = max(seen.told_term, message.term)
        last_term, last_index = seen.durable.last
        if last_index < message.match_index and last_term <= message.term:
            what = f"acknowledged in term {message.term}, but its disk ends at {last_index}"
            self._report.broken(
                "durable log", what, group=message.group, index=message.match_index, node=node
            )


def _crc(entry: Entry) -> int:
    crc: int = crc32c(entry.data, entry.kind)
    return crc
