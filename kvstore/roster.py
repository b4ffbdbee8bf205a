"""Which members this node has ever heard from: what they said counts, so none of them may come back as its old self.

A member whose disk is gone has forgotten its votes and what it acknowledged; begun anew under its old replica ids it could
elect a leader that lacks what was acknowledged (pitfall 9). `kvctl init`, run again, would make it just that: it asks the
others first whether they have heard it.

Invariant: a member is on disk here before anything that it says counts here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from kvstore.errors import DataDirectoryError

if TYPE_CHECKING:
    from kvstore.node import NodeFiles

FILE_NAME: Final = "heard.json"


class Roster:
    """Raises DataDirectoryError: the file is damaged."""

    def __init__(self, files: NodeFiles) -> None:
        self._files = files
        stored = files.read_file(FILE_NAME)
        try:
            self.heard: list[int] = msgspec.json.decode(stored or b"[]", type=list[int])
        except msgspec.MsgspecError as error:
            raise DataDirectoryError(
                f"{FILE_NAME} is damaged ({error}): put back a good copy"
            ) from error

    def note(self, node: int) -> None:
        """A stream of this member is about to be read. Durable when it returns; writes once for each member.

        Raises: OSError; then nothing may be read from it.
        """
        if node not in self.heard:
            heard = sorted([*self.heard, node])
            self._files.write_file(FILE_NAME, msgspec.json.encode(heard))
            self.heard = heard
