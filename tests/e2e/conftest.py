"""Small adapters in an origin of their own, and stacks that use it."""

import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest

from extproc.config.origins import OriginSettings
from extproc.config.read import parse
from extproc.up.demo import write_adapter
from extproc.up.processes import free_ports
from extproc.up.stack import Plan, Stack

NAMES = ("team/a", "team/b", "team/c", "team/deep/d", "flat")
StackFactory = Callable[..., AbstractAsyncContextManager[Stack]]


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five valid adapters of about 100 KB and one that is not."""
    root = tmp_path_factory.mktemp("origin")
    for seed, name in enumerate(NAMES):
        write_adapter(root / name, seed=seed, rank=8, hidden=512, layers=2)
    broken = write_adapter(root / "team/broken", seed=99, rank=8, hidden=512, layers=2)
    broken.write_bytes(broken.read_bytes()[:-100])
    return root


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, origin: Path) -> StackFactory:
    """Start a stack: `async with start(raw_settings, nodes=2) as stack`."""

    @contextlib.asynccontextmanager
    async def start(
        raw: dict[str, Any] | None = None, *, nodes: int = 2, routers: int = 1, envoy: Path | None = None, origins: tuple[OriginSettings, ...] = ()
    ) -> AsyncIterator[Stack]:
        where = origins or (OriginSettings(type="file", path=str(origin)),)
        plan = Plan(tmp_path_factory.mktemp("stack"), free_ports(1)[0], nodes, where, settings=parse(raw or {}, source="test"), routers=routers, envoy=envoy)
        async with Stack(plan) as stack:
            yield stack

    return start
