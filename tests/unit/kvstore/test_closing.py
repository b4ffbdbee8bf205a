"""Claims of the samples of issued timestamps: what was asked for after an acknowledgement covers it; what was asked for long
enough ago had been issued by then; they are bounded. Of messages of peers: what is none ends the stream. Of a replica that has
no state to read from: whoever takes it for the leader is told that it is not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kvstore import closing
from kvstore.closing import Closer, ReplicaReads, Samples
from replication.errors import FrameError
from tests.unit.txn.txn_driver import Range, stored
from txn.messages import READ_KEYS_MAX, STALE_RANGES_MAX, Failure, Read, ReadReply, Stale


def test_since_is_the_first_question_that_was_asked_then_or_later():
    samples = Samples()
    for number in range(5):
        samples.add(float(number), 100 + number, 0.1)
    assert samples.since(1.5) == 102
    assert samples.since(2.0) == 102
    assert samples.since(4.1) == 0  # nothing is known
    assert samples.last_asked_at == 4.0


def test_before_is_the_last_one_asked_by_then():
    samples = Samples()
    samples.add(1.0, 100, 0.1)
    samples.add(2.0, 110, 0.1)
    assert [samples.before(when) for when in (0.9, 1.0, 1.9, 2.0, 9.0)] == [0, 100, 100, 110, 110]


def test_answers_close_together_are_not_all_kept_and_none_goes_back():
    samples = Samples()
    samples.add(1.0, 100, 0.5)
    samples.add(1.2, 105, 0.5)
    assert samples.before(2.0) == 100
    samples.add(2.0, 90, 0.5)
    assert samples.before(3.0) == 100


def test_they_are_bounded_and_the_young_stay(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(closing, "SAMPLES_MAX", 8)
    samples = Samples()
    for number in range(100):
        samples.add(float(number), number + 1, 0.1)
    assert samples.before(99.0) == 100
    assert samples.since(0.0) > 90  # stricter than need be: never staler


def test_they_reach_back_a_day_the_older_the_fewer():
    """So a bound of an hour is not one of a minute when a range has lost its leader, and a lag of minutes closes something."""
    samples, day = Samples(), 86_400
    for second in range(day):
        samples.add(float(second), second, 0.1)
        assert len(samples) <= closing.SAMPLES_MAX
    for age in (2, 60, 600, 3_600, day // 2):
        asked = day - age
        assert asked - age / 8 < samples.before(asked) <= asked
        assert asked <= samples.since(asked) < asked + age / 8


@pytest.mark.parametrize("payload", [b"", b"\xc1", b"\x91\x01", b"\x91\x94\x01\x01\x01\xa1x"])
def test_what_is_no_message_is_a_malformed_frame(payload: bytes):
    store: Any = SimpleNamespace(replicas={})
    with pytest.raises(FrameError):
        Closer(store, 1.0).hear(payload)


@pytest.mark.parametrize(("last", "code"), [(False, "replica_behind"), (True, "not_leader")])
@pytest.mark.parametrize("why", ["installing", "receiving", "refused"])
def test_a_replica_without_state_sends_on_whoever_takes_it_for_the_leader(
    why: str, last: bool, code: str
):
    store: Any = SimpleNamespace(
        is_refused=lambda _number: why == "refused",
        not_leader=lambda number, _replica: Failure(number, "not_leader"),
    )
    row = SimpleNamespace(installing=why == "installing")
    replica: Any = SimpleNamespace(
        range_id=7, state=SimpleNamespace(row=row), receiving=why == "receiving"
    )
    request = Read(5, 7, 0, 0, [b"k"], Stale(1000, last=last))
    reply = ReplicaReads(store, Closer(store, 1.0)).read(replica, request, 10.0)
    assert isinstance(reply, Failure)
    assert (reply.id, reply.code) == (5, code)


def test_a_bound_beyond_the_retention_finds_what_is_kept_and_not_what_is_gone():
    """Another range of the same node is far behind: its safe timestamp is no version of this one any more."""

    def replica_of(number: int, safe: int) -> Any:
        place = Range()
        stored(place, b"k")
        place.state.row.gc_threshold = 500 * (number == 7)
        return SimpleNamespace(
            range_id=number, state=place.state, receiving=False, safe_ts=safe, evaluator=None
        )

    store: Any = SimpleNamespace(is_refused=lambda _number: False, engine=Range().rows)
    store.replicas = {7: replica_of(7, 900), 8: replica_of(8, 400)}
    closer = Closer(store, 1.0)
    closer.sample(0.0, 300)
    closer.sample(60.0, 900)
    reads, hour = ReplicaReads(store, closer), 3_600_000
    alone = reads.read(store.replicas[7], Read(5, 7, 0, 0, [b"k"], Stale(hour, 0, [7])), 61.0)
    assert isinstance(alone, ReadReply)
    assert alone.at == 900
    both = reads.read(store.replicas[7], Read(5, 7, 0, 0, [b"k"], Stale(hour, 0, [7, 8])), 61.0)
    assert isinstance(both, Failure)
    assert both.code == "replica_behind"


@pytest.mark.parametrize(("keys", "ranges"), [(READ_KEYS_MAX + 1, 0), (1, STALE_RANGES_MAX + 1)])
def test_a_stale_read_is_no_larger_than_a_client_makes_it(keys: int, ranges: int):
    store: Any = SimpleNamespace()
    replica: Any = SimpleNamespace()
    request = Read(5, 7, 0, 0, [b"k"] * keys, Stale(1000, 0, list(range(ranges))))
    reply = ReplicaReads(store, Closer(store, 1.0)).read(replica, request, 10.0)
    assert isinstance(reply, Failure)
    assert (reply.id, reply.code) == (5, "invalid_argument")
