"""Committing a write set: cut by ranges, driven by `txn.coordinator`, tried again where nothing can have happened.

One attempt is one `Coordinator` with its own txn_id; a new id is taken only after the old one is known ABORTED
(txn/DESIGN.md section 4). There is no task per commit: a `_Drive` reacts to answers, so a commit over several ranges
goes on by itself when the task that asked for it is cancelled, and `close` waits for those, within a bound.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from functools import partial
from typing import Final, NamedTuple

from kvstore import limits
from kvstore.cutting import WriteSet, cut, single_part
from kvstore.errors import (
    AuthenticationError,
    CommitUnknown,
    CompareFailed,
    Conflict,
    CorruptionError,
    DeadlineExceeded,
    DiskFull,
    EpochMismatch,
    InvalidArgument,
    KVError,
    OutcomeExpired,
    PermissionDenied,
    Throttled,
    TransactionTooLarge,
)
from kvstore.links import Answer, Call
from kvstore.locking import LockKeeper
from kvstore.router import Router
from replication.probes import chance, reached
from txn.coordinator import ContradictoryAnswers, Coordinator, Part, State, with_fast_guards
from txn.messages import Finalize, Outcome, Prepare, PrepareReply, Request, Resolve, TxnReply
from txn.types import (
    FenceReason,
    TxnStatus,
    age_of,
    begin_ts_of,
    make_txn_id,
    point_end,
)

SEEN_AGE_S_MAX: Final = 1.0  # a timestamp seen longer ago is not used for a new id
RESERVE_S: Final = 1.0  # of the time left, at most so much is kept for asking for the outcome ...
RESERVE_SHARE: Final = 0.25  # ... and at most this share
DECISION_TIMEOUT_S: Final = 5.0  # it is repeated for so long; the ranges' timers do the rest
ASK_AGAIN_S: Final = 0.02
DRIVES_MAX: Final = 4_096  # commits over several ranges under way, abandoned ones included
CONFLICT_BACKOFF_S: Final = 0.001
CONFLICT_BACKOFF_S_MAX: Final = 0.1
NO_FAST_GUARDS_S: Final = 5.0  # after a range was asked in vain


class Done(NamedTuple):
    """A commit."""

    version: int
    results: list[bytes] | None  # of the ADD writes, if one range held them all and told
    txn_id: bytes


class Committer:
    """Commits write sets through a router. Lives on the router's loop."""

    def __init__(self, router: Router, rng: random.Random) -> None:
        self.conflicts = 0  # attempts that were refused because of another transaction
        self.attempts = 0  # but for single writes that their range answered at once
        self.retries = 0  # attempts that followed another of the same write set
        self._router = router
        self._bits = rng.getrandbits
        self._random = rng.random
        self._fast_from = float("-inf")  # fast guards are tried from then on
        self.keeper = LockKeeper(router)
        self._drives: dict[_Drive, None] = {}
        self._idle: asyncio.Future[None] | None = None

    # --- ids --------------------------------------------------------------------------------------

    async def begin_ts(self, deadline: float, age_s_max: float = SEEN_AGE_S_MAX) -> int:
        """A timestamp that had been issued before now: the largest seen, unless that is too long ago."""
        router = self._router
        if router.monotonic() - router.seen_at <= age_s_max:
            return router.seen_ts
        return (await router.timestamps(deadline)).read_ts

    def txn_id(self, begin_ts: int) -> bytes:
        return make_txn_id(begin_ts, self._bits(64))

    # --- commit -----------------------------------------------------------------------------------

    async def commit(
        self,
        write_set: WriteSet,
        deadline: float,
        *,
        patient: bool,
        renames: Callable[[], bool] = lambda: True,
        txn_id: bytes = b"",
        age: int = 0,
        priority: int = 0,
        first: tuple[Call, Answer] | None = None,
        on_rename: Callable[[bytes], None] | None = None,
    ) -> Done:
        """Commit once, or raise.

        Args: patient: conflicts are tried again under a new id. renames: an attempt that nobody refused because of its
        content (its ranges changed, or it was given up) may be tried again under a new id; asked whenever one is about to
        be taken, for the old one may have been told meanwhile. txn_id: of the first attempt, if it has one already. first:
        its only Prepare, which is of one key, and what came of it, if that has been sent. on_rename: is told every id that is
        taken here, before anything is sent under it: the last one is what to ask the outcome of.
        Raises: Conflict, CompareFailed, InvalidArgument, TransactionTooLarge, CommitUnknown, OutcomeExpired,
        DeadlineExceeded, Unavailable, Throttled.
        """
        failures = 0
        failure: KVError | None = None  # of the last attempt
        fast = not age and self._fast(write_set) and renames()
        while True:
            if not txn_id:
                begin_ts = await self.begin_ts(deadline)
                if failure is not None and not renames():
                    raise failure
                txn_id = self.txn_id(begin_ts)
                if on_rename is not None:
                    on_rename(txn_id)
            age = age or age_of(begin_ts_of(txn_id), priority)
            if first is not None:  # it may have happened: no search for its range may end this
                parts = [single_part(write_set)]
            else:
                parts = cut(write_set, self._router.ranges) or await self._cut(write_set, deadline)
            if fast and not failures:  # later attempts guard in the log, where the older one waits
                parts = with_fast_guards(parts)
            self.attempts += 1
            coordinator = Coordinator(txn_id, parts, age=age, lock_owner=write_set.lock_owner)
            drive = self._started(coordinator, deadline, first)
            first = None
            await drive.decided()
            if coordinator.state is State.COMMITTED:
                results = coordinator.results[0] if coordinator.one_range else None
                return Done(coordinator.commit_ts, results, txn_id)
            failure = error = drive.error()
            if parts[0].elsewhere and drive.blameless:
                self._fast_from = self._router.monotonic() + NO_FAST_GUARDS_S
            conflicted = isinstance(error, Conflict)
            self.conflicts += conflicted
            if not ((conflicted and patient) or (drive.blameless and renames())):
                raise error
            reached("attempt_repeated")
            failures += 1
            wait_s = self._pause(failures)
            if self._router.monotonic() + wait_s >= deadline:
                raise DeadlineExceeded(
                    f"the time ran out after {failures} attempts: {error}"
                ) from error
            self.retries += 1
            txn_id = b""
            await asyncio.sleep(wait_s)

    def _started(
        self, coordinator: Coordinator, deadline: float, first: tuple[Call, Answer] | None
    ) -> _Drive:
        drive = _Drive(self, coordinator, deadline)
        if first is not None:
            drive.resume(*first)
        elif self._router.monotonic() >= deadline:  # where the link is up, nobody else looks
            raise DeadlineExceeded("the time ran out before the commit was sent")
        else:
            drive.start()
        return drive

    def _fast(self, write_set: WriteSet) -> bool:
        """Whether what it has read elsewhere may be asked about, instead of being guarded in the log."""
        asks = bool(write_set.guards) and not write_set.lock_owner
        return asks and self._router.monotonic() >= self._fast_from

    def _pause(self, failures: int) -> float:
        longest = min(CONFLICT_BACKOFF_S_MAX, CONFLICT_BACKOFF_S * (1 << min(failures, 10)))
        return longest * (0.5 + 0.5 * self._random())

    async def _cut(self, write_set: WriteSet, deadline: float) -> list[Part]:
        while True:
            parts = cut(write_set, self._router.ranges)
            if parts is not None:
                return parts
            await self._router.find_out(deadline)

    async def outcome(self, txn_id: bytes, anchor_key: bytes, deadline: float) -> TxnReply:
        """The definite outcome of an attempt; one that is undecided and abandoned is aborted by asking."""
        router = self._router
        while True:
            request = Outcome(0, 0, 0, txn_id, anchor_key)
            reply = await router.ask(request, anchor_key, b"", deadline)
            assert isinstance(reply, TxnReply)
            if reply.status in _FINAL:
                return reply
            await asyncio.sleep(ASK_AGAIN_S)

    # --- drives -----------------------------------------------------------------------------------

    def began(self, drive: _Drive) -> None:
        if len(self._drives) >= DRIVES_MAX:
            raise Throttled(CONFLICT_BACKOFF_S_MAX, "too many commits over several ranges at once")
        self._drives[drive] = None

    def ended(self, drive: _Drive) -> None:
        self._drives.pop(drive, None)
        if not self._drives and self._idle is not None and not self._idle.done():
            self._idle.set_result(None)

    async def drain(self, timeout_s: float) -> None:
        """Let commits that nobody waits for any more come to their decision, for a bounded time."""
        if not self._drives:
            return
        self._idle = asyncio.get_running_loop().create_future()
        try:
            await asyncio.wait_for(self._idle, timeout_s)
        except TimeoutError:
            pass  # recovery in the ranges finishes what is left

    @property
    def router(self) -> Router:
        return self._router


_FINAL: Final = (TxnStatus.COMMITTED, TxnStatus.ABORTED, TxnStatus.EXPIRED)
_BLAMELESS: Final = (FenceReason.NONE, FenceReason.RECOVERY)
_DEFINITE: Final = (
    InvalidArgument,
    PermissionDenied,
    AuthenticationError,
    DiskFull,
)  # refused unread


def _failure(answer: Answer) -> KVError:
    if isinstance(answer, KVError):
        return answer
    return CorruptionError(f"an answer of the wrong kind: {type(answer).__name__}")


def _error_of(refusal: PrepareReply) -> KVError:
    """The typed error of a part's durable refusal."""
    reason = refusal.reason
    if reason == FenceReason.COMPARE_FAILED:
        return CompareFailed(refusal.other_version)
    if reason == FenceReason.BAD_VALUE:
        return InvalidArgument(
            f"the value of {refusal.key!r} is not a number of that format, or the result is out of range"
        )
    if reason == FenceReason.TOO_LARGE:
        return TransactionTooLarge(
            "in one range, a delete_range meets more rows, values grow to more bytes, or what is replaced and deleted holds "
            f"more bytes ({limits.TXN_RANGE_MOVED_BYTES_MAX}) than a transaction may have: write fewer keys at once "
            "(clear_range deletes any number of rows)"
        )
    if reason in _BLAMELESS:
        return Conflict(
            message="a range gave the attempt up, and nothing was written: run the transaction again"
        )
    return Conflict(refusal.key, refusal.other_txn, refusal.other_version)


def _size_bytes(prepare: Prepare) -> int:
    size = 0
    for write in prepare.writes:
        size += len(write.key) + len(write.value)
    for expect in prepare.expects:
        size += len(expect.key) + len(expect.value)
    for guards in (prepare.guards, *prepare.elsewhere):
        for guard in guards:
            size += len(guard.start) + len(guard.end)
    return size


class _Drive:
    """One attempt under way: the coordinator's requests go out, answers come in, one future tells the end."""

    __slots__ = (
        "_asked",
        "_calls",
        "_committer",
        "_deadline",
        "_done",
        "_failure",
        "_regroup",
        "_undone",
        "coordinator",
    )

    def __init__(self, committer: Committer, coordinator: Coordinator, deadline: float) -> None:
        self.coordinator = coordinator
        self._committer = committer
        self._deadline = deadline
        self._calls: list[Call] = []
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._failure: KVError | None = None  # why a part was lost
        self._regroup = False
        self._undone = False  # it failed before anything can have happened
        self._asked = False

    def start(self) -> None:
        if not self.coordinator.one_range:
            self._committer.began(self)
        now = self._committer.router.monotonic()
        left = self._deadline - now
        until = self._deadline - min(RESERVE_S, left * RESERVE_SHARE)
        for number, (prepare, part) in enumerate(
            zip(self.coordinator.start(), self.coordinator.parts, strict=True)
        ):
            span = part.participant
            single = span.end == point_end(span.start)
            try:
                call = self._committer.router.send(
                    prepare,
                    span.start,
                    b"" if single else span.end,
                    until,
                    size_bytes=_size_bytes(prepare),
                    on_reply=partial(self._on_prepare, number),
                )
            except KVError as error:
                self._on_prepare(number, error)
                return
            self._calls.append(call)
            if self.coordinator.state is not State.PREPARING or self._done.done():
                return  # a part was lost already: the rest need not be sent

    def resume(self, call: Call, answer: Answer) -> None:
        """The one Prepare of this attempt has been sent by somebody else, and this came of it."""
        self._calls.append(call)
        self._on_prepare(0, answer)

    async def decided(self) -> None:
        """Until the decision. Cancelled: one range's part is forgotten, a larger commit goes on by itself."""
        try:
            await self._done
        except BaseException:
            if self.coordinator.one_range:
                for call in self._calls:
                    self._committer.router.forget(call)
            raise

    @property
    def blameless(self) -> bool:
        """Aborted, and for no reason that lies in the transaction: it may be tried again under a new id."""
        refusal = self.coordinator.refusal
        if self._undone:
            return self._regroup
        if self.coordinator.state is not State.ABORTED:
            return False
        if refusal is not None:
            return refusal.reason in _BLAMELESS
        return self._regroup

    def error(self) -> KVError:
        """What to tell the user, who was not given a commit."""
        coordinator = self.coordinator
        if self._undone and self._failure is not None:
            return self._failure
        if coordinator.state is State.UNKNOWN:
            if isinstance(self._failure, CorruptionError):
                return self._failure
            if coordinator.forgotten:
                return OutcomeExpired()
            return CommitUnknown(f"the outcome could not be learned in time ({self._failure})")
        refusal = coordinator.refusal
        if refusal is None:
            if self._failure is not None and not self._regroup:
                failure = self._failure
                return DeadlineExceeded(failure.message) if failure.maybe_committed else failure
            return Conflict(message="the transaction was given up while its ranges changed")
        return _error_of(refusal)

    # --- inside -----------------------------------------------------------------------------------

    def _on_prepare(self, number: int, answer: Answer) -> None:
        coordinator = self.coordinator
        try:
            if isinstance(answer, PrepareReply):
                self._run(coordinator.on_prepare(number, answer))
                return
            self._failure = self._failure or _failure(answer)
            self._regroup = self._regroup or isinstance(answer, EpochMismatch)
            sent = any(call.sent for call in self._calls)
            definite = coordinator.one_range and isinstance(answer, _DEFINITE)
            if not sent or (definite and all(call.tries == 0 for call in self._calls)):
                self._give_up()
                return
            self._run(coordinator.on_part_lost(number))
        except ContradictoryAnswers as error:
            self._contradicted(error)

    def _on_outcome(self, request: Outcome, answer: Answer) -> None:
        try:
            if isinstance(answer, TxnReply):
                self._run(self.coordinator.on_outcome(answer))
            elif isinstance(answer, Throttled) and self._may_ask_again():
                self._ask_again(request)
            else:
                self._failure = self._failure or _failure(answer)
                self._run(self.coordinator.on_time_out())
        except ContradictoryAnswers as error:
            self._contradicted(error)

    def _give_up(self) -> None:
        """Nothing has left, or nothing was begun: the attempt ends as if it had never been."""
        self._undone = True
        for call in self._calls:
            self._committer.router.forget(call)
        self._end()

    def _contradicted(self, error: ContradictoryAnswers) -> None:
        self._failure = CorruptionError(str(error), maybe_committed=True)
        if not self.coordinator.decided:
            self.coordinator.state = State.UNKNOWN
        self._end()

    def _run(self, effects: list[Request]) -> None:
        for request in effects:
            if isinstance(request, Outcome):
                self._ask(request)
            else:
                self._tell(request)
        if self.coordinator.decided:
            self._end()

    def _end(self) -> None:
        self._committer.ended(self)
        if not self._done.done():
            self._done.set_result(None)

    def _ask(self, request: Outcome) -> None:
        reached("outcome_asked")
        if self._asked:  # the answer was not final: not at once again
            self._ask_again(request)
            return
        self._asked = True
        self._send_outcome(request)

    def _may_ask_again(self) -> bool:
        return self._committer.router.monotonic() + ASK_AGAIN_S < self._deadline

    def _ask_again(self, request: Outcome) -> None:
        asyncio.get_running_loop().call_later(ASK_AGAIN_S, self._send_outcome, request)

    def _send_outcome(self, request: Outcome) -> None:
        router, key = self._committer.router, request.anchor_key
        on_reply = partial(self._on_outcome, request)
        try:
            call = router.send(request, key, b"", self._deadline, on_reply=on_reply)
        except KVError as error:
            on_reply(error)
        else:
            self._calls.append(call)

    def _tell(self, request: Request) -> None:
        """Finalize and hints: nobody waits for the answer; lost ones are made good by the anchor's record."""
        if chance("hint_dropped"):
            return
        router = self._committer.router
        assert isinstance(request, Finalize | Resolve)
        if isinstance(request, Resolve) and request.commit_ts:  # the anchor's outbox says it again
            router.hint(request)
            return
        key = request.anchor_key if isinstance(request, Finalize) else request.locus
        until = router.monotonic() + DECISION_TIMEOUT_S
        try:
            router.send(request, key, b"", until, silent=True)
        except KVError:
            pass
