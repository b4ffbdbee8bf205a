"""Whether the packages below `kvstore` are Kvorum's: another distribution on PyPI installs one of the same name."""

from __future__ import annotations

from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path

import kvstore


def check_packages() -> None:
    """Raises ImportError if we would get hold of theirs. They are looked up and not run: theirs may do anything."""
    home = Path(kvstore.__file__).resolve().parent.parent
    for name in ("replication", "txn"):
        found = find_spec(name)
        file = None if found is None else found.origin
        ours = file is not None and Path(file).resolve().parent.parent == home
        places = None if found is None else found.submodule_search_locations
        if not ours or PathFinder.find_spec(f"{name}.types", places) is None:
            raise ImportError(
                f"the package `{name}` at {file} is not Kvorum's: install kvorum in an environment of its own"
            )
