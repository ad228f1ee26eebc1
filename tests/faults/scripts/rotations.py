"""Tokens and certificates that are replaced under load."""

import asyncio
import signal
import time
from pathlib import Path

from extproc.client import StagerClient
from extproc.config.credentials import RpcSettings
from extproc.errors import LoraExtprocError
from tests.fakes.certificates import Authority

from .. import faults
from ..faults import back
from ..scene import Scene

TAKEN_S = 60.0  # a renewed file is used within this
IMPOSTOR_S = 8.0  # in which a stager is up, and a router has tried it several times
STEP_S = 15.0  # between the steps of an operator who is in no hurry


class Tokens:
    """One file for all, as a mounted secret is."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.write("the first token")
        self.old = self.client_settings("old", "the first token")
        self.new = self.client_settings("new", "the second token")

    def settings(self, process: str, address: str) -> dict[str, str]:
        return {"token_file": str(self._directory / "token")}

    def client_settings(self, name: str, token: str) -> RpcSettings:
        file = self._directory / f"{name}-token"
        file.write_text(token.replace(" ", "-"))
        return RpcSettings(token_file=str(file))

    def write(self, token: str) -> None:
        fresh = self._directory / "token.new"
        fresh.write_text(token.replace(" ", "-"))
        fresh.replace(self._directory / "token")


class Certificates:
    """Two authorities, and the files of every process: its pair, and whom all trust."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory / "certificates"
        self._directory.mkdir()
        self.first, self.second = Authority(self._directory, "first"), Authority(self._directory, "second")
        self._trusted = self._directory / "trusted.pem"
        self._processes: dict[str, str] = {}
        self.trust(self.first)
        self.old, self.new = (authority.rpc(authority.pair(f"client-{number}")) for number, authority in enumerate((self.first, self.second)))

    def settings(self, process: str, address: str) -> dict[str, str]:
        self._processes[process] = address.rpartition(":")[0]
        pair = self.first.pair(process, self._processes[process])
        return {"cert_file": str(pair.cert), "key_file": str(pair.key), "ca_file": str(self._trusted)}

    def trust(self, *authorities: Authority) -> None:
        fresh = self._trusted.with_suffix(".new")
        fresh.write_bytes(b"".join(authority.ca_file.read_bytes() for authority in authorities))
        fresh.replace(self._trusted)

    def renew(self, authority: Authority, *processes: str) -> None:
        """These processes, or all, get a pair of `authority`."""
        for process in processes or self._processes:
            authority.pair(process, self._processes[process])


async def token(scene: Scene) -> None:
    """The file's content is replaced; later a stager is restarted, which knows the new token alone."""
    tokens = scene.fleet.credentials
    assert isinstance(tokens, Tokens)
    await scene.run(faults.CALM_S, at_least=2.0)
    scene.fault()
    tokens.write("the second token")
    scene.note("new taken after", await _until(scene, tokens.new, wanted=True))
    scene.note("old refused after", await _until(scene, tokens.old, wanted=False))
    await _restart_a_stager(scene)


async def certificates(scene: Scene) -> None:
    """Everybody trusts both authorities, then everybody has a pair of the new one, then nobody trusts the old one."""
    certificates = scene.fleet.credentials
    assert isinstance(certificates, Certificates)
    await scene.run(faults.CALM_S, at_least=2.0)
    scene.fault()
    certificates.trust(certificates.first, certificates.second)
    await scene.run(STEP_S, at_least=STEP_S)
    certificates.renew(certificates.second)
    await scene.run(STEP_S, at_least=STEP_S)
    certificates.trust(certificates.second)
    scene.note("new taken after", await _until(scene, certificates.new, wanted=True))
    scene.note("old refused after", await _until(scene, certificates.old, wanted=False))
    await _restart_a_stager(scene)
    name = f"{scene.victim}-stager"
    certificates.renew(certificates.first, name)  # somebody who still has a pair of the old authority takes a stager's place
    await scene.fleet.end(name, signal.SIGTERM)
    await scene.fleet.start(name)
    await asyncio.sleep(IMPOSTOR_S)
    scene.note("routers that take a stager of the old authority", await scene.fleet.seen_by(scene.victim))
    certificates.renew(certificates.second, name)
    await _restart_a_stager(scene)


async def _restart_a_stager(scene: Scene) -> None:
    """New connections have to come about, too."""
    await scene.fleet.end(f"{scene.victim}-stager", signal.SIGTERM)
    await back(scene, f"{scene.victim}-stager")
    scene.mended()
    await scene.run(faults.AFTER_S, at_least=3.0)


async def _until(scene: Scene, shown: RpcSettings, *, wanted: bool) -> float:
    """Seconds until every stager takes these credentials, or refuses them; TAKEN_S if one never does."""
    began = time.monotonic()
    while time.monotonic() - began < TAKEN_S:
        if all([await _is_taken(node.stager, shown) is wanted for node in scene.fleet.nodes]):
            return time.monotonic() - began
        await asyncio.sleep(0.5)
    return TAKEN_S


async def _is_taken(address: str, shown: RpcSettings) -> bool:
    """On a connection of its own: one that stands is not asked again who it is."""
    client = StagerClient(address, shown)
    try:
        async with asyncio.timeout(3.0):
            await client.list()
    except (LoraExtprocError, TimeoutError):
        return False
    finally:
        await client.close()
    return True
