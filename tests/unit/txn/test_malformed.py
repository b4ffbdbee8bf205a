"""Claims: what no client of ours sends is refused before it comes into the log, and stops neither leader nor replica."""

from __future__ import annotations

from tests.unit.txn.txn_driver import Range, put, settled, txn_id
from txn.commands import Decide
from txn.types import Participant, PartStatus, TxnStatus, point_end


def participants(*loci: bytes) -> list[Participant]:
    return [Participant(locus, locus, point_end(locus)) for locus in loci]


def test_a_participant_is_named_once():
    place = Range()
    asked = place.anchor(1, put(b"a"), others=(b"a",))
    assert settled(place, asked).reply.code == "invalid_argument"


def test_a_record_that_names_its_anchor_twice_is_decided_once():
    place = Range()
    place.anchor(1, put(b"a"), others=(b"x",))
    place.settle()
    place.state.staged[txn_id(1)].participants.extend(participants(b"a"))
    place.apply([Decide(txn_id(1), b"a", 101)])
    assert place.state.terminal_of(place.rows, txn_id(1), b"a") == (TxnStatus.COMMITTED, 101)
    assert place.state.answer_of(place.rows, txn_id(1), b"a").status == PartStatus.COMMITTED
