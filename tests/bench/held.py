"""`python -m tests.bench.held`: what thousands of held requests cost, and what they do to warm ones beside them."""

import argparse
import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import grpc.aio
import yaml

from extproc.pb import ext_proc_pb2 as pb
from extproc.router.server import PROCESS_METHOD
from extproc.up.demo import write_adapter
from extproc.up.processes import Child, free_ports, python, spawn, stop
from tests.fakes.origin_server import OriginServer

from .harness import ADAPTER, machine, rss_mib

COLD = "bench/cold"
WARM_REQUESTS = 500


@contextlib.asynccontextmanager
async def router_with_slow_origin() -> AsyncIterator[tuple[Child, str, str, OriginServer]]:
    """A router and a stager whose origin can be stopped; the router, its address, its control API, the origin."""
    with tempfile.TemporaryDirectory(prefix="lora-extproc-bench-") as temporary:
        directory = Path(temporary)
        for name in (ADAPTER, COLD):
            write_adapter(directory / "origin" / name, seed=1, rank=8, hidden=512, layers=2)
        async with OriginServer(directory / "origin") as origin:
            router, http, stager = (f"127.0.0.1:{port}" for port in free_ports(3))
            raw = {
                "pools": [{"name": "models", "endpoints": [{"address": "127.0.0.1:1", "stager": stager}]}],
                "router": {"listen": router, "health_listen": "", "http_listen": http, "lameduck_s": 0, "drain_s": 1},
                "stager": {
                    "listen": stager,
                    "http_listen": "",
                    "dir": str(directory / "node"),
                    "origins": [{"type": "http", "url": origin.url, "timeout_s": 600, "allow_private": True}],
                    "engine": {"url": ""},
                },
            }
            config = directory / "settings.yaml"
            config.write_text(yaml.safe_dump(raw))
            children = [await spawn(name, python(name, "--config", str(config)), directory) for name in ("stager", "router")]
            try:
                await _until_ready(http)
                yield children[1], router, http, origin
            finally:
                await stop(children, 2.0)


def messages(model: str, padding: int) -> list[bytes]:
    """A full-duplex request as Envoy shows it, about `padding` bytes long."""
    headers = {":method": "POST", ":path": "/v1/chat/completions", "content-type": "application/json", "x-request-id": "0" * 36}
    pairs = [pb.HeaderValue(key=key, raw_value=value.encode()) for key, value in headers.items()]
    text = b'{"messages":[{"role":"user","content":"%s"}],"model":"%s"}' % (b"x" * padding, model.encode())
    return [
        pb.ProcessingRequest(
            request_headers=pb.HttpHeaders(headers=pb.HeaderMap(headers=pairs)),
            protocol_config=pb.ProtocolConfiguration(request_body_mode=pb.FULL_DUPLEX_STREAMED),
        ).SerializeToString(),
        pb.ProcessingRequest(request_body=pb.HttpBody(body=text, end_of_stream=True)).SerializeToString(),
    ]


async def main(count: int, seconds: float, padding: int) -> None:
    """Warm latency without held requests, then beside `count` of them; memory before, while and after."""
    async with router_with_slow_origin() as (router, address, http, origin), grpc.aio.insecure_channel(address) as channel:
        cold, warm = messages(COLD, padding), messages(ADAPTER, padding)
        await _one(channel, warm)
        alone = await _latency(channel, warm)
        before = rss_mib(router)
        origin.gate.clear()
        held = [asyncio.create_task(_one(channel, cold)) for _ in range(count)]
        await _until_held(http, count)
        beside = await _latency(channel, warm)
        await asyncio.sleep(seconds)
        while_held = rss_mib(router)
        origin.gate.set()
        await asyncio.gather(*held)
        after = rss_mib(router)
    print(machine())
    print(f"{count} requests of {len(cold[1])} bytes held for {seconds:g} s: {(while_held - before) * 1024 / count:.1f} KB each")
    print(f"router RSS {before:.0f} MiB before, {while_held:.0f} MiB while held, {after:.0f} MiB after")
    print(f"a warm exchange: {alone:.2f} ms alone, {beside:.2f} ms beside them, ratio {beside / alone:.2f} (medians of {WARM_REQUESTS}, one at a time)")


async def _one(channel: Any, request: list[bytes]) -> None:
    call = channel.stream_stream(PROCESS_METHOD)()
    for message in request:
        await call.write(message)
    reply = pb.ProcessingResponse.FromString(await call.read())
    assert reply.WhichOneof("response") == "request_headers", reply
    await call.done_writing()
    while await call.read() is not grpc.aio.EOF:  # type: ignore[attr-defined]  # missing in the stubs
        pass


async def _latency(channel: Any, request: list[bytes]) -> float:
    """Median time of one exchange, in milliseconds."""
    loop = asyncio.get_running_loop()
    took = []
    for _ in range(WARM_REQUESTS):
        began = loop.time()
        await _one(channel, request)
        took.append((loop.time() - began) * 1000)
    return sorted(took)[len(took) // 2]


async def _until_held(http: str, count: int) -> None:
    async with aiohttp.ClientSession() as session:
        while True:
            async with session.get(f"http://{http}/metrics") as response:
                if f"\nlora_extproc_held_requests {float(count)}\n" in await response.text():
                    return
            await asyncio.sleep(0.2)


async def _until_ready(http: str) -> None:
    async with aiohttp.ClientSession() as session:
        while True:
            with contextlib.suppress(aiohttp.ClientError):
                async with session.get(f"http://{http}/v1/endpoints") as response:
                    if all(endpoint["down"] is None for endpoint in await response.json()):
                        return
            await asyncio.sleep(0.1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--padding", type=int, default=200, help="bytes of prompt")
    arguments = parser.parse_args()
    asyncio.run(main(arguments.count, arguments.seconds, arguments.padding))
