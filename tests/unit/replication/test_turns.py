"""The pure parts of a turn: deadlines, boxes, routes, the apply queue, the sync policy, and how a log may begin."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replication.errors import LogMismatch
from replication.messages import AppendRequest, TimeoutNow
from replication.turns import (
    ApplyQueue,
    Deadlines,
    Inbox,
    Outbox,
    Routes,
    SyncPolicy,
    begin_of,
    message_bytes,
    refusal_of,
    start_of,
)
from replication.types import Entry, EntryKind, HardState, Membership
from replication.wal import Fault, GroupLog

STATE = HardState(1, 2, 4)


def entry(index: int, term: int = 1, size: int = 1) -> Entry:
    return Entry(index, term, EntryKind.COMMAND, b"x" * size)


# -- deadlines


def test_a_deadline_that_moves_away_is_not_pushed_again():
    deadlines = Deadlines()
    for step in range(1000):
        deadlines.set(1, 10.0 + step)
    assert deadlines.next() == 10.0
    assert deadlines.due(10.0) == []
    assert deadlines.next() == 1009.0


def test_a_deadline_that_comes_nearer_counts_and_the_old_one_does_not():
    deadlines = Deadlines()
    deadlines.set(1, 10.0)
    deadlines.set(1, 5.0)
    assert deadlines.due(5.0) == [1]
    assert deadlines.due(20.0) == []


def test_no_deadline_is_no_deadline():
    deadlines = Deadlines()
    deadlines.set(1, 10.0)
    deadlines.set(1, None)
    assert deadlines.due(20.0) == []
    assert deadlines.next() is None


@given(
    st.lists(
        st.tuples(st.integers(1, 4), st.one_of(st.none(), st.integers(0, 30)), st.booleans()),
        max_size=60,
    )
)
def test_deadlines_are_those_of_a_plain_dictionary(steps):
    deadlines, model, now = Deadlines(), dict[int, float](), 0.0
    for key, at, look in steps:
        deadlines.set(key, at)
        model.pop(key, None)
        if at is not None:
            model[key] = at
        if look:
            now += 3
            due = sorted(key for key, at in model.items() if at <= now)
            assert sorted(deadlines.due(now)) == due
            for key in due:
                del model[key]
        following = deadlines.next()
        assert not model or (following is not None and following <= min(model.values()))


# -- boxes and routes


def test_the_outbox_has_one_list_for_each_node_in_order():
    outbox = Outbox()
    messages = [TimeoutNow(1, 2, 1, term) for term in range(4)]
    for node, message in zip((2, 3, 2, 2), messages, strict=True):
        outbox.add(node, message)
    assert outbox.take() == [(2, [messages[0], messages[2], messages[3]]), (3, [messages[1]])]
    assert outbox.take() == []


def test_the_inbox_is_bounded_in_messages_and_in_bytes():
    inbox = Inbox(messages_max=3, bytes_max=1000)
    small = TimeoutNow(1, 2, 1, 1)
    assert inbox.add(1, [small, small])
    assert not inbox.add(1, [small, small])
    assert inbox.add(2, [small])
    assert inbox.take() == [(1, [small, small]), (2, [small])]
    assert inbox.add(1, [small], size_bytes=1000)
    assert not inbox.add(1, [small])


def test_the_size_of_a_message_counts_its_commands():
    append = AppendRequest(1, 2, 1, 1, 0, 0, [entry(1, size=500), entry(2, size=500)], 0, 0)
    assert 1000 < message_bytes(append) < 1300


def test_a_membership_says_where_a_replica_lives_and_else_hearsay():
    routes = Routes()
    assert routes.node(5, Membership()) is None
    routes.heard(5, 50)
    assert routes.node(5, Membership()) == 50
    assert routes.node(5, Membership(voters=(5,), nodes=((5, 51),))) == 51


def test_hearsay_is_bounded():
    routes = Routes()
    for replica in range(1000):
        routes.heard(replica, replica)
    assert routes.node(0, Membership()) is None
    assert routes.node(999, Membership()) == 999


# -- the apply queue


def test_a_slice_ends_at_either_limit_and_holds_one_entry_at_least():
    queue = ApplyQueue(0)
    queue.add([entry(i, size=10) for i in range(1, 8)])
    assert [e.index for e in queue.take(bytes_max=25, entries_max=100).entries] == [1, 2]
    assert [e.index for e in queue.take(bytes_max=1000, entries_max=3).entries] == [3, 4, 5]
    assert [e.index for e in queue.take(bytes_max=1, entries_max=3).entries] == [6]


def test_a_gap_is_our_bug():
    queue = ApplyQueue(3)
    with pytest.raises(AssertionError, match="gap"):
        queue.add([entry(5)])


def test_what_a_snapshot_brought_is_skipped_queued_or_not():
    queue = ApplyQueue(3)
    queue.add([entry(4), entry(5), entry(6)])
    queue.installed(5)
    assert [e.index for e in queue.take(1000, 100).entries] == [6]
    queue.installed(9)
    queue.add([entry(7), entry(8), entry(9), entry(10)])
    assert [e.index for e in queue.take(1000, 100).entries] == [10]


# -- the sync policy


def run_syncs(policy, count, inline_s, thread_s):
    """So many syncs that take as long as the way that the policy chose."""
    for _ in range(count):
        threaded = policy.in_thread(creates_segment=False)
        policy.note(inline_s, thread_s if threaded else inline_s, threaded=threaded)


def test_auto_stays_inline_while_the_disk_is_quick():
    policy = SyncPolicy("auto")
    run_syncs(policy, 1_000, inline_s=0.0003, thread_s=0.0001)
    assert not policy.threaded
    assert policy.switches == 0


def test_auto_keeps_the_way_that_lets_the_loop_go_on_sooner():
    policy = SyncPolicy("auto")
    run_syncs(policy, 3 * policy.PROBE, inline_s=0.005, thread_s=0.002)
    assert policy.threaded
    policy = SyncPolicy("auto")
    run_syncs(policy, 3 * policy.PROBE, inline_s=0.002, thread_s=0.008)
    assert not policy.threaded
    assert policy.switches == 2


def test_auto_comes_back_when_the_disk_is_quick_again():
    policy = SyncPolicy("auto")
    run_syncs(policy, 3 * policy.PROBE, inline_s=0.005, thread_s=0.002)
    assert policy.threaded
    run_syncs(policy, policy.AGAIN + 2 * policy.PROBE, inline_s=0.0003, thread_s=0.002)
    assert not policy.threaded


def test_a_disk_that_stalls_gets_the_thread_even_if_that_is_slower():
    policy = SyncPolicy("auto")
    run_syncs(policy, 3 * policy.PROBE, inline_s=0.06, thread_s=0.08)
    assert policy.threaded


@pytest.mark.parametrize("usual_s", [0.0003, 0.002], ids=["a quick disk", "a slow disk"])
@pytest.mark.parametrize(("stalls", "threaded"), [(1, False), (2, True)], ids=["once", "twice"])
def test_a_disk_that_stalls_again_and_again_gets_the_thread_whatever_its_median(
    usual_s, stalls, threaded
):
    policy = SyncPolicy("auto")
    run_syncs(policy, 3 * policy.PROBE, inline_s=usual_s, thread_s=0.008)
    for _ in range(stalls):
        run_syncs(policy, 20, inline_s=usual_s, thread_s=0.008)
        run_syncs(policy, 1, inline_s=0.2, thread_s=0.2)
    run_syncs(policy, 2 * policy.PROBE, inline_s=usual_s, thread_s=0.008)
    assert policy.threaded is threaded
    run_syncs(policy, policy.AGAIN + 2 * policy.PROBE, inline_s=usual_s, thread_s=0.008)
    assert not policy.threaded  # it stalls no more


def test_syncs_that_went_to_the_thread_for_another_reason_decide_nothing():
    policy = SyncPolicy("auto")
    for _ in range(1_000):
        policy.note(0.1, 0.1, threaded=True)
    assert not policy.threaded


@pytest.mark.parametrize(("mode", "threaded"), [("inline", False), ("thread", True)])
def test_a_chosen_mode_stays(mode, threaded):
    policy = SyncPolicy(mode)
    for seconds in (0.00001, 0.1):
        for _ in range(300):
            policy.note(seconds, seconds, threaded=threaded)
    assert policy.threaded is threaded
    assert policy.in_thread(creates_segment=True) is threaded
    assert policy.p99_s() == 0.1


def test_a_segment_is_made_in_the_thread_unless_inline_was_chosen():
    assert SyncPolicy("auto").in_thread(creates_segment=True)
    assert not SyncPolicy("auto").in_thread(creates_segment=False)


# -- how a log may begin


def log(start=(0, 0), last=5, term=1, state=STATE) -> GroupLog:
    return GroupLog(state, start, [entry(i, term) for i in range(start[0] + 1, last + 1)])


def test_commit_is_within_the_log_and_at_least_applied():
    assert start_of(log(), (2, 1)).state.commit == 4
    assert start_of(log(), (5, 1)).state.commit == 5
    assert start_of(log(last=3), (2, 1)).state.commit == 3


def test_a_term_that_is_older_than_the_log_is_raised_and_its_vote_is_void():
    start = start_of(log(term=4, state=HardState(3, 2, 1)), (0, 0))
    assert start.state == HardState(4, 0, 1)


def test_a_new_group_begins_where_it_was_created():
    assert start_of(None, (0, 0)).log_start == (0, 0)
    start = start_of(None, (10, 5), installed=(10, 5))
    assert (start.log_start, start.applied, start.reset) == ((10, 5), 10, True)
    assert start.state == HardState(5, 0, 10)


@pytest.mark.parametrize(
    ("recovered", "applied"),
    [
        (log(last=5), (6, 1)),
        (log(last=5, term=1), (4, 2)),
        (None, (10, 5)),
    ],
    ids=["beyond the log", "another term", "no log at all"],
)
def test_a_contradiction_is_a_hard_error_unless_a_snapshot_was_just_installed(recovered, applied):
    with pytest.raises(LogMismatch):
        start_of(recovered, applied)
    start = start_of(recovered, applied, installed=applied)
    assert (start.log_start, start.entries, start.reset) == (applied, [], True)


@pytest.mark.parametrize("installed", [(0, 0), (2, 1)])
def test_an_engine_that_is_behind_the_logs_start_has_lost_what_it_flushed(installed):
    with pytest.raises(LogMismatch):
        start_of(log(start=(3, 1), last=5), (2, 1), installed=installed)


def test_an_installation_that_was_cut_short_begins_at_the_start_of_the_log():
    start = start_of(log(start=(3, 1), last=5), (99, 9), installing=True)
    assert (start.applied, start.reset, len(start.entries)) == (3, False, 2)


def test_damage_doubt_and_removal_refuse_a_log():
    assert refusal_of(log(), 1) == ""
    suspect, faulty, removed = log(), log(), log()
    suspect.suspect = True
    faulty.faulty.append(Fault(1, 3, 1, 0, 4, 8192, 1, None))
    removed.tombstone = 2
    assert "vote" in refusal_of(suspect, 1)
    assert "segment 4 offset 8192" in refusal_of(faulty, 1)
    assert "removed" in refusal_of(removed, 2)
    assert refusal_of(removed, 3) == ""


def rotten(*indices: int, last: int = 5) -> GroupLog:
    """A log whose entries at these indices are stand-ins."""
    found = log(last=last)
    for index in indices:
        found.faulty.append(Fault(1, index, 1, 0, 4, 8192, 1, 7))
        found.entries[index - 1] = Entry(index, 1, 0, b"")
    return found


def test_damaged_entries_that_the_engine_has_are_left_behind():
    for index in (3, 4, 5):
        start = begin_of(rotten(1, 3), 1, (index, 1))
        assert not isinstance(start, str)
        assert (start.log_start, start.applied, start.reset) == ((index, 1), index, False)
        assert [left.index for left in start.entries] == list(range(index + 1, 6))
        assert start.state.commit == max(index, STATE.commit)


@pytest.mark.parametrize(
    ("applied", "installing"),
    [((2, 1), False), ((3, 2), False), ((6, 1), False), ((3, 1), True)],
    ids=["not applied", "another term", "beyond the log", "an engine without a state"],
)
def test_damaged_entries_that_the_engine_may_lack_refuse_a_log(applied, installing):
    assert "the first is 1," in str(begin_of(rotten(1, 3), 1, applied, installing=installing))


def test_doubt_is_not_cured_by_what_the_engine_has():
    found = rotten(1)
    found.suspect = True
    assert "vote" in str(begin_of(found, 1, (5, 1)))
