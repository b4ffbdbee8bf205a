"""What an operator may set on a node: every key with its unit, default and meaning, in one place.

A key is `section.name`. Its value comes from the first of these that has it: a flag, an environment variable
(`KVORUM_RAFT__ELECTION_TIMEOUT=1s`), the TOML file, the default. An unknown key is an error wherever it stands, and the
error tells the nearest known one: a misspelt safety setting must not be silently the default.

Durations are text with a unit (`"500ms"`, `"1s"`, `"2m"`); a bare number is refused, since nobody knows what it means.
Sizes are `"64MiB"`, `"10MB"` or a bare number of bytes. Programs use attributes whose names end with the unit:
`config.raft.election_timeout_s` is a float of seconds, set by the key `raft.election_timeout`; sizes are ints of
bytes and keep their name.

Checks happen in `load` and `validate`, not in the constructors: a test may build a section with any values.
Pure but for reading the file that it is given.
"""

from __future__ import annotations

import difflib
import json
import textwrap
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple, TypeAlias

import msgspec
from msgspec import Meta

from kvstore.bootstrap import parse_address
from kvstore.errors import ConfigError, InvalidArgument
from kvstore.limits import KIB, MESSAGE_BYTES_MAX, MIB
from kvstore.quantities import (
    SIZE_BYTES_MAX,
    format_duration,
    format_size,
    parse_duration,
    parse_size,
)

ENVIRONMENT_PREFIX: Final = "KVORUM_"
DURATION_S_MAX: Final = 7 * 86_400.0
SEGMENT_ALIGNMENT_BYTES: Final = 4 * KIB
COMMENT_COLUMNS: Final = 100

Kind: TypeAlias = Literal["duration", "size", "count", "ratio", "text", "list"]


Duration: TypeAlias = Annotated[float, Meta(gt=0, le=DURATION_S_MAX)]
Size: TypeAlias = Annotated[int, Meta(ge=KIB, le=SIZE_BYTES_MAX)]
LargeSize: TypeAlias = Annotated[int, Meta(ge=MIB, le=SIZE_BYTES_MAX)]
QueueSize: TypeAlias = Annotated[int, Meta(ge=MESSAGE_BYTES_MAX, le=SIZE_BYTES_MAX)]


def says(meaning: str) -> Meta:
    """What a key is for, as its comment in the file."""
    return Meta(description=meaning)


class Section(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    rename=lambda name: name.removesuffix("_s"),
):
    """One table of the file. A field's encoded name is its key; its Meta holds limits and meaning."""


class NodeSection(Section, frozen=True, kw_only=True):
    """Who this node is and where it is reached."""

    dir: Annotated[str, says("The data directory; `kvstore start` needs one.")] = ""
    listen: Annotated[str, says("HOST:PORT to listen on; one port serves everything.")] = (
        "127.0.0.1:7400"
    )
    advertise: Annotated[
        str,
        says("HOST:PORT that others reach this node at; empty: where it listens."),
    ] = ""
    join: Annotated[
        tuple[str, ...],
        says(
            "HOST:PORT of members that an empty node asks to be let in. Not possible yet: refused."
        ),
    ] = ()


class RaftSection(Section, frozen=True, kw_only=True):
    """Elections, leases, and how much may be under way between a leader and its followers."""

    election_timeout_s: Annotated[
        Duration,
        says(
            "A follower that hears no leader campaigns after this long, up to twice as long. "
            "The same on every node: leases are counted by it."
        ),
    ] = 1.0
    heartbeat_s: Annotated[
        Duration,
        says("How often an idle leader says that it is there; at most half of election_timeout."),
    ] = 0.2
    lease_drift: Annotated[
        float,
        Meta(
            ge=0.01,
            le=0.5,
            description="How far two monotonic clocks may drift apart, as a share; a leader's lease is shorter "
            "than the election timeout by it.",
        ),
    ] = 0.1
    append_bytes: Annotated[
        Size,
        says("Entries of one append message; one entry at least."),
    ] = 1 * MIB
    inflight_bytes: Annotated[
        Size,
        says("Entries sent to one follower and not yet acknowledged, in bytes."),
    ] = 4 * MIB
    inflight_entries: Annotated[
        int, Meta(ge=1, le=1_000_000, description="The same, in entries.")
    ] = 256
    uncommitted_bytes: Annotated[
        Size,
        says("Proposals of one range that are not committed; beyond it they are refused."),
    ] = 64 * MIB


class LogSection(Section, frozen=True, kw_only=True):
    """The node's one log, and how much of it a restart may have to replay."""

    segment_bytes: Annotated[
        int,
        Meta(
            ge=16 * MIB,
            le=(1 << 32) - SEGMENT_ALIGNMENT_BYTES,  # or positions in it would be those of the next
            description="Size of a segment file, preallocated; a multiple of 4KiB.",
        ),
    ] = 64 * MIB
    sync_mode: Annotated[
        Literal["auto", "inline", "thread"],
        says(
            "Where fdatasync runs: on the event loop, in a worker thread, or as measured (inline while its "
            "median is under 1ms, else where the loop goes on sooner)."
        ),
    ] = "auto"
    flush_bytes: Annotated[
        LargeSize,
        says("The engine is flushed after this much log, so that replay stays short."),
    ] = 64 * MIB
    flush_interval_s: Annotated[
        Duration,
        says("The engine is flushed at least this often, if anything changed."),
    ] = 60.0


class StorageSection(Section, frozen=True, kw_only=True):
    """RocksDB, and the cache in front of it."""

    cache_bytes: Annotated[LargeSize, says("Block cache.")] = 128 * MIB
    write_buffer_bytes: Annotated[LargeSize, says("One memtable.")] = 64 * MIB
    read_cache_bytes: Annotated[
        int,
        Meta(
            ge=0,
            le=SIZE_BYTES_MAX,
            description="Newest versions of keys that are read again and again, kept in the node's memory; 0: none.",
        ),
    ] = 64 * MIB


class NetworkSection(Section, frozen=True, kw_only=True):
    """Streams between nodes, and between clients and nodes."""

    stall_timeout_s: Annotated[
        Duration,
        says("A connection with bytes to send and no progress for this long is cut."),
    ] = 5.0
    ping_interval_s: Annotated[
        Duration,
        says("How often an idle connection is tried; at most half of stall_timeout."),
    ] = 1.0
    queue_bytes: Annotated[
        QueueSize,
        says("What may wait to be sent on one connection; at least one whole message (9MiB)."),
    ] = 32 * MIB
    connect_timeout_s: Annotated[
        Duration,
        says("Time for a connection and its handshake."),
    ] = 2.0
    reconnect_max_s: Annotated[
        Duration,
        says("The longest pause before a lost peer is tried again."),
    ] = 1.0


class LimitsSection(Section, frozen=True, kw_only=True):
    """How much a node takes on before it answers `Throttled`."""

    inbox_bytes: Annotated[
        QueueSize,
        says(
            "Messages received and not yet handled, of nodes and of clients each; at least one whole message (9MiB)."
        ),
    ] = 64 * MIB
    requests_in_flight: Annotated[
        int, Meta(ge=1, le=10_000_000, description="Requests accepted and not yet answered.")
    ] = 20_000
    requests_per_connection: Annotated[
        int,
        Meta(ge=1, le=10_000_000, description="The same, of one connection: it cannot take all."),
    ] = 10_000
    watches: Annotated[
        int,
        Meta(
            ge=0,
            le=10_000_000,
            description="Watches that wait here for news, each in every range that it covers.",
        ),
    ] = 10_000
    watch_recent_rows: Annotated[
        int,
        Meta(
            ge=16,
            le=1_000_000,
            description="Keys written lately that a replica keeps in memory for watches; older changes are searched for.",
        ),
    ] = 4_096


class ClientSection(Section, frozen=True, kw_only=True):
    """The client that runs inside the node, for HTTP and for what ranges ask each other."""

    timeout_s: Annotated[
        Duration,
        says("Time for one call that has none of its own, its retries included."),
    ] = 5.0


class TxnSection(Section, frozen=True, kw_only=True):
    """Transactions: how long one waits for another, and when an abandoned one is cleared away."""

    conflict_wait_s: Annotated[
        float,
        Meta(
            ge=0,
            le=DURATION_S_MAX,
            description="How long a write waits for an undecided one in its way (in several ranges: for locks, too).",
        ),
    ] = 0.05
    anchor_timer_s: Annotated[
        Duration,
        says("After this long without its coordinator, a transaction's first range finishes it."),
    ] = 1.0
    orphan_timer_s: Annotated[
        Duration,
        says(
            "After this long, a range asks what became of a part prepared in it; above anchor_timer."
        ),
    ] = 2.0
    retention_s: Annotated[
        Duration,
        says(
            "How long old versions, and outcomes of commits, can be asked for; then they are collected."
        ),
    ] = 600.0
    idempotency_retention_s: Annotated[
        Duration,
        says(
            "How long the result of a run with an idempotency key is kept; a later one runs again."
        ),
    ] = 86_400.0
    snapshot_hold_s: Annotated[
        Duration,
        says(
            "How far back an open snapshot or transaction keeps versions from being collected, beyond retention."
        ),
    ] = 3600.0
    closed_lag_s: Annotated[
        Duration,
        says(
            "How far replicas run behind, at least; reads with a max_staleness below this plus about 1s go to leaders."
        ),
    ] = 1.0
    lock_lease_s: Annotated[
        float,
        Meta(
            ge=3,
            le=3600,
            description="A transaction's locks end after this long without a word of its client, who renews them.",
        ),
    ] = 10.0
    locks_per_range: Annotated[
        int,
        Meta(
            ge=1,
            le=1_000_000,
            description="Locks held and waited for in one range; who wants more is throttled.",
        ),
    ] = 20_000
    oracle_window_s: Annotated[
        float,
        Meta(
            ge=0.1,  # more than a log round, or time would wait for the log
            le=60,
            description="How far ahead the timestamp oracle reserves, in one log entry; a new leader skips as much.",
        ),
    ] = 3.0


class HttpSection(Section, frozen=True, kw_only=True):
    """HTTP+JSON on the same port."""

    body_bytes_max: Annotated[
        int,
        Meta(
            ge=KIB,
            le=1 << 30,
            description="The largest body of a request. A transaction of 8MiB is 11MiB in base64.",
        ),
    ] = 16 * MIB
    request_timeout_s: Annotated[
        Duration,
        says("Time for one request that names no timeout."),
    ] = 30.0
    shutdown_timeout_s: Annotated[
        Duration,
        says("How long a stopping node waits for open requests."),
    ] = 1.0


class LoggingSection(Section, frozen=True, kw_only=True):
    """What the node writes to standard error."""

    level: Annotated[
        Literal["debug", "info", "warning", "error"],
        says("The least level that is written; debug may show what users store."),
    ] = "info"
    format: Annotated[
        Literal["auto", "json", "console"],
        says("One JSON object a line, text for people, or text only on a terminal."),
    ] = "auto"


class NodeConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that can be set. `NodeConfig()` is the defaults; `msgspec.structs.replace` makes variants."""

    node: NodeSection = msgspec.field(default_factory=NodeSection)
    raft: RaftSection = msgspec.field(default_factory=RaftSection)
    log: LogSection = msgspec.field(default_factory=LogSection)
    storage: StorageSection = msgspec.field(default_factory=StorageSection)
    network: NetworkSection = msgspec.field(default_factory=NetworkSection)
    limits: LimitsSection = msgspec.field(default_factory=LimitsSection)
    client: ClientSection = msgspec.field(default_factory=ClientSection)
    txn: TxnSection = msgspec.field(default_factory=TxnSection)
    http: HttpSection = msgspec.field(default_factory=HttpSection)
    logging: LoggingSection = msgspec.field(default_factory=LoggingSection)


class Key(NamedTuple):
    """One thing that can be set. `name` is `section.key` as operators write it; `attribute` is the field's name."""

    name: str
    section: str
    attribute: str
    kind: Kind
    type: Any
    default: Any
    meaning: str


def load(
    path: Path | None = None,
    *,
    environment: Mapping[str, str] | None = None,
    flags: Mapping[str, object] | None = None,
) -> NodeConfig:
    """The configuration from all its sources.

    Args: path: a TOML file. environment: usually os.environ; only names that begin with KVORUM_ and hold a double
    underscore are keys. flags: `section.key` -> value as given on the command line; None means not given.
    Raises: ConfigError: a file that cannot be read, an unknown key, a value that is malformed, out of its limits, or at
    odds with another one. The message says where the value came from.
    """
    values: dict[str, Any] = {}
    if path is not None:
        values |= _from_file(path)
    values |= _from_environment(environment or {})
    values |= _from_flags(flags or {})
    return _build(values)


def validate(path: Path) -> NodeConfig:
    """What `path` alone would configure. Raises: ConfigError."""
    return load(path)


def print_default() -> str:
    """Every key with its meaning, unit and default, as a TOML file that `load` reads back to the defaults."""
    head = (
        "# Kvorum: every key with its default.\n"
        "# Durations have a unit: us, ms, s, m, h. Sizes: B, KiB, MiB, GiB, TiB, KB, MB, GB, TB; without one, bytes.\n"
        f"# A key `name` of [section] is also set by {ENVIRONMENT_PREFIX}SECTION__NAME in the environment.\n"
    )
    return head + render(NodeConfig())


def render(config: NodeConfig) -> str:
    """This configuration as TOML, every key with a comment. `load` of the text gives an equal configuration."""
    lines: list[str] = []
    section = ""
    for key in KEYS.values():
        table = getattr(config, key.section)
        if key.section != section:
            section = key.section
            lines += ["", f"# {type(table).__doc__}", f"[{section}]"]
        meaning = f"{key.meaning} ({_unit(key)})"
        lines += textwrap.wrap(
            meaning, COMMENT_COLUMNS, initial_indent="# ", subsequent_indent="# "
        )
        name = key.name.partition(".")[2]
        lines.append(f"{name} = {_toml(key.kind, getattr(table, key.attribute))}")
    return "\n".join(lines) + "\n"


def _keys() -> Iterator[Key]:
    for table in msgspec.structs.fields(NodeConfig):
        for field in msgspec.structs.fields(table.type):
            meaning = next(m.description for m in field.type.__metadata__ if m.description)
            yield Key(
                name=f"{table.name}.{field.encode_name}",
                section=table.name,
                attribute=field.name,
                kind=_kind(field.name, field.default),
                type=field.type,
                default=field.default,
                meaning=meaning,
            )


def _kind(attribute: str, default: object) -> Kind:
    """The unit in the attribute's name decides, then the type."""
    if attribute.endswith("_s"):
        return "duration"
    if attribute.endswith(("_bytes", "_bytes_max")):
        return "size"
    by_type: dict[type, Kind] = {int: "count", float: "ratio", str: "text", tuple: "list"}
    return by_type[type(default)]


KEYS: Final[Mapping[str, Key]] = {key.name: key for key in _keys()}


def _from_file(path: Path) -> dict[str, Any]:
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # no TOML, no UTF-8; nested too deeply
        raise ConfigError(f"{path}: not a TOML file: {error}") from error
    values = {}
    for section, table in tables.items():
        if not isinstance(table, dict):
            raise _unknown(section, str(path))
        for name, raw in table.items():
            key = _known(f"{section}.{name}", str(path))
            values[key.name] = _value(key, raw, f"{path}: {key.name}", is_text=False)
    for section in tables.keys() - set(NodeConfig.__struct_fields__):
        raise _unknown(section, str(path))  # an empty table of an unknown name
    return values


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    flattened = {key.name.replace(".", "_"): key.name for key in KEYS.values()}
    values = {}
    for variable, raw in environment.items():
        if not variable.startswith(ENVIRONMENT_PREFIX):
            continue
        rest = variable.removeprefix(ENVIRONMENT_PREFIX).lower()
        section, separator, name = rest.partition("__")
        if separator:
            key = _known(f"{section}.{name}", f"environment variable {variable}")
            values[key.name] = _value(key, raw, f"environment variable {variable}", is_text=True)
        elif rest in flattened:
            wanted = ENVIRONMENT_PREFIX + flattened[rest].replace(".", "__").upper()
            raise ConfigError(f"environment variable {variable} sets nothing: write {wanted}")
    return values


def _from_flags(flags: Mapping[str, object]) -> dict[str, Any]:
    values = {}
    for name, raw in flags.items():
        if raw is not None:
            key = _known(name, "flag")
            values[name] = _value(key, raw, f"flag {name}", is_text=isinstance(raw, str))
    return values


def _known(name: str, source: str) -> Key:
    if name not in KEYS:
        raise _unknown(name, source)
    return KEYS[name]


def _unknown(name: str, source: str) -> ConfigError:
    near = difflib.get_close_matches(name, KEYS, n=1, cutoff=0.5) or [
        key for key in KEYS if key.endswith(f".{name}")
    ]
    hint = f"; did you mean {near[0]}?" if near else "; see `kvstore config print-default`"
    return ConfigError(f"{source}: unknown key {name}{hint}")


def _value(key: Key, raw: object, source: str, *, is_text: bool) -> Any:
    """The checked value of one key. With `is_text`, numbers and lists are read out of text, as in the environment."""
    try:
        if key.kind == "duration":
            if not isinstance(raw, str):
                raise ValueError(
                    f"{raw!r} has no unit; write it as text, such as '500ms', '1s' or '2m'"
                )
            raw = parse_duration(raw)
        elif key.kind == "size" and isinstance(raw, str):
            raw = parse_size(raw)
        elif key.kind == "list" and isinstance(raw, str) and is_text:
            raw = [part.strip() for part in raw.split(",") if part.strip()]
        return msgspec.convert(raw, key.type, strict=not is_text)
    except (ValueError, OverflowError) as error:  # msgspec.ValidationError is a ValueError
        raise ConfigError(f"{source}: {error}") from error


def _build(values: Mapping[str, Any]) -> NodeConfig:
    sections: dict[str, Section] = {}
    for table in msgspec.structs.fields(NodeConfig):
        given = {
            key.attribute: values[key.name]
            for key in KEYS.values()
            if key.section == table.name and key.name in values
        }
        sections[table.name] = table.type(**given)
    config = NodeConfig(**sections)  # type: ignore[arg-type]  # each section is of its field's type
    for is_right, rule in _agreements(config):
        if not is_right:
            raise ConfigError(rule)
    return config


def _agreements(config: NodeConfig) -> Iterator[tuple[bool, str]]:
    """Rules about two keys at once, as (holds, what must hold)."""
    raft, network = config.raft, config.network
    yield (
        raft.heartbeat_s * 2 <= raft.election_timeout_s,
        "raft.heartbeat must be at most half of raft.election_timeout",
    )
    yield (
        raft.append_bytes <= raft.inflight_bytes <= raft.uncommitted_bytes,
        "raft.append_bytes, raft.inflight_bytes and raft.uncommitted_bytes must not descend",
    )
    yield raft.append_bytes <= MESSAGE_BYTES_MAX - MIB, "raft.append_bytes must be at most 8MiB"
    yield (
        config.log.segment_bytes % SEGMENT_ALIGNMENT_BYTES == 0,
        "log.segment_bytes must be a multiple of 4KiB",
    )
    yield (
        network.ping_interval_s * 2 <= network.stall_timeout_s,
        "network.ping_interval must be at most half of network.stall_timeout",
    )
    yield (
        config.txn.anchor_timer_s < config.txn.orphan_timer_s,
        "txn.anchor_timer must be below txn.orphan_timer",
    )
    node = config.node
    for name, address in (("listen", node.listen), ("advertise", node.advertise)):
        yield (
            _is_address(address) or (name == "advertise" and not address),
            f"node.{name}: not an address of the form HOST:PORT: {address!r}",
        )
    for address in node.join:
        yield _is_address(address), f"node.join: not an address of the form HOST:PORT: {address!r}"


def _is_address(text: str) -> bool:
    try:
        parse_address(text)
    except InvalidArgument:
        return False
    return True


def _unit(key: Key) -> str:
    if isinstance(key.default, str) and hasattr(key.type.__origin__, "__args__"):
        return "one of " + ", ".join(key.type.__origin__.__args__)
    return "list of text" if key.kind == "list" else key.kind


def _toml(kind: Kind, value: Any) -> str:
    if kind == "duration":
        value = format_duration(value)
    elif kind == "size":
        value = format_size(value)
    # JSON's numbers, strings and lists are TOML's, but for DEL
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
