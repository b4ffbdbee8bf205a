"""The anchor's answer to a reader about a transaction that is STAGED (DESIGN.md section 7)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from replication.probes import reached
from txn.messages import Failure, PartReply, QueryPart, QueryTxn, Reply, TxnReply
from txn.types import Participant, PartStatus, TxnStatus

if TYPE_CHECKING:
    from txn.latches import Waiter
    from txn.recovery import Recovery
    from txn.state import Staged


class Visibility:
    """The anchor answers a reader at read_ts about a STAGED transaction: asks each participant, decides nothing."""

    def __init__(self, recovery: Recovery, waiter: Waiter, staged: Staged) -> None:
        self.recovery = recovery
        self.waiter = waiter
        self.missing = {participant.locus: participant for participant in staged.participants}
        self.commit_ts = 0
        self.answered = False
        request: QueryTxn = waiter.request
        for participant in staged.participants:
            question = QueryPart(0, 0, 0, request.txn_id, participant.locus, request.read_ts)
            recovery.call(participant.locus, question, self._on_reply(participant))

    def _on_reply(self, participant: Participant) -> Callable[[Reply], None]:
        def on_reply(reply: Reply) -> None:
            if not self.answered:
                self._learn(participant, reply)

        return on_reply

    def _learn(self, participant: Participant, reply: Reply) -> None:
        if not isinstance(reply, PartReply):
            self._answer(
                Failure(self.waiter.request.id, "unavailable", "a participant did not answer")
            )
            return
        status = reply.status
        request: QueryTxn = self.waiter.request
        request_id = request.id
        if status == PartStatus.PREPARED:
            self.commit_ts = max(self.commit_ts, reply.ts)
            self.missing.pop(participant.locus, None)
            if not self.missing:  # R2: all prepared and staged is committed, whoever writes it down
                self._answer(TxnReply(request_id, TxnStatus.COMMITTED, self.commit_ts))
        elif status == PartStatus.COMMITTED:
            self._answer(TxnReply(request_id, TxnStatus.COMMITTED, reply.ts))
        elif status == PartStatus.EXPIRED and request.txn_id not in self.recovery.ev.state.staged:
            self.answered = True
            reached("participant_forgot")
            self.recovery.look_again(self.waiter)
        elif status in (PartStatus.FENCED, PartStatus.ABORTED):
            self._answer(TxnReply(request_id, TxnStatus.ABORTED))
        else:
            # ABSENT is a promise of the participant. EXPIRED is none: that it never was prepared there follows from the
            # record, which a deposed leader takes for STAGED long after it was decided, and its parts forgotten.
            invisible = TxnReply(request_id, TxnStatus.INVISIBLE)
            self._answer(invisible, confirm=status == PartStatus.EXPIRED)

    def _answer(self, reply: Reply, *, confirm: bool = False) -> None:
        self.answered = True
        self.recovery.looked(self.waiter, reply, confirm=confirm)
