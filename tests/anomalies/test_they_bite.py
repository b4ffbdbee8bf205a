"""Claims: each script shows its anomaly when the rule that excludes it is left out; and there is a script for each of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

from kvstore.buffer import ReadSpans
from kvstore.reads import View
from tests.anomalies import (
    test_aborted_read,
    test_causal_reverse,
    test_dirty_read,
    test_dirty_write,
    test_intermediate_read,
    test_long_fork,
    test_lost_update,
    test_non_repeatable_read,
    test_phantom,
    test_read_skew,
    test_stale_read,
    test_write_skew,
)
from tests.anomalies.stage import Script, play
from tests.sim.plants.leaders import _oracle_not_confirmed
from txn import apply
from txn.commands import PreparePart
from txn.evaluate import Evaluator
from txn.latches import Pending
from txn.mvcc import encode_latest
from txn.reads import Reader
from txn.state import Part, RangeState, Staged

Plant = Callable[[pytest.MonkeyPatch], None]


def keys_are_not_guarded(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ReadSpans, "add_key", lambda *_: None)


def spans_are_not_guarded(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ReadSpans, "add", lambda *_: None)


def intents_are_not_met(patch: pytest.MonkeyPatch) -> None:
    """Readers do not ask about undecided writes: half of a commit is seen."""
    patch.setattr(Reader, "undecided", lambda *_: False)


def writers_pass_intents(patch: pytest.MonkeyPatch) -> None:
    """What is undecided is overwritten, and whoever is resolved last stands."""

    def add_part(self: RangeState, part: Part) -> None:
        self.parts.setdefault(part.txn_id, {})[part.locus] = part
        self.intents |= dict.fromkeys(part.row.keys, part)
        if part.row.participants:
            self.staged[part.txn_id] = Staged(part.locus, part.row.participants)

    def remove_part(self: RangeState, part: Part) -> None:
        del self.parts[part.txn_id]
        self.staged.pop(part.txn_id, None)
        for key in part.row.keys:
            self.intents.pop(key, None)

    def write(overlay: Any, keys: Any, values: Any, ts: int, txn_id: bytes) -> None:
        for key, value in zip(keys, values, strict=True):
            overlay.put(b"L" + key, encode_latest(ts, txn_id, value))

    def take(self: Pending, part: Part, *_: Any) -> None:
        self.part = part  # two are resolved at once, and a key's latch has one holder

    patch.setattr(Evaluator, "_foreign_part", lambda *_: None)
    patch.setattr(Pending, "take", take)
    patch.setattr(RangeState, "add_part", add_part)
    patch.setattr(RangeState, "remove_part", remove_part)
    patch.setattr(apply, "_write_versions", write)


def prepared_is_visible(patch: pytest.MonkeyPatch) -> None:
    """A part's writes are versions as soon as it is prepared, whatever becomes of it."""
    prepare = apply._prepare

    def visible(state: Any, overlay: Any, command: PreparePart) -> Any:
        answer = prepare(state, overlay, command)
        for key, value in zip(command.keys, command.values, strict=True):
            row = encode_latest(command.min_ts - 1, command.txn_id, value)
            overlay.put(b"L" + key, row)
        return answer

    patch.setattr(apply, "_APPLY", {**apply._APPLY, PreparePart: visible})


def no_snapshot(patch: pytest.MonkeyPatch) -> None:
    """Every key is read at a timestamp of its own."""
    read = View.read

    async def one(self: View, key: bytes) -> Any:
        return (await read(View(self.router, self.timeout_s), [key]))[key]

    async def one_by_one(self: View, keys: Any) -> Any:
        wanted = list(keys)
        return dict(
            zip(wanted, await asyncio.gather(*[one(self, key) for key in wanted]), strict=True)
        )

    patch.setattr(View, "get", one)
    patch.setattr(View, "read", one_by_one)


def leadership_is_not_confirmed(patch: pytest.MonkeyPatch) -> None:
    for owner, name, replacement in _oracle_not_confirmed():
        patch.setattr(owner, name, replacement)


BITES: Final[list[tuple[Plant, Script]]] = [
    (writers_pass_intents, test_dirty_write.script),
    (intents_are_not_met, test_dirty_read.script),
    (prepared_is_visible, test_aborted_read.script),
    (intents_are_not_met, test_intermediate_read.script),
    (no_snapshot, test_non_repeatable_read.script),
    (keys_are_not_guarded, test_lost_update.script),
    (no_snapshot, test_read_skew.script),
    (keys_are_not_guarded, test_write_skew.script),
    (spans_are_not_guarded, test_phantom.script),
    (no_snapshot, test_long_fork.script),
    (no_snapshot, test_causal_reverse.script),
    (leadership_is_not_confirmed, test_stale_read.script),
]


@pytest.mark.parametrize(
    ("plant", "script"),
    BITES,
    ids=lambda each: (
        each.__module__.rpartition(".")[2] if each.__name__ == "script" else each.__name__
    ),
)
def test_without_its_rule_the_anomaly_is_seen(
    plant: Plant, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        play(script)


def test_every_script_is_shown_to_bite() -> None:
    named = {path.stem for path in Path(__file__).parent.glob("test_*.py")} - {Path(__file__).stem}
    assert {script.__module__.rpartition(".")[2] for _, script in BITES} == named
    assert len(named) == 12
