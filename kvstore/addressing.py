"""By which key a request that names no range finds its range."""

from __future__ import annotations

from txn.messages import (
    Changes,
    Fence,
    Finalize,
    KeepLocks,
    LockRead,
    LockWaits,
    Outcome,
    Prepare,
    QueryPart,
    QuerySettled,
    QueryTxn,
    Read,
    Request,
    Resolve,
    Scan,
    Unlock,
    Validate,
)


def key_of(request: Request) -> bytes:
    """The key by which a request without a range id is routed."""
    if isinstance(request, Read):
        return request.keys[0] if request.keys else b""
    if isinstance(request, (Scan, Changes)):
        return request.start
    if isinstance(request, Validate):
        return request.guards[0].start if request.guards else b""
    if isinstance(request, (Prepare, Resolve, Fence, QueryPart)):
        return request.locus
    if isinstance(request, (LockRead, KeepLocks, Unlock, LockWaits)):
        return request.key
    assert isinstance(request, (Finalize, QueryTxn, Outcome, QuerySettled))
    return request.anchor_key
