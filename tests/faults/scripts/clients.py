"""Clients that come all at once, that are slow, and that stop in the middle."""

import asyncio
import contextlib
import json
import time

from tests.fakes.adapters import WEIGHTS

from .. import faults
from ..load import Kind, Request, judge
from ..scene import Scene

HERD, HERD_NAMES = 2000, 20
SLOW, SLOW_PIECES, SLOW_EVERY_S = 200, 16, 0.5
GIVEN_BACK_S = 20.0  # a client of the load keeps a connection that it does not need for 15 s
BODY_PATIENCE_S = 90.0


async def herd(scene: Scene) -> None:
    """Everybody wants one of a few new adapters in the same moment."""
    names = [f"herd/{number}" for number in range(HERD_NAMES)]
    for name in names:
        await scene.origin.put(name)
    await scene.run(faults.CALM_S, at_least=2.0)
    scene.fault()
    with scene.timed("all answered after"):
        answers = await asyncio.gather(*(scene.load.ask(names[number % len(names)]) for number in range(HERD)))
    scene.mended()
    await scene.run(3.0, at_least=2.0)
    scene.note("answered well", sum(not answer.failed for answer in answers))
    scene.note("fetches of one adapter", max(len(scene.origin.gets(f"{name}/{WEIGHTS}")) for name in names))


async def slow(scene: Scene) -> None:
    """Many clients send a body in small pieces over some seconds, and read the answer as slowly."""
    await scene.run(faults.CALM_S, at_least=2.0)
    before = scene.fleet.resources()["envoy"]
    scene.fault()
    answers = await asyncio.gather(*(_slowly(scene, scene.load.warm[number % len(scene.load.warm)]) for number in range(SLOW)))
    scene.mended()
    deadline = time.monotonic() + GIVEN_BACK_S
    while (after := scene.fleet.resources()["envoy"])[1] > before[1] and time.monotonic() < deadline:
        await scene.run(1.0, at_least=1.0)
    scene.note("answered well", sum(not answer.failed for answer in answers))
    scene.note("open files more in Envoy", after[1] - before[1])
    scene.note("MiB more in Envoy", after[0] - before[0])


async def _slowly(scene: Scene, model: str) -> Request:
    request = Request(Kind.OWN, model, time.monotonic())
    with contextlib.suppress(OSError, EOFError, ValueError, IndexError):
        reader, writer = await _connected(scene)
        try:
            body = _body(model)
            writer.write(_head(len(body)))
            size = -(-len(body) // SLOW_PIECES)
            for at in range(0, len(body), size):
                writer.write(body[at : at + size])
                await writer.drain()
                await asyncio.sleep(SLOW_EVERY_S)
            status, headers, answer = await _read_answer(reader, pause_s=0.1)
            judge(request, status, headers, answer, scene.origin)
        finally:
            writer.transport.abort()
    request.ended = time.monotonic()
    scene.record.requests.append(request)
    return request


async def body_stops(scene: Scene) -> None:
    """Half a body, and then nothing more, on a connection that stays open."""
    model = scene.load.warm[0]
    request = Request(Kind.OWN, model, time.monotonic())
    scene.fault()
    reader, writer = await _connected(scene)
    try:
        body = _body(model)
        writer.write(_head(len(body)) + body[: len(body) // 2])
        with scene.timed("answered after"), contextlib.suppress(TimeoutError, OSError, EOFError):
            async with asyncio.timeout(BODY_PATIENCE_S):
                status, headers, answer = await _read_answer(reader)
                judge(request, status, headers, answer, scene.origin)
    finally:
        writer.transport.abort()
    scene.mended()
    scene.note("status", request.status)
    scene.note("has a reason of its own", request.reason not in ("", "gateway", "no reason"))
    await scene.run(2.0, at_least=1.0)


def _body(model: str) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": "slowly " * 40}], "model": model}).encode()


def _head(length: int) -> bytes:
    return f"POST /v1/chat/completions HTTP/1.1\r\nhost: faults\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n".encode()


async def _connected(scene: Scene) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, _, port = scene.fleet.address.rpartition(":")
    return await asyncio.open_connection(host, int(port))


async def _read_answer(reader: asyncio.StreamReader, pause_s: float = 0.0) -> tuple[int, dict[str, str], bytes]:
    """Status, headers in lower case, and a body with a length; a pause before each piece of it."""
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:] if line)}
    body = b""
    while len(body) < int(headers.get("content-length", "0")):
        await asyncio.sleep(pause_s)
        piece = await reader.read(64)
        if not piece:
            break
        body += piece
    return int(lines[0].split()[1]), headers, body
