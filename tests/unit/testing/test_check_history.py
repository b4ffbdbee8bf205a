"""Claims of `python -m tools.check_history`: what a file holds is judged, and the exit status is the verdict."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvstore.testing.checkers import registers
from kvstore.testing.history import History, Outcome, RegisterOp, TxnOp
from kvstore.testing.jsonl import write_history
from tests.unit.testing.micro_histories import parse
from tools.check_history import main

GOOD = ["a 1..2 append x 1", "b 3..4 r x 1"]
BAD = ["a 1..9 append x 1", "b 2..3 r x 1", "c 4..5 r x -"]

TWICE = (
    '{"record":"micro","client":"c","begin":1,"outcome":"ok","end":2,'
    '"steps":[["append","x",1],["append","x",1]]}'
)


def save(path: Path, micro: list[str] | None = None, *, value: bytes = b"1") -> str:
    """A file with micro transactions, or with a register and a transaction that read `value`, where 1 was written."""
    history = History()
    ok = Outcome.OK
    if micro is None:
        history.registers = [
            RegisterOp("a", "put", b"k", 1, b"1", version=5, end=2, outcome=ok),
            RegisterOp("a", "get", b"k", 3, value, version=5, end=4, outcome=ok),
        ]
        history.initial = {b"x": b"1"}
        history.transactions = [TxnOp("a", b"t", 5, {b"x": value}, {}, 9, 6, ok)]
    else:
        history.micro = parse(micro)
    with path.open("wb") as stream:
        write_history(history, stream)
    return str(path)


def test_a_clean_file_is_zero(tmp_path, capsys) -> None:
    assert main([save(tmp_path / "h", GOOD)]) == 0
    assert capsys.readouterr().out == "list-append: 2 operations, nothing found\n"
    assert main([save(tmp_path / "h")]) == 0
    assert capsys.readouterr().out == (
        "registers: 2 operations, nothing found\ntransactions: 1 operations, nothing found\n"
    )


def test_an_anomaly_is_one_and_its_cycle_is_shown(tmp_path, capsys) -> None:
    assert main([save(tmp_path / "h", BAD)]) == 1
    out = capsys.readouterr().out
    assert out.startswith("G-single-realtime: ")
    assert "  T3 -rw-> T1: T3 read 'x' as [], to which T1 appended 1\n" in out
    assert out.endswith("list-append: 3 operations, 1 found\n")


def test_every_kind_in_the_file_is_judged(tmp_path, capsys) -> None:
    path = save(tmp_path / "h", value=b"2")
    assert main([path]) == 1
    out = capsys.readouterr().out
    assert "b'k': read b'2', which nobody wrote" in out
    assert "b't' of a at version 9 read b'x' = b'2'" in out
    assert main([path, "--kind", "rw-register"]) == 0  # there are none


def test_reads_of_lists_alone_are_of_list_append(tmp_path, capsys) -> None:
    assert main([save(tmp_path / "h", ["a 1..2 r x 1,2", "b 3..4 r y -"])]) == 1
    assert "list-append: 2 operations" in capsys.readouterr().out


def test_both_kinds_of_micro_transactions_may_be_in_one_file(tmp_path, capsys) -> None:
    path = tmp_path / "h"
    lists, registers = Path(save(tmp_path / "l", BAD)), save(tmp_path / "r", ["a 1..2 w z 1"])
    nothing = '{{"record":"micro","client":"d","begin":9,"outcome":"ok","end":10,"steps":[["r","{}",null]]}}\n'
    text = lists.read_text() + Path(registers).read_text()
    path.write_text(text + nothing.format("x") + nothing.format("z"))
    assert main([str(path)]) == 1
    out = capsys.readouterr().out
    assert "list-append: 4 operations, 1 found\n" in out
    assert "'z'" in out  # it was written, and then not there
    assert out.endswith("rw-register: 2 operations, 1 found\n")
    target = tmp_path / "h.edn"
    assert main([str(path), "--kind", "rw-register", "--edn", str(target)]) == 0
    assert len(target.read_text().splitlines()) == 4


def test_a_transaction_of_both_kinds_is_refused(tmp_path, capsys) -> None:
    path = tmp_path / "h"
    path.write_text(TWICE.replace('["append","x",1]]', '["w","y",1]]') + "\n")
    assert main([str(path)]) == 2
    assert "no step of list-append" in capsys.readouterr().err


def test_what_could_not_be_judged_is_said(tmp_path, capsys) -> None:
    """Transactions that tell neither reads nor writes, and keys that nobody looked at in the end: these are no rows that are
    gone, for whoever looks may choose what at."""
    history = History()
    ok = Outcome.OK
    history.initial = {b"x": b"0"}
    history.transactions = [
        TxnOp("a", b"t1", 1, {}, {b"x": b"1", b"y": b"1"}, 5, 2, ok),
        TxnOp("a", b"t2", 3, {}, {b"y": b"2"}, 0, 4, Outcome.FAILED),
        TxnOp("a", b"t3", 5, {}, {}, 7, 6, ok),
        TxnOp("a", b"t4", 7, {}, {}, 0, 8, Outcome.FAILED),
    ]
    path = tmp_path / "h"
    one = "transactions: 1 key that was written was not looked at in the end\n"
    both = "transactions: 2 keys that were written were not looked at in the end\n"
    finals: list[tuple[dict[bytes, bytes | None] | None, str]]
    finals = [(None, ""), ({b"x": b"1"}, one), ({}, both), ({b"x": b"1", b"y": b"1"}, "")]
    for final, told in finals:
        history.final = final
        with path.open("wb") as stream:
            write_history(history, stream)
        assert main([str(path)]) == 0
        assert capsys.readouterr().out == (
            "transactions: 4 operations, nothing found\n"
            "transactions: 1 operation tells neither reads nor writes: what it did was not judged\n"
            + told
        )
    assert main([str(path), "-o", "json"]) == 0
    (note,) = json.loads(capsys.readouterr().out)["transactions"]["not judged"]
    assert note.startswith("1 operation tells neither")


def test_a_row_that_was_looked_at_in_the_end_and_is_gone_is_found(tmp_path, capsys) -> None:
    path = tmp_path / "h"
    path.write_text(
        '{"record":"transaction","client":"c","begin":1,"outcome":"ok","end":2,"version":"5","name":"t",'
        '"writes":{"x":"1"}}\n{"record":"final","rows":{"x":null}}\n'
    )
    assert main([str(path)]) == 1
    assert "at the end b'x' = None" in capsys.readouterr().out


def hard(path: Path, *more: str) -> str:
    """A key that cannot be explained, with so many unknown writes that the search is given up; and lines of another file."""
    history = History()
    ok = Outcome.OK
    history.registers = [RegisterOp("a", "put", b"k", 1, b"%d" % n) for n in range(20)]
    history.registers.append(RegisterOp("a", "cas", b"k", 3, b"x", b"nobody's", end=4, outcome=ok))
    with path.open("wb") as stream:
        write_history(history, stream)
    path.write_text("\n".join([path.read_text(), *more]))
    return str(path)


def test_a_search_that_is_given_up_is_two_if_nothing_was_found(
    tmp_path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr(registers, "CONFIGURATIONS_MAX", 100)
    path = hard(tmp_path / "h", Path(save(tmp_path / "good", GOOD)).read_text())
    assert main([path]) == 2
    told = capsys.readouterr()
    assert "registers: b'k': more than 100 configurations" in told.err
    assert told.out == (
        "registers: 21 operations, undecided\nlist-append: 2 operations, nothing found\n"
    )
    assert main([path, "-o", "json"]) == 2
    report = json.loads(capsys.readouterr().out)
    assert report["registers"]["undecided"] == "b'k': more than 100 configurations"
    assert "undecided" not in report["list-append"]


@pytest.mark.parametrize("refused", [False, True])
def test_what_one_kind_shows_is_told_whatever_becomes_of_another(
    tmp_path, capsys, monkeypatch, refused: bool
) -> None:
    """`refused`: the other kind breaks its rules, rather than that its search was given up."""
    monkeypatch.setattr(registers, "CONFIGURATIONS_MAX", 100)
    path = hard(tmp_path / "h", Path(save(tmp_path / "bad", BAD)).read_text())
    if refused:
        path = save(tmp_path / "h", value=b"2")
        with Path(path).open("a") as stream:
            stream.write(TWICE)
    assert main([path]) == 1
    told = capsys.readouterr()
    assert ("nobody wrote" if refused else "G-single-realtime: ") in told.out
    assert ("it must be unique" if refused else "more than 100") in told.err


def test_versions_are_used_on_demand(tmp_path) -> None:
    path = save(
        tmp_path / "h", ["a 1..9@6 w x 1", "b 2..3@5 w x 2", "c 4..5 r x 1", "d 6..7 r x 2"]
    )
    assert main([path]) == 0
    assert main([path, "--by-version"]) == 1


def test_json_holds_names_transactions_and_edges(tmp_path, capsys) -> None:
    assert main([save(tmp_path / "h", BAD), "-o", "json"]) == 1
    report = json.loads(capsys.readouterr().out)["list-append"]
    assert report["operations"] == 3
    (anomaly,) = report["anomalies"]
    assert anomaly["name"] == "G-single-realtime"
    assert [txn["name"] for txn in anomaly["transactions"]] == ["T1", "T2", "T3"]
    assert anomaly["edges"][2] == {
        "from": "T3",
        "to": "T1",
        "kind": "rw",
        "key": "x",
        "reason": "T3 read 'x' as [], to which T1 appended 1",
    }


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{}\n", "line 1: Object missing required field `record`"),
        (f"{TWICE}\n", "it must be unique"),
        (None, "No such file"),
    ],
)
def test_a_file_that_is_no_history_is_two(tmp_path, capsys, text, what) -> None:
    path = tmp_path / "h"
    if text is not None:
        path.write_text(text)
    assert main([str(path)]) == 2
    assert what in capsys.readouterr().err


def test_it_writes_edn(tmp_path, capsys) -> None:
    target = tmp_path / "h.edn"
    assert main([save(tmp_path / "h", BAD), "--edn", str(target)]) == 0
    assert len(target.read_text().splitlines()) == 6
    mixed = save(tmp_path / "h")
    assert main([mixed, "--edn", str(target)]) == 2
    assert "registers, transactions: choose by --kind" in capsys.readouterr().err
    assert main([mixed, "--edn", str(target), "--kind", "registers", "--key", "k"]) == 0
    assert ':f :write, :value "1"' in target.read_text()
