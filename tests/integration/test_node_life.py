"""Claims: an initialisation that fails leaves nothing open and can be tried again, or the node says that it failed; one that
is overtaken by a stop opens nothing; and a stop releases everything, whatever fails on its way."""

from __future__ import annotations

import asyncio
import errno
import os
import threading

import pytest

import kvstore
from kvstore.adapters import wal_files
from kvstore.adapters.local_network import LocalNetwork
from kvstore.adapters.rocks_engine import RocksEngine
from kvstore.adapters.wal_files import DirectoryFiles, DirectoryLogFiles
from kvstore.bootstrap import mint_cluster_id, plan
from kvstore.config import NodeConfig
from kvstore.embedded import ADDRESS, EmbeddedAdapters
from kvstore.errors import DiskFull, InvalidArgument, NodeStopped, NotReady, StorageError
from kvstore.identity import FILE_NAME
from kvstore.node import Node

REQUEST = plan(mint_cluster_id(1_700_000_000_000, 1, [ADDRESS], []), [ADDRESS])[0]


def fail_once(monkeypatch, owner, name):
    """The next call finds the disk full."""
    real = getattr(owner, name)

    def failing(*_args, **_kwargs):
        monkeypatch.setattr(owner, name, real)
        raise DiskFull("no space left")

    monkeypatch.setattr(owner, name, failing)


class Gate:
    """A call of a thread that waits there until it is let through."""

    def __init__(self, monkeypatch, owner, name):
        self._loop = asyncio.get_running_loop()
        self._real = getattr(owner, name)
        self._open = threading.Event()
        self.reached = asyncio.Event()

        def gated(engine):
            self._pass(engine)

        monkeypatch.setattr(owner, name, gated)

    def _pass(self, engine):
        if threading.current_thread() is not threading.main_thread():
            self._loop.call_soon_threadsafe(self.reached.set)
            assert self._open.wait(50.0)
        self._real(engine)

    def let_through(self):
        self._open.set()


@pytest.mark.parametrize("step", ["write", "flush"])
async def test_an_initialisation_that_found_the_disk_full_can_be_repeated(
    waiting, monkeypatch, step
):
    real_init = RocksEngine.__init__

    def failing_init(engine, *args):
        real_init(engine, *args)
        if step == "write":
            fail_once(monkeypatch, engine, "_write")

    if step == "flush":
        fail_once(monkeypatch, RocksEngine, "flush")
    else:
        monkeypatch.setattr(RocksEngine, "__init__", failing_init)
    with pytest.raises(DiskFull):
        await waiting.initialize(REQUEST)
    monkeypatch.setattr(RocksEngine, "__init__", real_init)
    assert (waiting.state, waiting.cluster_id) == ("waiting", "")
    await waiting.initialize(REQUEST)
    assert waiting.state == "ready"


@pytest.mark.parametrize("step", ["create", "write", "sync", "write_file"])
@pytest.mark.parametrize(("errno_", "told"), [(errno.ENOSPC, DiskFull), (errno.EIO, StorageError)])
async def test_an_initialisation_whose_log_could_not_be_begun_can_be_repeated(
    waiting, monkeypatch, tmp_path, step, errno_, told
):
    owner, name = {
        "create": (wal_files, "_reserve"),
        "write": (os, "pwrite"),
        "sync": (wal_files, "_sync_data"),
        "write_file": (DirectoryFiles, "write_file"),
    }[step]
    with monkeypatch.context() as broken:

        def failing(*_args):
            raise OSError(errno_, "broken")

        broken.setattr(owner, name, failing)
        with pytest.raises(OSError if step == "write_file" else told):
            await waiting.initialize(REQUEST)
    assert (waiting.state, waiting.cluster_id) == ("waiting", "")
    assert not (tmp_path / FILE_NAME).exists()
    await waiting.initialize(REQUEST)
    assert waiting.state == "ready"


async def test_a_plan_with_an_address_under_which_the_node_would_not_start_again_is_refused(
    waiting, tmp_path
):
    """As with --listen 0.0.0.0:7400 and no --advertise: init would work, and every start after it be refused."""
    other = plan(mint_cluster_id(1_700_000_000_000, 1, ["db1:7400"], []), ["db1:7400"])[0]
    with pytest.raises(InvalidArgument, match="--advertise db1:7400"):
        await waiting.initialize(other)
    assert (waiting.state, waiting.cluster_id) == ("waiting", "")
    assert not (tmp_path / FILE_NAME).exists()
    await waiting.initialize(REQUEST)
    await waiting.initialize(REQUEST)


async def test_a_plan_from_a_clock_that_is_far_ahead_is_refused(waiting, tmp_path):
    """Timestamps would begin there, and nothing would grow old before that time has come."""
    now_ms = waiting.adapters.clock.wall_ms()
    early, late = (
        plan(mint_cluster_id(now_ms + minutes * 60_000, 1, [ADDRESS], []), [ADDRESS])[0]
        for minutes in (50, 70)
    )
    with pytest.raises(InvalidArgument, match=r"is 4\d\d\d s ahead of this node's"):
        await waiting.initialize(late)
    assert (waiting.state, waiting.cluster_id) == ("waiting", "")
    assert not (tmp_path / FILE_NAME).exists()
    await waiting.initialize(early)


@pytest.mark.parametrize("advertised", ["", "db1:7400"])
async def test_a_node_starts_again_under_the_address_of_its_plan(tmp_path, advertised):
    config = NodeConfig()
    own = advertised or ADDRESS
    request = plan(mint_cluster_id(1_700_000_000_000, 1, [own], []), [own])[0]
    for turn in range(2):
        node = Node(str(tmp_path), ADDRESS, advertised, config, EmbeddedAdapters(config))
        await node.start()
        if not turn:
            await node.initialize(request)
        assert node.state == "ready"
        await node.stop(drain=False)


async def test_a_name_that_is_listened_at_is_the_nodes_address_and_port_0_becomes_the_real_one(
    tmp_path, monkeypatch
):
    found = []
    for listen in ("localhost:0", "name:1"):
        adapters = EmbeddedAdapters(NodeConfig())

        async def serve(*_):
            return "127.0.0.1:9"

        monkeypatch.setattr(adapters, "serve", serve)
        node = Node(str(tmp_path), listen, "", NodeConfig(), adapters)
        await node.start()
        found.append(node.address)
        await node.stop(drain=False)
    assert found == ["127.0.0.1:9", "name:1"]


async def test_a_new_member_is_not_ready_before_it_serves(waiting):
    assert waiting.ready() == (False, "waiting")
    await waiting.initialize(REQUEST)
    found, reason = waiting.ready()
    assert not found
    assert "ranges" in reason
    async with asyncio.timeout(20.0):
        while not waiting.ready()[0]:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0)
    assert await waiting.database.get(b"k", timeout=1.0) is None


async def test_a_member_that_could_not_be_opened_has_failed_and_says_so(waiting, monkeypatch):
    fail_once(monkeypatch, waiting, "_add_replicas")
    with pytest.raises(DiskFull):
        await waiting.initialize(REQUEST)
    assert not waiting.live()
    assert isinstance(waiting.fatal.exception(), DiskFull)
    with pytest.raises(NotReady, match="failed"):
        await waiting.initialize(REQUEST)


async def test_a_stop_during_an_initialisation_waits_for_it_and_nothing_is_opened(
    waiting, monkeypatch, tmp_path
):
    flush = Gate(monkeypatch, RocksEngine, "flush")
    initializing = asyncio.ensure_future(waiting.initialize(REQUEST))
    await flush.reached.wait()
    stopping = asyncio.ensure_future(waiting.stop(drain=False))
    await asyncio.sleep(0)
    flush.let_through()
    with pytest.raises(NodeStopped):
        await initializing
    await stopping
    assert waiting.state == "stopped"
    assert waiting.engine is None
    assert not (tmp_path / FILE_NAME).exists()
    async with kvstore.open(tmp_path) as db:
        await db.put(b"k", b"1")


# --- the end


@pytest.mark.parametrize("owner", [RocksEngine, DirectoryLogFiles, LocalNetwork])
async def test_a_directory_is_given_up_though_something_in_it_could_not_be_closed(
    tmp_path, monkeypatch, owner
):
    db = await kvstore.open(tmp_path)
    await db.put(b"k", b"1")
    real = owner.close

    def failing(*args):
        monkeypatch.setattr(owner, "close", real)
        closed = real(*args)
        if closed is not None:
            closed.close()  # a coroutine
        raise DiskFull("no space left")

    monkeypatch.setattr(owner, "close", failing)
    with pytest.raises(DiskFull):
        await db.close()
    async with kvstore.open(tmp_path) as db:
        assert await db.get(b"k") == b"1"


async def test_a_close_that_is_cancelled_comes_to_its_end(tmp_path, monkeypatch):
    db = await kvstore.open(tmp_path)
    await db.put(b"k", b"1")
    close = Gate(monkeypatch, RocksEngine, "close")
    closing = asyncio.ensure_future(db.close())
    await close.reached.wait()
    closing.cancel()
    await asyncio.sleep(0)
    close.let_through()
    with pytest.raises(asyncio.CancelledError):
        await closing
    async with kvstore.open(tmp_path) as db:
        assert await db.get(b"k") == b"1"
