"""Whole stagers on a directory, filled from origins as the settings describe them, and what an engine and the books see of them."""

import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from extproc.config.origins import OriginSettings
from extproc.config.stager import EngineSettings, StagerSettings
from extproc.metrics import StagerMetrics
from extproc.stager.engine.api import Engine
from extproc.stager.stager import Stager
from extproc.stager.supply.origins import Origin, build_origin
from extproc.stager.supply.peers import Peers
from extproc.stager.supply.source import Source
from extproc.up.demo import BASE_MODEL

from .adapters import Files, read_files
from .wait import Clock


@contextlib.asynccontextmanager
async def node(
    directory: Path,
    *origins: OriginSettings | Origin | Source,
    clock: Callable[[], float] | None = None,
    peers: Peers | None = None,
    instance: str = "",
    **settings: Any,
) -> AsyncIterator[Stager]:
    """A stager that compares nothing with its origins by itself. Keyword arguments are its settings."""
    clock = clock or Clock()
    engine = EngineSettings(url="", base_model=BASE_MODEL, max_lora_rank=8)
    chosen = StagerSettings(**{"dir": str(directory), "revalidate_s": 0.0, "engine": engine, **settings})
    stager = Stager(chosen, [source_of(origin, clock) for origin in origins], Engine(engine), StagerMetrics(), clock, peers, instance)
    try:
        await stager.open()
        yield stager
    finally:
        await stager.close()


def source_of(origin: OriginSettings | Origin | Source, clock: Callable[[], float]) -> Source:
    """With the limits that the settings name."""
    if isinstance(origin, Source):
        return origin
    return Source(build_origin(origin), origin, clock) if isinstance(origin, OriginSettings) else Source(origin, clock=clock)


def web_origin(url: str, **settings: Any) -> OriginSettings:
    """A web server on this machine, which has to be allowed."""
    return OriginSettings(**{"type": "http", "url": url, "allow_private": True, "timeout_s": 5.0, **settings})


def s3_origin(endpoint: str, **settings: Any) -> OriginSettings:
    """The bucket `models` of a server that wants no credentials."""
    chosen = {"type": "s3", "bucket": "models", "endpoint": endpoint, "region": "us-east-1", "anonymous": True, "timeout_s": 5.0, **settings}
    return OriginSettings(**chosen)


def hub_origin(url: str, **settings: Any) -> OriginSettings:
    return OriginSettings(**{"type": "huggingface", "url": url, "timeout_s": 5.0, **settings})


def visible(directory: Path) -> dict[str, Files]:
    """What an engine finds: adapter name -> its files."""
    links = [path for path in directory.rglob("*") if path.is_symlink() and ".store" not in path.parts]
    return {str(path.relative_to(directory)): read_files(path) for path in links}


def stored(directory: Path) -> list[str]:
    """Digests of what is published, with a name or without."""
    return sorted(path.name for path in (directory / ".store").iterdir())


def nothing_half_done(stager: Stager) -> bool:
    """Neither on disk nor in the books."""
    return list((stager.node.store.directory / ".staging").iterdir()) == [] and stager.node.holdings.index.reserved_bytes == 0


def nothing_there(stager: Stager) -> bool:
    """Nothing visible, nothing published, nothing half done, nothing counted."""
    directory = stager.node.store.directory
    return visible(directory) == {} and stored(directory) == [] and nothing_half_done(stager) and stager.node.holdings.index.used_bytes == 0
