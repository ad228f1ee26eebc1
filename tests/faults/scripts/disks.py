"""Disks that are full, and directories that somebody else has his hands on."""

import asyncio
import shutil
import signal
import time
from pathlib import Path

import aiohttp

from .. import faults
from ..faults import back
from ..scene import Scene

EVICTIONS = "lora_extproc_evictions_total"
HANDS_OFF_S = 8.0
BACK_S = 30.0


async def evictable(scene: Scene) -> None:
    """Cold adapters come faster than they fit, and go when their leases end."""
    scene.fault()
    await scene.run(25.0, at_least=12.0)
    scene.mended()
    scene.note("evictions", sum([await scene.fleet.metric(node.name, EVICTIONS) for node in scene.fleet.nodes]))


async def permissions_taken(scene: Scene) -> None:
    """The victim's directory is chmod 000 for a while."""
    directory = scene.fleet.node(scene.victim).directory
    await scene.run(faults.CALM_S, at_least=2.0)
    scene.fault()
    before = directory.stat().st_mode
    directory.chmod(0)
    try:
        await asyncio.sleep(HANDS_OFF_S)
        scene.note("the node says that it is not ready", not await _is_ready(scene))
    finally:
        directory.chmod(before)
    scene.mended()
    await _until_back(scene)


async def directory_removed(scene: Scene) -> None:
    """rm -rf of everything in the victim's directory; what it needs may be made anew."""
    await scene.run(faults.CALM_S, at_least=2.0)
    scene.fault()
    await asyncio.to_thread(_empty, scene.fleet.node(scene.victim).directory)
    await asyncio.sleep(HANDS_OFF_S)
    scene.mended()
    await _until_back(scene)


async def entry_removed(scene: Scene) -> None:
    """What lies under one warm adapter's digest is removed by hand, and the engine, restarted, has to read it again."""
    model = next([name for name in scene.load.warm if await scene.fleet.owner(name) == scene.victim].__iter__())
    await scene.run(faults.CALM_S, at_least=2.0)
    scene.fault()
    link = scene.fleet.node(scene.victim).directory / model
    entry = link.resolve()
    await asyncio.to_thread(shutil.rmtree, entry)
    await scene.fleet.end(f"{scene.victim}-engine", signal.SIGKILL)
    await back(scene, f"{scene.victim}-engine")
    scene.mended()
    await scene.run(15.0, at_least=10.0)
    scene.note("it is on the disk again", entry.exists())


async def _until_back(scene: Scene) -> None:
    """How long it takes until the victim is ready again, if it is at all."""
    began = time.monotonic()
    while not await _is_ready(scene) and time.monotonic() - began < BACK_S:
        await asyncio.sleep(0.2)
    scene.note("ready again after", time.monotonic() - began)
    await scene.run(faults.AFTER_S, at_least=3.0)


async def _is_ready(scene: Scene) -> bool:
    async with aiohttp.ClientSession() as session, session.get(f"http://{scene.fleet.node(scene.victim).stager_http}/readyz") as response:
        return response.status == 200


def _empty(directory: Path) -> None:
    for path in directory.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
