"""Claims of the router: one message per node and loop turn, ids that survive repetition, repetition that ends at the
deadline, corrections that are learned, and nothing left behind by what nobody waits for."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from kvstore.client import Database
from kvstore.errors import (
    ClientClosed,
    DeadlineExceeded,
    DiskFull,
    EpochMismatch,
    InvalidArgument,
    KVError,
    NoQuorum,
    Throttled,
    TransactionTooLarge,
    Unavailable,
    WrongCluster,
)
from kvstore.limits import MESSAGE_BYTES_MAX
from kvstore.link import encode_frame
from kvstore.ranges import META_KEY
from kvstore.reads import View
from kvstore.sim import loop as sim
from kvstore.sim.loop import EPOCH_S
from kvstore.streams import Stream
from replication.errors import FrameError
from tests.unit.kvstore.fake_cluster import FakeCluster, simulate
from tests.unit.kvstore.fake_pipes import Pipe
from txn.messages import (
    Failure,
    GetDirectory,
    GetTimestamps,
    Outcome,
    Prepare,
    PrepareReply,
    RangeInfo,
    Read,
    Scan,
)
from txn.types import begin_ts_of


def now() -> float:
    return asyncio.get_running_loop().time()


async def _ready(db: Database) -> None:
    """Every node is connected and a timestamp has been seen."""
    await db.get(b"a")
    await db.get(b"z")


def test_all_requests_of_one_turn_leave_as_one_message_per_node():
    async def test(cluster: FakeCluster, db: Database) -> None:
        await _ready(db)
        before = len(cluster.messages)
        await asyncio.gather(*(db.put(b"k%03d" % number, b"v") for number in range(200)))
        assert len(cluster.messages) == before + 1
        assert len(cluster.messages[-1][1]) == 200

    simulate(test)


def test_requests_for_ranges_of_several_nodes_make_one_message_for_each():
    async def test(cluster: FakeCluster, db: Database) -> None:
        await _ready(db)
        before = len(cluster.messages)
        await asyncio.gather(*(db.put(key, b"v") for key in (b"a", b"z", b"b", b"y")))
        assert [len(requests) for _node, requests in cluster.messages[before:]] == [2, 2]

    simulate(test, FakeCluster(b"m"))


def test_a_turn_with_much_to_send_is_cut_into_messages():
    async def test(cluster: FakeCluster, db: Database) -> None:
        await _ready(db)
        before = len(cluster.messages)
        value = bytes(300_000)
        await asyncio.gather(*(db.put(b"k%d" % number, value) for number in range(10)))
        sizes = [len(requests) for _node, requests in cluster.messages[before:]]
        assert sizes == [4, 4, 2]

    simulate(test)


def test_a_request_too_large_for_any_message_fails_alone_and_blocks_nothing():
    async def test(cluster: FakeCluster, db: Database) -> None:
        await _ready(db)
        until = db.router.monotonic() + 5
        large = Read(0, 0, 0, 0, [bytes(MESSAGE_BYTES_MAX)])
        put = asyncio.ensure_future(db.put(b"k", b"v"))
        with pytest.raises(TransactionTooLarge):
            await db.router.ask(large, b"k", b"", until)
        await put
        assert await db.get(b"k") == b"v"
        assert db.router.calls == 0

    simulate(test)


def test_a_request_that_no_message_can_hold_fails_alone_and_blocks_nothing():
    async def test(cluster: FakeCluster, db: Database) -> None:
        await _ready(db)
        until = db.router.monotonic() + 5
        puts = [asyncio.ensure_future(db.put(key, b"v")) for key in (b"k", b"z")]
        with pytest.raises(InvalidArgument, match="cannot be sent"):
            await db.router.ask(Read(0, 0, 0, 1 << 64, [b"k"]), b"k", b"", until)
        await asyncio.gather(*puts)
        assert await db.get(b"k") == b"v"
        assert db.router.calls == 0

    simulate(test)


def test_a_hint_to_another_leader_is_followed_at_once_and_remembered():
    async def test(cluster: FakeCluster, db: Database) -> None:
        await _ready(db)
        cluster.ranges[0] = _led_by(cluster.ranges[0], 2)
        began = now()
        version = await db.put(b"k", b"v")
        assert now() == began
        assert [node for node, request in cluster.requests if isinstance(request, Prepare)] == [
            1,
            2,
        ]
        first, second = cluster.of(Prepare)
        assert (first.id, first.txn_id) == (second.id, second.txn_id)
        assert cluster.value(b"k") == b"v"
        assert version == cluster.data[b"k"][-1].ts
        await db.put(b"k", b"w")
        assert cluster.requests[-1][0] == 2

    simulate(test)


def test_without_a_hint_the_other_replicas_are_asked():
    async def test(cluster: FakeCluster, db: Database) -> None:
        await _ready(db)
        cluster.ranges[0] = _led_by(cluster.ranges[0], 3)
        cluster.fail(Prepare, "not_leader", times=2)
        await db.put(b"k", b"v")
        assert [node for node, request in cluster.requests if isinstance(request, Prepare)] == [
            1,
            2,
            3,
        ]

    simulate(test)


def test_retries_carry_the_same_txn_id():
    async def test(cluster: FakeCluster, db: Database) -> None:
        await _ready(db)
        cluster.fail(Prepare, "unavailable", times=4)
        cluster.drop_replies(Prepare, times=1)
        version = await db.put(b"k", b"v")
        prepares = cluster.of(Prepare)
        assert len(prepares) >= 6
        assert len({prepare.txn_id for prepare in prepares}) == 1
        assert [each.ts for each in cluster.data[b"k"]] == [version]

    simulate(test)


def test_silence_is_met_with_another_try_and_the_first_versions_answer():
    async def test(cluster: FakeCluster, db: Database) -> None:
        await _ready(db)
        cluster.drop_replies(Prepare)
        began = now()
        version = await db.put(b"k", b"v")
        assert 1.0 <= now() - began < 1.2
        assert [each.ts for each in cluster.data[b"k"]] == [version]

    simulate(test)


def test_a_lost_connection_is_made_again_and_the_calls_go_on():
    async def test(cluster: FakeCluster, db: Database) -> None:
        await _ready(db)
        cluster.ignore(Prepare)
        call = asyncio.ensure_future(db.put(b"k", b"v"))
        await asyncio.sleep(0.01)
        began = now()
        cluster.network.cut()
        await call
        assert now() - began < 0.1
        assert len({prepare.txn_id for prepare in cluster.of(Prepare)}) == 1

    simulate(test)


def test_a_stopped_node_is_left_for_another_replica():
    async def test(cluster: FakeCluster, db: Database) -> None:
        await _ready(db)
        cluster.stop_node(1)
        cluster.ranges = [_led_by(each, 2) for each in cluster.ranges]
        began = now()
        await db.put(b"k", b"v")
        assert now() - began < 0.5

    simulate(test)


def test_a_split_is_learned_from_the_refusal():
    async def test(cluster: FakeCluster, db: Database) -> None:
        await _ready(db)
        cluster.set_ranges(b"m", version=2)
        await db.put(b"z", b"v")
        first, second = cluster.of(Prepare)
        assert first.txn_id == second.txn_id
        assert (first.version, second.version) == (1, 2)
        assert len([each for each in db.router.ranges if each.version == 2]) == 4

    simulate(test)


def test_a_refusal_that_says_nothing_of_the_ranges_makes_it_ask_for_the_directory():
    async def test(cluster: FakeCluster, db: Database) -> None:
        await _ready(db)
        asked = len(cluster.of(GetDirectory))
        cluster.set_ranges(b"m", version=2)
        cluster.fail(Prepare, "epoch_mismatch")
        await db.put(b"z", b"v")
        assert len(cluster.of(GetDirectory)) > asked

    simulate(test)


def test_a_span_that_no_longer_fits_one_range_is_given_back():
    async def test(cluster: FakeCluster, db: Database) -> None:
        await _ready(db)
        cluster.set_ranges(b"m", version=2)
        with pytest.raises(EpochMismatch):
            await db.router.ask(Read(0, 0, 0, 0, [b"a", b"z"]), b"a", b"z\x00", now() + 1.0)
        sent = len(cluster.of(Read))
        with pytest.raises(EpochMismatch):  # known by now: not even sent
            await db.router.ask(Read(0, 0, 0, 0, [b"a", b"z"]), b"a", b"z\x00", now() + 1.0)
        assert len(cluster.of(Read)) == sent

    simulate(test)


def test_throttled_waits_as_long_as_it_is_told():
    async def test(cluster: FakeCluster, db: Database) -> None:
        await _ready(db)
        cluster.fail(Prepare, "throttled", {"retry_after_s": 0.3})
        began = now()
        await db.put(b"k", b"v")
        assert now() - began == pytest.approx(0.3, abs=0.05)

    simulate(test)


@pytest.mark.parametrize(
    ("code", "error"), [("throttled", Throttled), ("unavailable", Unavailable), ("x", KVError)]
)
def test_what_a_server_goes_on_saying_is_what_the_reader_is_told(code: str, error: type[KVError]):
    async def test(cluster: FakeCluster, db: Database) -> None:
        await _ready(db)
        cluster.fail(Read, code, times=1_000)
        began = now()
        with pytest.raises(error) as caught:
            await db.get(b"k", timeout=2.0)
        assert caught.value.code == code
        assert now() - began <= 2.001

    simulate(test)


def test_silence_to_the_end_is_a_deadline_and_a_timeout_error():
    async def test(cluster: FakeCluster, db: Database) -> None:
        cluster.ignore(Read, times=100)
        began = now()
        with pytest.raises(DeadlineExceeded) as caught:
            await db.get(b"k", timeout=3.0)
        assert isinstance(caught.value, TimeoutError)
        assert now() - began == pytest.approx(3.0, abs=0.01)
        assert len(cluster.of(Read)) == 2  # after one second, and after two more

    simulate(test)


def test_an_error_that_no_repetition_helps_is_raised_at_once():
    async def test(cluster: FakeCluster, db: Database) -> None:
        await _ready(db)
        cluster.fail(Prepare, "disk_full")
        with pytest.raises(DiskFull):
            await db.put(b"k", b"v")
        assert len(cluster.of(Prepare)) == 1
        assert cluster.of(Outcome) == []

    simulate(test)


def test_a_cancelled_put_leaves_nothing_behind():
    async def test(cluster: FakeCluster, db: Database) -> None:
        await _ready(db)
        cluster.ignore(Prepare, times=100)
        calls = [asyncio.ensure_future(db.put(b"k%d" % number, b"v")) for number in range(50)]
        await asyncio.sleep(0.01)
        assert db.router.calls == 50
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        assert db.router.calls == 0
        assert not any(link.pending for link in db.router.links)

    simulate(test)


def test_a_cancelled_call_that_waits_for_its_next_try_leaves_nothing_behind():
    async def test(cluster: FakeCluster, db: Database) -> None:
        await _ready(db)
        cluster.fail(Read, "throttled", {"retry_after_s": 0.4}, times=100)
        call = asyncio.ensure_future(db.get(b"k"))
        await asyncio.sleep(0.01)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        assert db.router.calls == 0
        asked = len(cluster.of(Read))
        await asyncio.sleep(1.0)
        assert len(cluster.of(Read)) == asked

    simulate(test)


def test_a_call_cancelled_as_its_answer_arrives_is_harmless():
    async def test(cluster: FakeCluster, db: Database) -> None:
        await _ready(db)
        for turns in range(12):
            call = asyncio.ensure_future(db.put(b"k", b"v"))
            for _ in range(turns):
                await asyncio.sleep(0)
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)
            assert db.router.calls == 0
        assert await db.put(b"k", b"w")

    simulate(test)


def test_close_ends_what_waits_and_says_whether_it_may_have_happened():
    async def test(cluster: FakeCluster, db: Database) -> None:
        await _ready(db)
        cluster.ignore(Read, times=10)
        cluster.ignore(Prepare, times=10)
        read, write = asyncio.ensure_future(db.get(b"k")), asyncio.ensure_future(db.put(b"k", b"v"))
        await asyncio.sleep(0.01)
        await db.close()
        read_error, write_error = await asyncio.gather(read, write, return_exceptions=True)
        assert isinstance(read_error, ClientClosed)
        assert isinstance(write_error, KVError)
        assert write_error.maybe_committed
        with pytest.raises(ClientClosed):
            await db.put(b"k", b"v")

    simulate(test)


def test_questions_for_a_timestamp_of_one_turn_share_a_request_and_none_joins_one_that_left():
    async def test(cluster: FakeCluster, db: Database) -> None:
        until = now() + 1.0
        asks = [asyncio.ensure_future(db.router.timestamps(until)) for _ in range(10)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)  # it has left
        cluster.ts += 5
        later = asyncio.ensure_future(db.router.timestamps(until))
        await asyncio.gather(*asks, later)
        assert len(cluster.of(GetTimestamps)) == 2
        assert (await later).read_ts == cluster.ts

    simulate(test)


def test_starting_needs_only_one_node_of_the_list():
    cluster = FakeCluster()

    async def main(loop: sim.SimLoop) -> None:
        await cluster.start()
        cluster.stop_node(1)
        cluster.stop_node(2)
        cluster.ranges = [_led_by(each, 3) for each in cluster.ranges]
        began = now()
        async with cluster.database() as db:
            await db.put(b"k", b"v")
        assert now() - began < 1.0

    sim.run(main, 1, time_limit_s=60.0)


def test_nodes_that_are_not_connected_are_asked_for_ranges_that_the_connected_do_not_know():
    """A node tells of the ranges that it has replicas of: with more nodes than replicas, of some only."""
    cluster = FakeCluster(b"g", b"p", nodes=3)
    cluster.ranges = [
        msgspec.structs.replace(each, replicas=[(node, 10 + node)], leader_node=node)
        for node, each in zip((1, 2, 3, 1, 2), cluster.ranges, strict=True)
    ]

    async def test(cluster: FakeCluster, db: Database) -> None:
        await asyncio.gather(*(db.put(key, b"v") for key in (b"a", b"h", b"q")))
        assert now() < EPOCH_S + 1.0

    simulate(test, cluster)


def test_a_cluster_that_nobody_serves_is_unavailable():
    cluster = FakeCluster()

    async def main(loop: sim.SimLoop) -> None:
        began = now()
        with pytest.raises(Unavailable):
            await cluster.database(2.0).start()
        assert now() - began <= 2.1

    sim.run(main, 1, time_limit_s=60.0)


def test_a_cluster_without_ranges_is_waited_for_and_then_unavailable():
    cluster = FakeCluster()
    ranges, cluster.ranges = cluster.ranges, []

    async def main(loop: sim.SimLoop) -> None:
        await cluster.start()
        with pytest.raises(Unavailable, match="kvctl init"):
            async with cluster.database(1.0):
                pass
        loop.call_later(0.5, lambda: cluster.ranges.extend(ranges))
        async with cluster.database(2.0) as db:
            assert db.router.ranges.find(META_KEY)

    sim.run(main, 1, time_limit_s=60.0)


def test_another_cluster_is_refused():
    cluster = FakeCluster(nodes=1)

    async def main(loop: sim.SimLoop) -> None:
        await cluster.start()
        with pytest.raises(WrongCluster):
            await cluster.database(2.0, cluster="another").start()

    sim.run(main, 1, time_limit_s=60.0)


def test_bytes_that_do_not_decode_end_the_connection_and_nothing_else():
    async def test(cluster: FakeCluster, db: Database) -> None:
        await _ready(db)
        failure = msgspec.msgpack.encode([Failure(1, "throttled", "oops", {})])
        no_text = b"\x03" + failure.replace(b"oops", b"oo\xffs")
        for garbage in (b"\x03\xc1garbage", no_text, b""):
            channel = next(link.channel for link in db.router.links if link.channel is not None)
            assert isinstance(channel, Stream)
            pipe = channel._pipe
            assert isinstance(pipe, Pipe)
            pipe.inbox.append(encode_frame(0, 0, garbage))
            pipe.wake()
            assert await db.put(b"k", b"v")
            assert isinstance(channel.error, FrameError)

    simulate(test)


def test_an_answer_that_nobody_waits_for_is_dropped():
    async def test(cluster: FakeCluster, db: Database) -> None:
        await _ready(db)

        def twice(node: int, request: Prepare) -> PrepareReply:
            reply = cluster.handle(node, request)
            assert isinstance(reply, PrepareReply)
            cluster.also.append(reply)
            return reply

        cluster.fault(Prepare, twice)
        assert await db.put(b"k", b"v")
        assert await db.get(b"k") == b"v"

    simulate(test)


def test_scans_are_addressed_by_their_span():
    async def test(cluster: FakeCluster, db: Database) -> None:
        cluster.seed(a=b"1", z=b"2")
        assert await db.scan().to_list() == [(b"a", b"1"), (b"z", b"2")]
        assert [(scan.start, scan.end) for scan in cluster.of(Scan)] == [
            (b"", b"m"),
            (b"m", b"\xff"),
        ]

    simulate(test, FakeCluster(b"m"))


def test_reading_an_old_snapshot_does_not_make_its_timestamp_new():
    """A put after ten minutes of such reads begins at a timestamp of now: at the old one its outcome would be expired."""

    async def test(cluster: FakeCluster, db: Database) -> None:
        version = await db.put(b"k", b"v")
        old = db.router.seen_ts
        assert old == version
        view = View(
            db.router, 5.0, at=version
        )  # without the leases of a snapshot, which ask the oracle
        for _ in range(60):
            await asyncio.sleep(10.0)
            assert (await view.read((b"k",)))[b"k"].value == b"v"
        cluster.seed(other=b"v")  # others have gone on
        await db.put(b"k", b"w")
        assert begin_ts_of(cluster.of(Prepare)[-1].txn_id) > old

    simulate(test)


def test_a_read_of_the_newest_makes_its_timestamp_new_even_if_it_is_the_same():
    """So a put after it needs no question to the oracle, which may be out of reach."""

    async def test(cluster: FakeCluster, db: Database) -> None:
        await db.put(b"k", b"v")
        await asyncio.sleep(60.0)
        assert await db.get(b"k") == b"v"
        before = len(cluster.of(GetTimestamps))
        await db.put(b"k", b"w")
        assert len(cluster.of(GetTimestamps)) == before

    simulate(test)


def test_an_idle_cluster_is_asked_for_the_time_once_and_not_at_every_put():
    async def test(cluster: FakeCluster, db: Database) -> None:
        await db.put(b"k", b"v")
        await asyncio.sleep(60.0)
        before = len(cluster.of(GetTimestamps))
        await asyncio.gather(*[db.put(b"k%d" % number, b"v") for number in range(20)])
        await db.put(b"k", b"w")
        assert len(cluster.of(GetTimestamps)) <= before + 2

    simulate(test)


def test_a_range_that_nobody_leads_is_no_quorum_though_other_nodes_are_down():
    async def test(cluster: FakeCluster, db: Database) -> None:
        await _ready(db)
        cluster.stop_node(2)
        cluster.stop_node(3)
        cluster.fail(Read, "not_leader", {"leader_node": 0}, times=1_000)
        with pytest.raises(NoQuorum, match=r"range \d+ has no leader: .* answers.*kvctl status"):
            await db.get(b"k", timeout=3.0)

    simulate(test)


def test_a_range_that_has_a_leader_again_is_not_without_quorum():
    async def test(cluster: FakeCluster, db: Database) -> None:
        await _ready(db)
        cluster.fail(Read, "not_leader", {"leader_node": 0}, times=3)
        cluster.fail(Read, "throttled", {"retry_after": 0.5}, times=1_000)
        with pytest.raises(Throttled):
            await db.get(b"k", timeout=3.0)

    simulate(test)


def test_a_failure_with_odd_details_is_only_a_failure():
    async def test(cluster: FakeCluster, db: Database) -> None:
        await _ready(db)
        cluster.fail(Read, "not_leader", {"leader_node": "x", "address": 5})
        cluster.fail(Read, "epoch_mismatch", {"ranges": [[1, 2]]})
        cluster.fail(Read, "throttled", {"retry_after_s": "soon"})
        assert await db.get(b"k") is None

    simulate(test)


def _led_by(info: RangeInfo, node: int) -> RangeInfo:
    return RangeInfo(
        info.range_id, info.start, info.end, info.version, info.conf_ver, info.replicas, node
    )
