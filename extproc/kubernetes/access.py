"""Where the API server is, and who asks it: the pod's service account, or a kubeconfig file where there is no pod.

The service account's token is a file that the kubelet replaces about every hour, so it is read for each request. Certificates are read when a
connection is made after one has failed.
"""

import base64
import binascii
import os
import ssl
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .failures import KubernetesFailed

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")  # where the kubelet mounts `token`, `ca.crt` and `namespace`


@dataclass(frozen=True, slots=True)
class Access:
    """One API server and one user. What is bytes came in the kubeconfig itself; "" and b"" are not there."""

    url: str
    namespace: str = "default"  # where the settings name none
    ca_file: str = ""
    ca_data: bytes = b""
    token_file: str = ""
    token: str = ""
    cert_file: str = ""
    key_file: str = ""
    cert_data: bytes = b""
    key_data: bytes = b""
    is_verified: bool = True

    def bearer(self) -> str:
        """The token as it is now; "" without one. Blocks. Raises KubernetesFailed."""
        if not self.token_file:
            return self.token
        try:
            return Path(self.token_file).read_text().strip()
        except (OSError, ValueError) as error:
            raise KubernetesFailed(f"the token {self.token_file} cannot be read: {getattr(error, 'strerror', None) or 'it is no text'}") from None

    def tls(self) -> ssl.SSLContext:
        """Blocks. Raises KubernetesFailed."""
        try:
            context = ssl.create_default_context(cafile=self.ca_file or None, cadata=self.ca_data.decode() or None)
            if self.cert_data:
                # the ssl module takes a certificate of ours from a file alone
                with tempfile.NamedTemporaryFile() as pair:
                    pair.write(self.cert_data + b"\n" + self.key_data)
                    pair.flush()
                    context.load_cert_chain(pair.name)
            elif self.cert_file:
                context.load_cert_chain(self.cert_file, self.key_file)
        except (OSError, ValueError) as error:
            raise KubernetesFailed(f"the certificates for {self.url} cannot be used: {getattr(error, 'strerror', None) or error}") from None
        if not self.is_verified:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context


def find_access(kubeconfig: str = "") -> Access:
    """What the kubeconfig file says; without one, the service account of the pod that this process runs in. Blocks. Raises KubernetesFailed."""
    return _of_file(Path(kubeconfig)) if kubeconfig else _of_pod()


def _of_pod() -> Access:
    host, port = os.environ.get("KUBERNETES_SERVICE_HOST", ""), os.environ.get("KUBERNETES_SERVICE_PORT", "443")
    if not host:
        raise KubernetesFailed("this process runs in no pod (KUBERNETES_SERVICE_HOST is not set), and the settings name no kubeconfig")
    if not (ACCOUNT / "token").exists():
        raise KubernetesFailed(f"there is no {ACCOUNT}/token: the pod has automountServiceAccountToken off")
    try:
        namespace = (ACCOUNT / "namespace").read_text().strip()
    except (OSError, ValueError):
        namespace = "default"
    url = f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"
    return Access(url, namespace, ca_file=str(ACCOUNT / "ca.crt"), token_file=str(ACCOUNT / "token"))


def _of_file(path: Path) -> Access:
    try:
        raw = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise KubernetesFailed(f"kubeconfig {path} cannot be read: {getattr(error, 'strerror', None) or 'it is no YAML'}") from None
    try:
        context = _named(raw["contexts"], raw["current-context"])["context"]
        cluster = _named(raw["clusters"], context["cluster"])["cluster"]
        user = _named(raw["users"], context["user"])["user"] or {}
        url = str(cluster["server"]).rstrip("/")
    except (KeyError, TypeError, StopIteration):
        raise KubernetesFailed(f"kubeconfig {path} has no current-context with a cluster, its server, and a user") from None
    if method := next((method for method in ("exec", "auth-provider", "username") if method in user), None):
        cure = "`kubectl create token NAME` makes a token, which `token` or `tokenFile` may hold"
        raise KubernetesFailed(f"kubeconfig {path}: users are logged in by a token or a certificate here, not by {method!r}; {cure}")
    try:
        ca = base64.b64decode(cluster.get("certificate-authority-data", ""), validate=True)
        cert, key = (base64.b64decode(user.get(f"client-{what}-data", ""), validate=True) for what in ("certificate", "key"))
    except (binascii.Error, TypeError, ValueError):
        raise KubernetesFailed(f"kubeconfig {path}: a field that ends with -data is no Base64") from None
    return Access(
        url,
        context.get("namespace") or "default",
        ca_file=_beside(path, cluster.get("certificate-authority", "")),
        ca_data=ca,
        token_file=_beside(path, user.get("tokenFile", "")),
        token=user.get("token", ""),
        cert_file=_beside(path, user.get("client-certificate", "")),
        key_file=_beside(path, user.get("client-key", "")),
        cert_data=cert,
        key_data=key,
        is_verified=not cluster.get("insecure-skip-tls-verify", False),
    )


def _named(entries: list[dict[str, Any]], name: str) -> dict[str, Any]:
    return next(entry for entry in entries if entry["name"] == name)


def _beside(path: Path, file: str) -> str:
    """Files are named relative to the kubeconfig that names them."""
    return str(path.parent / file) if file else ""
