"""Questions to other ranges about what is undecided: so many are on their way at a time, the rest wait for their turn.

Thousands may be due at once, and the range that they go to may be away for hours, while others answer at once.

Q1 a question is asked once at a time: it waits here, or it is on its way. It may wait at the other range for as long as a latch
   does, and another would wait beside it.
Q2 the first to come is the first to go, but for those that somebody waits for. What ended meanwhile is passed over.
Q3 what was not answered the last time waits apart, and has half of the room at most: what is not answered cannot keep out for
   long what would be.
Q4 nothing here has to survive the term: the timers that brought a question bring it again, the next leader's too.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from replication.probes import reached
from txn.messages import Failure, QueryMode, QueryTxn, Reply

if TYPE_CHECKING:
    from txn.recovery import Recovery

IN_FLIGHT_MAX: Final = 1_000  # of one kind, from one range
SILENT_MAX: Final = IN_FLIGHT_MAX // 2  # of these, what was not answered the last time

Subject = tuple[bytes, bytes]  # txn_id and locus of a part


class Questions:
    """Of one kind. `send` asks about a part, or says that there is nothing to ask any more."""

    def __init__(self, send: Callable[[bytes, bytes], bool]) -> None:
        self._send = send
        self._fresh: OrderedDict[Subject, None] = OrderedDict()
        self._silent: OrderedDict[Subject, None] = OrderedDict()  # Q3
        self._out: dict[Subject, bool] = {}  # on their way -> whether it is one of Q3
        self._silent_out = 0

    def ask(self, txn_id: bytes, locus: bytes, *, silent: bool, first: bool = False) -> None:
        """Now, or when its turn comes. silent: as in Q3. first: somebody waits for the answer."""
        subject = txn_id, locus
        if subject in self._out:
            return
        queue = self._silent if subject in self._silent else self._fresh
        if subject not in queue:
            queue = self._silent if silent else self._fresh
            queue[subject] = None
        if first:
            queue.move_to_end(subject, last=False)
        self._fill()

    def answered(self, txn_id: bytes, locus: bytes) -> None:
        """Or not, and its time is over: the next has its turn."""
        self._silent_out -= self._out.pop((txn_id, locus))
        self._fill()

    def _fill(self) -> None:
        while len(self._out) < IN_FLIGHT_MAX:
            silent = bool(self._silent) and self._silent_out < SILENT_MAX
            queue = self._silent if silent else self._fresh
            if not queue:
                return
            subject, _ = queue.popitem(last=False)
            if self._send(*subject):
                self._out[subject] = silent
                self._silent_out += silent


class PartQuestions(Questions):
    """What became of undecided parts, to their anchors."""

    def __init__(self, recovery: Recovery, mode: QueryMode) -> None:
        super().__init__(self._send_query)
        self._recovery = recovery
        self._mode = mode

    def _send_query(self, txn_id: bytes, locus: bytes) -> bool:
        recovery = self._recovery
        part = recovery.ev.state.part(txn_id, locus)
        if part is None or part.resolving is not None:
            return False

        def on_reply(reply: Reply) -> None:
            part.unheard = isinstance(reply, Failure)
            self.answered(txn_id, locus)
            recovery.on_outcome(part, reply)

        if self._mode == QueryMode.ORPHAN:
            reached("orphan_asks")
        else:
            reached("blocked_writer_asks")
        request = QueryTxn(0, 0, 0, txn_id, part.row.anchor_key, self._mode)
        recovery.call(part.row.anchor_key, request, on_reply)
        return True
