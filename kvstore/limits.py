"""Every limit that users can meet, with its unit in the name, and the checks that refuse what
exceeds one.

The checks run in the client before anything is sent, and for HTTP at the node. What is written is
measured again by the range that it is written in (txn/values.py), whoever sends it. Keys are
ordered as unsigned bytes; those that begin with 0xFF are the system's, so the users' key space is
[b"", USER_KEY_END).
"""

from __future__ import annotations

from typing import Final

from kvstore.errors import InvalidArgument, KeyTooLarge, TransactionTooLarge, ValueTooLarge

KIB: Final = 1024
MIB: Final = 1024 * KIB

KEY_BYTES_MAX: Final = 4 * KIB  # and at least one byte
VALUE_BYTES_MAX: Final = 1 * MIB
BOUND_BYTES_MAX: Final = KEY_BYTES_MAX + 1  # so that `key + b"\x00"` can be a bound for every key

TXN_BYTES_MAX: Final = 8 * MIB  # keys and values written, over all ranges
TXN_ROWS_MAX: Final = 20_000
TXN_RANGE_BYTES_MAX: Final = 4 * MIB  # of one transaction in one range
TXN_RANGE_ROWS_MAX: Final = 5_000
TXN_RANGE_MOVED_BYTES_MAX: Final = 32 * MIB  # of old values that it replaces or deletes there
TXN_PARTICIPANTS_MAX: Final = 128
TXN_READ_SPANS_MAX: Final = 10_000  # beyond it, neighbouring spans are merged
TXN_LOCKS_MAX: Final = 10_000  # keys that one transaction locks
PRIORITY_MAX: Final = 1_000  # of a transaction, either way
TXN_AGE_S_MAX: Final = 300.0

FRAME_BYTES_MAX: Final = 256 * KIB
MESSAGE_BYTES_MAX: Final = TXN_BYTES_MAX + 1 * MIB  # reassembled from frames; 1 MiB of overhead

TXN_SPANS_BYTES_MAX: Final = 3 * MIB  # bounds of what is read; beyond it, neighbours are merged
TXN_RANGE_MESSAGE_BYTES_MAX: Final = MESSAGE_BYTES_MAX - 2 * MIB  # without the participants
ENTRY_BYTES_MAX: Final = (
    MESSAGE_BYTES_MAX - 64 * KIB
)  # of the log: a message to a follower holds it
SPAN_OVERHEAD_BYTES: Final = 16  # of a span with its timestamp in a message

APPLY_BATCH_BYTES_MAX: Final = 1 * MIB  # one write batch of the engine; one entry at least
APPLY_BATCH_ROWS_MAX: Final = 2_000

USER_KEY_END: Final = b"\xff"
_SYSTEM_BYTE: Final = 0xFF


def validate_key(key: bytes) -> None:
    """Refuse what no user key can be. Raises: InvalidArgument (not bytes, empty, the system's),
    KeyTooLarge.
    """
    if type(key) is bytes and 0 < len(key) <= KEY_BYTES_MAX and key[0] != _SYSTEM_BYTE:
        return
    _require_bytes("key", key)
    if not key:
        raise InvalidArgument("a key has at least one byte")
    if len(key) > KEY_BYTES_MAX:
        raise KeyTooLarge(f"the key has {len(key)} bytes; at most {KEY_BYTES_MAX} are allowed")
    raise InvalidArgument("keys that begin with 0xFF are the system's")


def validate_value(value: bytes) -> None:
    """Raises: InvalidArgument (not bytes), ValueTooLarge. An empty value is a value."""
    if type(value) is bytes and len(value) <= VALUE_BYTES_MAX:
        return
    _require_bytes("value", value)
    raise ValueTooLarge(f"the value has {len(value)} bytes; at most {VALUE_BYTES_MAX} are allowed")


def validate_range(start: bytes, end: bytes | None) -> tuple[bytes, bytes]:
    """Check [start, end) of user keys and return it with an absent end made explicit; it may be
    empty (start == end).

    Raises: InvalidArgument (not bytes, start above end, beyond the user's keys), KeyTooLarge.
    """
    if end is None:
        end = USER_KEY_END
    for name, bound in (("start", start), ("end", end)):
        _require_bytes(name, bound)
        if len(bound) > BOUND_BYTES_MAX:
            raise KeyTooLarge(
                f"{name} has {len(bound)} bytes; at most {BOUND_BYTES_MAX} are allowed"
            )
        if bound > USER_KEY_END:
            raise InvalidArgument(
                f"{name} is beyond the users' keys: those that begin with 0xFF are the system's"
            )
    if start > end:
        raise InvalidArgument("start is above end")
    return start, end


def prefix_range(prefix: bytes) -> tuple[bytes, bytes]:
    """[start, end) of all user keys with this prefix; the empty prefix means all of them. Raises as
    `validate_range`.
    """
    _require_bytes("prefix", prefix)
    if prefix[:1] == USER_KEY_END:
        raise InvalidArgument("keys that begin with 0xFF are the system's")
    return validate_range(prefix, prefix_end(prefix))


def prefix_end(prefix: bytes) -> bytes | None:
    """The first key above all keys with this prefix; None if there is no such key (empty, or
    nothing but 0xFF).
    """
    head = prefix.rstrip(b"\xff")
    return head[:-1] + bytes((head[-1] + 1,)) if head else None


def validate_timeout(timeout: float, *, zero: bool = False) -> float:
    """The seconds as a plain float; infinity is a timeout. `zero`: 0 is one, too.

    Raises: InvalidArgument (0, below it, NaN, no number, more than a float holds).
    """
    try:
        seconds = float(timeout)
    except OverflowError as error:
        raise InvalidArgument("timeout is more seconds than a float holds") from error
    except (TypeError, ValueError) as error:
        raise InvalidArgument("timeout must be a number of seconds") from error
    if isinstance(timeout, str) or not (seconds > 0 or (zero and seconds == 0)):
        raise InvalidArgument(f"timeout must {'not be below' if zero else 'be above'} 0 seconds")
    return seconds


def validate_transaction_size(size_bytes: int, rows: int, participants: int = 1) -> None:
    """Refuse a transaction that is too large as a whole. Raises: TransactionTooLarge."""
    if size_bytes > TXN_BYTES_MAX:
        raise _too_large("bytes", size_bytes, TXN_BYTES_MAX)
    if rows > TXN_ROWS_MAX:
        raise _too_large("rows", rows, TXN_ROWS_MAX)
    if participants > TXN_PARTICIPANTS_MAX:
        raise _too_large("ranges", participants, TXN_PARTICIPANTS_MAX)


def validate_range_batch_size(size_bytes: int, rows: int) -> None:
    """Refuse one transaction's part in one range that is too large. Raises: TransactionTooLarge."""
    if size_bytes > TXN_RANGE_BYTES_MAX:
        raise _too_large("bytes in one range", size_bytes, TXN_RANGE_BYTES_MAX)
    if rows > TXN_RANGE_ROWS_MAX:
        what = "rows written and spans deleted in one range"
        raise _too_large(what, rows, TXN_RANGE_ROWS_MAX)


def validate_range_message_size(size_bytes: int) -> None:
    """Refuse what does not fit into one message to a range. Raises: TransactionTooLarge."""
    if size_bytes > TXN_RANGE_MESSAGE_BYTES_MAX:
        what = "bytes written, read, locked and deleted as spans in one range"
        raise _too_large(what, size_bytes, TXN_RANGE_MESSAGE_BYTES_MAX)


def _too_large(what: str, amount: int, limit: int) -> TransactionTooLarge:
    return TransactionTooLarge(f"the transaction has {amount} {what}; at most {limit} are allowed")


def _require_bytes(name: str, value: object) -> None:
    """Nor a subclass: messages do not encode those, and all requests of a turn are one message."""
    if type(value) is not bytes:
        raise InvalidArgument(f"{name} must be bytes, not {type(value).__name__}")
