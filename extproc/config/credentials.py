"""Certificates and tokens: what the router shows gateways, and what router, stagers and command line show each other."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from .values import Group


class TlsSettings(Group):
    mode: Literal["off", "files", "self-signed"] = "off"
    """`off`: plaintext HTTP/2. `files`: the pair below. `self-signed`: made at start, for gateways that encrypt without verifying."""
    cert_file: str = ""
    """PEM chain, with `files`. Read again when it changes."""
    key_file: str = ""
    """PEM key, with `files`."""
    client_ca_file: str = ""
    """PEM certificates that clients must be signed by. Empty: clients show none."""

    @model_validator(mode="after")
    def _check_files(self) -> "TlsSettings":
        if self.mode == "files" and not (self.cert_file and self.key_file):
            raise ValueError("mode files needs cert_file and key_file")
        return self


class RpcSettings(Group):
    """What router, stagers and command line show each other. Without any of it, nothing destructive is done for callers beyond loopback."""

    token_env: str = ""
    """The environment variable that holds the token all of them share."""
    token_file: str = ""
    """A file that holds it; read again when it changes."""
    token_grace_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 30.0
    """How long after a change of `token_file` stagers still accept the token before."""
    cert_file: str = ""
    """Mutual TLS: this process's certificate chain, PEM. All three files are read again when they change."""
    key_file: str = ""
    """Mutual TLS: its key, PEM."""
    ca_file: str = ""
    """Mutual TLS: the certificates that the other side's must be signed by, PEM."""
    server_name: str = ""
    """Mutual TLS: the name in the stagers' certificates, where it is not the one they are called by."""

    @model_validator(mode="after")
    def _check_files(self) -> "RpcSettings":
        given = [bool(value) for value in (self.cert_file, self.key_file, self.ca_file)]
        if any(given) and not all(given):
            raise ValueError("mutual TLS needs cert_file, key_file and ca_file")
        return self
