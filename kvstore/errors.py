"""Every error that users and peers of Kvorum meet, and how one travels over the wire.

An error says what the caller may do next: `code` is a stable name to match on (never match texts),
`retryable` says that trying the same thing again may well succeed (`Client.run` does so by itself),
`maybe_committed` says that what was asked for may have happened all the same. `to_wire` and
`from_wire` carry an error with its fields between processes: a code of a newer version that this
one does not know becomes a plain `KVError` with that code and its flags.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Final

import msgspec

CODES: Final[dict[str, type[KVError]]] = {}  # code -> class; every class below enters itself


class KVError(Exception):
    """Base of all errors of Kvorum.

    Args: message: for people. code, retryable, maybe_committed: only for an error that this version
    has no class for.
    """

    code: str = "kv_error"
    retryable: bool = False
    maybe_committed: bool = False
    fields: ClassVar[Mapping[str, Any]] = {}  # what a subclass adds: name -> type

    def __init__(
        self,
        message: str = "",
        *,
        code: str | None = None,
        retryable: bool | None = None,
        maybe_committed: bool | None = None,
    ) -> None:
        super().__init__(message or _summary(type(self)))
        if code is not None:
            self.code = code
        if retryable is not None:
            self.retryable = retryable
        if maybe_committed is not None:
            self.maybe_committed = maybe_committed

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        known = CODES.setdefault(cls.code, cls)
        assert known is cls or not cls.__module__.startswith("kvstore."), (
            f"two classes share the code {cls.code!r}"
        )

    def __reduce__(
        self,
    ) -> tuple[Callable[..., KVError], tuple[str, str, dict[str, Any]], dict[str, Any]]:
        return from_wire, to_wire(self), self.__dict__  # with its fields, and flags of its own

    @property
    def message(self) -> str:
        return str(self.args[0]) if self.args else ""


CODES[KVError.code] = KVError


def to_wire(error: KVError) -> tuple[str, str, dict[str, Any]]:
    """(code, message, details). Details hold the error's fields and its two flags, as plain msgpack
    values.
    """
    details: dict[str, Any] = {name: getattr(error, name) for name in error.fields}
    details["retryable"] = error.retryable
    details["maybe_committed"] = error.maybe_committed
    return error.code, error.message, details


def from_wire(code: str, message: str, details: Mapping[str, Any] | None = None) -> KVError:
    """The typed error again. Never raises: fields that are absent or of a wrong type get their
    defaults.

    An unknown code gives a `KVError` with that code; without flags it counts as not retryable and
    maybe committed.
    """
    given = details or {}
    cls = CODES.get(code)
    if cls is None:
        retryable, maybe = given.get("retryable", False), given.get("maybe_committed", True)
        return KVError(
            message, code=code, retryable=retryable is True, maybe_committed=maybe is not False
        )
    values: dict[str, Any] = {}
    for name, wanted in cls.fields.items():
        try:
            # not strict: JSON has versions as strings and bytes as base64
            values[name] = msgspec.convert(given[name], wanted, strict=False)
        except (KeyError, msgspec.ValidationError):
            continue
    return cls(**values, message=message)


def _summary(cls: type[KVError]) -> str:
    return " ".join((cls.__doc__ or cls.__name__).split("\n\n")[0].split())


# --- what the caller asked for is wrong -----------------------------------------------------------


class InvalidArgument(KVError, ValueError):
    """An argument is wrong; nothing was sent. Mend the call."""

    code = "invalid_argument"


class KeyTooLarge(InvalidArgument):
    """The key is longer than limits.KEY_BYTES_MAX."""

    code = "key_too_large"


class ValueTooLarge(InvalidArgument):
    """The value is longer than limits.VALUE_BYTES_MAX."""

    code = "value_too_large"


class TransactionTooLarge(InvalidArgument):
    """The transaction exceeds a limit in bytes, rows, participants or spans; nothing of it
    happened. Split it.
    """

    code = "transaction_too_large"


class ConfigError(InvalidArgument):
    """A configuration key is unknown or its value is wrong."""

    code = "config_error"


class NotFound(KVError):
    """There is no such key: told over HTTP and by `kvctl get`; the clients return None."""

    code = "not_found"


class Refused(KVError):
    """An action is not possible in the present state of the cluster; nothing was changed. The
    message says why.
    """

    code = "refused"


# --- transactions ---------------------------------------------------------------------------------


class Conflict(KVError):
    """Another transaction changed what this one read or wrote; this one is aborted. Run it again.

    Fields: key: where they met. other_txn: the other's id (empty if unknown). their_version: its
    commit version (0 if it has not committed, or is unknown).
    """

    code = "conflict"
    retryable = True
    fields: ClassVar[Mapping[str, Any]] = {"key": bytes, "other_txn": bytes, "their_version": int}

    def __init__(
        self, key: bytes = b"", other_txn: bytes = b"", their_version: int = 0, message: str = ""
    ) -> None:
        super().__init__(
            message or f"conflict at key {key!r} with transaction {other_txn.hex() or 'unknown'}"
        )
        self.key = key
        self.other_txn = other_txn
        self.their_version = their_version


class Deadlock(KVError):
    """Transactions waited for each other in a circle and this one was chosen to give way; it is
    aborted. Run it again.

    Field: cycle: the transaction ids of the circle, each waiting for the next.
    """

    code = "deadlock"
    retryable = True
    fields: ClassVar[Mapping[str, Any]] = {"cycle": tuple[bytes, ...]}

    def __init__(self, cycle: Sequence[bytes] = (), message: str = "") -> None:
        super().__init__(message or "deadlock: " + " waits for ".join(txn.hex() for txn in cycle))
        self.cycle = tuple(cycle)


class LockTimeout(KVError):
    """A lock was not free in time; the transaction is aborted. Run it again.

    Fields: key: what was to be locked. holder: the transaction in the way (empty if unknown).
    """

    code = "lock_timeout"
    retryable = True
    fields: ClassVar[Mapping[str, Any]] = {"key": bytes, "holder": bytes}

    def __init__(self, key: bytes = b"", holder: bytes = b"", message: str = "") -> None:
        super().__init__(
            message
            or f"the lock of key {key!r} was not free in time: transaction {holder.hex() or 'unknown'} is in the way; "
            "run this one again, or give it more time"
        )
        self.key = key
        self.holder = holder


class TransactionTooOld(KVError):
    """The transaction was open for too long, or what it read is no longer kept; it is aborted. Run
    it again.
    """

    code = "transaction_too_old"
    retryable = True


class TransactionClosed(KVError):
    """The transaction has already been committed, rolled back or aborted. Begin another."""

    code = "transaction_closed"


class SnapshotTooOld(KVError):
    """Versions that old are no longer kept. Read at a newer version."""

    code = "snapshot_too_old"


class ReplicaBehind(KVError):
    """The replica that was asked does not know enough yet to answer alone. Ask another one, or the leader.

    The client does that by itself (kvstore/follower_reads.py): its callers do not meet this error.
    """

    code = "replica_behind"
    retryable = True


class Compacted(KVError):
    """The watch asked for changes that are no longer kept. Read anew, then watch from that version.

    Field: oldest: the version from which on they are kept (0: unknown); it rises.
    """

    code = "compacted"
    fields: ClassVar[Mapping[str, Any]] = {"oldest": int}

    def __init__(self, oldest: int = 0, message: str = "") -> None:
        super().__init__(
            message
            or f"changes are kept from version {oldest} on: read anew with db.snapshot(), then watch(since=its version)"
        )
        self.oldest = oldest


class CompareFailed(KVError):
    """The condition of a write does not hold; nothing was written. Field: version: the present one
    (0: no such key).
    """

    code = "compare_failed"
    fields: ClassVar[Mapping[str, Any]] = {"version": int}

    def __init__(self, version: int = 0, message: str = "") -> None:
        super().__init__(message or f"the condition does not hold: the key has version {version}")
        self.version = version


class CommitUnknown(KVError):
    """The time ran out before the outcome could be learned: it may have happened. Ask for it, never
    retry blindly.
    """

    code = "commit_unknown"
    maybe_committed = True


class OutcomeExpired(KVError):
    """The record of that transaction is no longer kept, so its outcome cannot be learned any more."""

    code = "outcome_expired"
    maybe_committed = True


# --- time, load, reachability ---------------------------------------------------------------------


class DeadlineExceeded(KVError, TimeoutError):
    """The call's time ran out; nothing was committed. Ask again with more time."""

    code = "deadline_exceeded"


class Unavailable(KVError):
    """No node that could serve this answered; nothing was committed. Try again."""

    code = "unavailable"
    retryable = True


class NoQuorum(Unavailable):
    """Too few replicas of a range can reach each other; nothing was committed. Try again when nodes
    are back.
    """

    code = "no_quorum"


class Throttled(KVError):
    """Refused because of load before anything was done. Field: retry_after: seconds to wait before
    trying again.
    """

    code = "throttled"
    retryable = True
    fields: ClassVar[Mapping[str, Any]] = {"retry_after": float}

    def __init__(self, retry_after: float = 0.0, message: str = "") -> None:
        super().__init__(message or f"throttled: try again in {retry_after:g} s")
        self.retry_after = retry_after


class NodeStopped(KVError):
    """The node is stopping or has stopped; the request was not begun. Ask another node."""

    code = "node_stopped"
    retryable = True


class NotReady(KVError):
    """The node does not serve yet: it waits for `kvctl init`, or replays its log. Try again."""

    code = "not_ready"
    retryable = True


class NotLeader(KVError):
    """This replica does not lead the range; nothing was done. Ask the leader. Fields: range_id,
    node, address (0, "" if unknown).
    """

    code = "not_leader"
    retryable = True
    fields: ClassVar[Mapping[str, Any]] = {"range_id": int, "node": int, "address": str}

    def __init__(
        self, range_id: int = 0, node: int = 0, address: str = "", message: str = ""
    ) -> None:
        which = f"range {range_id}" if range_id else "the range"
        who = f"the leader is node {node}" if node else "no leader is known"
        super().__init__(message or f"not the leader of {which}; {who}")
        self.range_id = range_id
        self.node = node
        self.address = address


class EpochMismatch(KVError):
    """The range has changed since the caller learned of it; nothing was done. Route again.

    Fields: range_id. ranges: descriptors that this node knows for the span, encoded as the
    directory encodes them.
    """

    code = "epoch_mismatch"
    retryable = True
    fields: ClassVar[Mapping[str, Any]] = {"range_id": int, "ranges": tuple[Any, ...]}

    def __init__(self, range_id: int = 0, ranges: Sequence[Any] = (), message: str = "") -> None:
        super().__init__(message or f"range {range_id} has changed")
        self.range_id = range_id
        self.ranges = tuple(ranges)


class ClientClosed(KVError):
    """The client has been closed. Connect again."""

    code = "client_closed"


# --- who may talk to whom -------------------------------------------------------------------------


class PermissionDenied(KVError):
    """This caller may not do that."""

    code = "permission_denied"


class AuthenticationError(KVError):
    """The caller could not prove who it is."""

    code = "authentication_error"


class VersionMismatch(KVError):
    """The two sides share no version of the protocol, or what is on disk is of another version of
    Kvorum, older or newer. Use that version.
    """

    code = "version_mismatch"


class WrongCluster(KVError):
    """The other side belongs to another cluster."""

    code = "wrong_cluster"


class PipeClosed(KVError):
    """A connection ended. What was sent on it last may or may not have arrived."""

    code = "pipe_closed"
    retryable = True
    maybe_committed = True


# --- storage --------------------------------------------------------------------------------------


class StorageError(KVError):
    """Reading or writing the data directory failed. The node stops rather than guess what reached
    the disk.
    """

    code = "storage_error"


class DiskFull(StorageError):
    """There is no space left for writes. A node that needs them stops: make room, then start it."""

    code = "disk_full"


class CorruptionError(StorageError):
    """Stored bytes are not what was written (a checksum fails). The node serves them no longer, and
    nothing repairs them yet.
    """

    code = "corruption_error"


class DataDirectoryError(StorageError):
    """The data directory is in use by another process, is not ours, or is not accessible."""

    code = "data_directory_error"


class EngineClosed(StorageError):
    """The storage engine, or a cursor or snapshot of it, was used after it was closed."""

    code = "engine_closed"
