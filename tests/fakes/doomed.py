"""`python -m tests.fakes.doomed DIR ORIGIN`: a process that forks a stager, kills it, and forks the next, as a reader of its input says.

Importing everything takes longer than one life lasts, so it is done once. The forking process has one thread and no event loop.

A life is a line `<seconds> <seed>` in, and a line of JSON out: what the stager acknowledged before SIGKILL, in order.
"""

import asyncio
import contextlib
import gc
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from extproc.config.origins import OriginSettings
from extproc.config.stager import EngineSettings, PeerSettings, StagerSettings
from extproc.errors import AdapterInUse, ModelNotFound, NoSpace, OriginChanged
from extproc.metrics import StagerMetrics
from extproc.stager.engine.api import Engine
from extproc.stager.stager import Stager
from extproc.stager.supply.origins.file import FileOrigin
from extproc.stager.supply.source import Source

PASSING = tuple(f"acme/p{n}" for n in range(6))
TWINS = ("twins/a", "twins/b")  # one content
PACKED = ("packed/tar", "packed/zip")
KEPT = ("kept/still", "kept/moving")  # pinned
MOVING = ("moving/a", "kept/moving")  # of two versions each
ROOM = 8  # small adapters: fewer than there are
HURRIED = (NoSpace, AdapterInUse, ModelNotFound, OriginChanged)  # what a busy node may answer


def move(origin: Path, name: str) -> None:
    """Let `name` lead to its other version, in one step."""
    link = origin / name
    versions = origin.parent / "versions" / name
    fresh = origin.parent / f"fresh-{os.getpid()}"
    fresh.symlink_to(versions / ("2" if link.exists() and link.resolve().name == "1" else "1"))
    fresh.replace(link)


async def live(directory: str, origin: Path, seed: int, say: int, room: int) -> None:
    """Stage, pin, refresh and purge until the end."""
    settings = StagerSettings(
        dir=directory,
        max_bytes=room,
        lease_s=0.001,
        negative_ttl_s=0.0,
        revalidate_s=0.01,
        scan_s=0.001,
        engine=EngineSettings(url=""),
        peers=PeerSettings(mode="off"),
    )
    source = Source(FileOrigin(OriginSettings(type="file", path=str(origin), links_outside=True)))
    stager = Stager(settings, [source], Engine(settings.engine), StagerMetrics())
    await stager.open()
    chance = random.Random(seed)

    def tell(*words: str) -> None:
        os.write(say, (json.dumps(words) + "\n").encode())

    tell("open")

    async def visit() -> None:
        while True:
            deed, name = chance.random(), chance.choice((*PASSING, *TWINS, *PACKED, *MOVING))
            with contextlib.suppress(*HURRIED):
                if deed < 0.1:
                    name = chance.choice(KEPT)
                    await stager.pin(name)
                    tell("pin", name)
                elif deed < 0.7:
                    await stager.ensure(name)
                    tell("ensure", name)
                elif deed < 0.85:
                    name = chance.choice(MOVING)
                    move(origin, name)
                    await stager.refresh(name)
                    tell("refresh", name)
                elif name not in KEPT:
                    await (stager.purge(name) if deed < 0.95 else stager.evict(name))
                    tell("remove", name)
            await asyncio.sleep(0)

    await asyncio.gather(*(visit() for _ in range(4)))


def live_and_die(directory: str, origin: Path, life_s: float, seed: int, room: int) -> list[list[str]]:
    """One life; what it acknowledged. An error that none of its deeds should meet is its last word."""
    ear, mouth = os.pipe()
    began = time.monotonic()
    child = os.fork()
    if not child:
        try:
            os.close(ear)
            asyncio.run(live(directory, origin, seed, mouth, room))
        except BaseException as error:
            os.write(mouth, (json.dumps(["error", repr(error)]) + "\n").encode())
        finally:
            os._exit(1)
    os.close(mouth)
    time.sleep(max(0.0, began + life_s - time.monotonic()))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with os.fdopen(ear, "rb") as said:
        return [json.loads(line) for line in said]


def main() -> None:
    directory, origin, room = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        life_s, seed = line.split()
        print(json.dumps(live_and_die(directory, origin, float(life_s), int(seed), room)), flush=True)


if __name__ == "__main__":
    main()
