"""The pytest plugin `kvorum`: options for simulated tests, and fixtures with clusters to test against.

    --kvorum-seeds N       each test with @simulate plays N seeds, if it does not say which
    --kvorum-seed N        ... or this one alone
    kvorum_cluster         a LocalCluster, three real processes, for the tests of one module
    kvorum_db              a blocking client of it; each test begins with all nodes running and no keys
    kvorum_embedded        a blocking client of an embedded store in tmp_path

A module sets its cluster up by `pytestmark = pytest.mark.kvorum(nodes=1, splits=[b"m"])`: the arguments of LocalCluster.
One cluster per module: starting one takes a second or two, and a module is what can carry a mark for all its tests.
Loaded by every pytest run where Kvorum is installed, so it imports the product inside of fixtures only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import pytest

from kvstore.testing import seeds

if TYPE_CHECKING:
    from pathlib import Path

    from kvstore.sync import Client
    from kvstore.testing.cluster import LocalCluster

MARK: Final = "kvorum"
CLUSTER_FIXTURES: Final = ("kvorum_cluster", "kvorum_db")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kvorum", "Kvorum")
    group.addoption(
        "--kvorum-seeds",
        type=int,
        metavar="N",
        help="play N seeds of each simulated test that does not say which (KVORUM_SEEDS)",
    )
    group.addoption(
        "--kvorum-seed",
        type=int,
        metavar="N",
        help="play this seed alone of each simulated test (KVORUM_SEED)",
    )


def pytest_configure(config: pytest.Config) -> None:
    line = "kvorum(**options): on a module: the arguments of the LocalCluster that its tests get"
    config.addinivalue_line("markers", line)
    wish = seeds.Wish(config.getoption("--kvorum-seed"), config.getoption("--kvorum-seeds"))
    if wish.seeds is not None and not 1 <= wish.seeds <= seeds.SEEDS_MAX:
        raise pytest.UsageError(f"--kvorum-seeds is from 1 to {seeds.SEEDS_MAX}")
    seeds.command_lines.append(wish)


def pytest_unconfigure() -> None:
    if seeds.command_lines:
        seeds.command_lines.pop()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A mark on one test would be ignored, since the cluster is its module's: say so."""
    wanted = [name for name in CLUSTER_FIXTURES if name in getattr(item, "fixturenames", ())]
    for node, mark in item.iter_markers_with_node(MARK):
        if mark.args:
            raise pytest.UsageError(
                "pytest.mark.kvorum takes keywords: the arguments of LocalCluster"
            )
        if wanted and not isinstance(node, pytest.Module | pytest.Package | pytest.Session):
            raise pytest.UsageError(
                f"pytest.mark.kvorum is for a module (`pytestmark = ...`), not for {node.name}: "
                "all tests of a module share its cluster"
            )


@pytest.fixture(scope="module")
def kvorum_cluster(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LocalCluster]:
    """Real processes on this machine; asynchronous clients: `async with kvstore.connect(kvorum_cluster.endpoints)`."""
    from kvstore.testing.cluster import LocalCluster

    mark = request.node.get_closest_marker(MARK)
    options = {"directory": tmp_path_factory.mktemp("kvorum"), **(mark.kwargs if mark else {})}
    with LocalCluster(**options) as cluster:
        yield cluster


@pytest.fixture
def kvorum_db(kvorum_cluster: LocalCluster) -> Iterator[Client]:
    """A blocking client, of a cluster whose nodes all run and whose key space is empty.

    The results of idempotency keys are kept from test to test: use keys that are new in each.
    """
    from kvstore.sync import Client

    if kvorum_cluster.stopped:
        kvorum_cluster.start()
    for node in kvorum_cluster.nodes:
        if node.paused and node.running:
            kvorum_cluster.resume(node.number)
        if not node.running:
            kvorum_cluster.restart(node.number)
    kvorum_cluster.wait_leaders()
    with Client(kvorum_cluster.endpoints) as client:
        client.clear_range()
        yield client


@pytest.fixture
def kvorum_embedded(tmp_path: Path) -> Iterator[Client]:
    """A blocking client of a store in this process; its files are in tmp_path / "kvorum"."""
    from kvstore.sync import Client

    with Client.open(tmp_path / "kvorum") as client:
        yield client
