"""The certificate of the ext_proc port: a given one, read again when its files change, or one made for this process.

The files are compared by what they hold: a time stamp may stay the same (a volume that is mounted anew, a copy that keeps it), and does not tell a file
that is half written. New files give a new context, since a context can only be given more certificates to trust, never fewer.
"""

import contextlib
import datetime
import hashlib
import logging
import ssl
import tempfile
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from ..config.credentials import TlsSettings
from ..errors import StartError

log = logging.getLogger(__name__)

VALID_YEARS = 10  # as the reference Endpoint Picker's; gateways do not verify it


class Certificate:
    """What new connections are greeted with: `context`, which `reload_if_changed` replaces. Raises StartError if the given files cannot be used."""

    def __init__(self, settings: TlsSettings) -> None:
        self._settings = settings
        self._paths = tuple(path for path in (settings.cert_file, settings.key_file, settings.client_ca_file) if path)
        self._loaded: tuple[bytes, ...] = ()  # digests; none of a certificate that is made here
        self._refused: tuple[bytes, ...] = ()  # what could not be used at the last look, so that it is logged once
        if settings.mode == "self-signed":
            self.context = _context()
            _load_self_signed(self.context)
            return
        try:
            self._loaded = self._digests()
            self.context = self._load()
        except OSError as error:  # ssl.SSLError is one
            raise StartError(f"router.tls: {', '.join(self._paths)}: {error.strerror or error}") from None

    def reload_if_changed(self) -> bool:
        """Read the files again if they hold something else; True if `context` is a new one. Files that do not fit each other are left for the next look."""
        if not self._loaded:
            return False
        try:
            digests = self._digests()
            if digests in (self._loaded, self._refused):
                return False
            context = self._load()
            if self._digests() != digests:  # written meanwhile: the context may be of neither
                return False
        except OSError as error:
            with contextlib.suppress(OSError):
                self._refused = self._digests()
            log.warning("router.tls: the new certificate cannot be used: %s", error.strerror or error)
            return False
        self._loaded, self._refused, self.context = digests, (), context
        log.info("router.tls: a new certificate is in use")
        return True

    def _load(self) -> ssl.SSLContext:
        context = _context()
        context.load_cert_chain(self._settings.cert_file, self._settings.key_file)
        if self._settings.client_ca_file:
            context.load_verify_locations(self._settings.client_ca_file)
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def _digests(self) -> tuple[bytes, ...]:
        return tuple(hashlib.sha256(Path(path).read_bytes()).digest() for path in self._paths)


def _context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["h2"])
    return context


def self_signed(names: tuple[str, ...] = ("lora-extproc",)) -> tuple[bytes, bytes]:
    """A new certificate and its key, as PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0])])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))  # clocks differ
        .not_valid_after(now + datetime.timedelta(days=365 * VALID_YEARS))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(n) for n in names]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return certificate.public_bytes(serialization.Encoding.PEM), private


def _load_self_signed(context: ssl.SSLContext) -> None:
    with tempfile.TemporaryDirectory() as directory:  # the library reads files only; this one is the process's own (mode 0700)
        cert, key = Path(directory, "cert"), Path(directory, "key")
        for path, text in zip((cert, key), self_signed(), strict=True):
            path.write_bytes(text)
        context.load_cert_chain(cert, key)
