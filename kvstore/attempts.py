"""How `run` tries again, and how it keeps a result so that a second run finds it. Shared with the blocking client."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, Final

import msgspec

from kvstore.errors import CorruptionError, DeadlineExceeded, InvalidArgument, KVError, Throttled
from kvstore.transactions import Contested, Transaction, TransactionOptions
from txn.types import KEPT_PREFIX

RUN_TIMEOUT_S: Final = 30.0  # `run` without a timeout begins no other attempt after this
BACKOFF_S: Final = 0.002
BACKOFF_S_MAX: Final = 0.25
KEPT_BYTES_MAX: Final = 1_024
CONTESTED_MAX: Final = 16  # keys that the next attempt locks first

Begin = Callable[[TransactionOptions, int], Transaction]


class Attempts:
    """The attempts of one `run`: each begins a new transaction, which inherits the age of the first, and locks first what the
    earlier ones lost to others: so of many that want one key nobody tries in vain for long.

    Args: timeout_s: for all of them (None: each call has the client's, and the last begins within RUN_TIMEOUT_S).
    """

    def __init__(
        self,
        begin: Begin,
        monotonic: Callable[[], float],
        draw: Callable[[], float],
        read_only: bool,
        timeout_s: float | None,
        priority: int,
    ) -> None:
        self._begin = begin
        self._monotonic = monotonic
        self._draw = draw
        self._read_only = read_only
        self._priority = priority
        self._hard = timeout_s is not None
        self._deadline = monotonic() + (RUN_TIMEOUT_S if timeout_s is None else timeout_s)
        self._age = 0
        self._failures = 0
        self._contested: dict[bytes, Contested] = {}

    def begin(self) -> Transaction:
        left_s = max(self._deadline - self._monotonic(), 0.001) if self._hard else None
        contested = tuple(self._contested.values())
        options = TransactionOptions(self._read_only, left_s, self._priority, contested)
        return self._begin(options, self._age)

    def pause(self, tx: Transaction, error: KVError) -> float:
        """Seconds to wait before the next attempt. Raises `error`, or DeadlineExceeded, if there is to be none."""
        if not error.retryable or error.maybe_committed or tx.commit_version is not None:
            raise error
        self._age = tx.age
        self._failures += 1
        found = tx.contested_by(error)
        if found is not None and (found.written or found.key not in self._contested):
            self._contested[found.key] = found
            while len(self._contested) > CONTESTED_MAX:
                del self._contested[next(iter(self._contested))]
        longest = min(BACKOFF_S_MAX, BACKOFF_S * (1 << min(self._failures, 10)))
        wait_s = longest * (0.5 + 0.5 * self._draw())
        if isinstance(error, Throttled):
            wait_s = max(wait_s, error.retry_after)
        if self._monotonic() + wait_s >= self._deadline:
            reason = f"the time ran out after {self._failures} attempts: {error}"
            raise DeadlineExceeded(reason) from error
        return wait_s


class KeptResult:
    """The row of an idempotency key: read with a guard, written with the result (txn/DESIGN.md section 9)."""

    def __init__(self, idempotency_key: bytes | str) -> None:
        given = idempotency_key.encode() if isinstance(idempotency_key, str) else idempotency_key
        if not isinstance(given, bytes) or not given:
            raise InvalidArgument("an idempotency key is text or bytes, and not empty")
        self._row = KEPT_PREFIX + hashlib.blake2b(given, digest_size=32).digest()

    async def recall(self, tx: Transaction) -> bytes | None:
        """What an earlier run left, for `decode`."""
        return await tx.recall(self._row)

    def decode(self, kept: bytes) -> Any:
        try:
            return msgspec.msgpack.decode(kept)
        except msgspec.DecodeError as error:
            raise CorruptionError("the row of an idempotency key is damaged") from error

    def remember(self, tx: Transaction, result: object) -> None:
        try:
            kept = msgspec.msgpack.encode(result)
        except (TypeError, ValueError, OverflowError) as error:
            raise InvalidArgument(f"a result that is to be kept is plain data: {error}") from error
        if len(kept) > KEPT_BYTES_MAX:
            raise InvalidArgument(f"a result that is to be kept has at most {KEPT_BYTES_MAX} bytes")
        tx.remember(self._row, kept)
