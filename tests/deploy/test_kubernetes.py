"""deploy/kubernetes: what every folder renders, against golden files and schemas, and the rules that all of it keeps."""

import importlib.metadata
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from extproc.config.discovery import DnsSourceSettings
from extproc.config.read import load
from extproc.config.settings import Settings
from extproc.envoyconfig import render
from tests.conftest import NEWEST

from .manifests import DEPLOY, GOLDEN, KUBERNETES, NO_CRD_HERE, Manifest, Pod, crds, kustomizations, named, own, pods, quantity, read, rendered

OLDEST_KUBERNETES, NEWEST_KUBERNETES = "1.33", "1.36"  # that Envoy Gateway 1.9 is made for
RBAC = KUBERNETES / "rbac"
OUR_USER = int(re.findall(r"^USER (\d+)", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)[-1])
# how the settings name pods, and the folder in rbac/ with the rights for that
WAYS = {"service": "service", "inference_pool": "inference-pool", "selector": "selector"}
EVERY = pytest.mark.parametrize("overlay", kustomizations())


def test_every_folder_is_found() -> None:
    """A parametrization over nothing would pass."""
    assert {"base", "plain", "vllm", "simulated", "monitoring"} <= set(kustomizations())


# ---- as a whole


@EVERY
def test_what_is_rendered_is_what_was_looked_at(kubectl: str, overlay: str, update_golden: bool) -> None:
    """golden/<folder>.yaml has what is its own; --update-golden rewrites it."""
    kept = GOLDEN / f"{overlay.replace('/', '-')}.yaml"
    if update_golden:
        kept.write_text(own(kubectl, overlay))
    assert kept.read_text() == own(kubectl, overlay)


def test_golden_files_are_of_folders_that_are_there() -> None:
    """One that was renamed leaves its file behind."""
    assert {file.stem for file in GOLDEN.glob("*.yaml")} == {overlay.replace("/", "-") for overlay in kustomizations()}


@EVERY
def test_every_object_follows_its_schema(kubectl: str, overlay: str) -> None:
    """Of the oldest and the newest Kubernetes, or of its CRD, unknown fields refused. Needs no cluster."""
    kubernetes = pytest.importorskip("kubernetes_validate.utils", reason="kubernetes-validate is missing: pip install '.[test]'")
    for one in read(own(kubectl, overlay)):
        try:
            for version in (OLDEST_KUBERNETES, NEWEST_KUBERNETES):
                kubernetes.validate(one, version, strict=True)
        except kubernetes.SchemaNotFoundError:
            if one["apiVersion"].partition("/")[0] not in NO_CRD_HERE:
                jsonschema.validate(one, crd_schema(one["apiVersion"], one["kind"]))


def test_the_schemas_would_say_what_is_wrong(kubectl: str) -> None:
    """A field that is misspelt, in a kind of Kubernetes' own and in one of a CRD."""
    kubernetes = pytest.importorskip("kubernetes_validate.utils", reason="kubernetes-validate is missing: pip install '.[test]'")
    deployment = named(read(rendered(kubectl, "base")), "Deployment", "lora-extproc")
    deployment["spec"]["replica"] = deployment["spec"].pop("replicas")
    with pytest.raises(kubernetes.ValidationError, match="replica"):
        kubernetes.validate(deployment, NEWEST_KUBERNETES, strict=True)
    pool: Manifest = {"apiVersion": "inference.networking.k8s.io/v1", "kind": "InferencePool", "metadata": {"name": "llama"}}
    spec = {
        "selector": {"matchLabels": {"app": "vllm"}},
        "targetPorts": [{"number": 8000}],
        "endpointPickerRef": {"name": "lora-extproc", "port": {"number": 9002}},
    }
    schema = crd_schema(pool["apiVersion"], "InferencePool")
    jsonschema.validate({**pool, "spec": spec}, schema)
    with pytest.raises(jsonschema.ValidationError, match="targetPort"):
        jsonschema.validate({**pool, "spec": {**spec, "targetPort": 8000}}, schema)


@cache
def crd_schema(api_version: str, kind: str) -> Manifest:
    """The schema in the CRD of that kind. Where the CRDs are missing, the test is skipped."""
    folder = os.environ.get("LORA_EXTPROC_CRDS", "")
    if not folder:
        pytest.skip("LORA_EXTPROC_CRDS names no folder with the CRDs of the gateways")
    group, _, version = api_version.partition("/")
    [found] = crds(sorted(Path(folder).glob("*.yaml")), {(group, kind)})
    [served] = [one for one in found["spec"]["versions"] if one["name"] == version]
    schema: Manifest = _strict(
        served["schema"]["openAPIV3Schema"] | {"x-kubernetes-preserve-unknown-fields": True}
    )  # of metadata, apiVersion and kind it says nothing
    return schema


def _strict(schema: Any) -> Any:
    """As the API server reads it: a field that is not named is not known, and an IntOrString is of either type."""
    if isinstance(schema, list):
        return [_strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {key: _strict(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object" and not schema.get("x-kubernetes-preserve-unknown-fields"):
        strict.setdefault("additionalProperties", False)
    if schema.get("x-kubernetes-int-or-string"):
        strict.pop("type", None)
    return strict


# ---- rules


def every_pod(kubectl: str, overlay: str) -> list[Pod]:
    return list(pods(read(rendered(kubectl, overlay))))


@EVERY
def test_pods_keep_to_the_restricted_profile(kubectl: str, overlay: str) -> None:
    """Of the Pod Security Standards, and what runs our image or Envoy's writes nowhere but in its volumes."""
    for pod in every_pod(kubectl, overlay):
        whole = pod.spec["securityContext"]
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod.spec)
        assert not [volume for volume in pod.spec.get("volumes", ()) if "hostPath" in volume]
        for container in pod.containers:
            context = whole | container.spec["securityContext"]
            assert context["runAsNonRoot"]
            assert context["runAsUser"] == OUR_USER if container.is_ours else context["runAsUser"] > 0
            assert context["seccompProfile"] == {"type": "RuntimeDefault"}
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert context.get("readOnlyRootFilesystem") or container.spec["name"] == "vllm", container.spec["name"]


@EVERY
def test_images_are_of_one_version(kubectl: str, overlay: str) -> None:
    """Ours of this package's, Envoy of the newest that tests run, and none that may be another tomorrow."""
    versions = {"lora-extproc": importlib.metadata.version("lora-extproc"), "envoyproxy/envoy": f"v{NEWEST}"}
    for container in (container for pod in every_pod(kubectl, overlay) for container in pod.containers):
        name, _, tag = container.spec["image"].partition(":")
        assert tag not in ("", "latest")
        assert tag == versions.get(name, tag)


@EVERY
def test_containers_say_what_they_take_and_how_they_are(kubectl: str, overlay: str) -> None:
    """Requests of CPU and memory, a limit of memory; probes of what runs on: of a sidecar no readiness, which would be its engine's."""
    for container in (container for pod in every_pod(kubectl, overlay) for container in pod.containers):
        resources = container.spec["resources"]
        assert {"cpu", "memory"} <= set(resources["requests"])
        assert "memory" in resources["limits"]
        assert "cpu" not in resources["limits"]
        if container.runs_on:
            assert {"startupProbe", "livenessProbe"} <= set(container.spec)
            assert ("readinessProbe" in container.spec) != container.is_initial


@EVERY
def test_pods_have_the_time_that_their_drain_takes(kubectl: str, overlay: str) -> None:
    """And some more, for what follows it. A hook that waits ends in time for SIGTERM."""
    for pod in every_pod(kubectl, overlay):
        grace = pod.spec.get("terminationGracePeriodSeconds", 30)
        if "router" in pod.settings:
            router = pod.settings["router"].router
            assert router.lameduck_s + router.drain_s + 10 <= grace
            assert router.drain_s >= router.stage_deadline_s  # or requests that are held for an adapter are cut off
        waits = [int(limit) for limit in re.findall(r"SECONDS\"? -lt (\d+)", str(pod.spec))]
        assert all(limit + 20 <= grace for limit in waits)
        if "stager" in pod.settings:
            drain_s = pod.settings["stager"].stager.drain_s
            assert drain_s + 30 <= grace
            assert drain_s < min(waits)  # or engines end before their stagers


@EVERY
def test_settings_say_where_the_manifests_expect_them(kubectl: str, overlay: str) -> None:
    """Ports of probes and Services, directories that are volumes, and room in those."""
    for pod in every_pod(kubectl, overlay):
        for container in pod.containers:
            if (settings := pod.settings.get(container.spec["name"])) is None:
                continue
            mounts = {mount["mountPath"]: mount for mount in container.spec["volumeMounts"]}
            ports = {port["name"]: f"0.0.0.0:{port['containerPort']}" for port in container.spec["ports"]}
            if container.spec["name"] == "router":
                router = settings.router
                assert ports == {"grpc": router.listen, "health": router.health_listen, "http": router.http_listen}
                assert settings.discovery.dir in mounts
                assert router.max_held_bytes <= quantity(container.spec["resources"]["limits"]["memory"]) / 2
            else:
                stager = settings.stager
                assert ports == {"stager": stager.listen, "stager-http": stager.http_listen}
                [volume] = [one for one in pod.spec["volumes"] if one["name"] == mounts[stager.dir]["name"]]
                assert stager.max_bytes < quantity(volume["emptyDir"]["sizeLimit"])


@EVERY
def test_volumes_in_a_nodes_memory_or_on_its_disk_are_bounded(kubectl: str, overlay: str) -> None:
    """What fills a node's disk evicts others."""
    for pod in every_pod(kubectl, overlay):
        assert all("sizeLimit" in volume["emptyDir"] for volume in pod.spec.get("volumes", ()) if "emptyDir" in volume)


@EVERY
def test_selectors_select_pods_that_are_there(kubectl: str, overlay: str) -> None:
    """Those of Services, budgets and network policies, and every port that a Service leads to has its name in the pod. Gateways make pods of their own."""
    found = read(rendered(kubectl, overlay))
    there = list(pods(found))
    for one in found:
        if one["kind"] not in ("Service", "PodDisruptionBudget", "NetworkPolicy") or not there:
            continue
        spec = one["spec"]
        labels = spec["selector"] if one["kind"] == "Service" else spec.get("selector", spec.get("podSelector", {}))["matchLabels"]
        chosen = [pod for pod in there if labels.items() <= pod.labels.items()]
        assert chosen, f"{one['kind']} {one['metadata']['name']}"
        ports = {port["name"]: port["containerPort"] for pod in chosen for container in pod.containers for port in container.spec.get("ports", ())}
        if one["kind"] == "Service":
            assert {port["targetPort"] for port in spec["ports"]} <= set(ports)
        if one["kind"] == "NetworkPolicy":
            assert {port["port"] for rule in spec["ingress"] for port in rule["ports"]} <= set(ports.values())


@EVERY
def test_a_router_has_the_rights_for_what_its_settings_ask(kubectl: str, overlay: str) -> None:
    """Those of the folder in rbac/ for its way to find pods, and no others."""
    found = read(rendered(kubectl, overlay))
    for pod in (pod for pod in pods(found) if "router" in pod.settings):
        ways = {way for pool in pod.settings["router"].pools for source in pool.discovery for way in WAYS if getattr(source, way, "")}
        assert len(ways) == 1
        [wanted] = [one for one in read((RBAC / WAYS[ways.pop()] / "rights.yaml").read_text()) if one["kind"] == "Role"]
        assert named(found, "Role", "lora-extproc-discovery")["rules"] == wanted["rules"]
        assert pod.spec["serviceAccountName"] == named(found, "ServiceAccount", "lora-extproc")["metadata"]["name"]


# ---- engines and their stagers


@pytest.mark.parametrize("overlay", ["vllm", "simulated"])
def test_an_engines_flags_are_what_its_stager_was_told(kubectl: str, overlay: str) -> None:
    """A stager refuses by them what its engine could not load."""
    [pod] = every_pod(kubectl, overlay)
    engine = pod.settings["stager"].stager.engine
    flags = " ".join(pod.spec["containers"][0]["args"]).replace("=", " ").split()
    limits = {"--max-loras": engine.max_loras, "--max-cpu-loras": engine.max_cpu_loras, "--max-lora-rank": engine.max_lora_rank}
    assert {flag: int(flags[flags.index(flag) + 1]) for flag in limits} == limits
    assert engine.base_model in (flags[flags.index("--model") + 1] if "--model" in flags else "", "")
    assert engine.url == "http://127.0.0.1:8000"


@pytest.mark.parametrize("overlay", ["vllm", "simulated"])
def test_engine_and_stager_see_adapters_under_the_same_path(kubectl: str, overlay: str) -> None:
    """The engine cannot write there, and its group can read what the stager writes."""
    [pod] = every_pod(kubectl, overlay)
    mounts = {one.spec["name"]: {mount["name"]: mount for mount in one.spec["volumeMounts"]}.get("adapters", {}) for one in pod.containers}
    assert mounts["stager"]["mountPath"] == mounts["vllm"]["mountPath"] == pod.settings["stager"].stager.dir
    assert mounts["vllm"]["readOnly"]
    assert pod.spec["securityContext"]["fsGroup"] == OUR_USER


@pytest.mark.parametrize("overlay", ["vllm", "simulated"])
def test_stagers_find_each_other(kubectl: str, overlay: str) -> None:
    """By a Service that has the addresses of all pods, which needs no rights."""
    found = read(rendered(kubectl, overlay))
    [pod] = pods(found)
    [source] = pod.settings["stager"].pools[0].discovery
    assert isinstance(source, DnsSourceSettings)
    service = named(found, "Service", source.name)["spec"]
    assert service["clusterIP"] == "None"
    assert service["publishNotReadyAddresses"]
    assert [port["port"] for port in service["ports"]] == [source.stager_port]


def sidecar(kind: str) -> Manifest:
    patch: Manifest = yaml.safe_load((KUBERNETES / "vllm" / "sidecar" / f"{kind}.yaml").read_text())
    return patch


def test_the_patches_of_a_deployment_and_of_a_statefulset_differ_in_their_kind_alone() -> None:
    """One of them is part of the sample, and so of all that the sample shows."""
    assert sidecar("statefulset") == sidecar("deployment") | {"kind": "StatefulSet"}


def test_the_patch_of_a_leaderworkerset_adds_the_same(kubectl: str, tmp_path: Path) -> None:
    """To the leader; its workers see the same directory, which is another for each group."""
    (tmp_path / "set.yaml").write_text((Path(__file__).parent / "leaderworkerset.yaml").read_text())
    (tmp_path / "patch.yaml").write_text((KUBERNETES / "vllm" / "sidecar" / "leaderworkerset.yaml").read_text())
    patched = {"resources": ["set.yaml"], "patches": [{"path": "patch.yaml", "target": {"kind": "LeaderWorkerSet"}}]}
    (tmp_path / "kustomization.yaml").write_text(yaml.dump(patched))
    [one] = read(rendered(kubectl, str(tmp_path)))
    group = one["spec"]["leaderWorkerTemplate"]
    leader, worker = group["leaderTemplate"]["spec"], group["workerTemplate"]["spec"]
    wanted = sidecar("deployment")["spec"]["template"]["spec"]
    [stager] = leader["initContainers"]
    assert stager["env"].pop() == leader["containers"][0]["env"][-1] == worker["containers"][0]["env"][-1]
    of_the_group = {"subPathExpr": "$(LWS_GROUP)"}
    assert stager["volumeMounts"][0].pop("subPathExpr") == of_the_group["subPathExpr"]
    assert stager == wanted["initContainers"][0]
    mount = wanted["containers"][0]["volumeMounts"][0] | of_the_group
    assert leader["containers"][0]["volumeMounts"][-1] == worker["containers"][0]["volumeMounts"][-1] == mount
    assert leader["containers"][0]["lifecycle"] == wanted["containers"][0]["lifecycle"]
    assert leader["terminationGracePeriodSeconds"] == wanted["terminationGracePeriodSeconds"]
    assert leader["securityContext"]["fsGroup"] == worker["securityContext"]["fsGroup"] == wanted["securityContext"]["fsGroup"]
    assert wanted["containers"][0]["env"][0] in leader["containers"][0]["env"]


# ---- the plain Envoy


def test_envoys_configuration_is_what_the_settings_of_the_base_render(update_golden: bool) -> None:
    """--update-golden rewrites it."""
    text = render(load(KUBERNETES / "base" / "settings.yaml"))
    kept = KUBERNETES / "plain" / "envoy.yaml"
    if update_golden:
        kept.write_text(text)
    assert kept.read_text() == text


def test_envoy_asks_each_router_by_its_own_address(kubectl: str) -> None:
    """A Service without an address of its own, whose name and port the settings have."""
    found = read(rendered(kubectl, "plain"))
    settings: Settings = next(pod.settings["router"] for pod in pods(found) if "router" in pod.settings)
    name, _, port = settings.envoy.router.partition(":")
    service = named(found, "Service", name)
    assert service["spec"]["clusterIP"] == "None"
    assert [one["port"] for one in service["spec"]["ports"]] == [int(port)]
