"""What a cluster says of the manifests: a real kube-apiserver with the CRDs of every gateway, and the commands of each README that need no pod to run."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.fakes.kube_apiserver import crds as shipped
from tests.fakes.kube_apiserver import running_cluster

from .manifests import CHART, DEPLOY, KUBERNETES, NO_CRD_HERE, Manifest, crds, kustomizations, own, read, rendered, run

sys.path.insert(0, str(DEPLOY / "compose"))

from following import differs, steps  # it is no package

READMES = [*sorted(file.parent for file in KUBERNETES.rglob("README.md")), CHART]
# commands that need a container engine or another registry; pods that run; a gateway's controller, which tests/e2e/kubernetes/ has. The API server of the test has its
# namespace already, and no controller that would delete one
NOT_HERE = (
    "docker build",
    "helm install eg",
    "curl",
    "port-forward",
    "rollout",
    "kubectl -n llm wait",
    "kubectl -n llm get btp",
    "kubectl create namespace",
    "kubectl delete namespace",
)
COMMAND_S = 60


@pytest.fixture(scope="module")
def kubeconfig(kubectl: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of the administrator of a cluster that has every kind and every namespace which a manifest names, and warns of what the restricted profile forbids."""
    directory = tmp_path_factory.mktemp("cluster")
    named = [one for overlay in kustomizations() for one in read(rendered(kubectl, overlay))]
    kinds = {(one["apiVersion"].partition("/")[0], one["kind"]) for one in named}
    wanted = crds(shipped("envoy-gateway", "gaie", "gateway-api", "istio"), kinds)
    wanted += [crd_of_anything(group, kind) for group, kind in kinds if group in NO_CRD_HERE]
    (directory / "crds.yaml").write_text(yaml.dump_all(wanted, Dumper=yaml.CSafeDumper))
    with running_cluster(directory, [directory / "crds.yaml"]) as cluster:
        path = cluster.server.kubeconfig(directory / "kubeconfig")
        for namespace in {one["metadata"].get("namespace", "llm") for one in named} - {"llm"}:
            run([kubectl, "create", "namespace", namespace], KUBECONFIG=path)
        run([kubectl, "label", "namespace", "--all", "pod-security.kubernetes.io/warn=restricted"], KUBECONFIG=path)
        yield path


def crd_of_anything(group: str, kind: str) -> Manifest:
    """In the place of a CRD that is not here: commands find the kind, and nothing of an object is judged."""
    plural = kind.lower().removesuffix("y") + ("ies" if kind.endswith("y") else "s")
    schema = {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}}
    versions = [{"name": "v1", "served": True, "storage": True, "schema": schema}]
    spec = {"group": group, "scope": "Namespaced", "names": {"kind": kind, "plural": plural, "singular": kind.lower()}, "versions": versions}
    return {"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition", "metadata": {"name": f"{plural}.{group}"}, "spec": spec}


def dry_run(kubectl: str, kubeconfig: str, objects: list[Manifest]) -> None:
    """As `kubectl apply` would send them. The API server must refuse none, and have nothing to warn of."""
    run([kubectl, "apply", "--dry-run=server", "-f", "-"], yaml.dump_all(objects, Dumper=yaml.CSafeDumper), KUBECONFIG=kubeconfig)


@pytest.mark.parametrize("overlay", kustomizations())
def test_every_object_is_accepted(kubectl: str, kubeconfig: str, overlay: str) -> None:
    """Schemas, defaults, CEL rules and the restricted profile, as a cluster has them."""
    dry_run(kubectl, kubeconfig, read(own(kubectl, overlay)))


def test_the_profile_would_be_heard_of(kubectl: str, kubeconfig: str) -> None:
    """A container that may become root."""
    found = read(rendered(kubectl, "base"))
    [deployment] = [one for one in found if one["kind"] == "Deployment"]
    del deployment["spec"]["template"]["spec"]["containers"][0]["securityContext"]["allowPrivilegeEscalation"]
    with pytest.raises(AssertionError, match='would violate PodSecurity "restricted'):
        dry_run(kubectl, kubeconfig, found)


def test_every_object_of_the_chart_is_accepted(kubectl: str, helm: str, kubeconfig: str) -> None:
    """With all that can be switched on."""
    values = ["--set", "monitoring.enabled=true,stager.settings.stager.listen=0.0.0.0:9102"]
    dry_run(kubectl, kubeconfig, read(run([helm, "template", "a-release", str(CHART), "--namespace", "llm", *values])))


# ---- the READMEs


@pytest.mark.parametrize("folder", READMES, ids=lambda folder: str(folder.relative_to(DEPLOY)))
def test_a_readmes_commands_do_what_it_says(kubectl: str, helm: str, kubeconfig: str, tmp_path: Path, folder: Path) -> None:
    """In their order, from the top of the repository; what they make is gone after the last one."""
    for name, command in {"kubectl": kubectl, "helm": helm, "lora-extproc": f"{sys.executable} -m extproc"}.items():
        (tmp_path / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "KUBECONFIG": kubeconfig, "HOME": str(tmp_path)}
    found = [step for step in steps((folder / "README.md").read_text()) if not any(word in step.command for word in NOT_HERE)]
    assert found
    for step in found:
        done = subprocess.run(step.command, shell=True, cwd=DEPLOY.parent, capture_output=True, text=True, env=environment, timeout=COMMAND_S, check=False)
        assert done.returncode == 0, f"{step.command}: {done.stderr}"
        assert not differs(done.stdout, step), step.command
    kinds = "deployment,service,configmap,secret,serviceaccount,role,rolebinding,poddisruptionbudget,networkpolicy"
    left = run([kubectl, "-n", "llm", "get", kinds, "-o", "name"], KUBECONFIG=kubeconfig)
    assert not left
