"""The listener's certificate with real TLS clients: what is renewed, and what is withdrawn."""

import asyncio
import contextlib
import os
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from extproc.config.credentials import TlsSettings
from extproc.router.http2 import frames
from extproc.router.tls import Certificate, self_signed
from extproc.router.transport import Listener

from .test_http2 import METHODS, Wire


class Files:
    """A server's pair, and the certificates of clients that sign for themselves."""

    def __init__(self, directory: Path) -> None:
        self.cert, self.key, self.ca = directory / "cert", directory / "key", directory / "ca"
        self.directory = directory
        self.renew()

    def renew(self) -> None:
        cert, key = self_signed(("localhost",))
        self.cert.write_bytes(cert)
        self.key.write_bytes(key)

    def client(self, name: str) -> ssl.SSLContext:
        """A client's context, made once per name."""
        cert, key = self.directory / f"{name}.cert", self.directory / f"{name}.key"
        if not cert.exists():
            for path, text in zip((cert, key), self_signed((name,)), strict=True):
                path.write_bytes(text)
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.set_alpn_protocols(["h2"])
        context.load_cert_chain(cert, key)
        return context

    def trust(self, *names: str) -> None:
        self.ca.write_bytes(b"".join((self.directory / f"{name}.cert").read_bytes() for name in names))

    def settings(self, *, with_clients: bool) -> TlsSettings:
        return TlsSettings(mode="files", cert_file=str(self.cert), key_file=str(self.key), client_ca_file=str(self.ca) if with_clients else "")


@contextlib.asynccontextmanager
async def listening(certificate: Certificate) -> AsyncIterator[Listener]:
    listener = Listener("127.0.0.1:0", METHODS, 100, certificate.context)
    await listener.start()
    try:
        yield listener
    finally:
        await listener.stop(0)


@contextlib.asynccontextmanager
async def connected(listener: Listener, context: ssl.SSLContext) -> AsyncIterator[Wire]:
    """A connection whose first ping was answered."""
    host, port = listener.address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port), ssl=context)
    try:
        writer.write(frames.PREFACE)
        wire = Wire(reader, writer)
        wire.frame(frames.SETTINGS, 0, 0)
        await wire.ping()
        yield wire
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            await writer.wait_closed()


async def test_a_withdrawn_client_ca_is_trusted_no_more(tmp_path: Path) -> None:
    """A new connection is refused, one that is open goes on, and who is trusted yet comes in."""
    files = Files(tmp_path)
    old, new = files.client("old"), files.client("new")
    files.trust("old", "new")
    certificate = Certificate(files.settings(with_clients=True))
    async with listening(certificate) as listener, connected(listener, old) as wire:
        files.trust("new")
        assert certificate.reload_if_changed()
        await listener.use(certificate.context)
        with pytest.raises((ssl.SSLError, ConnectionError, asyncio.IncompleteReadError)):
            async with connected(listener, old):
                pass
        await wire.ping()
        async with connected(listener, new):
            pass


async def test_a_rotation_loses_no_connection(tmp_path: Path) -> None:
    """Certificates change ten times while two hundred clients connect; each is served."""
    files = Files(tmp_path)
    certificate = Certificate(files.settings(with_clients=False))
    async with listening(certificate) as listener:
        context = files.client("any")
        served = 0

        async def connect() -> None:
            nonlocal served
            async with connected(listener, context):
                served += 1

        clients = []
        for _ in range(10):
            clients += [asyncio.create_task(connect()) for _ in range(20)]
            await asyncio.sleep(0)
            files.renew()
            assert certificate.reload_if_changed()
            await listener.use(certificate.context)
        await asyncio.gather(*clients)
        assert served == 200


def test_a_half_written_pair_is_left_for_the_next_look(tmp_path: Path) -> None:
    """The certificate of one pair with the key of another is not used; when the key has come, both are."""
    files = Files(tmp_path)
    certificate = Certificate(files.settings(with_clients=False))
    before = certificate.context
    cert, key = self_signed(("localhost",))
    files.cert.write_bytes(cert)
    assert not certificate.reload_if_changed()
    assert not certificate.reload_if_changed()
    assert certificate.context is before
    files.key.write_bytes(key)
    assert certificate.reload_if_changed()
    assert certificate.context is not before


def test_files_are_compared_by_what_they_hold(tmp_path: Path) -> None:
    """A new time stamp alone changes nothing, and a change that keeps the time stamp is seen."""
    files = Files(tmp_path)
    certificate = Certificate(files.settings(with_clients=False))
    os.utime(files.cert, (1, 1))
    assert not certificate.reload_if_changed()
    files.renew()
    for path in (files.cert, files.key):
        os.utime(path, (1, 1))
    assert certificate.reload_if_changed()


def test_a_file_that_is_gone_is_left_for_the_next_look(tmp_path: Path) -> None:
    """As between the two steps of a volume that is mounted anew."""
    files = Files(tmp_path)
    certificate = Certificate(files.settings(with_clients=False))
    files.key.unlink()
    assert not certificate.reload_if_changed()
    files.renew()
    assert certificate.reload_if_changed()
