"""Claims of kvstore.errors: stable codes, honest flags, and fields that survive the wire."""

from __future__ import annotations

import copy
import json
import pickle
import re
from typing import Any

import msgspec
import pytest

from kvstore import errors
from kvstore.errors import (
    CODES,
    CommitUnknown,
    Compacted,
    CompareFailed,
    Conflict,
    DeadlineExceeded,
    Deadlock,
    DiskFull,
    EpochMismatch,
    InvalidArgument,
    KeyTooLarge,
    KVError,
    LockTimeout,
    NoQuorum,
    NotLeader,
    StorageError,
    Throttled,
    Unavailable,
    from_wire,
    to_wire,
)

FILLED: dict[type[KVError], dict[str, Any]] = {
    Conflict: {"key": b"\x00k\xff", "other_txn": b"t" * 16, "their_version": 2**60},
    LockTimeout: {"key": b"k", "holder": b"a" * 16},
    Deadlock: {"cycle": (b"a" * 16, b"b" * 16)},
    CompareFailed: {"version": 2**60},
    Compacted: {"oldest": 2**60},
    Throttled: {"retry_after": 0.25},
    NotLeader: {"range_id": 7, "node": 3, "address": "127.0.0.1:7400"},
    EpochMismatch: {"range_id": 7, "ranges": (b"one", [2, b"two"])},
}
# Other modules add errors of their own to the registry when they are imported; each is tested where it is defined.
EVERY = sorted(
    (cls for cls in CODES.values() if cls.__module__ == errors.__name__), key=lambda cls: cls.code
)


def filled(cls: type[KVError]) -> KVError:
    return cls(**FILLED.get(cls, {}))


@pytest.mark.parametrize("cls", EVERY)
def test_a_code_is_the_snake_case_of_the_class_name(cls: type[KVError]):
    if cls is KVError:
        assert cls.code == "kv_error"
    else:
        assert cls.code == re.sub(r"(?<=[a-z])(?=[A-Z])", "_", cls.__name__).lower()


@pytest.mark.parametrize("cls", EVERY)
def test_what_an_error_says_by_itself_is_not_cut_short(cls: type[KVError]):
    documented = " ".join((cls.__doc__ or "").split())
    message = cls().message
    assert "\n" not in message
    assert message.endswith(".") or not documented.startswith(message)


def test_every_error_of_the_module_is_in_the_registry():
    defined = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, KVError)]
    assert sorted(EVERY, key=repr) == sorted(defined, key=repr)


@pytest.mark.parametrize("cls", EVERY)
def test_an_error_survives_the_wire_pickling_and_copying(cls: type[KVError]):
    error = filled(cls)
    assert set(FILLED.get(cls, {})) == set(cls.fields)
    packed = msgspec.msgpack.decode(msgspec.msgpack.encode(to_wire(error)))
    for again in (from_wire(*packed), pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(again) is cls
        assert str(again) == str(error) != ""
        assert (again.code, again.retryable, again.maybe_committed) == (
            error.code,
            error.retryable,
            error.maybe_committed,
        )
        for name in cls.fields:
            assert getattr(again, name) == getattr(error, name) == FILLED[cls][name]


@pytest.mark.parametrize("cls", EVERY)
def test_flags_of_one_error_alone_survive_pickling_and_copying(cls: type[KVError]):
    error = filled(cls)
    error.retryable, error.maybe_committed = not cls.retryable, not cls.maybe_committed
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(again) is cls
        assert again.retryable is error.retryable
        assert again.maybe_committed is error.maybe_committed


@pytest.mark.parametrize("cls", [cls for cls in EVERY if cls is not EpochMismatch])
def test_an_error_survives_json_where_bytes_are_base64_and_versions_strings(cls: type[KVError]):
    code, message, details = to_wire(filled(cls))
    for name, value in details.items():
        if name in {"version", "their_version"}:
            details[name] = str(value)
    sent = json.loads(msgspec.json.encode([code, message, details]))
    again = from_wire(*sent)
    assert type(again) is cls
    for name in cls.fields:
        assert getattr(again, name) == FILLED[cls][name]


def test_an_unknown_code_becomes_a_plain_error_with_that_code_and_its_flags():
    error = from_wire("newer_error", "of a newer version", {"retryable": True, "x": 1})
    assert type(error) is KVError
    assert (error.code, str(error), error.retryable) == ("newer_error", "of a newer version", True)
    assert error.maybe_committed  # nothing said that it was not
    certain = from_wire("newer_error", "m", {"maybe_committed": False})
    assert not certain.maybe_committed
    assert not certain.retryable
    assert to_wire(error)[0] == to_wire(from_wire(*to_wire(error)))[0] == "newer_error"


@pytest.mark.parametrize(
    "details",
    [
        None,
        {},
        {"key": 5, "other_txn": None, "their_version": "many"},
        {"key": [b"a"], "other_txn": "not base64!", "their_version": 1.5},
        {"other": "thing"},
    ],
)
def test_details_that_are_absent_or_wrong_get_defaults(details: dict[str, Any] | None):
    error = from_wire("conflict", "met another", details)
    assert isinstance(error, Conflict)
    assert (error.key, error.other_txn, error.their_version) == (b"", b"", 0)
    assert str(error) == "met another"


def test_errors_are_also_what_python_calls_them():
    assert issubclass(InvalidArgument, ValueError)
    assert issubclass(KeyTooLarge, InvalidArgument)
    assert issubclass(DeadlineExceeded, TimeoutError)
    assert issubclass(NoQuorum, Unavailable)
    assert issubclass(DiskFull, StorageError)
    assert str(DeadlineExceeded("no answer in 5 s")) == "no answer in 5 s"


def test_only_these_errors_may_have_committed():
    maybe = {cls.code for cls in EVERY if cls.maybe_committed}
    assert maybe == {"commit_unknown", "outcome_expired", "pipe_closed"}
    assert not CommitUnknown.retryable


def test_only_these_errors_are_worth_another_try():
    assert {cls.code for cls in EVERY if cls.retryable} == {
        "replica_behind",
        "conflict",
        "deadlock",
        "epoch_mismatch",
        "lock_timeout",
        "no_quorum",
        "node_stopped",
        "not_leader",
        "not_ready",
        "pipe_closed",
        "throttled",
        "transaction_too_old",
        "unavailable",
    }


def test_fields_may_be_given_by_position_and_show_in_the_text():
    assert str(Conflict(b"k", b"\x01\x02", 9)) == "conflict at key b'k' with transaction 0102"
    assert str(Deadlock([b"\x01", b"\x02"])) == "deadlock: 01 waits for 02"
    assert Throttled(1.5).retry_after == 1.5
    assert CompareFailed(4).version == 4


def test_a_user_may_derive_an_error_and_it_travels_as_its_base():
    class OutOfStock(Conflict):
        pass

    assert CODES["conflict"] is Conflict
    assert type(from_wire(*to_wire(OutOfStock(b"k")))) is Conflict
