"""Which rare ways a seed takes on purpose (`replication.probes.chance`), and which must have been taken by many seeds.

Swarm, as with faults: a seed switches on about a quarter of the points, each with a probability of its own. A point
draws from its own generator, so that one more look at another point changes nothing here.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Final

SHARE: Final = 0.25  # of the points that a seed has switched on, on average
PROBABILITIES: Final = (0.01, 0.05, 0.25)


class Points:
    """The chooser of one seed. `off`: nothing rare on purpose any more (in peace, when everything must come to its end)."""

    def __init__(self, seed: str, *, off: bool = False) -> None:
        self.off = off
        self._seed = seed
        self._points: dict[str, tuple[float, random.Random]] = {}  # by name, as they are met

    def __call__(self, name: str) -> bool:
        if self.off:
            return False
        point = self._points.get(name)
        if point is None:
            rng = random.Random(f"{self._seed}/point/{name}")
            on = rng.random() < SHARE
            point = self._points[name] = (rng.choice(PROBABILITIES) if on else 0.0, rng)
        probability, rng = point
        return probability > 0.0 and rng.random() < probability


def never_reached(counts: Mapping[str, int], *, seeds: int) -> list[str]:
    """Which paths so many seeds (of the default size) should have taken, and did not. counts: added up over all."""
    wanted = (*(EXPECTED if seeds >= 150 else ()), *(RARE if seeds >= 2_000 else ()))
    return [name for name in wanted if not counts.get(name)]


EXPECTED: Final[tuple[str, ...]] = (  # by 150 seeds of the default size
    "anchor_fences_itself",
    "anchor_recovers",
    "append_below_commit",
    "append_refused",
    "append_sent_again",
    "attempt_repeated",
    "blocked_writer_asks",
    "chance:anchor_timer_early",
    "chance:append_window_of_one",
    "chance:apply_slice_of_one",
    "chance:candidate_impatient",
    "chance:flush_early",
    "chance:guards_not_from_recent",
    "chance:guards_walked_slowly",
    "chance:hint_dropped",
    "chance:inbox_full",
    "chance:leadership_handed_on",
    "chance:lease_not_used",
    "chance:lock_lost",
    "chance:locks_not_kept",
    "chance:log_tail_dropped",
    "chance:oracle_asked_remotely",
    "chance:oracle_window_small",
    "chance:orphan_timer_early",
    "chance:outbox_late",
    "chance:page_small",
    "chance:segment_begun_early",
    "chance:snapshot_chunks_small",
    "chance:snapshot_for_a_tail",
    "chance:snapshot_queue_full",
    "chance:sync_in_the_thread",
    "chance:throttled",
    "chance:turn_small",
    "chance:validation_given_up",
    "chance:unlock_dropped",
    "chance:write_batch_cut",
    "closed_without_a_lease",
    "conflict_truncated",
    "contested_key_locked",
    "conflict_wait_over",
    "conflict_waited_for",
    "deadlock_broken",
    "decision_waits_for_the_oracle",
    "disk_stalled",
    "durable_in_an_older_term",
    "election_lost",
    "entry_rotten",
    "fast_guard_refused",
    "fast_guards_held",
    "follower_behind_the_log",
    "inbox_full",
    "leader_stepped_down",
    "leadership_balanced",
    "lock_lease_ended",
    "lock_wait_cancelled",
    "lock_waits_for_part",
    "locks_lost",
    "log_carried",
    "log_reset_for_a_snapshot",
    "log_written_again",
    "oracle_bound_lost",
    "oracle_bound_near",
    "oracle_silent",
    "orphan_asks",
    "outbox_sent_again",
    "outcome_asked",
    "peer_silent",
    "proposal_dropped",
    "proposal_refused",
    "quorum_lost",
    "read_index",
    "read_index_failed",
    "read_put_off",
    "reader_asks",
    "reader_rests",
    "reader_told_invisible",
    "recovery_aborts",
    "recovery_commits",
    "rot_found",
    "segment_deleted",
    "snapshot_installed",
    "snapshot_overtaken_by_commit",
    "stale_term",
    "stale_read_at_the_leader",
    "state_lost",
    "timeout_now",
    "torn_tail_cut",
    "transfer_given_up",
    "vote_in_doubt",
    "vote_refused_while_led",
    "watch_falls_back",
    "write_refused_by_lock",
    "write_waits_for_lock",
)
RARE: Final[tuple[str, ...]] = (  # one seed in thirty, or fewer: by 2,000
    "append_while_installing",
    "caretaker_handed_over",
    "chance:conflict_not_waited_for",
    "contested_key_not_locked",
    "closed_by_an_earlier_leader",
    "hold_ended",
    "chance:poll_put_off",
    "chance:search_slice_small",
    "fast_guards_given_up",
    "fast_guards_met",
    "guards_in_slices",
    "word_of_a_snapshot_lost",
    "snapshot_refused",
    "committed_entries_skipped",
    "crash_before_the_logs_reset",
    "oracle_bound_used_up",
    "read_given_up",
    "reader_of_a_silent_oracle_given_up",
    "writer_of_a_silent_oracle_given_up",
    "readable_again",
    "rot_below_applied",
    "resolved_unprepared",
    "snapshot_asked_for",
    "snapshot_broken",
    "snapshot_link_lost",
    "snapshot_not_needed",
    "snapshot_replaced",
    "timestamps_leapt",
    "unreadable_leader",
    "unreadable_still",
    "vote_given_again",
)
# No seed so far, or hardly any: no run fails for want of these. Why, and which tests take them: tests/sim/README.md.
UNREACHED: Final[tuple[str, ...]] = (
    "append_with_no_room",
    "deposed_before_it_proposed",
    "holds_are_full",
    "joint_left",
    "lock_table_full",
    "outcome_expired",
    "participant_forgot",
    "poll_given_up",
    "peer_takes_nothing",
    "snapshot_outrun",
    "timestamp_too_old",
    "upgraded_lock_was_lost",
    "watch_cut_anew",
    "watch_goes_on",
    "watch_left_without_a_word",
)
