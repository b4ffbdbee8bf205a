"""The language of the Raft transcripts: commands that drive a Cluster, and how what happens is told.

A transcript is a file of blocks. A block is commands, one a line, then `----`, then what they print, then a blank line.
Lines that begin with `#` are comments; the first says the claim. Replicas are numbers; `a->b` is a link.

    cluster 1 2 3 [learners 4]   replicas with empty disks; `config key=value ...` before it sets RaftConfig
    campaign N | elect N         N asks for votes; elect also delivers everything
    deliver [a->b ...]           what is on its way now arrives (all, or on these links), once
    settle                       deliver until nothing is on its way
    drop [a->b ...] | repeat a->b | network          lose it; let it arrive twice; show it
    hold a->b | release          put what is on its way on a link aside; let it go on
    isolate N | block a->b | heal                    links that lose everything
    tick N                       N's next deadline comes, and only N's timer fires
    wait S | run S               S seconds pass: without timers; with timers and deliveries
    propose N data [times K] | read N context ... | lease N | transfer N to M | step-down N
    change N voters ... [learners ...] [joint]       N proposes a membership
    compact N index | crash N [keep K] | restart N [promised] | add N
    writes by hand N... | persist N [K]              writes of these replicas reach the disk only by `persist`
    installs by hand N | install N                   the same for snapshots
    snapshot-fails N M           the snapshot that N sends to M is lost, and N hears so
    status [N ...] | log N       what they know
    quietly COMMAND              without telling what happens
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields

from replication.errors import ReplicationError
from replication.membership import enter_joint
from replication.messages import (
    AppendRequest,
    AppendResponse,
    Heartbeat,
    HeartbeatResponse,
    InstallSnapshot,
    Message,
    SteppedDown,
    TimeoutNow,
    VoteRequest,
    VoteResponse,
)
from replication.raft import RaftConfig, Ready
from replication.types import Entry, EntryKind, Membership
from tests.scripts.raft_cluster import Cluster, Flight, Server, plain

SEPARATOR = "----"


def show_entry(entry: Entry) -> str:
    body = {EntryKind.NOOP: "noop", EntryKind.CONFIG: "config"}.get(
        EntryKind(entry.kind), entry.data.decode(errors="replace")
    )
    return f"{entry.index}/{entry.term} {body}"


def show_entries(entries: Sequence[Entry]) -> str:
    if len(entries) > 4:
        return f"[{show_entry(entries[0])} .. {show_entry(entries[-1])}]"
    return "[" + ", ".join(show_entry(entry) for entry in entries) + "]"


def show_membership(membership: Membership) -> str:
    text = f"voters {' '.join(map(str, membership.voters))}"
    for name in ("voters_outgoing", "learners", "learners_next"):
        ids: tuple[int, ...] = getattr(membership, name)
        if ids:
            text += f", {name.replace('_', ' ')} {' '.join(map(str, ids))}"
    return text


def show_message(message: Message) -> str:
    """`1->2 append term=1 ...`"""
    return f"{message.sender}->{message.to} {_body(message)}"


def _body(m: Message) -> str:
    match m:
        case VoteRequest():
            kind = "pre-vote?" if m.pre else "vote?"
            transfer = " (transfer)" if m.transfer else ""
            return f"{kind} term={m.term} last={m.last_index}/{m.last_term}{transfer}"
        case VoteResponse():
            kind = "pre-vote" if m.pre else "vote"
            return f"{kind} {'granted' if m.granted else 'refused'} term={m.term}"
        case AppendRequest():
            place = f"{m.previous_index}/{m.previous_term}"
            return (
                f"append term={m.term} after={place} {show_entries(m.entries)}"
                f" commit={m.commit} probe={m.probe}"
            )
        case AppendResponse(success=True):
            return f"appended term={m.term} match={m.match_index} probe={m.probe}"
        case AppendResponse():
            return (
                f"append refused term={m.term} at={m.rejected_index}"
                f" hint={m.hint_index}/{m.hint_term}"
            )
        case Heartbeat():
            return f"heartbeat term={m.term} commit={m.commit} probe={m.probe}"
        case HeartbeatResponse():
            return f"alive term={m.term} last={m.last_index} probe={m.probe}"
        case TimeoutNow():
            return f"take over term={m.term}"
        case SteppedDown():
            return f"stepped down term={m.term}"
        case InstallSnapshot():
            return f"snapshot term={m.term} at={m.meta.index}/{m.meta.term}"


def parse_link(text: str) -> tuple[int, int]:
    sender, receiver = text.split("->")
    return int(sender), int(receiver)


class Script:
    """One cluster and what has happened since it was last asked."""

    def __init__(self) -> None:
        self.config = RaftConfig()
        self._cluster: Cluster | None = None
        self.by_hand: dict[int, None] = {}
        self.held: list[Flight] = []
        self.lines: list[str] = []

    @property
    def cluster(self) -> Cluster:
        assert self._cluster is not None, "the script begins with `cluster`"
        return self._cluster

    def run(self, command: str) -> list[str]:
        """Carry out one command; what it prints."""
        self.lines = []
        words = command.split()
        quietly = words[0] == "quietly"
        if quietly:
            words = words[1:]
        handler: Callable[..., None] = getattr(self, "do_" + words[0].replace("-", "_"))
        try:
            handler(*words[1:])
            if self._cluster is not None:
                self._work()
        except ReplicationError as error:
            self.lines.append(f"{type(error).__name__}: {error}")
        return [] if quietly else self.lines

    # ------------------------------------------------------------------ telling

    def _told(self, replica: int, ready: Ready) -> None:
        tell = self.lines.append
        raft = self.cluster.raft(replica)
        if ready.leadership is not None:
            tell(f"{replica} {'leads' if ready.leadership else 'leads no more:'} term {raft.term}")
        if replica in self.by_hand and ready.token is not None:
            state = ready.hard_state
            what = [f"term {state.term} vote {state.vote}"] if state else []
            what += [f"entries {show_entries(ready.entries)}"] if ready.entries else []
            tell(f"{replica} begins to write {', '.join(what)}")
        for entry in ready.committed:
            tell(f"{replica} applies {show_entry(entry)}")
        for context, index in ready.read_states:
            tell(f"{replica} confirms read {context} at {index}")
        for context in ready.reads_failed:
            tell(f"{replica} fails read {context}")
        for other in ready.snapshot_to:
            tell(f"{replica} sends a snapshot to {other}")
        if ready.install is not None:
            tell(f"{replica} begins to install the snapshot at {ready.install.index}")

    def _work(self) -> None:
        """Everybody works; writes reach the disk at once but where they are by hand."""
        cluster = self.cluster
        busy = True
        while busy:
            busy = False
            for server in cluster.live():
                server.work()
                if server.replica not in self.by_hand and server.writes:
                    server.persist(len(server.writes))
                    busy = True

    def _server(self, replica: str) -> Server:
        return self.cluster.servers[int(replica)]

    # ------------------------------------------------------------------ commands

    def do_config(self, *settings: str) -> None:
        values = {}
        for setting in settings:
            name, value = setting.split("=")
            assert name in {item.name for item in fields(RaftConfig)}, name
            values[name] = float(value) if name.endswith(("_s", "drift")) else int(value)
        self.config = RaftConfig(**values)  # type: ignore[arg-type]  # floats and ints by name

    def do_cluster(self, *words: str) -> None:
        voters, learners = self._halves(words)
        self._cluster = Cluster(plain(voters, learners), config=self.config)
        self.cluster.auto_persist = False
        self.cluster.on_ready = self._told

    @staticmethod
    def _halves(words: tuple[str, ...]) -> tuple[list[int], list[int]]:
        split = words.index("learners") if "learners" in words else len(words)
        return [int(word) for word in words[:split]], [int(word) for word in words[split + 1 :]]

    def do_campaign(self, replica: str) -> None:
        server = self._server(replica)
        self.cluster.raft(server.replica).campaign(server.now)

    def do_elect(self, replica: str) -> None:
        self.do_campaign(replica)
        self.do_settle()

    def _chosen(self, links: tuple[str, ...]) -> Callable[[Message], bool]:
        wanted = [parse_link(link) for link in links]
        return lambda message: not wanted or (message.sender, message.to) in wanted

    def do_deliver(self, *links: str) -> None:
        cluster, wanted = self.cluster, self._chosen(links)
        self._work()
        going = [flight for flight in cluster.network if wanted(flight.message)]
        cluster.network = [flight for flight in cluster.network if not wanted(flight.message)]
        for flight in going:
            lost = cluster.servers[flight.message.to].raft is None
            self.lines.append(show_message(flight.message) + (" (it is down)" if lost else ""))
            cluster.servers[flight.message.to].receive(flight)
            self._work()

    def do_settle(self) -> None:
        self._work()
        for _ in range(100):
            if not self.cluster.network:
                return
            self.do_deliver()
        raise AssertionError("never silent")

    def do_drop(self, *links: str) -> None:
        wanted = self._chosen(links)
        self._work()
        kept = []
        for flight in self.cluster.network:
            if wanted(flight.message):
                self.lines.append(f"lost: {show_message(flight.message)}")
            else:
                kept.append(flight)
        self.cluster.network = kept

    def do_repeat(self, link: str) -> None:
        wanted = self._chosen((link,))
        self._work()
        network = self.cluster.network
        network += [flight for flight in network if wanted(flight.message)]

    def do_hold(self, link: str) -> None:
        wanted = self._chosen((link,))
        self._work()
        network = self.cluster.network
        self.held += [flight for flight in network if wanted(flight.message)]
        self.cluster.network = [flight for flight in network if not wanted(flight.message)]

    def do_release(self) -> None:
        self.cluster.network += self.held
        self.held = []

    def do_network(self) -> None:
        self._work()
        self.lines += [show_message(flight.message) for flight in self.cluster.network]

    def do_isolate(self, replica: str) -> None:
        self.cluster.isolate(int(replica))

    def do_block(self, link: str) -> None:
        self.cluster.blocked[parse_link(link)] = None

    def do_heal(self) -> None:
        self.cluster.heal()

    def do_tick(self, replica: str) -> None:
        server = self._server(replica)
        deadline = self.cluster.raft(server.replica).deadline()
        assert deadline is not None, f"{replica} waits for nothing"
        self.cluster.now = max(self.cluster.now, deadline)
        self.lines.append(f"at {self.cluster.now:.2f} s")
        self.cluster.raft(server.replica).tick(self.cluster.now)

    def do_wait(self, seconds: str) -> None:
        self.cluster.now += float(seconds)

    def do_run(self, seconds: str) -> None:
        cluster, end = self.cluster, self.cluster.now + float(seconds)
        while cluster.now < end - 1e-9:
            cluster.now = min(cluster.now + 0.01, end)
            cluster.fire_timers()
            self.do_settle()

    def do_propose(self, replica: str, data: str, *times: str) -> None:
        count = int(times[1]) if times else 1
        indices = [self.cluster.propose(int(replica), data.encode()) for _ in range(count)]
        what = f"{indices[0]}..{indices[-1]}" if count > 1 else f"{indices[0]}"
        self.lines.append(f"{replica} appends {what}")

    def do_read(self, replica: str, *contexts: str) -> None:
        for context in contexts:
            self.cluster.read(int(replica), int(context))

    def do_lease(self, replica: str) -> None:
        server = self._server(replica)
        valid = self.cluster.raft(server.replica).lease_valid(server.now)
        self.lines.append(f"{replica} {'has a' if valid else 'has no'} lease")

    def do_transfer(self, replica: str, _to: str, other: str) -> None:
        server = self._server(replica)
        self.cluster.raft(server.replica).transfer_leadership(int(other), server.now)

    def do_step_down(self, replica: str) -> None:
        server = self._server(replica)
        self.cluster.raft(server.replica).step_down(server.now)

    def do_change(self, replica: str, _voters: str, *words: str) -> None:
        server = self._server(replica)
        raft = self.cluster.raft(server.replica)
        joint = words[-1] == "joint"
        voters, learners = self._halves(words[:-1] if joint else words)
        wanted = plain(voters, learners)
        if joint:
            wanted = enter_joint(raft.membership, voters, learners, wanted.nodes)
        index = raft.propose_membership(raft.term, wanted, server.now)
        self.lines.append(f"{replica} appends {index}: {show_membership(wanted)}")

    def do_add(self, replica: str) -> None:
        self.cluster.add(int(replica), Membership())

    def do_compact(self, replica: str, index: str) -> None:
        self._server(replica).compact(int(index))

    def do_crash(self, replica: str, *keep: str) -> None:
        self._server(replica).crash(int(keep[1]) if keep else 0)

    def do_restart(self, replica: str, *promised: str) -> None:
        self.cluster.restart(int(replica), may_have_promised=bool(promised))

    def do_writes(self, _by: str, _hand: str, *replicas: str) -> None:
        self.by_hand = {int(replica): None for replica in replicas}

    def do_persist(self, replica: str, count: str = "1") -> None:
        for token in self._server(replica).persist(int(count)):
            self.lines.append(
                f"{replica} has on disk: term {token.term} vote {token.vote},"
                f" log up to {token.last_index}/{token.last_term}"
            )

    def do_installs(self, _by: str, _hand: str, replica: str) -> None:
        self._server(replica).auto_install = False

    def do_install(self, replica: str) -> None:
        self._server(replica).install()

    def do_snapshot_fails(self, sender: str, receiver: str) -> None:
        self.do_drop(f"{sender}->{receiver}")
        server = self._server(sender)
        self.cluster.raft(server.replica).snapshot_status(int(receiver), False, server.now)

    def do_status(self, *replicas: str) -> None:
        self._work()
        for server in self.cluster.servers.values():
            if replicas and str(server.replica) not in replicas:
                continue
            raft = server.raft
            if raft is None:
                self.lines.append(f"{server.replica} is down")
                continue
            self.lines.append(
                f"{server.replica} {raft.role.value} term={raft.term}"
                f" vote={raft.status()['vote']} leader={raft.leader}"
                f" log={raft.first_index}..{raft.last_index}"
                f" commit={raft.commit_index} applied={raft.applied_index};"
                f" {show_membership(raft.membership)}"
            )
            for other, peer in raft.status()["peers"].items():
                self.lines.append(
                    f"  {other} {peer['state']}{' paused' if peer['paused'] else ''}"
                    f" match={peer['match']} next={peer['next']}"
                )

    def do_log(self, replica: str) -> None:
        raft = self.cluster.raft(int(replica))
        entries = raft.log.slice(raft.first_index, raft.last_index) if len(raft.log) else []
        self.lines += [show_entry(entry) for entry in entries]


def run_transcript(text: str) -> str:
    """The transcript with what its commands print now."""
    script = Script()
    out: list[str] = []
    lines = text.splitlines()
    position = 0
    while position < len(lines):
        line = lines[position]
        position += 1
        out.append(line)
        if line == SEPARATOR or line.startswith("#") or not line.strip():
            continue
        printed = script.run(line)
        while position < len(lines) and lines[position].strip() not in {"", SEPARATOR}:
            out.append(lines[position])
            printed += script.run(lines[position])
            position += 1
        while position < len(lines) and lines[position].strip():
            position += 1  # what was recorded
        out += [SEPARATOR, *(printed or ["ok"])]
    return "\n".join(out).rstrip("\n") + "\n"
