"""A real etcd on a port: Debian's `etcd-server`. Where it is not installed, what needs it is skipped."""

import asyncio
import base64
import contextlib
import json
import shutil
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from extproc.up.processes import Child, free_ports, spawn, stop

from .wait import PATIENCE_S


class EtcdServer:
    """One member, which is a cluster of its own."""

    def __init__(self, directory: Path, *options: str, tls: ssl.SSLContext | None = None) -> None:
        self.port, self._peer_port = free_ports(2)
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.port}"
        self._directory = directory
        self._options = options
        self._tls = tls
        self._child: Child | None = None
        self._session: aiohttp.ClientSession | None = None

    async def start(self) -> None:
        peer = f"http://127.0.0.1:{self._peer_port}"
        command = ["etcd", "--data-dir", str(self._directory / "data"), "--listen-client-urls", self.url, "--advertise-client-urls", self.url]
        command += ["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", f"default={peer}", *self._options]
        self._child = await spawn("etcd", command, self._directory)

    async def until_ready(self) -> None:
        """Return when it answers."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                with contextlib.suppress(aiohttp.ClientError, AssertionError):
                    await self.call("kv/range", {"key": encoded("x")})
                    return
                await asyncio.sleep(0.05)

    async def stop(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None
        if self._child is not None:
            await stop([self._child], 5)

    async def call(self, method: str, body: dict[str, Any], token: str = "") -> dict[str, Any]:
        if self._session is None:
            self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=self._tls or True))
        async with self._session.post(f"{self.url}/v3/{method}", json=body, headers={"Authorization": token} if token else {}) as response:
            answer = await response.json(content_type=None)
            assert response.status == 200, answer
            result: dict[str, Any] = answer
            return result

    async def put(self, key: str, value: object, **more: Any) -> int:
        """Write a value as JSON. Returns the revision."""
        written = await self.call("kv/put", {"key": encoded(key), "value": encoded(json.dumps(value)), **more})
        return int(written["header"]["revision"])

    async def put_many(self, values: dict[str, object]) -> None:
        """In transactions of a hundred, which is near the most that etcd takes."""
        puts = [{"requestPut": {"key": encoded(key), "value": encoded(json.dumps(value))}} for key, value in values.items()]
        for begin in range(0, len(puts), 100):
            await self.call("kv/txn", {"success": puts[begin : begin + 100]})

    async def delete(self, key: str) -> None:
        await self.call("kv/deleterange", {"key": encoded(key)})

    async def delete_below(self, prefix: str) -> None:
        end = prefix[:-1] + chr(ord(prefix[-1]) + 1)
        await self.call("kv/deleterange", {"key": encoded(prefix), "range_end": encoded(end)})

    async def lease(self, seconds: int) -> str:
        lease: str = (await self.call("lease/grant", {"TTL": seconds}))["ID"]
        return lease

    async def compact(self, revision: int) -> None:
        await self.call("kv/compaction", {"revision": revision, "physical": True})

    async def demand_passwords(self, user: str, password: str) -> None:
        """Switch authentication on; `user` may do everything."""
        await self.call("auth/role/add", {"name": "root"})
        for name in {user, "root"}:
            await self.call("auth/user/add", {"name": name, "password": password})
            await self.call("auth/user/grant", {"user": name, "role": "root"})
        await self.call("auth/enable", {})


@contextlib.asynccontextmanager
async def running_etcd(directory: Path, *options: str, tls: ssl.SSLContext | None = None) -> AsyncIterator[EtcdServer]:
    """One that answers. `options` are its command line's; `tls` is how this test talks to one that has certificates among them."""
    if shutil.which("etcd") is None:
        pytest.skip("there is no etcd here (Debian: apt-get install etcd-server)")
    server = EtcdServer(directory, *options, tls=tls)
    await server.start()
    try:
        await server.until_ready()
        yield server
    finally:
        await server.stop()


def encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()
