"""The kinds of faults: what each does, to whom, and when it ends. Drawn and numbered by the nemesis (faults.py).

Each function is one kind: it picks its victims with the fault's own generator, says what it is about to do (`say`), and
does it. One that finds no victim says nothing and does nothing.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from kvstore.errors import StorageError
from kvstore.sim.adapters import DRIFT_MAX, NO_SPACE, QUICK_S, STALL_TIMEOUTS
from kvstore.sim.cluster import Server
from kvstore.sim.disk import INJECTED
from kvstore.sim.messages import Astray
from kvstore.sim.process import outside
from txn.messages import Prepare

if TYPE_CHECKING:
    from kvstore.sim.faults import Nemesis

IO_POINTS_MAX: Final = 60
IO_POINTS: Final = ("", "", "written", "written", "synced", "engine flush", "delete")
STEPS_MAX: Final = 400  # of a node's process until it dies
COMMIT_STEPS_MAX: Final = 40  # of a client's process after the first Prepare of a commit left
FAULT_S_MAX: Final = 8.0
LONG_PAUSES: Final = (
    1 / 6
)  # of all pauses; longer than the leases of locks and of holds, which are 10 s
LONG_PAUSE_S: Final = (11.0, 14.0)
FLIPS_MAX: Final = 3
LATE_S: Final = (0.01, 0.3, 3.0)


class Trap(NamedTuple):
    """After how many calls with its disk a process dies; `point`: only of that kind, if not empty (see Machine.io).
    `fault`: the number of the one that set it."""

    calls: int
    power: bool
    point: str
    fault: int = 0


class Kinds:
    """One fault and its draws."""

    def __init__(self, nemesis: Nemesis, rng: random.Random, number: int, kind: str) -> None:
        self.nemesis, self.rng, self.number, self.kind = nemesis, rng, number, kind
        self.cluster = nemesis.cluster
        self.seconds = min(FAULT_S_MAX, 0.05 + rng.expovariate(1 / nemesis.hold_s))

    def say(self, details: str) -> None:
        """The fault begins."""
        self.nemesis.began(self.number, self.kind, details)

    def arm(self, details: str) -> None:
        """The same of one that waits for its moment, which may never come. When it does, `go_off` has to be called."""
        self.say(details)
        self.nemesis.armed[self.number] = self.kind

    def go_off(self) -> None:
        """What it waited for has come."""
        self.nemesis.went_off(self.number)

    def until(self, end: Callable[[], None]) -> None:
        """It ends after its time."""
        self.nemesis.later(self.seconds, end)

    def server(self) -> Server | None:
        """One that runs: the first such in a drawn order, so that the draw is the same whoever else is down."""
        servers = list(self.cluster.servers.values())
        self.rng.shuffle(servers)
        return next((server for server in servers if server.running), None)

    def any_server(self) -> Server:
        """One, whether it runs or not."""
        return self.rng.choice(list(self.cluster.servers.values()))

    def leader(self) -> Server | None:
        """Of some range."""
        return self.cluster.leader_of(self.rng.randint(1, len(self.cluster.splits) + 3))

    def victim(self) -> str:
        """A client; empty if there is none."""
        victims = self.nemesis.victims()
        return self.rng.choice(victims) if victims else ""

    def hosts(self) -> list[str]:
        return [*self.cluster.servers, *self.nemesis.victims()]

    def sides(self) -> tuple[list[str], list[str]]:
        """All hosts in two parts."""
        hosts = self.hosts()
        self.rng.shuffle(hosts)
        cut = self.rng.randint(1, max(1, len(hosts) - 1))
        return hosts[:cut], hosts[cut:]

    def kill(self, server: Server, *, power: bool) -> None:
        self.cluster.crash(server.name, power=power)
        self.nemesis.restart_later(server.name, self.seconds)


def _for(fault: Kinds) -> str:
    return f"for {fault.seconds:.3f} s"


def _sides(a: list[str], b: list[str]) -> str:
    return f"{'+'.join(a)} | {'+'.join(b)}"


# -- processes


def _crash(fault: Kinds) -> None:
    _kill(fault, fault.server())


def _crash_leader(fault: Kinds) -> None:
    _kill(fault, fault.leader())


def _kill(fault: Kinds, server: Server | None) -> None:
    if server is not None:
        power, point = fault.rng.random() < 0.7, fault.rng.choice(("", "", "", "written", "synced"))
        how = f"{', power lost' if power else ''}{f', once it has {point},' if point else ','}"
        details = f"{server.name}{how} {_for(fault)}"
        if point:  # else hardly any crash would come between a write and its sync
            fault.arm(details)
            fault.nemesis.traps[server.name] = Trap(1, power, point, fault.number)
        else:
            fault.say(details)
            fault.kill(server, power=power)


def _blackout(fault: Kinds) -> None:
    power = fault.rng.random() < 0.8
    fault.say(f"all{', power lost,' if power else ''} {_for(fault)}")
    for server in fault.cluster.running():
        fault.cluster.crash(server.name, power=power)
        fault.nemesis.restart_later(server.name, fault.seconds * (0.5 + 0.5 * fault.rng.random()))


def _crash_at_io(fault: Kinds) -> None:
    server = fault.server()
    if server is not None:
        point = fault.rng.choice(IO_POINTS)
        calls, power = fault.rng.randint(1, IO_POINTS_MAX), fault.rng.random() < 0.8
        if point:
            calls = 1 + calls // 10
        fault.arm(f"{server.name} at its call {calls} {point or 'of any kind'}")
        fault.nemesis.traps[server.name] = Trap(calls, power, point, fault.number)


def _crash_at_step(fault: Kinds) -> None:
    """Each callback is the resumption of an await somewhere: the process dies at that one."""
    server = fault.server()
    if server is None or server.process is None or server.process.lit:
        return
    steps, power = fault.rng.randint(1, STEPS_MAX), fault.rng.random() < 0.5
    fault.arm(f"{server.name} at its step {steps}, then down {_for(fault)}")

    def die() -> None:
        fault.go_off()
        fault.kill(server, power=power)

    server.process.light(steps, die)


def _pause(fault: Kinds) -> None:
    server = fault.server()
    _pause_for(fault, server.name if server is not None else "")


def _pause_leader(fault: Kinds) -> None:
    server = fault.leader()
    _pause_for(fault, server.name if server is not None else "")


def _client_pause(fault: Kinds) -> None:
    _pause_for(fault, fault.victim())


def _pause_for(fault: Kinds, name: str) -> None:
    if name:
        if fault.rng.random() < LONG_PAUSES:
            fault.seconds = fault.rng.uniform(*LONG_PAUSE_S)
        fault.say(f"{name} {_for(fault)}")
        fault.nemesis.pause(name, fault.seconds)


def _client_crash(fault: Kinds) -> None:
    name = fault.victim()
    if name:
        fault.say(name)
        _kill_client(fault, name)


def _kill_client(fault: Kinds, name: str) -> None:
    fault.cluster.crash_client(name)
    fault.nemesis.on_client_crash(name)


def _commit_crash(fault: Kinds) -> None:
    """The coordinator dies at some await of a commit over several ranges: between any two of its messages."""
    name = fault.victim()
    if not name or fault.cluster.clients[name].process.lit:
        return
    steps = fault.rng.randint(1, COMMIT_STEPS_MAX)
    client = fault.cluster.clients[name]
    router: Any = client.database.router
    send = router.send
    fault.arm(f"{name} at step {steps} of its next commit")

    def die() -> None:
        fault.go_off()
        _kill_client(fault, name)

    def watched(request: Any, *args: Any, **options: Any) -> Any:
        if type(request) is Prepare and not request.one_range:
            router.send = send
            client.process.light(steps, lambda: outside(die))
        return send(request, *args, **options)

    router.send = watched

    def restore() -> None:
        router.send = send

    fault.nemesis.left.append(restore)


# -- network


def _partition(fault: Kinds) -> None:
    _cut(fault, *fault.sides(), one_way=False)


def _one_way(fault: Kinds) -> None:
    _cut(fault, *fault.sides(), one_way=True)


def _partial(fault: Kinds) -> None:
    """Two nodes lose each other (or one loses the other), and all others see both."""
    if len(fault.cluster.servers) < 2:
        return
    a, b = fault.rng.sample(list(fault.cluster.servers), 2)
    _cut(fault, [a], [b], one_way=fault.rng.random() < 0.4)


def _cut_leader(fault: Kinds) -> None:
    """A leader is alone with some of the clients."""
    leader = fault.leader()
    if leader is not None:
        clients = [name for name in fault.nemesis.victims() if fault.rng.random() < 0.5]
        others = [name for name in fault.hosts() if name != leader.name and name not in clients]
        _cut(fault, [leader.name, *clients], others, one_way=fault.rng.random() < 0.3)


def _cut(fault: Kinds, a: list[str], b: list[str], *, one_way: bool) -> None:
    network = fault.cluster.network
    fault.say(f"{_sides(a, b)} {'from left to right ' if one_way else ''}{_for(fault)}")
    network.partition(a, b, one_way=one_way)
    fault.until(lambda: network.heal(a, b))


def _clog(fault: Kinds) -> None:
    a, b = fault.sides()
    fault.say(f"{_sides(a[:1], b)} {_for(fault)}")
    fault.cluster.network.clog(a[:1], b, fault.seconds, one_way=fault.rng.random() < 0.5)


def _slow_path(fault: Kinds) -> None:
    network = fault.cluster.network
    a, b = fault.sides()
    longest = fault.rng.choice((0.02, 0.1, 0.5))
    fault.say(f"{_sides(a, b)} up to {longest:g} s {_for(fault)}")
    network.set_delay(a, b, (longest / 10, longest))
    fault.until(lambda: network.set_delay(a, b, None))


def _break(fault: Kinds) -> None:
    hosts = fault.hosts()
    if len(hosts) < 2:
        return
    names = fault.rng.sample(hosts, 2)
    fault.say(" ".join(names))
    for name in names:
        fault.cluster.network.break_connections(name)


def _flaky(fault: Kinds) -> None:
    network = fault.cluster.network
    rate = fault.rng.choice((0.001, 0.01))
    fault.say(f"{rate:g} of all frames {_for(fault)}")
    network.break_rate = rate

    def end() -> None:
        network.break_rate = 0.0

    fault.until(end)


def _astray(fault: Kinds) -> None:
    """Messages of Raft and of closed timestamps are lost, doubled and overtaken: of all nodes, of one, or on one path."""
    rng, messages, names = fault.rng, fault.nemesis.messages, list(fault.cluster.servers)
    if len(names) < 2:
        return
    astray = _drawn_astray(rng)
    one, other = rng.sample(names, 2)
    paths = [(a, b) for a in names for b in names if a != b]
    where = rng.choice(("all", one, f"{one} to {other}"))
    if where == one:
        paths = [path for path in paths if one in path]
    elif where != "all":
        paths = [(one, other)]
    fault.say(f"{where}: {_shares(astray)}, {_for(fault)}")
    for path in paths:
        messages.set(*path, astray)

    def end() -> None:
        for path in paths:
            messages.clear(*path)

    fault.until(end)


def _requests_astray(fault: Kinds) -> None:
    """Requests that nodes take from clients and from each other, and their answers: of all nodes, or of one."""
    requests, servers = fault.nemesis.requests, fault.cluster.servers
    astray = _drawn_astray(fault.rng)
    names = fault.rng.choice((list(servers), [fault.any_server().name]))
    fault.say(f"{'+'.join(names)}: {_shares(astray)}, {_for(fault)}")
    for name in names:
        requests.set(name, astray)

    def end() -> None:
        for name in names:
            requests.clear(name)

    fault.until(end)


def _drawn_astray(rng: random.Random) -> Astray:
    return Astray(
        rng.choice((0.0, 0.02, 0.1, 0.3)),
        rng.choice((0.0, 0.05, 0.3)),
        rng.choice((0.0, 0.1, 0.5)),
        rng.choice(LATE_S),
    )


def _shares(astray: Astray) -> str:
    return f"{astray.loss:g} lost, {astray.double:g} doubled, {astray.late:g} late by {astray.late_s:g} s"


# -- disks


def _slow_disk(fault: Kinds) -> None:
    machine = fault.any_server().machine
    longest = fault.rng.choice((0.05, 0.3, 3.0))
    fault.say(f"{machine.name} up to {longest:g} s a call {_for(fault)}")
    machine.call_s = (longest / 20, longest)

    def end() -> None:
        machine.call_s = QUICK_S

    fault.until(end)


def _stalled_disk(fault: Kinds) -> None:
    """A sync takes longer than an election."""
    machine = fault.any_server().machine
    stall_s = fault.rng.uniform(*STALL_TIMEOUTS) * fault.cluster.config.raft.election_timeout_s
    fault.say(f"{machine.name} {stall_s:.3f} s a call {_for(fault)}")
    machine.stall(stall_s)

    def end() -> None:
        machine.call_s = QUICK_S

    fault.until(end)


def _sync_fails(fault: Kinds) -> None:
    """EIO: of a write, some of which may be on the disk, or of a sync, after which nobody knows."""
    server = fault.server()
    if server is None:
        return
    calls = fault.rng.randint(0, 20)
    if fault.rng.random() < 0.5:
        fault.arm(f"{server.name} sync {calls + 1}")
        server.machine.disk.fail_sync(calls, fault.go_off)
    else:
        fault.arm(f"{server.name} write {calls + 1}")
        server.machine.disk.fail_write(calls, fault.go_off)


def _read_fails(fault: Kinds) -> None:
    """EIO: the engine cannot read for a while, or a start cannot read the log."""
    server = fault.server()
    if server is None:
        return
    machine = server.machine
    if fault.rng.random() < 0.5:
        fault.arm(
            f"{server.name} cannot read its log at the next start, after a crash {_for(fault)}"
        )
        machine.disk.fail_read(fault.rng.randint(0, 2), fault.go_off)
        fault.kill(server, power=False)
        return
    fault.say(f"{server.name} cannot read its engine {_for(fault)}")
    directory = machine.directory
    directory.read_error = StorageError(f"IO error: {INJECTED}")

    def end() -> None:
        directory.read_error = None

    fault.until(end)


def _engine_fails(fault: Kinds) -> None:
    """EIO: the engine takes no writes for a while, or those into memory alone: then its next flush fails."""
    server = fault.server()
    if server is None:
        return
    directory = server.machine.directory
    error = StorageError(f"IO error: {INJECTED}")
    if fault.rng.random() < 0.5:
        fault.say(f"{server.name} write {_for(fault)}")
        directory.write_error = error
    else:
        fault.say(f"{server.name} flush {_for(fault)}")
        directory.flush_error = error
        _flush_now(fault, server)

    def end() -> None:
        directory.write_error = directory.flush_error = None

    fault.until(end)


def _full_disk(fault: Kinds) -> None:
    """No space: for new segments of the log, or for the engine, or for both. It is emptied after a while."""
    server = fault.server()
    if server is None:
        return
    machine = server.machine
    log, engine = fault.rng.choice(NO_SPACE)
    fault.say(f"{server.name}{' log' if log else ''}{' engine' if engine else ''} {_for(fault)}")
    machine.fill(log=log, engine=engine)

    def end() -> None:
        machine.disk.capacity_bytes = None
        machine.directory.write_error = None

    fault.until(end)


def _log_rot(fault: Kinds) -> None:
    _damage_log(fault, lambda server: server.machine.disk.rot(fault.rng))


def _misdirected(fault: Kinds) -> None:
    _damage_log(fault, lambda server: server.machine.disk.misdirect(fault.rng))


def _damage_log(fault: Kinds, harm: Callable[[Server], str]) -> None:
    """Nobody notices before a start reads the log, so there may be one now."""
    server = fault.nemesis.atlas.damageable(fault.rng)
    if server is None:
        return
    done = [where for _ in range(fault.rng.randint(1, FLIPS_MAX)) if (where := harm(server))]
    if not done:
        return
    crashes = fault.rng.random() < 0.7
    fault.say(f"{server.name} {'; '.join(done)}{f', then down {_for(fault)}' if crashes else ''}")
    server.damage.append(fault.kind)
    if crashes and server.running:
        fault.kill(server, power=fault.rng.random() < 0.5)


def _engine_rot(fault: Kinds) -> None:
    server = fault.nemesis.atlas.damageable(fault.rng)
    if server is None:
        return
    keys = server.machine.directory.rot(fault.rng)
    if keys:
        fault.say(f"{server.name} {len(keys)} rows from {keys[0]!r}")
        server.damage.append(fault.kind)


# -- clocks, and work at odd times


def _wall_jump(fault: Kinds) -> None:
    machine = fault.any_server().machine
    jump_s = fault.rng.choice((-86_400.0, -3.0, -0.5, 0.0, 0.5, 3.0, 86_400.0))
    fault.say(f"{machine.name} to {jump_s:+g} s")
    machine.wall_jump_s = jump_s

    def end() -> None:
        machine.wall_jump_s = 0.0

    if fault.nemesis.rights_clocks:
        fault.nemesis.left.append(end)


def _drift(fault: Kinds) -> None:
    machines = [server.machine for server in fault.cluster.servers.values()]
    if not fault.nemesis.rights_clocks:
        machines += [fault.cluster.clients[name].machine for name in fault.nemesis.victims()]
    machine = fault.rng.choice(machines)
    rate = 1.0 + fault.rng.uniform(-DRIFT_MAX, DRIFT_MAX)
    fault.say(f"{machine.name} at {rate:.3f}")
    machine.drift(rate)
    if fault.nemesis.rights_clocks:
        fault.nemesis.left.append(lambda: machine.drift(1.0))


def _flush(fault: Kinds) -> None:
    server = fault.server()
    if server is not None and _can_flush(server):
        fault.say(server.name)
        _flush_now(fault, server)


def _can_flush(server: Server) -> bool:
    node = server.node
    return node is not None and node.host is not None and not node.fatal.done()


def _flush_now(fault: Kinds, server: Server) -> None:
    if _can_flush(server):
        assert server.process is not None
        assert server.node is not None
        fault.nemesis.flushes.append(server.process.spawn(server.node.flush()))


KINDS: Final[Mapping[str, Callable[[Kinds], None]]] = {
    "crash": _crash,
    "crash_leader": _crash_leader,
    "crash_at_io": _crash_at_io,
    "crash_at_step": _crash_at_step,
    "blackout": _blackout,
    "pause": _pause,
    "pause_leader": _pause_leader,
    "partition": _partition,
    "one_way": _one_way,
    "partial": _partial,
    "cut_leader": _cut_leader,
    "clog": _clog,
    "slow_path": _slow_path,
    "break": _break,
    "flaky": _flaky,
    "astray": _astray,
    "slow_disk": _slow_disk,
    "stalled_disk": _stalled_disk,
    "sync_fails": _sync_fails,
    "read_fails": _read_fails,
    "full_disk": _full_disk,
    "log_rot": _log_rot,
    "misdirected": _misdirected,
    "engine_rot": _engine_rot,
    "wall_jump": _wall_jump,
    "drift": _drift,
    "flush": _flush,
    "client_pause": _client_pause,
    "client_crash": _client_crash,
    "commit_crash": _commit_crash,
    "engine_fails": _engine_fails,
    "requests_astray": _requests_astray,
}
RARE: Final = frozenset({"log_rot", "misdirected", "engine_rot"})  # they leave a node damaged
APART: Final[Mapping[str, float]] = {  # shares of the seeds; see `drawn_apart`
    "engine_fails": 0.05,
    "requests_astray": 0.08,
}


def drawn_apart(seed: str, kind: str) -> bool:
    """Whether a seed has a kind of APART. Each is drawn by a generator of its own: the seeds without it stay as they are."""
    return random.Random(f"{seed}/kind/{kind}").random() < APART[kind]
