"""One kube-apiserver for the tests of each module, and discovery as a router runs it."""

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from extproc.config.discovery import DiscoverySettings
from extproc.config.pools import PoolSettings
from extproc.discovery.discovery import Discovery
from extproc.discovery.sources import build_sources
from extproc.metrics import RouterMetrics
from tests.discovery.scripted import Taken
from tests.fakes.kube_apiserver import Admin, Cluster, running_cluster
from tests.fakes.netns import network_of_its_own

DiscoveryFactory = Callable[..., AbstractAsyncContextManager[Taken]]
CRD = Path(__file__).parent / "inferencepools.yaml"


@pytest.fixture(scope="module")
def network() -> Iterator[None]:
    """The module's tests, and all that they start, are in a network namespace. Named before `cluster`."""
    with network_of_its_own():
        yield


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """With InferencePools."""
    with running_cluster(tmp_path_factory.mktemp("cluster"), [CRD]) as cluster:
        yield cluster


@pytest.fixture
async def admin(cluster: Cluster) -> AsyncIterator[Admin]:
    """In a namespace without pods."""
    async with Admin(cluster.server) as admin:
        await admin.clear()
        yield admin


@pytest.fixture
def discovering(cluster: Cluster, tmp_path: Path) -> DiscoveryFactory:
    """Run discovery of one pool: `async with discovering(inference_pool="llama") as taken`. `url` is a way to the API server other than its own."""

    @asynccontextmanager
    async def discovering(*, url: str = "", token: str = "", keep_empty_s: float = 0.0, **source: Any) -> AsyncIterator[Taken]:
        who = {"token": token} if token else {}
        kubeconfig = cluster.server.kubeconfig(tmp_path / "kubeconfig", url=url, **who)
        pool = PoolSettings.model_validate({"name": "p", "discovery": [{"type": "kubernetes", "kubeconfig": kubeconfig, **source}]})
        settings = DiscoverySettings(debounce_s=0.0, keep_empty_s=keep_empty_s)
        discovery = Discovery(build_sources([pool]), settings, RouterMetrics().discovery)
        taken = Taken()
        taken.fleets.append(await discovery.first())
        discovery.follow(taken.apply)
        try:
            yield taken
        finally:
            await discovery.stop()

    return discovering
