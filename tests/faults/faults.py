"""Faults as context managers: each happens to a scene, and is mended at the end of its block."""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager

from .network import dropped
from .scene import Scene

Fault = Callable[[Scene], AbstractAsyncContextManager[None]]
Names = Callable[[Scene], list[str]]  # processes of a scene
Script = Callable[[Scene], Awaitable[None]]
CALM_S = 3.0  # before a fault
AFTER_S = 6.0  # after it


def during(fault: Fault, seconds: float, *, at_least: float | None = None, after: float = AFTER_S) -> Script:
    """The whole of most scripts: calm, the fault, and what comes after it. On a smaller scale the fault still lasts `at_least` seconds: all of them
    by default, since it has to outlast its bound.
    """

    async def script(scene: Scene) -> None:
        await scene.run(CALM_S, at_least=2.0)
        scene.fault()
        async with fault(scene):
            await scene.run(seconds, at_least=seconds if at_least is None else at_least)
        scene.mended()
        await scene.run(after, at_least=3.0)

    return script


def stager(scene: Scene) -> list[str]:
    return [f"{scene.victim}-stager"]


def engine(scene: Scene) -> list[str]:
    return [f"{scene.victim}-engine"]


def node(scene: Scene) -> list[str]:
    return [f"{scene.victim}-stager", f"{scene.victim}-engine"]


def stagers(scene: Scene) -> list[str]:
    return [f"{one.name}-stager" for one in scene.fleet.nodes[: scene.fleet.layout.nodes]]


def router(_scene: Scene) -> list[str]:
    return ["router-1"]


def stopped(names: Names) -> Fault:
    """SIGSTOP, and SIGCONT: they are there, and do nothing."""

    @contextlib.asynccontextmanager
    async def fault(scene: Scene) -> AsyncIterator[None]:
        for name in names(scene):
            os.kill(scene.fleet.pid(name), signal.SIGSTOP)
        try:
            yield
        finally:
            for name in names(scene):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(scene.fleet.pid(name), signal.SIGCONT)

    return fault


def ended(names: Names, how: signal.Signals = signal.SIGKILL) -> Fault:
    """They end, and are started again and ready when the block is left."""

    @contextlib.asynccontextmanager
    async def fault(scene: Scene) -> AsyncIterator[None]:
        for name in names(scene):
            await scene.fleet.end(name, how)
        yield
        await back(scene, *names(scene))

    return fault


async def back(scene: Scene, *names: str) -> None:
    """Start processes again, engines before the stagers that ask for them, and wait until everybody sees them."""
    for name in sorted(names):
        await scene.fleet.start(name)
    for name in sorted(names):
        await scene.fleet.until_ready(name)
    nodes = {name.rpartition("-")[0] for name in names if name.startswith("node-")}
    await scene.fleet.until_seen(*nodes)
    routers = [scene.fleet.routers[int(name.rpartition("-")[2]) - 1].listen for name in names if name.startswith("router-")]
    await scene.fleet.until_envoy_sees(*routers, *(scene.fleet.node(name).engine for name in nodes))


@contextlib.asynccontextmanager
async def cut_off(scene: Scene) -> AsyncIterator[None]:
    """The victim's host loses every packet."""
    async with dropped(scene.fleet.hosts[scene.victim]):
        yield


@contextlib.asynccontextmanager
async def stager_cut_off(scene: Scene) -> AsyncIterator[None]:
    """Only the victim's stager cannot be reached; its engine can."""
    async with dropped(scene.fleet.hosts[scene.victim], int(scene.fleet.node(scene.victim).stager.rpartition(":")[2])):
        yield


@contextlib.asynccontextmanager
async def router_cut_off(scene: Scene) -> AsyncIterator[None]:
    """Envoy cannot reach the first router."""
    async with dropped(scene.fleet.hub, int(scene.fleet.routers[0].listen.rpartition(":")[2])):
        yield


@contextlib.asynccontextmanager
async def silent_stager(scene: Scene) -> AsyncIterator[None]:
    """In the victim's stager's place there is a port that takes connections, reads, and never says a word."""

    async def swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.add(writer)
        with contextlib.suppress(OSError):
            while await reader.read(2**16):
                pass

    connections: set[asyncio.StreamWriter] = set()
    name, address = f"{scene.victim}-stager", scene.fleet.node(scene.victim).stager
    await scene.fleet.end(name, signal.SIGKILL)
    host, _, port = address.rpartition(":")
    server = await asyncio.start_server(swallow, host, int(port))
    try:
        yield
    finally:
        server.close()
        for writer in connections:
            writer.transport.abort()
        await server.wait_closed()
    await back(scene, name)


@contextlib.asynccontextmanager
async def origin_down(scene: Scene) -> AsyncIterator[None]:
    """Every request is answered 500."""
    with scene.origin.answering(status=500):
        yield


@contextlib.asynccontextmanager
async def full(scene: Scene) -> AsyncIterator[None]:
    """No node's file system has room for a byte."""
    for disk in scene.fleet.disks.values():
        await asyncio.to_thread(disk.fill)
    try:
        yield
    finally:
        for disk in scene.fleet.disks.values():
            disk.empty()
