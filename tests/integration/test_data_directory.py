"""Claims: a data directory that is not whole (identity, log or rows gone, a format of tomorrow, records rotten) is refused
with a typed error and left as it is; a range whose vote may be forgotten is not begun anew."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import kvstore
from kvstore import identity
from kvstore.adapters.rocks_engine import RocksConfig, RocksEngine
from kvstore.adapters.wal_files import DirectoryLogFiles
from kvstore.bootstrap import mint_cluster_id, plan
from kvstore.config import NodeConfig, RaftSection
from kvstore.embedded import ADDRESS, EmbeddedAdapters
from kvstore.errors import (
    CorruptionError,
    DataDirectoryError,
    DiskFull,
    KVError,
    StorageError,
    VersionMismatch,
)
from kvstore.node import Node
from replication.types import HardState
from replication.wal import Wal
from replication.wal_format import BATCH_HEADER_BYTES, RECORD_HEADER_BYTES
from txn import keycode

ROOT = Path(__file__).resolve().parents[2]
BLOCK_BYTES = 4096
ADDRESSES = ["h1:1", "h2:2", "h3:3"]
PLANS = plan(mint_cluster_id(1_700_000_000_000, 7, ADDRESSES, []), ADDRESSES)


@pytest.fixture
async def data(tmp_path):
    """A directory in which some rows were written and the node was stopped."""
    async with kvstore.open(tmp_path / "data") as db:
        for number in range(40):
            await db.put(b"k%d" % number, b"v")
    return tmp_path / "data"


async def refusal(directory) -> KVError:
    """What opening ends in; the second time as the first, so nothing was changed by it."""
    found = []
    for _ in range(2):
        with pytest.raises(KVError) as caught:
            await kvstore.open(directory)
        found.append((type(caught.value), str(caught.value)))
    assert found[0] == found[1]
    return caught.value


async def ended(program: str) -> int:
    """A process of its own that runs it; what it exits with."""
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", program, cwd=ROOT)
    return await process.wait()


async def test_without_its_identity_a_directory_is_not_taken_for_an_empty_one(data):
    kept = (data / "node.toml").rename(data.parent / "kept.toml")
    error = await refusal(data)
    assert isinstance(error, DataDirectoryError)
    assert "holds a log but no node.toml" in str(error)
    kept.rename(data / "node.toml")
    async with kvstore.open(data) as db:
        assert await db.get(b"k1") == b"v"


@pytest.mark.parametrize("cut", [False, True])
async def test_rows_without_identity_and_log_are_not_wiped(data, cut):
    """Only `rocks` was put back, into a new directory; `cut`: not even all of it."""
    kept = data.parent / "kept"
    kept.mkdir()
    for name in ["node.toml", "wal", *(["rocks/CURRENT"] if cut else [])]:
        (data / name).rename(kept / Path(name).name)
    error = await refusal(data)
    assert isinstance(error, DataDirectoryError)
    assert "holds rows but no node.toml" in str(error)
    if cut:
        (kept / "CURRENT").rename(data / "rocks" / "CURRENT")
    for name in ("node.toml", "wal"):
        (kept / name).rename(data / name)
    async with kvstore.open(data) as db:
        assert await db.get(b"k1") == b"v"


async def test_what_a_former_cluster_heard_is_no_beginning_of_another_one(tmp_path):
    """It would count: `kvctl init`, cut off and run again, would take the nodes that it names for members that lost their
    disks.
    """
    (tmp_path / "heard.json").write_text("[2,3]")
    error = await refusal(tmp_path)
    assert isinstance(error, DataDirectoryError)
    assert "holds heard.json but no node.toml" in str(error)
    (tmp_path / "heard.json").unlink()
    async with kvstore.open(tmp_path) as db:
        await db.put(b"a", b"1")


async def test_what_an_unfinished_initialisation_left_is_no_obstacle(tmp_path):
    (tmp_path / "rocks").mkdir()
    (tmp_path / "rocks" / "000004.log").write_bytes(b"x")
    async with kvstore.open(tmp_path) as db:
        await db.put(b"a", b"1")


async def test_rows_that_were_half_removed_when_an_initialisation_began_anew_are_no_obstacle(
    tmp_path,
):
    engine = RocksEngine(tmp_path / "rocks", RocksConfig())
    engine.write({b"R12345678": b"x"})
    engine.close()
    for table in (tmp_path / "rocks").glob("*.sst"):
        table.unlink()
    async with kvstore.open(tmp_path) as db:
        await db.put(b"a", b"1")


@pytest.mark.parametrize("name", ["rocks", "wal"])
async def test_what_an_unfinished_initialisation_left_behind_a_link_is_removed_too(tmp_path, name):
    """`rocks` may be a link to another disk; rows that stayed there would belong to the new cluster."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "000004.old").write_bytes(b"x")
    (tmp_path / "other" / "lost+found").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / name).symlink_to("../other")
    async with kvstore.open(tmp_path / "data") as db:
        await db.put(b"a", b"1")
    assert not (tmp_path / "other" / "000004.old").exists()
    assert (tmp_path / "data" / name).is_symlink()
    assert any((tmp_path / "other").iterdir())
    async with kvstore.open(tmp_path / "data") as db:
        assert await db.get(b"a") == b"1"


async def test_what_cannot_be_removed_is_no_beginning_of_a_cluster(tmp_path, monkeypatch):
    (tmp_path / "rocks" / "old").mkdir(parents=True)

    def refusing(path, *_args, **_kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(shutil, "rmtree", refusing)
    error = await refusal(tmp_path)
    assert isinstance(error, DataDirectoryError)
    assert "rocks cannot be emptied (Permission denied)" in str(error)
    assert not (tmp_path / "node.toml").exists()


async def test_a_directory_is_free_after_close_though_a_forked_child_holds_its_files(tmp_path):
    """A lock belongs to the open file, which a child that forked inherits: closing our descriptor is not enough."""
    config = NodeConfig()
    adapters = EmbeddedAdapters(config)
    node = Node(str(tmp_path), ADDRESS, "", config, adapters)
    await node.start()
    inherited = os.dup(adapters._lock)
    try:
        await node.stop(drain=False)
        async with kvstore.open(tmp_path) as db:
            await db.put(b"a", b"1")
    finally:
        os.close(inherited)


@pytest.mark.parametrize("lost", [["rocks"], ["rocks", "wal"]])
async def test_without_its_rows_a_node_does_not_start_as_one_that_holds_no_ranges(data, lost):
    for name in lost:
        (data / name).rename(data.parent / name)
    error = await refusal(data)
    assert isinstance(error, DataDirectoryError)
    assert "put rocks and wal back" in str(error)
    assert not any((data / name).exists() for name in lost)
    for name in lost:
        (data.parent / name).rename(data / name)
    async with kvstore.open(data) as db:
        assert await db.get(b"k1") == b"v"


def placed(directory, number, rows):
    """A member that never ran, with the identity and the begun log of PLANS[number], and these rows."""
    engine = RocksEngine(directory / "rocks", RocksConfig())
    engine.write(rows)
    engine.close()
    files = DirectoryLogFiles(directory / "wal", spare=False)
    Wal.begin(files)
    files.close()
    found = identity.identity_of(PLANS[number])
    (directory / "node.toml").write_bytes(identity.encode_identity(found))
    config = NodeConfig()
    return Node(str(directory), ADDRESSES[number], "", config, EmbeddedAdapters(config))


async def refused(node) -> str:
    try:
        with pytest.raises(DataDirectoryError) as caught:
            await node.start()
    finally:
        await node.stop(drain=False)
    return str(caught.value)


async def test_rows_of_another_member_are_refused(tmp_path):
    """Node 2 has lost its disk, and gets its node.toml back, and rows and log of node 1: two disks would vote as one."""
    told = await refused(placed(tmp_path, 1, identity.first_rows(PLANS[0])))
    assert "the rows are of node 1 (range 1), and node.toml is of node 2" in told


async def test_rows_of_another_cluster_are_refused_and_those_of_an_older_version_name_none(
    tmp_path,
):
    other = plan(mint_cluster_id(1_700_000_000_000, 8, ADDRESSES, []), ADDRESSES)[0]
    told = await refused(placed(tmp_path / "a", 0, identity.first_rows(other)))
    assert f"the rows are of cluster {other.cluster_id}" in told
    rows = identity.first_rows(PLANS[0])
    del rows[keycode.CLUSTER_ROW]
    node = placed(tmp_path / "b", 0, rows)
    try:
        await node.start()
        assert node.state == "ready"
    finally:
        await node.stop(drain=False)


async def test_with_rows_of_nothing_a_node_does_not_start_either(data):
    shutil.rmtree(data / "rocks")
    RocksEngine(data / "rocks", RocksConfig()).close()
    error = await refusal(data)
    assert isinstance(error, CorruptionError)
    assert "the log has ranges [1, 2, 3] of which the engine has no rows" in str(error)


async def test_without_its_log_a_node_does_not_start(data):
    shutil.rmtree(data / "wal")
    assert isinstance(await refusal(data), CorruptionError)


async def test_without_its_log_a_node_does_not_start_though_nothing_of_it_was_flushed_to_the_rows(
    tmp_path,
):
    """The rows are as they were made, as after a crash before the log's beginning: but something was acknowledged."""
    path = tmp_path / "data"
    program = (
        "import asyncio, os, kvstore\n"
        "async def run():\n"
        f"    db = await kvstore.open({str(path)!r})\n"
        "    await db.put(b'a', b'1')\n"
        "    os._exit(9)\n"
        "asyncio.run(run())\n"
    )
    assert await ended(program) == 9
    (path / "wal").rename(tmp_path / "kept")
    error = await refusal(path)
    assert isinstance(error, CorruptionError)
    assert "nothing of the log is left" in str(error)
    (path / "wal").rmdir()
    (tmp_path / "kept").rename(path / "wal")
    async with kvstore.open(path) as db:
        assert await db.get(b"a") == b"1"


@pytest.mark.parametrize(
    ("number", "kind", "told"),
    [
        (errno.EACCES, DataDirectoryError, "let this user read and write there"),
        (errno.EROFS, DataDirectoryError, "let this user read and write there"),
        (errno.EIO, StorageError, "look after the disk"),
        (errno.ENOSPC, DiskFull, "No space left"),
    ],
)
async def test_a_log_that_cannot_be_written_is_a_typed_error(data, monkeypatch, number, kind, told):
    real = os.open

    def refusing(path, flags, *args, **options):
        if str(path).endswith("00000001.log") and flags & os.O_RDWR:
            raise OSError(number, os.strerror(number), str(path))
        return real(path, flags, *args, **options)

    monkeypatch.setattr(os, "open", refusing)
    error = await refusal(data)
    assert type(error) is kind
    assert "the log cannot be recovered: write segment 1" in str(error)
    assert told in str(error)


async def test_a_log_that_cannot_be_read_is_a_typed_error(data, monkeypatch):
    real = Path.read_bytes

    def refusing(path):
        if path.suffix == ".log":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", refusing)
    error = await refusal(data)
    assert isinstance(error, DataDirectoryError)
    assert "let this user read and write there" in str(error)


@pytest.mark.parametrize("name", ["", "rocks", "wal"])
async def test_a_dangling_link_says_so(tmp_path, name):
    """The disk that it links to is not mounted."""
    link = tmp_path / "data" / name
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(tmp_path / "other")
    error = await refusal(tmp_path / "data")
    assert isinstance(error, DataDirectoryError)
    assert f"{link} links to {tmp_path / 'other'}, which is not there" in str(error)
    (tmp_path / "other").mkdir()
    async with kvstore.open(tmp_path / "data") as db:
        await db.put(b"a", b"1")


@pytest.mark.parametrize(("call", "name"), [("is_symlink", "rocks"), ("unlink", "spare")])
async def test_a_directory_that_this_user_may_not_enter_says_so(data, monkeypatch, call, name):
    done = getattr(Path, call)

    def refused(path: Path, **options: bool) -> object:
        if path.name == name:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return done(path, **options)

    monkeypatch.setattr(Path, call, refused)
    error = await refusal(data)
    assert isinstance(error, DataDirectoryError)
    assert "Permission denied" in str(error)
    monkeypatch.undo()
    async with kvstore.open(data) as db:
        assert await db.get(b"k0") == b"v"


async def test_why_the_rows_of_an_unfinished_initialisation_cannot_be_looked_at_is_told(
    tmp_path, monkeypatch
):
    """That says nothing of whose rows they are, and nothing has to be put back."""
    with contextlib.closing(RocksEngine(tmp_path / "rocks", RocksConfig())) as engine:
        engine.write(identity.first_rows(PLANS[0]))
        engine.flush()
    with monkeypatch.context() as patch:

        def full(*_: object) -> RocksEngine:
            raise DiskFull("no space left")

        patch.setattr("kvstore.adapters.production.RocksEngine", full)
        assert isinstance(await refusal(tmp_path), DiskFull)
    async with kvstore.open(tmp_path) as db:
        await db.put(b"a", b"1")


async def test_a_log_that_is_all_rotten_is_none(data):
    (segment,) = sorted((data / "wal").glob("*.log"))
    image = b"\xff" * segment.stat().st_size
    segment.write_bytes(image)
    assert isinstance(await refusal(data), CorruptionError)
    assert segment.read_bytes() == image, "it is evidence"


@pytest.mark.parametrize("torn", [False, True])
async def test_a_log_that_an_unfinished_initialisation_began_is_no_obstacle(tmp_path, torn):
    (tmp_path / "wal").mkdir()
    files = DirectoryLogFiles(tmp_path / "wal")
    Wal.begin(files)
    if torn:
        files.write(1, 0, bytes(512))
    files.close()
    async with kvstore.open(tmp_path) as db:
        await db.put(b"a", b"1")
    async with kvstore.open(tmp_path) as db:
        assert await db.get(b"a") == b"1"


@pytest.mark.parametrize("step", ["engine flushed", "log begun", "node.toml written"])
async def test_a_directory_is_whole_wherever_its_first_opening_ends(tmp_path, step):
    owner, name = {
        "engine flushed": ("kvstore.adapters.rocks_engine.RocksEngine", "flush"),
        "log begun": ("replication.wal.Wal", "begin"),
        "node.toml written": ("kvstore.adapters.wal_files.DirectoryFiles", "write_file"),
    }[step]
    module, _, kind = owner.rpartition(".")
    program = (
        "import os, kvstore\n"
        f"from {module} import {kind}\n"
        f"real = {kind}.{name}\n"
        "def last(*args, **options):\n"
        "    real(*args, **options)\n"
        "    os._exit(9)\n"
        f"{kind}.{name} = last\n"
        f"with kvstore.Client.open({str(tmp_path / 'data')!r}): pass\n"
    )
    assert await ended(program) == 9
    assert (tmp_path / "data" / "node.toml").exists() == (step == "node.toml written")
    async with kvstore.open(tmp_path / "data") as db:
        await db.put(b"a", b"1")
    async with kvstore.open(tmp_path / "data") as db:
        assert await db.get(b"a") == b"1"


async def test_a_newer_format_is_a_version_mismatch(data):
    file = data / "node.toml"
    file.write_text(file.read_text().replace("format = 2", "format = 3"))
    assert isinstance(await refusal(data), VersionMismatch)


async def test_a_path_that_cannot_be_a_directory_says_what_to_do(tmp_path):
    (tmp_path / "file").write_text("")
    error = await refusal(tmp_path / "file")
    assert isinstance(error, DataDirectoryError)
    assert "name another --dir" in str(error)


async def test_a_range_of_which_the_rotten_log_says_nothing_is_not_begun_anew(data):
    """The system's last range wrote nothing but its beginning: with that gone, nobody knows how it voted."""
    (segment,) = sorted((data / "wal").glob("*.log"))
    image = bytearray(segment.read_bytes())
    used = [start for start in range(0, len(image), BLOCK_BYTES) if any(image[start : start + 64])]
    assert len(used) > 20
    for start in used[: len(used) // 2]:
        image[start + 8] ^= 0xFF  # every batch header of the first half
    segment.write_bytes(image)

    config = NodeConfig(raft=RaftSection(election_timeout_s=0.2, heartbeat_s=0.05))
    node = Node(str(data), ADDRESS, "", config, EmbeddedAdapters(config))
    try:
        await node.start()
        assert node.host is not None
        assert 3 in node.host.refused
        assert 3 not in node.host.groups()
        assert "vote" in node.host.refused[3]
    finally:
        await node.stop(drain=False)


@pytest.mark.parametrize("what", ["header", "body"])
async def test_damage_that_costs_nothing_is_named(data, caplog, what):
    """Of a record that later ones have replaced nothing is missing: but the disk that did it has other rows."""
    files = DirectoryLogFiles(data / "wal", spare=False)
    wal, recovered = Wal.recover(files)
    batches = []
    for step in range(3):
        if step == 0:
            wal.set_hard_state(3, HardState(900, 1, 1))
        elif step == 1:
            for group, found in recovered.items():
                wal.set_hard_state(group, found.hard_state)
        else:
            wal.sync_mark()
        batch = wal.take()
        assert batch is not None
        files.write(batch.segment, batch.offset, batch.data)
        files.sync(batch.segment)
        wal.synced(batch.number)
        batches.append(batch)
    files.close()
    lost = batches[0]
    at = lost.offset + (0 if what == "header" else BATCH_HEADER_BYTES + RECORD_HEADER_BYTES)
    with (data / "wal" / f"{lost.segment:08d}.log").open("r+b") as file:
        file.seek(at)
        file.write(b"\xff")

    config = NodeConfig(raft=RaftSection(election_timeout_s=0.2, heartbeat_s=0.05))
    node = Node(str(data), ADDRESS, "", config, EmbeddedAdapters(config))
    try:
        await node.start()
        assert node.host is not None
        assert not node.host.refused
        assert node.status()["log"]["damaged_places"] == 1
    finally:
        await node.stop(drain=False)
    (told,) = [each for each in caplog.records if "the log is damaged" in each.getMessage()]
    assert vars(told)["places"] == [(lost.segment, at)]


@pytest.mark.parametrize(
    ("files", "tables"), [(1_024, 128), (65_536, 8_192), (resource.RLIM_INFINITY, -1)]
)
async def test_rows_keep_no_more_files_open_than_the_process_may_have(
    tmp_path, monkeypatch, files, tables
):
    """A file for each 64 MiB: 16 GiB of them were all that a process with 1,024 has beside its connections."""
    monkeypatch.setattr(resource, "getrlimit", lambda _: (files, files))
    async with kvstore.open(tmp_path) as db:
        await db.put(b"a", b"1")
    (options,) = sorted((tmp_path / "rocks").glob("OPTIONS-*"))[-1:]
    assert f"max_open_files={tables}\n" in options.read_text()


def test_a_program_that_opens_a_store_prints_what_it_prints_and_nothing_else(tmp_path):
    program = (
        "import kvstore\n"
        f"with kvstore.Client.open({str(tmp_path / 'data')!r}) as db:\n"
        "    db.put(b'a', b'1'); print(db.get(b'a'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("b'1'\n", "")
