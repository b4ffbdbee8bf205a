"""What clients do in a simulation, and what they remember of it.

Registers: puts, gets and compare-and-swaps on single keys, each with values that are unique. Transactions: transfers
between accounts, random reads and writes with a marker row of their own, snapshots, over all ranges. Every operation
goes into the history with its outcome as the client may claim it: done, failed for good, or unknown.
"""

from __future__ import annotations

import asyncio
import random
from typing import Final

from kvstore.client import Database, Transaction
from kvstore.errors import KVError
from kvstore.sim.cluster import Client, SimCluster
from kvstore.testing.history import History, Outcome, RegisterOp, TxnOp

REGISTERS: Final = (b"a-reg", b"k-reg", b"z-reg", b"z-reh")
ACCOUNTS: Final = (b"b-acct0", b"d-acct1", b"j-acct2", b"o-acct3", b"q-acct4", b"y-acct5")
CELLS: Final = (b"c-cell0", b"f-cell1", b"i-cell2", b"n-cell3", b"p-cell4", b"t-cell5")
MARKERS: Final = (b"g-mark/", b"l-mark/", b"s-mark/")
BALANCE: Final = 100
ABANDONED_S: Final = 0.0


class Workload:
    """Some clients, each with one worker that does `ops` operations. A killed client is followed by a new one."""

    def __init__(
        self,
        cluster: SimCluster,
        rng: random.Random,
        *,
        clients: int,
        ops: int,
        pause_s: float,
        timeout_s: float,
    ) -> None:
        self.history = History()
        self.done = 0
        self.failed = 0
        self.unknown = 0
        self._cluster = cluster
        self._rng = rng
        self._ops, self._pause_s, self._timeout_s = ops, pause_s, timeout_s
        self._left = [ops] * clients
        self._clients: list[Client | None] = [None] * clients
        self._tasks: list[asyncio.Task[None] | None] = [None] * clients
        self._starting: list[asyncio.Task[None]] = []
        self._weights = [rng.random() + 0.05 for _ in range(8)]

    @property
    def initial(self) -> dict[bytes, bytes | None]:
        return {key: str(BALANCE).encode() for key in ACCOUNTS}

    async def prepare(self) -> None:
        """Money into the accounts, before anything goes wrong."""
        client = await self._cluster.client("setup")

        async def opened() -> None:
            while True:
                try:
                    for key, value in self.initial.items():
                        assert value is not None
                        await client.database.put(key, value, timeout=30.0)
                    return
                except KVError:
                    continue

        await client.process.call(opened())

    def begin(self) -> None:
        for place in range(len(self._left)):
            self._launch(place)

    def _launch(self, place: int) -> None:
        async def launched() -> None:
            name = f"c{place + 1}"
            client = await self._cluster.client(name, self._timeout_s)
            worker = Worker(self, client, random.Random(f"{self._cluster.seed}/{client.name}"))
            self._clients[place] = client
            self._tasks[place] = client.process.spawn(worker.run(place))

        self._starting.append(asyncio.get_running_loop().create_task(launched()))

    def victims(self) -> list[str]:
        return [client.name for client in self._clients if client is not None and not client.dead]

    def crashed(self, name: str) -> None:
        """Its operation under way stays unknown; somebody else goes on in its place."""
        for place, client in enumerate(self._clients):
            if client is not None and client.name == name:
                self._clients[place] = self._tasks[place] = None
                if self._left[place] > 0:
                    self._launch(place)

    @property
    def finished(self) -> bool:
        return all(self._finished(place) for place in range(len(self._left)))

    def _finished(self, place: int) -> bool:
        task = self._tasks[place]
        return self._left[place] <= 0 and (task is None or task.done())

    def take(self, place: int) -> bool:
        """Whether the worker at this place has one more operation to do."""
        self._left[place] -= 1
        return self._left[place] >= 0

    @property
    def pause_s(self) -> float:
        return self._pause_s

    @property
    def weights(self) -> list[float]:
        return self._weights

    def ended(self, op: RegisterOp | TxnOp, what: str) -> None:
        if op.outcome is Outcome.OK:
            self.done += 1
        elif op.outcome is Outcome.FAILED:
            self.failed += 1
        else:
            self.unknown += 1
        self._cluster.trace.note("op", op.client, what, op.outcome.value, op.version)


class Worker:
    """One client's operations, one after the other."""

    def __init__(self, workload: Workload, client: Client, rng: random.Random) -> None:
        self._workload = workload
        self._name = client.name
        self._database: Database = client.database
        self._rng = rng
        self._made = 0
        self._last: dict[bytes, tuple[bytes | None, int]] = {}  # what it saw last, by register

    async def run(self, place: int) -> None:
        kinds = (
            self._put,
            self._get,
            self._cas,
            self._put_if,
            self._transfer,
            self._mixed,
            self._snapshot,
            self._scan,
        )
        rng = self._rng
        while self._workload.take(place):
            await asyncio.sleep(rng.expovariate(1 / self._workload.pause_s))
            await rng.choices(kinds, self._workload.weights)[0]()

    def _unique(self) -> bytes:
        self._made += 1
        return f"{self._name}-{self._made}".encode()

    # -- registers

    def _begin(self, kind: str, value: bytes | None = None) -> RegisterOp:
        history = self._workload.history
        key = self._rng.choice(REGISTERS)
        op = RegisterOp(self._name, kind, key, history.tick(), value)
        history.registers.append(op)
        return op

    def _end(self, op: RegisterOp, error: KVError | None = None) -> None:
        if error is None:
            op.outcome = Outcome.OK
        elif not error.maybe_committed:
            op.outcome = Outcome.FAILED
        if op.outcome is not Outcome.UNKNOWN:
            op.end = self._workload.history.tick()
        code = error.code if error is not None else ""
        self._workload.ended(op, f"{op.kind} {op.key!r} {op.value!r} {op.swapped} {code}")

    async def _put(self) -> None:
        value = None if self._rng.random() < 0.1 else self._unique()
        op = self._begin("put", value)
        try:
            if value is None:
                op.version = await self._database.delete(op.key)
            else:
                op.version = await self._database.put(op.key, value)
        except KVError as error:
            self._end(op, error)
        else:
            self._end(op)

    async def _get(self) -> None:
        op = self._begin("get")
        try:
            entry = await self._database.get_entry(op.key)
        except KVError as error:
            self._end(op, error)
            return
        if entry is not None:
            op.value, op.version = entry.value, entry.version
        self._last[op.key] = (op.value, op.version)
        self._end(op)

    async def _cas(self) -> None:
        op = self._begin("cas", self._unique())
        op.expected = self._last.get(op.key, (None, 0))[0]
        try:
            op.swapped = await self._database.cas(op.key, op.expected, op.value)
        except KVError as error:
            self._end(op, error)
            return
        if op.swapped:
            self._last[op.key] = (op.value, 0)
        self._end(op)

    async def _put_if(self) -> None:
        """Only over the version that was seen last, which stands for its unique value."""
        op = self._begin("cas", self._unique())
        seen, version = self._last.get(op.key, (None, 0))
        op.expected = seen
        assert op.value is not None
        try:
            if seen is None:
                op.version = await self._database.put(op.key, op.value, if_absent=True)
            elif version:
                op.version = await self._database.put(op.key, op.value, if_version=version)
            else:
                op.swapped = await self._database.cas(op.key, op.expected, op.value)
        except KVError as error:
            if error.code == "compare_failed":
                op.swapped = False
                self._end(op)
            else:
                self._end(op, error)
            return
        if op.swapped:
            self._last[op.key] = (op.value, op.version)
        self._end(op)

    # -- transactions

    def _begin_txn(self, kind: str) -> TxnOp:
        history = self._workload.history
        op = TxnOp(self._name, f"{kind}/".encode() + self._unique(), history.tick())
        history.transactions.append(op)
        return op

    def _end_txn(self, op: TxnOp, error: KVError | None = None) -> None:
        if error is None:
            op.outcome = Outcome.OK
        else:
            op.error = error.code
            if not error.maybe_committed:
                op.outcome = Outcome.FAILED
        if op.outcome is not Outcome.UNKNOWN:
            op.end = self._workload.history.tick()
        self._workload.ended(op, f"{op.name!r} {op.error} {op.reads!r} {op.writes!r}")

    async def _commit(self, op: TxnOp, tx: Transaction) -> None:
        """Write what the operation says, with its marker, and commit."""
        op.writes[marker_of(op)] = b"1"
        for key, value in op.writes.items():
            if value is None:
                tx.delete(key)
            else:
                tx.put(key, value)
        version = await tx.commit()
        assert version is not None
        op.version = version

    async def _transfer(self) -> None:
        op = self._begin_txn("move")
        source, target = self._rng.sample(ACCOUNTS, 2)
        amount = self._rng.randint(1, 5)
        try:
            async with self._database.transaction() as tx:
                if self._rng.random() < 0.5:
                    found: dict[bytes, bytes] = await tx.get_many([source, target])
                else:
                    found = {key: await tx.get(key, b"0") for key in (source, target)}
                op.reads.update(found)
                op.writes[source] = str(int(found[source]) - amount).encode()
                op.writes[target] = str(int(found[target]) + amount).encode()
                await self._commit(op, tx)
        except KVError as error:
            self._end_txn(op, error)
        else:
            self._end_txn(op)

    async def _mixed(self) -> None:
        op = self._begin_txn("mixed")
        rng = self._rng
        try:
            async with self._database.transaction() as tx:
                for key in rng.sample(CELLS, rng.randint(0, 3)):
                    op.reads[key] = await tx.get(key)
                if rng.random() < 0.3:
                    start, end = sorted(rng.sample(CELLS, 2))
                    rows = dict(await tx.scan(start, end).to_list())
                    op.reads |= {key: rows.get(key) for key in CELLS if start <= key < end}
                if rng.random() < 0.1:
                    await asyncio.sleep(rng.expovariate(1 / 0.5))
                for key in rng.sample(CELLS, rng.randint(1, 3)):
                    op.writes[key] = None if rng.random() < 0.2 else self._unique()
                await self._commit(op, tx)
        except KVError as error:
            self._end_txn(op, error)
        else:
            self._end_txn(op)

    async def _snapshot(self) -> None:
        op = self._begin_txn("snap")
        keys = [*ACCOUNTS, *CELLS]
        self._rng.shuffle(keys)
        try:
            snapshot = self._database.snapshot()
            found = await snapshot.get_many(keys)
            op.reads = {key: found.get(key) for key in keys}
            op.version = await snapshot.version()
        except KVError as error:
            self._end_txn(op, error)
        else:
            self._end_txn(op)

    async def _scan(self) -> None:
        op = self._begin_txn("scan")
        try:
            snapshot = self._database.snapshot()
            reverse = self._rng.random() < 0.5
            found = dict(await snapshot.scan(b"", b"\xff", reverse=reverse).to_list())
            op.reads = {key: found.get(key) for key in (*ACCOUNTS, *CELLS)}
            op.version = await snapshot.version()
        except KVError as error:
            self._end_txn(op, error)
        else:
            self._end_txn(op)


def marker_of(op: TxnOp) -> bytes:
    """The row that only this transaction writes; in which range, its name says."""
    return MARKERS[sum(op.name) % len(MARKERS)] + op.name


async def read_markers(database: Database, history: History) -> dict[bytes, int]:
    """Name -> version of every transaction that left its marker."""
    found: dict[bytes, int] = {}
    for op in history.transactions:
        if op.writes:
            entry = await database.get_entry(marker_of(op), timeout=20.0)
            if entry is not None:
                found[op.name] = entry.version
    return found
