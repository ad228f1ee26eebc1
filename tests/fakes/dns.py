"""Name servers on a port: a real one (Debian's `nsd`) for what zones say, and a scripted one for what goes wrong."""

import asyncio
import contextlib
import shutil
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import cast

import dns.flags
import dns.message
import dns.rcode
import dns.rrset
import pytest

from extproc.up.processes import Child, free_ports, spawn, stop

from .wait import PATIENCE_S

_SOA = "@ IN SOA ns hostmaster 1 3600 600 86400 {denial_s}\n@ IN NS ns\nns IN A 127.0.0.1\n"
_CONFIGURATION = """
server:
  ip-address: 127.0.0.1@{port}
  zonesdir: "{directory}"
  database: ""
  zonelistfile: "{directory}/zone.list"
  xfrdfile: "{directory}/xfrd.state"
  xfrdir: "{directory}"
  pidfile: ""
  username: ""
  server-count: 1
remote-control:
  control-enable: no
zone:
  name: "test"
  zonefile: "test.zone"
"""


class NameServer:
    """An nsd with the zone `test.`."""

    def __init__(self, directory: Path) -> None:
        [self.port] = free_ports(1)
        self.address = f"127.0.0.1:{self.port}"
        self._directory = directory
        self._child: Child | None = None

    def write(self, records: str, denial_s: int = 1) -> None:
        """Replace the zone; a running server reads it at once."""
        fresh = self._directory / "new.zone"
        fresh.write_text(f"$ORIGIN test.\n$TTL 1\n{_SOA.format(denial_s=denial_s)}{records}\n")
        fresh.rename(self._directory / "test.zone")
        if self._child is not None:
            self._child.process.send_signal(signal.SIGHUP)

    async def start(self) -> None:
        configuration = self._directory / "nsd.conf"
        configuration.write_text(_CONFIGURATION.format(port=self.port, directory=self._directory))
        self._child = await spawn("nsd", ["nsd", "-d", "-c", str(configuration)], self._directory)
        async with asyncio.timeout(PATIENCE_S):
            while "nsd started" not in self._child.last_words():
                await asyncio.sleep(0.02)

    async def stop(self) -> None:
        if self._child is not None:
            await stop([self._child], 5)
            self._child = None


@contextlib.asynccontextmanager
async def running_nsd(directory: Path, records: str, denial_s: int = 1) -> AsyncIterator[NameServer]:
    if shutil.which("nsd") is None:
        pytest.skip("there is no nsd here (Debian: apt-get install nsd)")
    server = NameServer(directory)
    server.write(records, denial_s)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


Answer = Callable[[dns.message.Message], dns.message.Message | bytes | None]


class ScriptedNameServer(asyncio.DatagramProtocol):
    """Answers over UDP and TCP as `answer` says; None: not at all."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.address = ""
        self.asked: list[str] = []  # "udp" or "tcp", name, type

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.DatagramTransport", transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        if (answer := self._answer("udp", data)) is not None:
            self._transport.sendto(answer, addr)

    async def serve_tcp(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            data = await reader.readexactly(int.from_bytes(await reader.readexactly(2)))
            if (answer := self._answer("tcp", data)) is not None:
                writer.write(len(answer).to_bytes(2) + answer)
                await writer.drain()
        writer.close()

    def _answer(self, over: str, data: bytes) -> bytes | None:
        query = dns.message.from_wire(data)
        self.asked.append(f"{over} {query.question[0].to_text()}")
        answer = self.answer(query)
        if isinstance(answer, dns.message.Message):
            return answer.to_wire(max_size=65535)
        return answer


@contextlib.asynccontextmanager
async def scripted_dns(answer: Answer) -> AsyncIterator[ScriptedNameServer]:
    server = ScriptedNameServer(answer)
    [port] = free_ports(1)
    server.address = f"127.0.0.1:{port}"
    transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(lambda: server, local_addr=("127.0.0.1", port))
    tcp = await asyncio.start_server(server.serve_tcp, "127.0.0.1", port)
    try:
        yield server
    finally:
        transport.close()
        tcp.close()


def reply(query: dns.message.Message, *records: str, rcode: str = "NOERROR", is_cut: bool = False) -> dns.message.Message:
    """An answer with these records, as a zone file spells them."""
    message = dns.message.make_response(query)
    message.set_rcode(dns.rcode.from_text(rcode))
    if is_cut:
        message.flags |= dns.flags.TC
    for record in records:
        name, ttl, _, kind, data = record.split(maxsplit=4)
        message.answer.append(dns.rrset.from_text(name, int(ttl), "IN", kind, data))
    return message
