"""The snapshot stream: what arrives is what was sent, or the stream fails as a whole; the receiver sets the pace."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from replication.errors import FrameError
from replication.snapshot import (
    Chunk,
    Credit,
    End,
    Frame,
    Offer,
    SnapshotBroken,
    SnapshotLimits,
    SnapshotReceiver,
    SnapshotSender,
    Throttle,
    Wanted,
    checksum,
    decode,
    encode,
)
from replication.types import Membership, SnapshotMeta

LIMITS = SnapshotLimits(window_chunks=3)
OFFER = Offer(2, 1, 5, SnapshotMeta(100, 4, Membership(voters=(1, 2), nodes=((1, 1), (2, 2)))))


def sender(now: float = 0.0) -> SnapshotSender:
    return SnapshotSender(group=7, snapshot=42, node=2, offer=OFFER, limits=LIMITS, now=now)


def chunk(frame: bytes) -> Chunk:
    decoded = decode(frame)
    assert isinstance(decoded, Chunk)
    return decoded


def opened() -> tuple[SnapshotSender, SnapshotReceiver]:
    """A stream whose offer was taken and credited."""
    sending = sender()
    receiving = SnapshotReceiver(chunk(sending.next_frame(None, 0.0)), 1, LIMITS, 0.0)
    credit = receiving.credit(0.0)
    assert credit is not None
    sending.receive(credit, 0.0)
    return sending, receiving


@given(st.lists(st.binary(min_size=1, max_size=40), max_size=12))
def test_what_arrives_is_what_was_sent(data):
    sending, receiving = opened()
    assert receiving.offer == OFFER
    left, got = list(data), []
    while not receiving.complete:
        while sending.may_send():
            arrived = chunk(sending.next_frame(left.pop(0) if left else None, 0.0))
            got.append(receiving.receive(arrived, 0.0))
            receiving.taken(0.0)
        credit = receiving.credit(0.0)
        if credit is not None:
            sending.receive(credit, 0.0)
    assert [piece for piece in got if piece] == data
    assert not sending.may_send()
    sending.receive(End(7, 42, True), 0.0)
    assert sending.outcome is True


def test_only_the_offer_goes_without_credit():
    sending = sender()
    assert sending.may_send()
    assert sending.offering
    sending.next_frame(None, 0.0)
    assert not sending.may_send()
    sending.receive(Credit(7, 42, 3), 0.0)
    sending.next_frame(b"1", 0.0)
    sending.next_frame(b"2", 0.0)
    assert not sending.may_send()


def test_a_refusal_ends_the_stream():
    sending = sender()
    sending.next_frame(None, 0.0)
    sending.receive(End(7, 42, False, "busy"), 0.0)
    assert (sending.outcome, sending.reason) == (False, "busy")
    assert not sending.may_send()


def test_the_word_about_another_stream_is_ignored():
    sending = sender()
    sending.receive(End(7, 41, True), 0.0)
    sending.receive(End(8, 42, True), 0.0)
    sending.receive(Credit(7, 41, 9), 0.0)
    assert sending.outcome is None
    sending.next_frame(None, 0.0)
    assert not sending.may_send()


def damaged(one: Chunk) -> dict[str, Chunk]:
    replace = msgspec.structs.replace
    return {
        "a flipped bit": replace(one, data=bytes((one.data[0] ^ 1,)) + one.data[1:]),
        "a wrong checksum": replace(one, checksum=one.checksum ^ 1),
        "a lost chunk": replace(one, sequence=2, checksum=checksum(0, 7, 42, 2, one.data)),
        "a chunk of the first place": replace(one, sequence=0),
        "a chunk not asked for": replace(one, sequence=99),
        "a last chunk with data": replace(one, last=True),
        "a huge chunk": replace(one, data=bytes(LIMITS.chunk_bytes_max + 1)),
    }


@pytest.mark.parametrize("what", list(damaged(Chunk(7, 42, 1, 0, False, b"rows"))))
def test_a_damaged_stream_fails_as_a_whole(what):
    sending, receiving = opened()
    good = chunk(sending.next_frame(b"rows", 0.0))
    with pytest.raises(SnapshotBroken):
        receiving.receive(damaged(good)[what], 0.0)


def test_a_doubled_chunk_and_one_after_the_end_are_broken():
    sending, receiving = opened()
    first = chunk(sending.next_frame(b"rows", 0.0))
    receiving.receive(first, 0.0)
    with pytest.raises(SnapshotBroken):
        receiving.receive(first, 0.0)
    last = chunk(sending.next_frame(None, 0.0))
    assert receiving.receive(last, 0.0) == b""
    assert receiving.complete
    with pytest.raises(SnapshotBroken):
        receiving.receive(last, 0.0)


@pytest.mark.parametrize(
    "first",
    [
        Chunk(7, 42, 1, 0, False, b"x"),
        Chunk(7, 42, 0, 0, True, b""),
        Chunk(7, 42, 0, checksum(0, 7, 42, 0, b"x"), False, b"x"),
        Chunk(7, 42, 0, 1, False, encode(OFFER)),
    ],
    ids=["not the first", "the last", "no offer", "a wrong checksum"],
)
def test_a_stream_begins_with_an_intact_offer(first):
    with pytest.raises(SnapshotBroken):
        SnapshotReceiver(first, 1, LIMITS, 0.0)


def test_without_progress_both_sides_give_up():
    sending, receiving = opened()
    assert not receiving.expired(LIMITS.timeout_s - 0.1)
    assert receiving.expired(LIMITS.timeout_s)
    sending.tick(LIMITS.timeout_s - 0.1)
    assert sending.outcome is None
    deadline = sending.deadline()
    assert deadline == LIMITS.timeout_s
    sending.tick(deadline)
    assert sending.outcome is False
    assert sending.deadline() is None


def test_progress_puts_the_end_off():
    sending, receiving = opened()
    receiving.receive(chunk(sending.next_frame(b"x", 8.0)), 8.0)
    assert not receiving.expired(12.0)
    sending.tick(12.0)
    assert sending.outcome is None


def test_the_throttle_lets_a_burst_pass_and_then_the_rate():
    throttle = Throttle(rate_bytes_s=100.0, burst_bytes=50)
    assert throttle.take(50, 10.0) == 10.0
    assert throttle.take(25, 10.0) == pytest.approx(10.25)
    assert throttle.take(0, 10.25) == pytest.approx(10.25)
    assert throttle.take(50, 11.0) == 11.0


def test_credit_waits_for_the_throttle():
    sending, receiving = opened()
    receiving.receive(chunk(sending.next_frame(b"x", 0.0)), 0.0)
    receiving.taken(welcome_at=2.0)
    assert receiving.deadline() == 2.0
    assert receiving.credit(1.9) is None
    credit = receiving.credit(2.0)
    assert credit == Credit(7, 42, 2 + LIMITS.window_chunks)
    assert receiving.credit(2.0) is None


def test_a_throttle_that_is_slower_than_anybodys_patience_does_not_end_a_healthy_stream():
    sending, receiving = opened()
    throttle, left, now = Throttle(rate_bytes_s=100.0, burst_bytes=100), [bytes(3_000)] * 6, 0.0
    arrivals: list[float] = []
    while not receiving.complete:
        while sending.may_send():
            arrived = chunk(sending.next_frame(left.pop() if left else None, now))
            receiving.receive(arrived, now)
            receiving.taken(throttle.take(len(arrived.data), now))
            arrivals.append(now)
        now = receiving.deadline() or now
        sending.tick(now)
        assert sending.outcome is None
        assert not receiving.expired(now)
        credit = receiving.credit(now)
        if credit is not None:
            sending.receive(credit, now)
    waited = LIMITS.timeout_s / 2
    assert arrivals == [0.0, 0.0, 0.0, waited, 2 * waited, 3 * waited, 4 * waited]


@given(st.binary(max_size=60))
def test_bytes_that_are_no_frame_are_refused(payload):
    try:
        decode(payload)
    except FrameError:
        pass


def not_utf8(frame: Frame, reason: bytes) -> bytes:
    """The frame as another program could send it: its text of three letters is `reason`."""
    encoded = encode(frame)
    assert encoded.count(b"\xa3bad") == 1
    return encoded.replace(b"\xa3bad", b"\xa3" + reason)


def test_a_reason_that_is_not_utf8_is_a_frame_error():
    assert decode(not_utf8(End(7, 42, False, "bad"), b"yes")) == End(7, 42, False, "yes")
    with pytest.raises(FrameError):
        decode(not_utf8(End(7, 42, False, "bad"), b"\xff\xfe\xfd"))


def test_every_frame_survives_the_wire():
    for frame in (
        Chunk(7, 42, 1, 5, False, b"rows"),
        Credit(7, 42, 3),
        End(7, 42, False, "busy"),
        Wanted(7, 1, 2),
    ):
        assert decode(encode(frame)) == frame
