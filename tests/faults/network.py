"""Hosts that can be cut off: a network namespace per node, on a bridge in the namespace of the case itself.

A case that wants this runs below `unshare --net --mount` (`runner.py` sees to it): bridge, wires, rules and mounts live in namespaces that only its
processes hold, and are gone when those are, however they end. Nothing of it shows on the machine's own network.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from extproc.up.processes import Child, spawn, stop

HUB_ADDRESS = "10.77.0.1"
_HUB, _TABLE = "hub", "cut"
_POLL_S = 0.01


@dataclass(frozen=True, slots=True)
class Host:
    """Where a node's processes run: their address, and what stands before their commands."""

    address: str = "127.0.0.1"
    prefix: tuple[str, ...] = ()


LOOPBACK = Host()


class Network:
    """`async with Network(directory) as network`, below `unshare --net`. `hub` is the host of routers, Envoy, the origin and the clients."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._holders: list[Child] = []
        self.hub = Host(HUB_ADDRESS)

    async def __aenter__(self) -> "Network":
        await command("ip", "link", "add", _HUB, "type", "bridge")
        await command("ip", "address", "add", f"{HUB_ADDRESS}/24", "dev", _HUB)
        await command("ip", "link", "set", _HUB, "up")
        return self

    async def __aexit__(self, *_: object) -> None:
        await stop(self._holders, 1.0)

    async def add(self, name: str) -> Host:
        """A host of its own: a namespace that a sleeping process holds, and a wire to the hub."""
        holder = await spawn(f"{name}-network", ["unshare", "--net", "--", "sleep", "infinity"], self._directory)
        self._holders.append(holder)
        namespace = Path(f"/proc/{holder.process.pid}/ns/net")
        async with asyncio.timeout(10.0):
            while namespace.readlink() == Path("/proc/self/ns/net").readlink():
                await asyncio.sleep(_POLL_S)
        number = len(self._holders)
        host = Host(f"10.77.0.{10 + number}", ("nsenter", f"--net={namespace}", "--"))
        wire = f"wire{number}"
        await command("ip", "link", "add", wire, "type", "veth", "peer", "name", "eth0", "netns", str(holder.process.pid))
        await command("ip", "link", "set", wire, "master", _HUB, "up")
        await command(*host.prefix, "ip", "link", "set", "lo", "up")
        await command(*host.prefix, "ip", "address", "add", f"{host.address}/24", "dev", "eth0")
        await command(*host.prefix, "ip", "link", "set", "eth0", "up")
        return host


@contextlib.asynccontextmanager
async def dropped(host: Host, port: int | None = None) -> AsyncIterator[None]:
    """Every packet from and to `host`, or from and to one TCP port of it, is lost without a word."""
    if port is None:
        rules = {"input": 'iifname != "lo" drop', "output": 'oifname != "lo" drop'}
    else:
        rules = dict.fromkeys(("input", "output"), f"tcp dport {port} drop; tcp sport {port} drop")
    chains = "\n".join(f"chain {hook} {{ type filter hook {hook} priority 0; {rule}; }}" for hook, rule in rules.items())
    await command(*host.prefix, "nft", f"table inet {_TABLE} {{\n{chains}\n}}")
    try:
        yield
    finally:
        await command(*host.prefix, "nft", "delete", "table", "inet", _TABLE)


async def command(*arguments: str) -> str:
    """What it prints. Raises RuntimeError with its own words if it fails."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*arguments, stdin=asyncio.subprocess.DEVNULL, stdout=pipe, stderr=pipe)
    output, errors = await process.communicate()
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(arguments)}: {errors.decode(errors='replace').strip()}")
    return output.decode()
