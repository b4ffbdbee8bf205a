"""How the log file's bytes look: batches at 4 KiB boundaries, each a table of record headers and then the bodies.

    batch   = header (64 bytes) | record header (48 bytes) * count | bodies, in the same order | zeros to 4 KiB
    header  = magic, format, count, number, length, segment, offset, previous_end, synced_upto, crc32c
    record  = type, kind, flags, body length, group, index, term, previous, body crc32c, header crc32c

All integers are little-endian. A position is one integer, segment << 32 | offset. `length` is without the zeros at
the end. The crc of a record header starts from the batch number, so a record counts in its own batch only. The
headers stand together so that damage to some of them costs only those: bodies are found from both ends.

What the fields of a record mean, by type:

    ENTRY       index, term, kind; previous: term of the entry before; body: the data
    HARD_STATE  term; index, previous: last index and term of the log at that moment; body: vote, commit, tombstone
    HEAD        as HARD_STATE; body: vote, commit, tombstone, start index, start term
    RESET       index, term: the log is empty and starts after them
    CARRY       the same, and the whole live log follows as ENTRY records of the same batch
    TOMBSTONE   index: the largest removed replica's id; hard state and log are void
    MARK        nothing (group 0): the batch is there for its `synced_upto`
"""

from __future__ import annotations

import enum
import struct
from typing import Final, NamedTuple

import msgspec
from crc32c import crc32c

from replication.errors import LogFormatError

FORMAT: Final = 1
MAGIC: Final = b"\xabKVWAL\r\n"
BLOCK_BYTES: Final = 4096
BATCH_HEADER_BYTES: Final = 64
RECORD_HEADER_BYTES: Final = 48
BATCH_BYTES_MAX: Final = 1 << 31

FLAG_SUSPECT: Final = 1  # on HARD_STATE and HEAD: the group is suspect, and stays it

CRC: Final = struct.Struct("<I")
RECORD: Final = struct.Struct("<BBHIQQQQI")  # followed by CRC
HARD_BODY: Final = struct.Struct("<QQQ")
HEAD_BODY: Final = struct.Struct("<QQQQQ")

_BATCH = struct.Struct("<8sHHIQIIIIQQI")  # followed by CRC
_SEED_MASK = 0xFFFF_FFFF


class RecordType(enum.IntEnum):
    ENTRY = 1
    HARD_STATE = 2
    HEAD = 3
    RESET = 4
    CARRY = 5
    TOMBSTONE = 6
    MARK = 7


_CHECKED = struct.Struct("<BBHIQQQQII")  # RECORD and its CRC
_Head = tuple[int, int, int, int, int, int, int, int, int, int]  # the same, unpacked


class BatchHeader(NamedTuple):
    """A batch header whose crc is right, and that says it belongs where it stands."""

    number: int
    segment: int
    offset: int
    length: int  # bytes from the header to the end of the last body
    record_count: int
    previous_end: int  # position where the batch before ended
    synced_upto: int  # everything before this position was durable when the batch was built

    @property
    def start(self) -> int:
        return position(self.segment, self.offset)

    @property
    def end(self) -> int:
        return position(self.segment, self.offset + aligned(self.length))


class Record(msgspec.Struct, gc=False):
    """One record. `body` is None when it is damaged; `offset` is where it stands in its segment."""

    type: int
    kind: int
    flags: int
    length: int
    group: int
    index: int
    term: int
    previous: int
    crc: int
    offset: int
    body: bytes | None


def position(segment: int, offset: int) -> int:
    return segment << 32 | offset


def aligned(length: int) -> int:
    """`length` rounded up to whole blocks."""
    return -(-length // BLOCK_BYTES) * BLOCK_BYTES


def seed_of(number: int) -> int:
    """Where the crc of record headers in this batch starts."""
    return number & _SEED_MASK


def encode_batch_header(header: BatchHeader) -> bytes:
    head = _BATCH.pack(
        MAGIC,
        FORMAT,
        0,
        header.record_count,
        header.number,
        header.length,
        header.segment,
        header.offset,
        0,
        header.previous_end,
        header.synced_upto,
        0,
    )
    return head + CRC.pack(crc32c(head))


def decode_batch_header(data: bytes, segment: int, offset: int) -> BatchHeader | None:
    """The header at `offset` of this segment's bytes; None if there is no valid one.

    Raises: LogFormatError for an intact header of a format that this version does not read.
    """
    raw = data[offset : offset + BATCH_HEADER_BYTES]
    if len(raw) < BATCH_HEADER_BYTES or not raw.startswith(MAGIC):
        return None
    head = raw[: _BATCH.size]
    if crc32c(head) != CRC.unpack_from(raw, _BATCH.size)[0]:
        return None
    _, version, _, count, number, length, own, at, _, previous_end, synced_upto, _ = _BATCH.unpack(
        head
    )
    if version != FORMAT:
        age = "a newer" if version > FORMAT else "an older"
        raise LogFormatError(
            f"segment {segment} has format {version}, of {age} version; this one reads {FORMAT}"
        )
    if own != segment or at != offset or synced_upto > position(segment, offset):
        return None
    if length < BATCH_HEADER_BYTES + count * RECORD_HEADER_BYTES or length > BATCH_BYTES_MAX:
        return None
    return BatchHeader(number, segment, offset, length, count, previous_end, synced_upto)


def decode_records(data: bytes, header: BatchHeader) -> list[Record | None]:
    """The records of a batch in order; None where a record's header is damaged: nothing of that record is known."""
    table = header.offset + BATCH_HEADER_BYTES
    seed = seed_of(header.number)
    size = RECORD.size
    whole = min(header.record_count, max(0, len(data) - table) // RECORD_HEADER_BYTES)
    heads: list[_Head | None] = []
    for at in range(table, table + whole * RECORD_HEADER_BYTES, RECORD_HEADER_BYTES):
        head: _Head = _CHECKED.unpack_from(data, at)
        heads.append(head if crc32c(data[at : at + size], seed) == head[9] else None)
    heads += [None] * (header.record_count - whole)  # the file is cut short
    records: list[Record | None] = []
    for known, at in zip(heads, _body_offsets(heads, header), strict=True):
        if known is None:
            records.append(None)
            continue
        kind, entry_kind, flags, length, group, index, term, previous, crc, _ = known
        body = data[at : at + length] if at >= 0 else None
        if body is not None and (len(body) != length or crc32c(body) != crc):
            body = None
        place = max(at, header.offset)
        records.append(
            Record(kind, entry_kind, flags, length, group, index, term, previous, crc, place, body)
        )
    return records


def _body_offsets(heads: list[_Head | None], header: BatchHeader) -> list[int]:
    """Where each body starts: counted from the front up to the first damaged header, from the end down to the last.

    -1: between two damaged headers, where no body can be found.
    """
    at = header.offset + BATCH_HEADER_BYTES + header.record_count * RECORD_HEADER_BYTES
    offsets = [-1] * len(heads)
    for i, head in enumerate(heads):
        offsets[i] = at
        if head is None:
            break
        at += head[3]
    else:
        return offsets
    at = header.offset + header.length
    for i in range(len(heads) - 1, -1, -1):
        last = heads[i]
        if last is None:
            break
        at -= last[3]
        offsets[i] = at
    return offsets
