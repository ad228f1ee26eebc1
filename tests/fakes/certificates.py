"""A certificate authority of one test: pairs for servers and clients, as files."""

import datetime
import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from extproc.config.credentials import RpcSettings


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, as PEM files."""

    cert: Path
    key: Path


class Authority:
    """Signs what it is asked to. `ca_file` is what those trust who trust it."""

    def __init__(self, directory: Path, name: str = "ca") -> None:
        self._directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name(f"{name} of a test")
        self.ca_file = directory / f"{name}.pem"
        self.ca_file.write_bytes(self._sign(self._name, self._key, _is_ca=True))

    def pair(self, name: str, *names: str) -> Pair:
        """A new certificate called `name`, for these DNS names and addresses; replaces, in one rename each, what had that name before."""
        key = ec.generate_private_key(ec.SECP256R1())
        cert = self._sign(_name(name), key, names)
        private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        pair = Pair(self._directory / f"{name}.pem", self._directory / f"{name}-key.pem")
        for path, text in ((pair.cert, cert), (pair.key, private)):
            fresh = path.with_suffix(".new")
            fresh.write_bytes(text)
            os.replace(fresh, path)  # noqa: PTH105
        return pair

    def rpc(self, pair: Pair, trusted: "Authority | None" = None, **more: Any) -> RpcSettings:
        """Settings that show `pair`, and trust this authority or another."""
        return RpcSettings(cert_file=str(pair.cert), key_file=str(pair.key), ca_file=str((trusted or self).ca_file), **more)

    def _sign(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, names: tuple[str, ...] = (), *, _is_ca: bool = False) -> bytes:
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=_is_ca, path_length=None), critical=True)
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName([_general(name) for name in names]), critical=False)
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)
