"""Claims of the configuration: precedence, units, limits; an unknown key is told with the nearest known one; what
is printed is read back; and every key has a unit, a default and a meaning.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore import config
from kvstore.config import KEYS, NodeConfig
from kvstore.errors import ConfigError, InvalidArgument
from kvstore.node import Node


@pytest.fixture
def written(tmp_path: Path):
    """Write a TOML file and give its path."""

    def write(text: str) -> Path:
        path = tmp_path / "node.conf.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


# --- sources --------------------------------------------------------------------------------------


def test_without_any_source_it_is_the_defaults():
    assert config.load() == NodeConfig()


def test_defaults_are_what_the_other_parts_are_written_against():
    defaults = NodeConfig()
    assert defaults.raft.election_timeout_s == 1.0
    assert defaults.raft.heartbeat_s == 0.2
    assert defaults.raft.append_bytes == 1 << 20
    assert defaults.log.segment_bytes == 64 << 20
    assert defaults.log.sync_mode == "auto"
    assert defaults.network.stall_timeout_s == 5.0
    assert defaults.limits.requests_in_flight == 20_000
    assert defaults.txn.conflict_wait_s == 0.05


def test_a_flag_is_over_the_environment_over_the_file_over_the_default(written):
    file = written('[raft]\nelection_timeout = "2s"\nheartbeat = "100ms"\nlease_drift = 0.2\n')
    environment = {"KVORUM_RAFT__ELECTION_TIMEOUT": "3s", "KVORUM_RAFT__HEARTBEAT": "150ms"}
    raft = config.load(file, environment=environment, flags={"raft.election_timeout": "4s"}).raft
    assert (raft.election_timeout_s, raft.heartbeat_s, raft.lease_drift) == (4.0, 0.15, 0.2)
    assert raft.append_bytes == NodeConfig().raft.append_bytes


def test_a_flag_that_was_not_given_hides_nothing():
    environment = {"KVORUM_NODE__LISTEN": "0.0.0.0:1"}
    assert (
        config.load(environment=environment, flags={"node.listen": None}).node.listen == "0.0.0.0:1"
    )


def test_the_environment_sets_every_kind_of_value():
    given_ = {
        "KVORUM_RAFT__ELECTION_TIMEOUT": "1500ms",
        "KVORUM_RAFT__LEASE_DRIFT": "0.05",
        "KVORUM_RAFT__INFLIGHT_ENTRIES": "12",
        "KVORUM_STORAGE__CACHE_BYTES": "1GiB",
        "KVORUM_LOG__FLUSH_BYTES": "33554432",
        "KVORUM_LOG__SYNC_MODE": "inline",
        "KVORUM_NODE__JOIN": "a:1, b:2,",
        "PATH": "/bin",
        "KVORUM_ENDPOINTS": "a:1",  # not of the node's configuration
    }
    loaded = config.load(environment=given_)
    assert loaded.raft.election_timeout_s == 1.5
    assert loaded.raft.lease_drift == 0.05
    assert loaded.raft.inflight_entries == 12
    assert loaded.storage.cache_bytes == 1 << 30
    assert loaded.log.flush_bytes == 32 << 20
    assert loaded.log.sync_mode == "inline"
    assert loaded.node.join == ("a:1", "b:2")


def test_the_file_sets_every_kind_of_value(written):
    loaded = config.validate(
        written(
            '[raft]\nelection_timeout = "1500ms"\nlease_drift = 0.05\ninflight_entries = 12\n'
            '[storage]\ncache_bytes = "1GiB"\n[log]\nflush_bytes = 33554432\nsync_mode = "inline"\n'
            '[node]\njoin = ["a:1", "b:2"]\n'
        )
    )
    assert loaded.raft.election_timeout_s == 1.5
    assert (loaded.raft.lease_drift, loaded.raft.inflight_entries) == (0.05, 12)
    assert (loaded.storage.cache_bytes, loaded.log.flush_bytes) == (1 << 30, 32 << 20)
    assert (loaded.log.sync_mode, loaded.node.join) == ("inline", ("a:1", "b:2"))


# --- what is refused ------------------------------------------------------------------------------


def test_a_configuration_error_is_an_invalid_argument():
    with pytest.raises(ConfigError) as caught:
        config.load(flags={"raft.nothing": "1"})
    assert isinstance(caught.value, InvalidArgument)
    assert (caught.value.code, caught.value.retryable) == ("config_error", False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '[raft]\nelection_timout = "1s"\n',
            "unknown key raft.election_timout; did you mean raft.election_timeout?",
        ),
        ("[raft]\nelection_timeout_s = 1\n", "did you mean raft.election_timeout?"),
        (
            '[rafts]\nheartbeat = "1s"\n',
            "unknown key rafts.heartbeat; did you mean raft.heartbeat?",
        ),
        ("[unheard_of]\n", "unknown key unheard_of; see `kvstore config print-default`"),
        ('listen = "a:1"\n', "unknown key listen; did you mean node.listen?"),
        ("[raft.heartbeat]\nx = 1\n", "raft.heartbeat: .* has no unit"),
        ("[raft\n", "not a TOML file: .*line 1"),
        ('[raft]\nheartbeat = "1s"\nheartbeat = "1s"\n', "not a TOML file"),
    ],
)
def test_an_unknown_key_in_the_file_is_told_with_the_nearest(written, text, message):
    with pytest.raises(
        ConfigError, match=message.replace("?", r"\?").replace("(", r"\(")
    ) as caught:
        config.validate(written(text))
    assert "node.conf.toml" in str(caught.value)


def test_an_unknown_key_in_the_environment_is_told_with_the_nearest():
    with pytest.raises(
        ConfigError, match=r"KVORUM_RAFT__HARTBEAT: .*did you mean raft\.heartbeat\?"
    ):
        config.load(environment={"KVORUM_RAFT__HARTBEAT": "1s"})


def test_a_single_underscore_in_the_environment_is_noticed():
    with pytest.raises(ConfigError, match="write KVORUM_RAFT__ELECTION_TIMEOUT"):
        config.load(environment={"KVORUM_RAFT_ELECTION_TIMEOUT": "1s"})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("raft.election_timeout", "1", "is not a duration"),
        ("raft.election_timeout", 1, "has no unit"),
        ("raft.election_timeout", True, "has no unit"),
        ("raft.election_timeout", "0s", "> 0"),
        ("raft.election_timeout", "1e999s", "<= 604800"),
        ("raft.lease_drift", "0.9", "<= 0.5"),
        ("raft.lease_drift", "nan", "float"),
        ("raft.lease_drift", float("nan"), "float"),
        ("raft.inflight_entries", "0", ">= 1"),
        ("raft.inflight_entries", "many", "Expected `int`"),
        ("raft.inflight_entries", True, "Expected `int`"),
        ("raft.inflight_entries", 1.5, "Expected `int`"),
        ("storage.cache_bytes", "64 parsecs", "is not a size"),
        ("storage.cache_bytes", -1, ">= 1048576"),
        ("storage.cache_bytes", 2.5, "Expected `int`"),
        ("log.sync_mode", "never", "Invalid enum value 'never'"),
        ("node.listen", 7400, "Expected `str`"),
        ("node.join", ["a:1", 2], "Expected `str`"),
        ("network.queue_bytes", "1MiB", ">= 9437184"),
        ("txn.oracle_window", "20ms", ">= 0.1"),
    ],
)
def test_a_value_that_is_malformed_or_out_of_its_limits_is_told_with_its_source(
    key, value, message
):
    with pytest.raises(ConfigError) as caught:
        config.load(flags={key: value})
    assert str(caught.value).startswith(f"flag {key}: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "rule"),
    [
        (
            {"raft.heartbeat": "600ms"},
            "raft.heartbeat must be at most half of raft.election_timeout",
        ),
        ({"raft.append_bytes": "5MiB"}, "must not descend"),
        ({"raft.inflight_bytes": "65MiB"}, "must not descend"),
        ({"log.segment_bytes": (16 << 20) + 1}, "multiple of 4KiB"),
        ({"log.segment_bytes": "4GiB"}, "log.segment_bytes"),  # a position in it would wrap
        (
            {"raft.append_bytes": "9MiB", "raft.inflight_bytes": "9MiB"},
            "raft.append_bytes must be at most 8MiB",
        ),
        (
            {"network.ping_interval": "2501ms"},
            "network.ping_interval must be at most half of network.stall_timeout",
        ),
        ({"txn.anchor_timer": "2s"}, "txn.anchor_timer must be below txn.orphan_timer"),
    ],
)
def test_two_keys_at_odds_are_refused(flags, rule):
    with pytest.raises(ConfigError, match=rule.replace(".", r"\.")):
        config.load(flags=flags)


async def test_the_least_that_the_network_may_have_is_enough_for_a_node():
    settings = config.load(flags={"network.queue_bytes": "9MiB", "network.ping_interval": "2500ms"})
    world = SimpleNamespace(clock=SimpleNamespace(monotonic=lambda: 0.0))
    node = Node("n1", "127.0.0.1:7400", "", settings, world)
    assert node.state == "starting"


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("node.listen", "here", "'here'"),
        ("node.listen", "", "''"),
        ("node.listen", "a:99999", "'a:99999'"),  # a socket would take it modulo 65536
        ("node.advertise", "a:-1", "'a:-1'"),
        ("node.join", "a:1,b", "'b'"),
    ],
)
def test_what_is_no_address_is_refused(key, value, shown):
    with pytest.raises(
        ConfigError,
        match=f"{key}: not an address of the form HOST:PORT: {shown}".replace(".", r"\."),
    ):
        config.load(flags={key: value})


def test_every_key_is_read_by_the_product():
    package = Path(config.__file__).parent
    sources = [
        file.read_text(encoding="utf-8")
        for file in sorted(package.rglob("*.py"))
        if file.name != "config.py" and "sim" not in file.relative_to(package).parts
    ]
    for key in KEYS.values():
        name = re.compile(rf"\b{key.section}\.{key.attribute}\b|\b\w+\.{key.attribute}\b(?!\()")
        assert any(name.search(text) for text in sources), f"{key.name} has no effect"


def test_a_file_that_cannot_be_read_is_a_configuration_error(tmp_path: Path):
    with pytest.raises(ConfigError, match="absent.toml: cannot be read: No such file"):
        config.validate(tmp_path / "absent.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not a TOML file"):
        config.validate(tmp_path / "binary.toml")


# --- what is printed ------------------------------------------------------------------------------


@pytest.mark.parametrize("deep", ["x = " + "[" * 5_000, "[raft]\nx = " + "{x=" * 5_000])
def test_a_file_that_is_nested_too_deeply_is_a_configuration_error(written, deep):
    with pytest.raises(ConfigError, match="not a TOML file"):
        config.validate(written(deep))


def test_the_printed_default_is_read_back_to_the_defaults(written):
    assert config.validate(written(config.print_default())) == NodeConfig()


def test_the_printed_default_has_every_key_with_a_comment_before_it():
    lines = config.print_default().splitlines()
    tables = tomllib.loads("\n".join(lines))
    assert {f"{section}.{name}" for section, table in tables.items() for name in table} == set(KEYS)
    for number, line in enumerate(lines):
        if " = " in line and not line.startswith("#"):
            assert lines[number - 1].startswith("# "), line


def test_every_key_has_a_meaning_and_a_unit_and_durations_hide_theirs_in_the_attribute():
    for key in KEYS.values():
        assert key.meaning.endswith("."), key.name
        assert (key.kind == "duration") == key.attribute.endswith("_s"), key.name
        assert (key.kind == "size") == ("_bytes" in key.attribute), key.name
        assert key.name == f"{key.section}.{key.attribute.removesuffix('_s')}"


def test_every_default_is_within_its_own_limits():
    for key in KEYS.values():
        assert msgspec.convert(key.default, key.type) == key.default


def test_every_key_can_be_set_by_flag_and_environment_with_what_is_printed():
    values = tomllib.loads(config.print_default())
    for key in KEYS.values():
        value = values[key.section][key.name.partition(".")[2]]
        text = ",".join(value) if isinstance(value, list) else str(value)
        variable = f"KVORUM_{key.name.replace('.', '__').upper()}"
        assert config.load(environment={variable: text}) == NodeConfig()
        assert config.load(flags={key.name: value}) == NodeConfig()


# Spelt out: the table of all characters takes hypothesis many seconds to make in a fresh clone.
ODD_CHARACTERS = "ab\"'\\#=[]{}, \t\n\r\x00\x1f\x7f\u0085\u2028\ufeff\u00e9\u4e2d\U0001f600"
texts = st.text(st.sampled_from(ODD_CHARACTERS), max_size=20)


@given(
    directory=texts,
    ports=st.lists(st.integers(min_value=0, max_value=65_535), max_size=3),
    election_timeout_s=st.floats(min_value=0.5, max_value=600_000),
    cache_bytes=st.integers(min_value=1 << 20, max_value=1 << 44),
)
def test_any_configuration_that_is_rendered_is_read_back(
    directory, ports, election_timeout_s, cache_bytes
):
    base = NodeConfig()
    join = [f"[::1]:{port}" for port in ports]
    wanted = NodeConfig(
        node=msgspec.structs.replace(base.node, dir=directory, join=tuple(join)),
        raft=msgspec.structs.replace(base.raft, election_timeout_s=election_timeout_s),
        storage=msgspec.structs.replace(base.storage, cache_bytes=cache_bytes),
    )
    tables = tomllib.loads(config.render(wanted))
    flat = {
        f"{section}.{name}": value
        for section, table in tables.items()
        for name, value in table.items()
    }
    flat["node.join"] = list(join)
    assert config.load(flags=flat) == wanted
