"""Parts that end, come back, are replaced, or live in another time."""

import asyncio
import contextlib
import shutil
import signal

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from extproc.router.health import EXT_PROC_SERVICE

from .. import faults
from ..faults import back
from ..scene import Scene

KILLS = 10
CLOCKS = ("+1h", "-2h", "+25h", "+0")
CLOCK_S = 5.0  # on each
COLD_START_S = 3.0  # how long the origin takes where a copy is to be slow


async def one_after_the_other(scene: Scene) -> None:
    """Stagers are killed in turn, each back before the next."""
    await scene.run(faults.CALM_S, at_least=2.0)
    names = faults.stagers(scene)
    scene.fault()
    for number in range(max(len(names), round(KILLS * scene.scale))):
        name = names[number % len(names)]
        async with faults.ended(lambda _scene, name=name: [name])(scene):  # type: ignore[misc]  # a lambda's default has no type
            await asyncio.sleep(1.0)
    scene.mended()
    await scene.run(faults.AFTER_S, at_least=2.0)
    left = sum(len(list((node.directory / ".staging").iterdir())) for node in scene.fleet.nodes)
    scene.note("left in .staging", left)


async def engine_twice(scene: Scene) -> None:
    await scene.run(faults.CALM_S, at_least=2.0)
    scene.fault()
    for _ in range(2):
        async with faults.ended(faults.engine)(scene):
            await asyncio.sleep(4.0)
        scene.mended()
        await scene.run(4.0, at_least=3.0)


async def node_twice(scene: Scene) -> None:
    """It dies, comes back, and dies for good."""
    await scene.run(faults.CALM_S, at_least=2.0)
    scene.fault()
    async with faults.ended(faults.node)(scene):
        await scene.run(8.0, at_least=5.0)
    scene.mended()
    await scene.run(faults.AFTER_S, at_least=3.0)
    for name in faults.node(scene):
        await scene.fleet.end(name, signal.SIGKILL)
    await scene.run(10.0, at_least=6.0)


async def only_node_restarted(scene: Scene) -> None:
    """As a rollout does it: told to stop, and started again. In between nobody is ready."""
    await scene.run(faults.CALM_S, at_least=2.0)
    scene.fault()
    async with faults.ended(faults.node, signal.SIGTERM)(scene):
        pass
    scene.mended()
    await scene.run(faults.AFTER_S, at_least=3.0)


async def owner_back_cold(scene: Scene) -> None:
    """A node dies, others take its adapters over, and it comes back with an empty disk, before an origin that takes its time."""
    await scene.run(faults.CALM_S, at_least=2.0)
    scene.fault()
    async with faults.ended(faults.node)(scene):
        await scene.run(8.0, at_least=6.0)
        await asyncio.to_thread(shutil.rmtree, scene.fleet.node(scene.victim).directory)
        scene.fleet.node(scene.victim).directory.mkdir()
        scene.origin.delay_s = COLD_START_S
        scene.mended()  # what comes now has a warm copy elsewhere
    await scene.run(12.0, at_least=8.0)
    scene.origin.delay_s = 0.0


async def rolling(scene: Scene) -> None:
    """A node is added, routers and stagers are replaced in turn, a node is removed: everything is told to stop and waited for."""
    fleet = scene.fleet
    await scene.run(faults.CALM_S, at_least=2.0)
    scene.fault()
    late = fleet.nodes[-1].name
    await back(scene, f"{late}-engine", f"{late}-stager")
    await scene.run(4.0, at_least=2.0)
    for name in ("router-1", "router-2", *faults.stagers(scene)):
        async with faults.ended(lambda _scene, name=name: [name], signal.SIGTERM)(scene):  # type: ignore[misc]  # as above
            pass
        await scene.run(2.0, at_least=1.0)
    await fleet.end(f"{scene.victim}-stager", signal.SIGTERM)
    await scene.run(2.0, at_least=2.0)
    await fleet.end(f"{scene.victim}-engine", signal.SIGTERM)
    scene.mended()
    await scene.run(faults.AFTER_S, at_least=3.0)


async def drained_while_watched(scene: Scene) -> None:
    """The first router drains as it is, and again while a probe watches its health on both ports."""
    await scene.run(faults.CALM_S, at_least=2.0)
    scene.fault()
    alone = await scene.fleet.end("router-1", signal.SIGTERM)
    await back(scene, "router-1")
    router = scene.fleet.routers[0]
    async with grpc.aio.insecure_channel(router.listen) as one, grpc.aio.insecure_channel(router.health) as other:
        watches = [asyncio.create_task(_watch(channel)) for channel in (one, other)]
        await scene.run(1.0, at_least=1.0)
        watched = await scene.fleet.end("router-1", signal.SIGTERM)
        said = await asyncio.gather(*watches)
    await back(scene, "router-1")
    scene.mended()
    await scene.run(3.0, at_least=2.0)
    scene.note("drained in", alone)
    scene.note("longer with a Watch", watched - alone)
    scene.note("Watches that were told", sum(health_pb2.HealthCheckResponse.NOT_SERVING in statuses for statuses in said))


async def _watch(channel: grpc.aio.Channel) -> list[int]:
    """Every status until the server ends it."""
    said: list[int] = []
    with contextlib.suppress(grpc.aio.AioRpcError):
        async for answer in health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=EXT_PROC_SERVICE)):
            said.append(answer.status)  # noqa: PERF401  # what was said before an error counts
    return said


async def clocks(scene: Scene) -> None:
    """The wall clock of routers, stagers and engines jumps."""
    await scene.run(faults.CALM_S, at_least=2.0)
    scene.fault()
    for offset in CLOCKS:
        scene.fleet.set_clocks(offset)
        await scene.run(CLOCK_S, at_least=3.0)
    scene.mended()
    await scene.run(3.0, at_least=2.0)


async def steady(scene: Scene) -> None:
    """Nothing happens, for a minute."""
    await scene.run(10.0, at_least=5.0)
    before = scene.fleet.resources()
    await scene.run(60.0, at_least=10.0)
    after = scene.fleet.resources()
    scene.note("MiB more, the worst process", max(after[name][0] - before[name][0] for name in before))
    scene.note("open files more, the worst process", max(after[name][1] - before[name][1] for name in before))
