"""Claims of the history files: JSON lines give back every operation as it was, and a bad line is refused by its number;
EDN holds the operations as Jepsen's checkers expect them, with processes that do one thing at a time and end with :info.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.testing.checkers import BadHistory
from kvstore.testing.edn import write_edn
from kvstore.testing.history import (
    FOREVER,
    History,
    MicroTxn,
    Operation,
    Outcome,
    RegisterOp,
    TxnOp,
)
from kvstore.testing.jsonl import (
    LINE_BYTES_MAX,
    Markers,
    Record,
    Rows,
    read_history,
    read_jsonl,
    write_history,
    write_record,
)
from tests.unit.testing.micro_histories import parse

DATA = st.binary(max_size=12) | st.sampled_from([b"\\x00", b'"', b"\xed\xa0\x80", "ß€😀".encode()])
WORD = st.characters(categories=("L", "N"))
VALUE = st.none() | DATA
ROWS = st.dictionaries(DATA, VALUE, max_size=3)
VERSION = st.integers(0, 1 << 90)
INTEGER = st.integers(-(1 << 62), 1 << 62)
STEPS = st.lists(
    st.tuples(st.just("append"), DATA, INTEGER)
    | st.tuples(st.just("w"), DATA, INTEGER)
    | st.tuples(st.just("r"), DATA, st.none() | INTEGER | st.lists(INTEGER, max_size=3)),
    max_size=4,
)


@st.composite
def times(draw: st.DrawFn) -> tuple[int, int, Outcome]:
    begin, outcome = draw(st.integers(0, 1 << 50)), draw(st.sampled_from(Outcome))
    end = begin + draw(st.integers(0, 1 << 50))
    if outcome is not Outcome.OK and draw(st.booleans()):
        end = FOREVER
    return begin, end, outcome


@st.composite
def operations(draw: st.DrawFn) -> Operation:
    begin, end, outcome = draw(times())
    client, version = draw(st.text(WORD, max_size=5)), draw(VERSION)
    kind = draw(st.sampled_from(("register", "transaction", "micro")))
    if kind == "register":
        what = draw(st.sampled_from(("put", "get", "cas", "delete")))
        key, value, expected, swapped = draw(st.tuples(DATA, VALUE, VALUE, st.booleans()))
        return RegisterOp(client, what, key, begin, value, expected, swapped, version, end, outcome)
    error = draw(st.text(WORD, max_size=5))
    if kind == "micro":
        return MicroTxn(client, begin, draw(STEPS), version, end, outcome, error)
    name, reads, writes = draw(st.tuples(DATA, ROWS, ROWS))
    return TxnOp(client, name, begin, reads, writes, version, end, outcome, error)


RECORDS: st.SearchStrategy[Record] = st.one_of(
    operations(),
    st.builds(Rows, st.sampled_from(("initial", "final")), ROWS),
    st.builds(Markers, st.dictionaries(DATA, VERSION, max_size=3)),
)


@given(st.lists(RECORDS, max_size=6))
def test_what_is_written_is_read_back(records: list[Record]) -> None:
    stream = io.BytesIO()
    for record in records:
        write_record(record, stream)
    text = stream.getvalue()
    assert text.count(b"\n") == len(records)
    assert text.decode().replace("\n", "").isprintable()
    assert list(read_jsonl(io.BytesIO(text))) == records


@given(st.lists(operations(), max_size=6), ROWS, st.none() | ROWS, st.none() | st.just({b"a": 5}))
def test_a_whole_history_is_read_back(ops, initial, final, markers) -> None:
    history = History()
    history.registers = [op for op in ops if isinstance(op, RegisterOp)]
    history.transactions = [op for op in ops if isinstance(op, TxnOp)]
    history.micro = [op for op in ops if isinstance(op, MicroTxn)]
    history.initial, history.final, history.markers = initial, final, markers
    stream = io.BytesIO()
    write_history(history, stream)
    assert vars(read_history(io.BytesIO(stream.getvalue()))) == vars(history)


def test_the_lines_are_as_documented() -> None:
    stream = io.BytesIO()
    key = b"\xff/x"
    write_record(
        RegisterOp("c1", "put", key, 1, b"v", version=5, end=2, outcome=Outcome.OK), stream
    )
    write_record(TxnOp("c1", b"t1", 3, {b"x": None}, {b"x": b"1"}, error="no_quorum"), stream)
    write_record(
        MicroTxn("c2", 4, [("append", b"x", 1), ("r", b"x", [1])], 7, 9, Outcome.OK), stream
    )
    assert stream.getvalue().decode().splitlines() == [REGISTER_LINE, TRANSACTION_LINE, MICRO_LINE]


REGISTER_LINE = (
    r'{"record":"register","client":"c1","begin":1,"outcome":"ok","end":2,"version":"5",'
    r'"kind":"put","key":"\\xff/x","value":"v"}'
)
TRANSACTION_LINE = (
    r'{"record":"transaction","client":"c1","begin":3,"outcome":"unknown",'
    r'"name":"t1","reads":{"x":null},"writes":{"x":"1"},"error":"no_quorum"}'
)
MICRO_LINE = (
    r'{"record":"micro","client":"c2","begin":4,"outcome":"ok","end":9,"version":"7",'
    r'"steps":[["append","x",1],["r","x",[1]]]}'
)
GOOD = b'{"record":"micro","client":"c","begin":1,"outcome":"ok","end":2,"steps":[]}\n'


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (b"{", "line 3: Input data was truncated"),
        (b"[]", "line 3: Expected `object`"),
        (b'{"record":"poem"}', "Invalid value 'poem'"),
        (GOOD.replace(b'"client":"c",', b""), "missing required field `client`"),
        (GOOD.replace(b'"ok"', b'"fine"'), "Invalid enum value 'fine'"),
        (GOOD.replace(b',"end":2', b""), "line 3: an operation that is ok has an end"),
        (GOOD.replace(b'"end":2', b'"end":0'), "1 to 0 is no time"),
        (GOOD.replace(b'"end":2', b'"end":2,"version":5'), "Expected `str | null`, got `int`"),
        (GOOD.replace(b'"end":2', b'"end":2,"version":"-5"'), "'-5' is no version"),
        (GOOD.replace(b"[]", b'[["append","x",null]]'), "append of None: write an integer"),
        (GOOD.replace(b"[]", b'[["r","\\\\q",null]]'), "write \\xNN for a byte"),
        (GOOD.replace(b'"c"', b'"\xff"'), "line 3: "),
        (b"[" * 100_000, "line 3: "),
    ],
)
def test_a_bad_line_is_refused_by_its_number(line: bytes, what: str) -> None:
    records = read_jsonl(io.BytesIO(GOOD + b"\n" + line + b"\n" + GOOD))
    next(records)
    with pytest.raises(BadHistory) as caught:
        next(records)
    assert caught.value.line == 3
    assert what in str(caught.value)


def test_a_line_without_end_is_refused() -> None:
    class Endless(io.RawIOBase):
        def readline(self, size: int | None = -1, /) -> bytes:
            assert size is not None
            assert 0 < size <= LINE_BYTES_MAX + 1
            return b" " * size

    with pytest.raises(BadHistory, match="line 1: longer than"):
        next(read_jsonl(Endless()))  # type: ignore[arg-type]


# ---------------------------------------------------------------- EDN

TOKEN = re.compile(r'[\s,]*([\[\]{}]|"(?:\\.|[^"\\])*"|[^\s,\[\]{}]+)')


def read_edn(text: str) -> Any:
    """One value of the little EDN that is written here: maps, vectors, strings, keywords (as text), integers, nil."""
    tokens = TOKEN.findall(text)

    def value() -> Any:
        token = tokens.pop(0)
        if token in {"[", "{"}:
            items = []
            while tokens[0] not in {"]", "}"}:
                items.append(value())
            tokens.pop(0)
            return items if token == "[" else dict(zip(items[::2], items[1::2], strict=True))
        if token.startswith('"'):
            return re.sub(r"\\(.)", r"\1", token[1:-1])
        if token == "nil":
            return None
        return token if token.startswith(":") else int(token)

    result = value()
    assert not tokens
    return result


def edn(ops: Sequence[Operation], key: bytes | None = None) -> list[dict[str, Any]]:
    stream = io.BytesIO()
    count = write_edn(ops, stream, key=key)
    lines = stream.getvalue().decode().splitlines()
    assert len(lines) == count
    return [read_edn(line) for line in lines]


def test_transactions_are_written_as_jepsen_has_them() -> None:
    history = parse(["a 1..4 append x 1; r x 1; r \\xff -", "b 2..3! append x 2", "a 5..6? r x 9"])
    stream = io.BytesIO()
    write_edn(history, stream)
    assert stream.getvalue().decode().splitlines() == [
        r'{:type :invoke, :process 0, :f :txn, :value [[:append "x" 1] [:r "x" nil] [:r "\\xff" nil]], :time 1, :index 0}',
        r'{:type :invoke, :process 1, :f :txn, :value [[:append "x" 2]], :time 2, :index 1}',
        r'{:type :fail, :process 1, :f :txn, :value [[:append "x" 2]], :time 3, :index 2}',
        r'{:type :ok, :process 0, :f :txn, :value [[:append "x" 1] [:r "x" [1]] [:r "\\xff" []]], :time 4, :index 3}',
        r'{:type :invoke, :process 0, :f :txn, :value [[:r "x" nil]], :time 5, :index 4}',
        r'{:type :info, :process 0, :f :txn, :value [[:r "x" nil]], :time 5, :index 5}',
    ]


def test_registers_are_written_as_knossos_has_them() -> None:
    ok = Outcome.OK
    ops = [
        RegisterOp("a", "put", b"k", 1, b"1", end=2, outcome=ok),
        RegisterOp("a", "get", b"k", 3, b"1", end=4, outcome=ok),
        RegisterOp("a", "cas", b"k", 5, b"2", b"1", end=6, outcome=ok),
        RegisterOp("a", "cas", b"k", 7, b"3", b"1", swapped=False, end=8, outcome=ok),
        RegisterOp("a", "delete", b"k", 9, end=10, outcome=ok),
        RegisterOp("a", "get", b"other", 11, b"9", end=12, outcome=ok),
    ]
    told = [(op[":type"], op[":f"], op[":value"]) for op in edn(ops, key=b"k")]
    assert told == [
        (":invoke", ":write", "1"),
        (":ok", ":write", "1"),
        (":invoke", ":read", None),
        (":ok", ":read", "1"),
        (":invoke", ":cas", ["1", "2"]),
        (":ok", ":cas", ["1", "2"]),
        (":invoke", ":cas", ["1", "3"]),
        (":fail", ":cas", ["1", "3"]),
        (":invoke", ":write", None),
        (":ok", ":write", None),
    ]
    assert edn(ops)[-1][":value"] == ["other", "9"]


def test_named_transactions_are_written_as_reads_and_writes() -> None:
    ok = TxnOp("a", b"t", 1, {b"x": b"1", b"y": None}, {b"x": b"2"}, 5, 2, Outcome.OK)
    failed = TxnOp("a", b"u", 3, {b"x": b"2"}, {}, 0, 4, Outcome.FAILED, "conflict")
    told = edn([ok, failed])
    assert told[1][":value"] == [[":r", "x", "1"], [":r", "y", None], [":w", "x", "2"]]
    assert told[3][":value"] == [[":r", "x", None]]
    assert told[3][":error"] == "conflict"


@given(st.lists(operations(), max_size=12))
def test_processes_do_one_thing_at_a_time_and_nothing_after_info(ops: list[Operation]) -> None:
    busy: dict[int, str] = {}  # process -> what it does; "gone" after :info
    last, open_ops = -1, 0
    for index, op in enumerate(edn(ops)):
        assert op[":index"] == index
        assert op[":time"] >= last
        last = op[":time"]
        process, kind = op[":process"], op[":type"]
        if kind == ":invoke":
            assert busy.get(process, "idle") == "idle"
            busy[process] = op[":f"]
            open_ops += 1
        else:
            assert busy[process] == op[":f"]
            busy[process] = "gone" if kind == ":info" else "idle"
            open_ops -= 1
    assert open_ops == 0
    assert sorted(busy) == list(range(len(busy)))


def test_a_client_keeps_its_process_until_an_unknown_outcome() -> None:
    ops = parse(["a 1..2 r x -", "a 3..4 r x -", "b 5..6 r x -", "a 7..8? w x 1", "a 9..10 r x -"])
    invoked = [op[":process"] for op in edn(ops) if op[":type"] == ":invoke"]
    assert invoked == [0, 0, 1, 0, 2]
