"""Claims of the link core: who may say what and when, that frames are whole or refused, that everything is bounded,
and that a peer that lives is kept while one that has stalled is given up."""

from __future__ import annotations

import random
import struct
from itertools import product

import msgspec
import pytest
from crc32c import crc32c
from hypothesis import given
from hypothesis import strategies as st

from kvstore import link
from kvstore.errors import (
    AuthenticationError,
    InvalidArgument,
    KVError,
    PipeClosed,
    Throttled,
    VersionMismatch,
    WrongCluster,
)
from kvstore.link import (
    BODY_BYTES_MAX,
    HEADER_BYTES,
    HELLO,
    LANES,
    LEGAL,
    MESSAGE_OVERHEAD_BYTES,
    MORE,
    PING,
    PONG,
    REFUSE,
    WIRE_BYTES_MAX,
    Hello,
    LinkCore,
    LinkLimits,
    LinkState,
    MalformedFrame,
    PeerStalled,
    WrongNode,
    agreed_version,
    encode_frame,
)
from replication.errors import FrameError

FLAGS = (0, MORE, PING, PONG, HELLO, REFUSE)
LIMITS = LinkLimits(
    queue_bytes_max=2_000_000,
    message_bytes_max=1_500_000,
    handshake_timeout_s=3.0,
    ping_interval_s=1.0,
    stall_timeout_s=4.0,
)


def new_core(*, dialler: bool, hello: Hello | None = None, check=None, limits=LIMITS) -> LinkCore:
    return LinkCore(dialler=dialler, hello=hello or Hello(), limits=limits, now=0.0, check=check)


def opened(now: float = 0.0, limits: LinkLimits = LIMITS) -> tuple[LinkCore, LinkCore]:
    near, far = new_core(dialler=True, limits=limits), new_core(dialler=False, limits=limits)
    shuttle(near, far, now)
    assert near.state is far.state is LinkState.OPEN
    return near, far


def shuttle(a: LinkCore, b: LinkCore, now: float) -> dict[LinkCore, list[bytes]]:
    """Carry frames both ways until nothing is left; what each side received."""
    got: dict[LinkCore, list[bytes]] = {a: [], b: []}
    while a.has_output() or b.has_output():
        for source, target in ((a, b), (b, a)):
            while (frame := source.take(now)) is not None:
                message = target.receive(frame, now)
                if message is not None:
                    got[target].append(message)
    return got


def taken(core: LinkCore, now: float = 0.0) -> bytes:
    frame = core.take(now)
    assert frame is not None
    return frame


def said(core: LinkCore, now: float = 0.0, payload: bytes = b"x") -> bytes:
    frame = core.direct(payload, now)
    assert frame is not None
    return frame


# --- handshake ------------------------------------------------------------------------------------


def test_after_the_handshake_each_side_knows_the_other():
    near = new_core(dialler=True, hello=Hello(cluster="c", node=1, kind="peer", to=2))
    far = new_core(dialler=False, hello=Hello(cluster="c", node=2, kind="peer"))
    shuttle(near, far, 0.0)
    assert near.peer is not None
    assert far.peer is not None
    assert (near.peer.node, far.peer.node) == (2, 1)
    assert near.version == far.version == link.PROTOCOL_VERSION


@pytest.mark.parametrize(
    ("mine", "theirs", "version"),
    [
        ((1, 1), (1, 1), 1),
        ((3, 1), (2, 2), 2),  # a rolling upgrade: the newer one speaks the older one's version
        ((3, 3), (2, 1), None),
        ((1, 1), (5, 4), None),
    ],
)
def test_the_newest_common_version_is_agreed_upon(mine, theirs, version):
    a, b = (Hello(protocol=new, protocol_min=old) for new, old in (mine, theirs))
    assert agreed_version(a, b) == agreed_version(b, a) == version


@pytest.mark.parametrize(
    ("near", "far", "error"),
    [
        (Hello(protocol=9, protocol_min=9), Hello(), VersionMismatch),
        (Hello(cluster="red"), Hello(cluster="blue"), WrongCluster),
        (Hello(node=1, to=2), Hello(node=3), WrongNode),
    ],
)
def test_a_refusal_is_the_same_typed_error_on_both_sides(near, far, error):
    dialling, accepting = new_core(dialler=True, hello=near), new_core(dialler=False, hello=far)
    first = dialling.take(0.0)
    assert first is not None
    with pytest.raises(error):
        accepting.receive(first, 0.0)
    refusal = accepting.take(0.0)
    assert refusal is not None
    with pytest.raises(error):
        dialling.receive(refusal, 0.0)
    assert dialling.state is accepting.state is LinkState.CLOSED
    assert dialling.peer is accepting.peer is None


def test_the_dialling_side_itself_refuses_a_node_that_is_not_the_one_it_dialled():
    near = new_core(dialler=True, hello=Hello(node=1, to=2))
    answer = encode_frame(HELLO, 0, msgspec.msgpack.encode(Hello(node=3)))
    with pytest.raises(WrongNode):
        near.receive(answer, 0.0)
    assert near.state is LinkState.CLOSED


@pytest.mark.parametrize("error", [AuthenticationError("who?"), Throttled(2.5)])
def test_what_check_gives_travels_to_the_dialling_side_with_its_fields(error):
    near, far = new_core(dialler=True), new_core(dialler=False, check=lambda _: error)
    with pytest.raises(type(error)):
        far.receive(taken(near), 0.0)
    with pytest.raises(type(error)) as caught:
        near.receive(taken(far), 0.0)
    assert caught.value.message == error.message
    assert getattr(caught.value, "retry_after", None) == getattr(error, "retry_after", None)


def test_a_cluster_id_that_is_not_known_yet_matches_any():
    for mine, theirs in (("", "c"), ("c", ""), ("", "")):
        near = new_core(dialler=True, hello=Hello(cluster=mine))
        far = new_core(dialler=False, hello=Hello(cluster=theirs))
        shuttle(near, far, 0.0)
        assert near.state is far.state is LinkState.OPEN


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        msgspec.msgpack.encode("hello"),
        msgspec.msgpack.encode(["one"]),
        msgspec.msgpack.encode(Hello()) + b"x",
        b"\x91" * 5000,  # nested deeper than the decoder goes
        b"\xdc\xff\xff" + b"\x00" * 65535,  # larger than a handshake may be
    ],
)
def test_a_malformed_handshake_is_a_frame_error(body):
    far = new_core(dialler=False)
    with pytest.raises(FrameError):
        far.receive(encode_frame(HELLO, 0, body), 0.0)
    assert far.state is LinkState.CLOSED


def test_a_newer_hello_with_more_fields_is_understood():
    far = new_core(dialler=False)
    longer = [*msgspec.msgpack.decode(msgspec.msgpack.encode(Hello(node=7))), "new", {"x": 1}]
    far.receive(encode_frame(HELLO, 0, msgspec.msgpack.encode(longer)), 0.0)
    assert far.peer is not None
    assert far.peer.node == 7


def test_a_handshake_that_does_not_end_in_time_is_given_up():
    core = new_core(dialler=False)
    assert core.deadline() == 3.0
    core.tick(2.9)
    with pytest.raises(PeerStalled):
        core.tick(3.0)
    assert core.deadline() is None


def test_nothing_can_be_sent_before_the_handshake():
    core = new_core(dialler=True)
    assert not core.send(b"x", 0.0)
    assert core.direct(b"x", 0.0) is None


def test_a_reason_given_while_open_ends_both_sides():
    near, far = opened()
    near.send(b"dropped", 0.0)
    near.refuse(Throttled(1.0))
    with pytest.raises(Throttled):
        far.receive(taken(near), 0.0)
    assert near.take(0.0) is None


# --- the table ------------------------------------------------------------------------------------


def state_of(state: LinkState) -> LinkCore:
    if state is LinkState.HELLO_SENT:
        return new_core(dialler=True)
    if state is LinkState.EXPECT_HELLO:
        return new_core(dialler=False)
    core, _ = opened()
    if state is LinkState.CLOSED:
        core.close()
    return core


@pytest.mark.parametrize(("state", "flags"), list(product(LinkState, FLAGS)))
def test_every_pair_of_state_and_kind_is_legal_by_the_table_or_an_error(state, flags):
    core = state_of(state)
    bodies = {
        HELLO: msgspec.msgpack.encode(Hello()),
        REFUSE: msgspec.msgpack.encode(["wrong_cluster", "no", {}]),
        PING: bytes(8),
        PONG: bytes(8),
        MORE: bytes(link.MORE_BYTES_MIN),
    }
    frame = encode_frame(flags, 0, bodies.get(flags, b""))
    if flags == REFUSE and (state, flags) in LEGAL:
        with pytest.raises(WrongCluster):
            core.receive(frame, 0.0)
    elif (state, flags) in LEGAL:
        core.receive(frame, 0.0)
        assert core.state is LinkState.OPEN
    else:
        with pytest.raises(PipeClosed if state is LinkState.CLOSED else FrameError):
            core.receive(frame, 0.0)
        assert core.state is LinkState.CLOSED


# --- frames ---------------------------------------------------------------------------------------


@given(st.data())
def test_a_frame_with_any_bit_flipped_is_refused_and_nothing_delivered(data):
    near, far = opened()
    frame = bytearray(near.direct(data.draw(st.binary(max_size=300)), 0.0) or b"")
    bit = data.draw(st.integers(0, len(frame) * 8 - 1))
    frame[bit // 8] ^= 1 << bit % 8
    with pytest.raises(FrameError):
        far.receive(bytes(frame), 0.0)
    assert far.state is LinkState.CLOSED


@given(st.binary(max_size=64))
def test_any_bytes_are_a_frame_or_a_frame_error(data):
    for state in LinkState:
        core = state_of(state)
        with pytest.raises((FrameError, KVError)):
            core.receive(data, 0.0)


@pytest.mark.parametrize("size", [0, HEADER_BYTES - 1, WIRE_BYTES_MAX + 1])
def test_a_frame_of_an_impossible_size_is_refused(size):
    _, far = opened()
    with pytest.raises(FrameError, match=f"a frame of {size} bytes"):
        far.receive(bytes(size), 0.0)


@pytest.mark.parametrize("kind", [MORE | PING, 32, 128, LANES << 8, 1 << 24, PING | 1 << 8 | 32])
def test_unknown_flags_and_lanes_are_refused_even_with_a_good_checksum(kind):
    _, far = opened()
    head = struct.pack("<I", kind)
    with pytest.raises(FrameError, match="unknown kind"):
        far.receive(struct.pack("<I", crc32c(b"body", crc32c(head))) + head + b"body", 0.0)


def test_the_sender_of_a_bad_frame_is_told_what_was_wrong_and_only_once():
    near, far = opened()
    far.send(b"queued", 0.0)
    with pytest.raises(FrameError):
        far.receive(b"bad bytes", 0.0)
    with pytest.raises(MalformedFrame, match="unknown kind"):
        near.receive(taken(far), 0.0)
    assert not near.has_output()  # a reproach is not answered by another
    with pytest.raises(FrameError):
        far.receive(b"bad bytes", 0.0)
    assert not far.has_output()


def test_after_a_bad_frame_not_even_a_good_one_is_delivered():
    near, far = opened()
    good = said(near, payload=b"good")
    with pytest.raises(FrameError):
        far.receive(b"bad bytes", 0.0)
    with pytest.raises(PipeClosed):
        far.receive(good, 0.0)


@pytest.mark.parametrize("size", [0, 1, BODY_BYTES_MAX])
def test_a_payload_up_to_a_frames_body_is_one_frame(size):
    near, far = opened()
    payload = bytes(size)
    assert near.send(payload, 0.0)
    frame = near.take(0.0)
    assert frame is not None
    assert len(frame) == HEADER_BYTES + size
    assert near.take(0.0) is None
    assert far.receive(frame, 0.0) == payload
    assert near.direct(payload, 0.0) == frame


@given(st.lists(st.tuples(st.integers(0, 1_400_000), st.integers(0, LANES - 1)), max_size=6))
def test_messages_arrive_whole_and_in_order_within_their_lane(sizes):
    near, far = opened()
    sent: list[list[bytes]] = [[] for _ in range(LANES)]
    for number, (size, lane) in enumerate(sizes):
        payload = bytes((number,)) * (size + 1)
        if near.send(payload, 0.0, lane):
            sent[lane].append(payload)
    got = shuttle(near, far, 0.0)[far]
    for lane in range(LANES):
        assert [m for m in got if m in sent[lane]] == sent[lane]
    assert len(got) == sum(map(len, sent))
    assert near.queue_bytes == 0


def test_a_large_message_in_one_lane_does_not_hold_up_the_other():
    near, far = opened()
    near.send(bytes(1_400_000), 0.0, 1)
    near.send(b"small", 0.0)
    got = [far.receive(taken(near), 0.0) for _ in range(2)]
    assert b"small" in got


def test_a_ping_goes_before_what_is_queued():
    near, far = opened()
    near.send(bytes(1_400_000), 0.0)
    near.receive(encode_frame(PING, 0, bytes(8)), 0.0)
    assert near.take(0.0) == encode_frame(PONG, 0, bytes(8))
    assert far.state is LinkState.OPEN


# --- bounds ---------------------------------------------------------------------------------------


def test_what_the_queue_has_no_room_for_is_refused_and_counted_and_changes_nothing():
    near, far = opened()
    taken = 0
    while near.send(bytes(1000), 0.0):
        taken += 1
    assert (
        near.queue_bytes
        <= LIMITS.queue_bytes_max
        < near.queue_bytes + 1000 + MESSAGE_OVERHEAD_BYTES
    )
    assert near.refused_sends == 1
    assert len(shuttle(near, far, 0.0)[far]) == taken
    assert near.send(bytes(1000), 0.0)


def test_even_empty_messages_are_bounded():
    limits = LinkLimits(queue_bytes_max=10_000, message_bytes_max=9000)
    near, _ = opened(limits=limits)
    assert sum(near.send(b"", 0.0) for _ in range(1000)) == 10_000 // MESSAGE_OVERHEAD_BYTES


def test_a_message_that_is_too_large_is_refused_before_anything_is_queued():
    near, _ = opened()
    with pytest.raises(InvalidArgument):
        near.send(bytes(LIMITS.message_bytes_max + 1), 0.0)
    assert near.queue_bytes == 0
    assert near.direct(bytes(LIMITS.message_bytes_max + 1), 0.0) is None


def test_a_peer_cannot_make_reassembly_grow_beyond_a_message():
    _, far = opened()
    part = encode_frame(MORE, 1, bytes(BODY_BYTES_MAX))
    for _ in range(LIMITS.message_bytes_max // BODY_BYTES_MAX):
        far.receive(part, 0.0)
    with pytest.raises(FrameError, match="too large"):
        far.receive(part, 0.0)


def test_a_peer_cannot_send_a_message_in_tiny_parts():
    _, far = opened()
    with pytest.raises(FrameError, match="a part of"):
        far.receive(encode_frame(MORE, 0, bytes(link.MORE_BYTES_MIN - 1)), 0.0)


def test_a_flood_of_pings_makes_one_pong():
    near, _ = opened()
    for number in range(1000):
        near.receive(encode_frame(PING, 0, struct.pack("<d", number)), 0.0)
    assert near.take(0.0) == encode_frame(PONG, 0, struct.pack("<d", 999))
    assert not near.has_output()


# --- time -----------------------------------------------------------------------------------------


def due(core: LinkCore) -> float:
    at = core.deadline()
    assert at is not None
    return at


def test_idle_links_ping_and_live_for_ever():
    near, far = opened()
    now, pings = 0.0, 0
    while now < 1000.0:
        now = min(due(near), due(far))
        for core in (near, far):
            if core.deadline() == now:
                core.tick(now)
        pings += near.frames_out
        shuttle(near, far, now)
    assert near.state is far.state is LinkState.OPEN
    assert 500 < near.frames_out < 3000
    assert near.rtt_s == 0.0


def test_the_round_trip_is_measured_by_the_newest_ping():
    near, far = opened()
    near.tick(due(near))
    ping = taken(near, 1.0)
    far.receive(ping, 1.2)
    near.receive(taken(far, 1.2), 1.3)
    assert near.rtt_s == pytest.approx(0.3)


def silent_end(near: LinkCore, *, on_frame=lambda core, now: None) -> float:
    """Tick on time until the core gives the peer up; when that was."""
    while True:
        now = due(near)
        try:
            near.tick(now)
        except PeerStalled:
            return now
        while near.take(now) is not None:
            near.unblocked(now)
        on_frame(near, now)
        assert now < 100.0


def test_a_peer_that_is_silent_is_given_up_a_stall_timeout_after_the_first_ping():
    near, _ = opened()
    at = silent_end(near)
    assert LIMITS.stall_timeout_s <= at <= LIMITS.stall_timeout_s + 2 * LIMITS.ping_interval_s
    assert near.state is LinkState.CLOSED


def test_a_peer_that_says_anything_is_kept():
    near, far = opened()

    def answer(core: LinkCore, now: float) -> None:
        if now < 50.0:
            core.receive(said(far, now), now)

    assert 50.0 <= silent_end(near, on_frame=answer) < 60.0


def test_a_writer_without_progress_is_given_up_although_the_peer_talks():
    near, far = opened()
    near.send(b"x", 1.0)
    near.take(1.0)
    near.blocked(1.0)
    while (now := due(near)) < 1.0 + LIMITS.stall_timeout_s:
        near.receive(said(far, now), now)
        near.tick(now)
    with pytest.raises(PeerStalled, match="nothing was taken"):
        near.tick(now)


def test_a_writer_that_makes_progress_is_kept():
    near, far = opened()
    near.send(b"x", 0.0)
    near.take(0.0)
    near.blocked(0.0)
    while (now := due(near)) < 50.0:
        near.receive(said(far, now), now)
        near.progress(now)
        near.tick(now)
    near.unblocked(now)
    assert near.state is LinkState.OPEN


def test_time_spent_idle_does_not_count_against_the_writer():
    near, far = opened()
    now = 0.0
    while now < 20.0:
        now = due(near)
        near.tick(now)
        far.tick(now)
        shuttle(near, far, now)
    near.send(b"x", now)
    near.tick(due(near))
    assert near.state is LinkState.OPEN


def test_a_pause_of_our_own_process_is_not_held_against_the_peer():
    near, far = opened()
    near.tick(due(near))
    near.take(1.0)
    near.send(b"x", 1.0)
    near.tick(500.0)  # should have been called at 2.0
    assert near.state is LinkState.OPEN
    shuttle(near, far, 500.0)
    near.tick(due(near))
    assert near.state is LinkState.OPEN


def test_a_deadline_that_comes_into_being_is_never_before_an_earlier_one():
    rng = random.Random(7)
    for _ in range(200):
        near, far = opened()
        now, armed = 0.0, due(near)
        for _ in range(60):
            now += rng.random()
            if now >= armed:
                now = armed
                try:
                    near.tick(now)
                except PeerStalled:
                    break
                armed = due(near)
            step = rng.randrange(5)
            if step == 0:
                near.send(bytes(rng.randrange(300_000)), now)
            elif step == 1 and near.take(now):
                (near.unblocked if rng.random() < 0.5 else near.blocked)(now)
            elif step == 2:
                near.progress(now)
            else:
                near.receive(said(far, now), now)
            assert due(near) >= armed
