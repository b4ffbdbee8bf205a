"""What clients and ranges ask of a range, and the answers (DESIGN.md section 3).

Array-like msgspec structs; fields are only appended, with defaults. `id` pairs an answer with its request on one stream.
Every request names the range it was computed for: `range_id` (0: whoever holds the key) and `version` of the range's epoch
(0: do not check). All are idempotent: a retry carries the same txn_id.

A list of a request (`Named`) has at most NAMED_MAX elements: a longer one does not decode, and none of it is looked at.
"""

from __future__ import annotations

import enum
from typing import Annotated, Any, TypeVar

import msgspec

from txn.types import Expect, Guard, Participant, Write, is_txn_id

T = TypeVar("T")

NAMED_MAX = 20_000  # a transaction guards what it has read, 10,000 spans, and locked, 10,000 keys
PARTICIPANTS_MAX = 128  # of one transaction
Named = Annotated[list[T], msgspec.Meta(max_length=NAMED_MAX)]


class Stale(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A read with it may be answered by any replica, at or below its safe timestamp (txn/closed.py).

    With `at` 0 the replica chooses the timestamp: at least `at_least`, not above the safe one of any range of `ranges`, and so
    that everything is seen which was acknowledged `ms` milliseconds ago. Who cannot answers Failure `replica_behind`; `last`:
    the leader has to answer then, and another replica says who that is (`not_leader`).
    """

    ms: int = 0  # only with `at` 0
    at_least: int = 0
    ranges: Named[int] = []  # that are going to be read at the same timestamp
    last: bool = False


class Read(msgspec.Struct, array_like=True, frozen=True, tag=1, gc=False):
    """The values of `keys` at timestamp `at`; 0: the leader asks the oracle, the answer says which. -> ReadReply"""

    id: int
    range_id: int
    version: int
    at: int
    keys: Named[bytes]
    stale: Stale | None = None


class Scan(msgspec.Struct, array_like=True, frozen=True, tag=2, gc=False):
    """Rows of [start, end) at `at` in order (or reversed), at most the limits; the first row may be larger. -> ScanReply"""

    id: int
    range_id: int
    version: int
    at: int
    start: bytes
    end: bytes  # b"" : to the end of the range's span
    rows_max: int
    bytes_max: int
    reverse: bool = False
    keys_only: bool = False
    stale: Stale | None = None


class Prepare(msgspec.Struct, array_like=True, frozen=True, tag=3, gc=False):
    """One range's part of a transaction. Without participants it is the whole transaction (one entry commits it).

    -> PrepareReply. The anchor's part lists every participant, itself included, and has locus == anchor_key.
    """

    id: int
    range_id: int
    version: int
    txn_id: bytes
    locus: bytes
    anchor_key: bytes
    writes: Named[Write]
    expects: Named[Expect] = []
    guards: Named[Guard] = []
    participants: Named[
        Participant
    ] = []  # only in the anchor's part of a transaction over several ranges
    one_range: bool = True
    age: int = 0  # begin_ts of the first attempt, and its priority: the older waits, the younger is refused
    lock_owner: bytes = b""  # the id under which its locks are held; b"": it has none
    elsewhere: Named[
        Named[Guard]
    ] = []  # what it has read in other ranges, one list for each (Validate)


class Finalize(msgspec.Struct, array_like=True, frozen=True, tag=4, gc=False):
    """To the anchor: every part is PREPARED, commit at commit_ts; or 0: some part is FENCED, abort. -> TxnReply"""

    id: int
    range_id: int
    version: int
    txn_id: bytes
    anchor_key: bytes
    commit_ts: int


class Resolve(msgspec.Struct, array_like=True, frozen=True, tag=5, gc=False):
    """To a participant: the outcome. `record`: sent from the anchor's terminal record (else a hint). -> Ack"""

    id: int
    range_id: int
    version: int
    txn_id: bytes
    anchor_key: bytes
    locus: bytes
    start: bytes
    end: bytes
    commit_ts: int  # 0: aborted
    record: bool = False


class Fence(msgspec.Struct, array_like=True, frozen=True, tag=6, gc=False):
    """Refuse this part for ever unless it is prepared already. -> PartReply"""

    id: int
    range_id: int
    version: int
    txn_id: bytes
    locus: bytes
    anchor_key: bytes


class QueryMode(enum.IntEnum):
    READ = 0  # is it visible at read_ts? never waits for a client, never decides
    BLOCKED = 1  # only asks
    ORPHAN = 2  # a part is older than the orphan timer: without a record, abort


class QueryTxn(msgspec.Struct, array_like=True, frozen=True, tag=7, gc=False):
    """To the anchor: what became of it? -> TxnReply"""

    id: int
    range_id: int
    version: int
    txn_id: bytes
    anchor_key: bytes
    mode: int
    read_ts: int = 0


class QueryPart(msgspec.Struct, array_like=True, frozen=True, tag=8, gc=False):
    """To a participant, from the anchor on behalf of a reader at read_ts. ABSENT promises: only above read_ts. -> PartReply"""

    id: int
    range_id: int
    version: int
    txn_id: bytes
    locus: bytes
    read_ts: int


class Outcome(msgspec.Struct, array_like=True, frozen=True, tag=9, gc=False):
    """To the anchor: the definite outcome; without a record the attempt is fenced and ABORTED. -> TxnReply (terminal)"""

    id: int
    range_id: int
    version: int
    txn_id: bytes
    anchor_key: bytes


class QuerySettled(msgspec.Struct, array_like=True, frozen=True, tag=12, gc=False):
    """To an anchor's range, by who collects statuses: which of the records that it keeps are terminal? -> Settled"""

    id: int
    range_id: int
    version: int
    anchor_key: bytes


class Validate(msgspec.Struct, array_like=True, frozen=True, tag=13, gc=False):
    """From the leader of the one range that a transaction writes in: do the spans of `guards`, read at their read_ts, hold
    the same at `at`, its commit timestamp? (txn/validation.py) -> Validated
    """

    id: int
    range_id: int
    version: int
    at: int
    txn_id: bytes
    age: int
    guards: Named[Guard]


class Changes(msgspec.Struct, array_like=True, frozen=True, tag=20, gc=False):
    """Every version of [start, end) above `since`, in the order of commit: whole commits, one at least. -> Changed

    `at`, an issued timestamp: the answer speaks of all up to it, and comes as soon as it can. 0: of what there is; if that is
    nothing, the answer waits for a commit in the span, `wait_ms` at most (and at most what the range allows). `watch` names
    who asks (0: nobody): an earlier question of his that still waits is answered, so that none is left behind.
    """

    id: int
    range_id: int
    version: int
    since: int
    start: bytes
    end: bytes  # b"": to the end of the range's span
    rows_max: int
    bytes_max: int
    at: int = 0
    wait_ms: int = 0
    watch: int = 0


class GetTimestamps(msgspec.Struct, array_like=True, frozen=True, tag=10, gc=False):
    """To the oracle (the meta range's leader): `fresh` new timestamps, and the last issued one. -> Timestamps

    `session` (not 0): a client that has snapshots open, the oldest of them at `oldest` (0: none any more). Until its lease
    ends, nothing that they can see is collected (kvstore/holds.py).
    """

    id: int
    fresh: int
    session: int = 0
    oldest: int = 0


class GetDirectory(msgspec.Struct, array_like=True, frozen=True, tag=11, gc=False):
    """To any node: its view of the ranges, their leaders and the nodes' addresses. -> Directory"""

    id: int


class LockRead(msgspec.Struct, array_like=True, frozen=True, tag=40, gc=False):
    """Lock a key in the leader's memory and read its newest version. Asked again, the place in the queue is kept.

    -> ReadReply of the key once it is held, at a timestamp up to which it does not change any more; LockPending after
    `wait_s` (at most LOCK_POLL_S) without it, and then to be asked again. Failure `deadlock`: the owner has to give way.
    """

    id: int
    range_id: int
    version: int
    key: bytes
    owner: bytes  # the transaction's id under which it locks
    age: int  # begin_ts of its first attempt
    shared: bool = False
    wait_s: float = 0.0  # 0: not queued at all
    fresh: bool = False  # read at a timestamp that is taken now, and held for FRESH_LEASE_S


class KeepLocks(msgspec.Struct, array_like=True, frozen=True, tag=41, gc=False):
    """The owners' clients live: their leases in the range of `key` begin anew. -> LockLeases"""

    id: int
    range_id: int
    version: int
    key: bytes
    owners: Named[bytes]


class Unlock(msgspec.Struct, array_like=True, frozen=True, tag=42, gc=False):
    """The owner has ended, and locks nothing more in the range of `key`; waits_only: it waits no more for `key`. -> Ack"""

    id: int
    range_id: int
    version: int
    key: bytes
    owner: bytes
    waits_only: bool = False


class LockEdge(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """`waiter` cannot go on before all `blockers` have given way. `number` names the wait within its leader's term."""

    number: int
    waiter: bytes
    age: int
    committing: bool
    blockers: Named[bytes]


class LockWaits(msgspec.Struct, array_like=True, frozen=True, tag=43, gc=False):
    """To the deadlock detector (the leader of the range of `key`): all long waits in one range. -> Victims"""

    id: int
    range_id: int
    version: int
    key: bytes
    source: int  # the range that reports
    term: int  # of its leader
    number: int  # of the report in that term, from 1 on
    after: int  # the report whose answer had come when this one was made; 0: none
    edges: Named[LockEdge]


READ_KEYS_MAX = 256  # of one Read; a reply may hold fewer values, and the rest is asked for again
STALE_RANGES_MAX = 128  # that one choice of a version looks at
FRESH_LEASE_S = 1.0  # of a lock that no user asked for: who is slow lets the others pass
FAST_RANGES_MAX = 32  # that a transaction has only read in, and that are asked before its commit
FAST_SPANS_MAX = 256  # in all of them
FAST_BYTES_MAX = (
    128 << 10
)  # of the bounds of those: beside a part of any size they fit into a message
LOCK_POLL_S = 0.5  # below the silence after which a client asks another replica

Request = (
    Read
    | Scan
    | Prepare
    | Finalize
    | Resolve
    | Fence
    | QueryTxn
    | QueryPart
    | Outcome
    | QuerySettled
    | Validate
    | Changes
    | GetTimestamps
    | GetDirectory
    | LockRead
    | KeepLocks
    | Unlock
    | LockWaits
)


class ReadReply(msgspec.Struct, array_like=True, frozen=True, tag=1, gc=False):
    """In the order of the keys; shorter than asked when the values are large: ask for the rest at the same `at`."""

    id: int
    at: int
    versions: list[int]  # 0: no value
    values: list[bytes | None]


class ScanReply(msgspec.Struct, array_like=True, frozen=True, tag=2, gc=False):
    """`done`: the span was read to its end (within the range: `covered_to` is where it ends or began, if reversed).

    A page that is not done may be short, or empty: it read so many bytes, or so many keys without a value.
    """

    id: int
    at: int
    keys: list[bytes]
    values: list[bytes]  # empty with keys_only
    versions: list[int]
    done: bool
    covered_to: bytes


class PrepareReply(msgspec.Struct, array_like=True, frozen=True, tag=3, gc=False):
    id: int
    status: int  # a PartStatus: COMMITTED (one range), PREPARED, FENCED, ABORTED, EXPIRED
    ts: int  # commit_ts or min_ts
    reason: int = 0  # a FenceReason
    key: bytes = b""  # where the conflict or the failed condition is
    other_txn: bytes = b""
    other_version: int = 0
    results: list[bytes] | None = (
        None  # new values of the ADD writes in order; None: read them back at ts
    )


class PartReply(msgspec.Struct, array_like=True, frozen=True, tag=4, gc=False):
    id: int
    status: int  # a PartStatus
    ts: int = 0


class TxnReply(msgspec.Struct, array_like=True, frozen=True, tag=5, gc=False):
    id: int
    status: int  # a TxnStatus
    ts: int = 0


class Ack(msgspec.Struct, array_like=True, frozen=True, tag=6, gc=False):
    """Applied, in the receiver's own log."""

    id: int


class Settled(msgspec.Struct, array_like=True, frozen=True, tag=10, gc=False):
    """Every transaction anchored in [start, end) that began at or below `upto` has ended there, or never will begin."""

    id: int
    start: bytes
    end: bytes  # b"": to the end of all keys
    upto: int


class Validated(msgspec.Struct, array_like=True, frozen=True, tag=11, gc=False):
    """`unchanged`: and nothing can change it at or below the timestamp any more. Else where, by whom, and at which version."""

    id: int
    unchanged: bool
    key: bytes = b""
    other_txn: bytes = b""
    other_version: int = 0


class Changed(msgspec.Struct, array_like=True, frozen=True, tag=20, gc=False):
    """What was written in (since, upto], all of it: three lists beside each other, by version, then by key."""

    id: int
    upto: int
    versions: list[int]
    keys: list[bytes]
    values: list[bytes | None]  # None: deleted


class Timestamps(msgspec.Struct, array_like=True, frozen=True, tag=7, gc=False):
    """`first` .. `first + count - 1` are the caller's alone; `read_ts` is the last issued before or at this answer.

    `floor`: what can be seen from there on is not to be collected; 0: that is not known.
    """

    id: int
    read_ts: int
    first: int
    count: int
    floor: int = 0


class RangeInfo(msgspec.Struct, array_like=True, frozen=True, gc=False):
    range_id: int
    start: bytes
    end: bytes  # b"": to the end of all keys
    version: int
    conf_ver: int
    replicas: list[tuple[int, int]]  # (node, replica id)
    leader_node: int  # a hint; 0: unknown


class Directory(msgspec.Struct, array_like=True, frozen=True, tag=8):
    id: int
    cluster: str
    node: int  # who answers
    ranges: list[RangeInfo]
    addresses: list[tuple[int, str]]  # (node, host:port)


class Failure(msgspec.Struct, array_like=True, frozen=True, tag=9):
    """Nothing is said about the outcome of a transaction by any of these.

    code: `not_leader` (details: leader_node), `epoch_mismatch`, `throttled` (details: retry_after, in seconds),
    `unavailable`, `snapshot_too_old`, `replica_behind` (details: safe_ts), or the code of any kvstore error.
    """

    id: int
    code: str
    message: str = ""
    details: dict[str, Any] = {}


class LockPending(msgspec.Struct, array_like=True, frozen=True, tag=40, gc=False):
    """Not held yet. `holder`: who is in the way."""

    id: int
    holder: bytes


class LockLeases(msgspec.Struct, array_like=True, frozen=True, tag=41, gc=False):
    id: int
    lease_s: float  # from now
    lost: list[bytes]  # owners that hold nothing here (any more)


class Victim(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """This wait has to end; `cycle` begins with its owner, each of whom waits for the next."""

    number: int
    cycle: list[bytes]


class Victims(msgspec.Struct, array_like=True, frozen=True, tag=42, gc=False):
    """Those of the reporting range."""

    id: int
    victims: list[Victim]


Reply = (
    ReadReply
    | ScanReply
    | PrepareReply
    | PartReply
    | TxnReply
    | Ack
    | Settled
    | Validated
    | Changed
    | Timestamps
    | Directory
    | Failure
    | LockPending
    | LockLeases
    | Victims
)


def too_wide(request: Read | Scan) -> Failure | None:
    """The refusal of a read that no client makes: it would hold the node for longer than others should wait."""
    stale = request.stale
    if type(request) is Read and len(request.keys) > READ_KEYS_MAX:
        message = f"a request reads {READ_KEYS_MAX} keys at most"
    elif stale is not None and len(stale.ranges) > STALE_RANGES_MAX:
        message = f"a version is chosen for {STALE_RANGES_MAX} ranges at most"
    else:
        return None
    return Failure(request.id, "invalid_argument", message)


def fast(elsewhere: list[list[Guard]]) -> bool:
    """Whether other ranges can be asked about these spans, one list for each."""
    if len(elsewhere) > FAST_RANGES_MAX:
        return False
    spans = size = 0
    for guards in elsewhere:
        spans += len(guards)
        if spans > FAST_SPANS_MAX:
            return False
        for guard in guards:
            size += len(guard.start) + len(guard.end)
            if guard.start >= guard.end:
                return False
    return all(elsewhere) and size <= FAST_BYTES_MAX


def well_formed(request: Prepare) -> bool:
    """The anchor's part, and only that, lists participants, each once and itself among them; a transaction of one range has
    none.
    What was read elsewhere goes with a transaction that writes in one range, and holds no lock. A guard covers something: one
    without an end would be met by no writer that is in flight.
    """
    if not is_txn_id(request.txn_id):
        return False
    for guard in request.guards:
        if guard.start >= guard.end:
            return False
    if request.elsewhere:
        if not request.one_range or request.lock_owner or not fast(request.elsewhere):
            return False
    if request.one_range or request.locus != request.anchor_key:
        return not request.participants
    if len(request.participants) > PARTICIPANTS_MAX:
        return False
    loci = {each.locus for each in request.participants}
    return request.anchor_key in loci and len(loci) == len(request.participants)
