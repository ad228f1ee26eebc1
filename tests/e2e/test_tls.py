"""Envoy speaks TLS to the router."""

from pathlib import Path

from extproc.router.tls import self_signed

from .client import Client, weights_of
from .conftest import StackFactory


async def test_envoy_encrypts_without_verifying(start: StackFactory, origin: Path) -> None:
    """As the gateways' own Endpoint Picker clusters do; health checks go the same way."""
    async with start({"router": {"tls": {"mode": "self-signed"}}}, nodes=1) as stack:
        client = Client(stack.address)
        assert (await client.chat("team/a", padding=300_000)).weights == weights_of(origin, "team/a")
        await client.close()


async def test_envoy_verifies_the_router_by_a_given_certificate(start: StackFactory, origin: Path, tmp_path: Path) -> None:
    """The pair that the router shows is the one that Envoy trusts."""
    files = {"cert_file": tmp_path / "cert.pem", "key_file": tmp_path / "key.pem"}
    for path, text in zip(files.values(), self_signed(), strict=True):
        path.write_bytes(text)
    tls = {"mode": "files", **{name: str(path) for name, path in files.items()}}
    async with start({"router": {"tls": tls}, "envoy": {"router_ca_file": str(files["cert_file"])}}, nodes=1) as stack:
        client = Client(stack.address)
        assert (await client.chat("team/b")).weights == weights_of(origin, "team/b")
        await client.close()
