"""Where the API server is, and who asks it."""

import base64
import ssl
from pathlib import Path
from typing import Any

import pytest
import yaml

from extproc.kubernetes import access as access_module
from extproc.kubernetes.access import Access, find_access
from extproc.kubernetes.failures import KubernetesFailed
from tests.fakes.certificates import Authority


def kubeconfig(directory: Path, user: dict[str, Any] | None = None, cluster: dict[str, Any] | None = None) -> str:
    path = directory / "config"
    raw = {
        "current-context": "here",
        "contexts": [{"name": "there"}, {"name": "here", "context": {"cluster": "c", "user": "u", "namespace": "llm"}}],
        "clusters": [{"name": "c", "cluster": {"server": "https://10.0.0.1:6443/", **(cluster or {})}}],
        "users": [{"name": "u", "user": {"token": "secret"} if user is None else user}],
    }
    path.write_text(yaml.dump(raw))
    return str(path)


@pytest.fixture
def account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the kubelet mounts into every pod."""
    (tmp_path / "token").write_text("secret\n")
    (tmp_path / "namespace").write_text("llm\n")
    monkeypatch.setattr(access_module, "ACCOUNT", tmp_path)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.96.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    return tmp_path


def test_in_a_pod_its_service_account_asks(account: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the token and the authority that are mounted, in the pod's namespace."""
    access = find_access()
    assert access == Access("https://10.96.0.1:443", "llm", ca_file=str(account / "ca.crt"), token_file=str(account / "token"))
    assert access.bearer() == "secret"
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "fd00::1")
    assert find_access().url == "https://[fd00::1]:443"


def test_a_pod_without_a_token_is_told_why(account: Path) -> None:
    """Charts switch it off by habit."""
    (account / "token").unlink()
    with pytest.raises(KubernetesFailed, match="automountServiceAccountToken"):
        find_access()


def test_outside_a_pod_a_kubeconfig_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways are named."""
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(KubernetesFailed, match=r"runs in no pod .* name no kubeconfig"):
        find_access()


def test_a_kubeconfig_says_server_user_and_namespace(tmp_path: Path) -> None:
    """Those of its current context; files are named relative to it."""
    access = find_access(kubeconfig(tmp_path, {"tokenFile": "token", "client-certificate": "/abs/cert"}, {"certificate-authority": "ca.crt"}))
    assert (access.url, access.namespace) == ("https://10.0.0.1:6443", "llm")
    assert (access.ca_file, access.token_file, access.cert_file) == (str(tmp_path / "ca.crt"), str(tmp_path / "token"), "/abs/cert")
    assert find_access(kubeconfig(tmp_path)).bearer() == "secret"


def test_certificates_may_stand_in_the_kubeconfig(tmp_path: Path) -> None:
    """As kind and minikube write them."""
    authority = Authority(tmp_path)
    pair = authority.pair("admin")
    data = {name: base64.b64encode(path.read_bytes()).decode() for name, path in (("certificate", pair.cert), ("key", pair.key), ("ca", authority.ca_file))}
    user = {"client-certificate-data": data["certificate"], "client-key-data": data["key"]}
    context = find_access(kubeconfig(tmp_path, user, {"certificate-authority-data": data["ca"]})).tls()
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert len(context.get_ca_certs()) == 1
    context = find_access(kubeconfig(tmp_path, cluster={"insecure-skip-tls-verify": True})).tls()
    assert context.verify_mode is ssl.CERT_NONE


def test_certificates_that_cannot_be_used_are_said(tmp_path: Path) -> None:
    """By the server that they are for."""
    (tmp_path / "ca.crt").write_text("none")
    for cluster in ({"certificate-authority": "ca.crt"}, {"certificate-authority": "missing"}):
        with pytest.raises(KubernetesFailed, match=r"the certificates for https://10\.0\.0\.1:6443 cannot be used"):
            find_access(kubeconfig(tmp_path, cluster=cluster)).tls()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot be read: No such file"),
        ("{", "cannot be read: it is no YAML"),
        ("[]", "has no current-context"),
        ("current-context: here\ncontexts: []\n", "has no current-context"),
    ],
)
def test_a_kubeconfig_that_cannot_be_used_is_said(tmp_path: Path, text: str | None, words: str) -> None:
    """Whatever it holds."""
    path = tmp_path / "config"
    if text is not None:
        path.write_text(text)
    with pytest.raises(KubernetesFailed, match=words):
        find_access(str(path))


def test_users_who_log_in_by_a_program_are_told_what_to_do(tmp_path: Path) -> None:
    """No program is run; a token does the same."""
    with pytest.raises(KubernetesFailed, match=r"not by 'exec'; .*kubectl create token"):
        find_access(kubeconfig(tmp_path, {"exec": {"command": "aws"}}))
    with pytest.raises(KubernetesFailed, match="no Base64"):
        find_access(kubeconfig(tmp_path, {"client-key-data": "?"}))
