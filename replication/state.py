"""What every replica of a group keeps, whatever its role; and what its host may ask. No rules are here."""

from __future__ import annotations

from replication.log import RaftLog
from replication.measures import Measures
from replication.membership import History, is_voter
from replication.messages import Message
from replication.reads import ReadState
from replication.ready import RaftConfig
from replication.types import Membership


class ReplicaState:
    """The log, the membership, and how far they are committed and applied; messages that wait to be handed out."""

    def __init__(
        self,
        group: int,
        replica: int,
        config: RaftConfig,
        log: RaftLog,
        history: History,
        measures: Measures,
    ) -> None:
        self.group = group
        self.replica = replica
        self.config = config
        self.log = log
        self.history = history
        self.measures = measures  # of the node, shared by its replicas
        self.now = float("-inf")  # the latest time that was passed in
        self.term = 0
        self.commit_index = 0
        self.applied_index = 0
        self.outgoing: list[
            tuple[Message, bool]
        ] = []  # True: held until all that is handed out is durable
        self.read_states: list[ReadState] = []
        self.reads_failed: list[int] = []
        # The host's word. electable: it may lead. caretaker: though it may not, its log is as good as any; if nobody
        # else can be elected, it leads for the sake of the log alone, and hands over to whoever has it.
        self.electable = True
        self.caretaker = False
        self.voter = False
        self.sole_voter = False
        self.derive_membership()

    def send(self, message: Message, *, held: bool = False) -> None:
        """Hand a message out with the next ready; `held`: it may leave only when everything is durable."""
        self.outgoing.append((message, held))

    def derive_membership(self) -> None:
        """The membership changed."""
        membership = self.history.current
        self.voter = is_voter(membership, self.replica)
        self.sole_voter = membership.voters == (self.replica,) and not membership.voters_outgoing

    @property
    def first_index(self) -> int:
        """The first entry that the log holds or will hold."""
        return self.log.first_index

    @property
    def last_index(self) -> int:
        return self.log.last_index

    @property
    def durable_index(self) -> int:
        """Everything up to here is on this replica's own disk."""
        return self.log.durable_index

    @property
    def log_bytes(self) -> int:
        """Bytes of the entries held in memory."""
        return self.log.bytes

    @property
    def membership(self) -> Membership:
        """The effective one: of the last CONFIG entry in the log, committed or not."""
        return self.history.current

    @property
    def membership_index(self) -> int:
        """Where the effective membership was appended."""
        return self.history.current_index

    def membership_at(self, index: int) -> Membership:
        """The membership in effect at an index at or above first_index - 1, for a snapshot's metadata."""
        return self.history.at(index)

    def term_at(self, index: int) -> int | None:
        """The term of the entry at `index`; None if the log does not reach there."""
        return self.log.term(index)
