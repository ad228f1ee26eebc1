"""deploy/helm/lora-extproc: without values it is deploy/kubernetes/base, and what each value changes."""

import copy
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from extproc.config.read import parse
from extproc.config.settings import Settings

from .manifests import CHART, KUBERNETES, Manifest, named, pods, read, rendered, run, unhashed

Render = Callable[..., list[Manifest]]
OF_HELM = ("helm.sh/chart", "app.kubernetes.io/managed-by", "app.kubernetes.io/version", "app.kubernetes.io/instance")
# what the annotation is for, kustomize does by the hash in the name of the ConfigMap
OF_THE_CHART = "lora-extproc/settings"


@pytest.fixture
def chart(helm: str, tmp_path: Path) -> Render:
    """`chart({"replicas": 3})` renders it with these values."""

    def render(values: Manifest | None = None, release: str = "lora-extproc", directory: Path = CHART) -> list[Manifest]:
        file = tmp_path / "values.yaml"
        file.write_text(yaml.dump(values or {}))
        return read(run([helm, "template", release, str(directory), "--namespace", "llm", "--values", str(file)]))

    return render


def plain(value: Any) -> Any:
    """Without what only one of helm and kustomize has, and with settings as values."""
    if isinstance(value, list):
        return [plain(one) for one in value]
    if not isinstance(value, dict):
        return unhashed(value) if isinstance(value, str) else value
    kept = {key: plain(one) for key, one in value.items() if key not in (*OF_HELM, OF_THE_CHART)}
    if "settings.yaml" in kept:
        kept["settings.yaml"] = yaml.safe_load(kept["settings.yaml"])
    return {key: one for key, one in kept.items() if one or key not in ("annotations", "labels")}


def by_name(found: list[Manifest]) -> dict[tuple[str, str], Any]:
    """Labels of the rights are the chart's alone: rbac/ is also applied by itself."""
    return {(one["kind"], one["metadata"]["name"]): one for one in map(plain, found)}


def without_labels(one: Manifest) -> Manifest:
    one = copy.deepcopy(one)
    one["metadata"].pop("labels", None)
    return one


def _settings(found: list[Manifest], name: str) -> Settings:
    return parse(yaml.safe_load(named(found, "ConfigMap", name)["data"]["settings.yaml"]), source=name)


def test_without_values_it_is_the_base(chart: Render, kubectl: str) -> None:
    """Object by object, so that a rule of the one is a rule of the other."""
    ours, base = by_name(chart()), by_name(read(rendered(kubectl, "base")))
    assert ours.keys() == base.keys()
    for key, one in base.items():
        is_right = key[0] in ("ServiceAccount", "Role", "RoleBinding")
        assert (without_labels(ours[key]) if is_right else ours[key]) == one, key


def test_monitoring_is_that_of_the_folder(chart: Render, kubectl: str) -> None:
    """Under names of the release."""
    ours, folder = by_name(chart({"monitoring": {"enabled": True}})), by_name(read(rendered(kubectl, "monitoring")))
    names = {"vllm": "lora-extproc-engines", "vllm-metrics": "lora-extproc-engines-metrics"}
    for (kind, name), one in folder.items():
        one["metadata"]["name"] = names.get(name, name)
        assert ours[kind, names.get(name, name)] == one


def test_selectors_are_of_one_release_alone(chart: Render) -> None:
    """Two releases in a namespace, as for two pools, take nothing from each other."""
    for name, release in (("pool-a-lora-extproc", "pool-a"), ("lora-extproc-b", "lora-extproc-b")):
        found = chart(release=release)
        assert {one["metadata"]["name"].removesuffix("-discovery") for one in found} == {name}
        selectors = [named(found, "Deployment", name)["spec"]["selector"]["matchLabels"], named(found, "Service", name)["spec"]["selector"]]
        selectors += [named(found, "NetworkPolicy", name)["spec"]["podSelector"]["matchLabels"]]
        assert all(one["app.kubernetes.io/instance"] == release for one in selectors)


@pytest.mark.parametrize(
    ("source", "rights"),
    [
        ({"inference_pool": "llama"}, "inference-pool"),
        ({"service": "vllm"}, "service"),
        ({"selector": "app=vllm", "ports": [8000]}, "selector"),
    ],
)
def test_rights_follow_from_the_settings(chart: Render, source: Manifest, rights: str) -> None:
    """The rules of rbac/, in the namespace where the pods are."""
    discovery = [{"type": "kubernetes", "namespace": "engines", **source}]
    found = chart({"settings": {"pools": [{"name": "p", "discovery": discovery}]}})
    [wanted] = [one for one in read((KUBERNETES / "rbac" / rights / "rights.yaml").read_text()) if one["kind"] == "Role"]
    role, binding = named(found, "Role", "lora-extproc-discovery"), named(found, "RoleBinding", "lora-extproc-discovery")
    assert role["rules"] == wanted["rules"]
    assert role["metadata"]["namespace"] == binding["metadata"]["namespace"] == "engines"
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": "lora-extproc", "namespace": "llm"}]


def test_a_router_that_asks_no_api_server_has_no_rights(chart: Render) -> None:
    """Endpoints of the settings, or of DNS."""
    found = chart({"settings": {"pools": [{"name": "p", "discovery": [{"type": "dns", "name": "vllm.llm.svc", "port": 8000}]}]}})
    assert not [one for one in found if one["kind"] in ("Role", "RoleBinding")]


@pytest.mark.parametrize("router", [{"lameduck_s": 30, "drain_s": 600}, {"lameduck_s": 0.5, "drain_s": 0}])
def test_the_grace_period_follows_from_the_settings(chart: Render, router: Manifest) -> None:
    """Else a longer drain would be cut off."""
    [pod] = pods(chart({"settings": {"router": router}}))
    assert pod.spec["terminationGracePeriodSeconds"] >= router["lameduck_s"] + router["drain_s"] + 10


def test_changed_settings_are_a_rollout(chart: Render) -> None:
    """A router reads them once."""
    [one], [other] = pods(chart()), pods(chart({"settings": {"log": {"level": "debug"}}}))
    assert one.annotations[OF_THE_CHART] != other.annotations[OF_THE_CHART]


def test_large_numbers_stay_numbers(chart: Render) -> None:
    """As helm reads values, they could become text that is no number of bytes."""
    found = chart({"stager": {"settings": {"stager": {"max_bytes": 107_374_182_400}}}})
    router, stager = (_settings(found, name) for name in ("lora-extproc", "lora-extproc-stager"))
    assert router.router.max_held_bytes == 2**30
    assert stager.stager.max_bytes == 100 * 2**30


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"replica": 3}, "replica"),
        ({"image": {"tag": "latest"}}, "/image/tag"),
        ({"settings": {"router": {"listen": "0.0.0.0:80"}}}, "/settings/router/listen"),
        ({"settings": {"pools": []}}, "/settings/pools"),
    ],
)
def test_values_that_cannot_be_meant_are_refused(chart: Render, values: Manifest, complaint: str) -> None:
    """By the schema, before anything is installed."""
    with pytest.raises(AssertionError, match=complaint):
        chart(values)


def test_a_chart_that_depends_on_it_gets_the_sidecar_of_the_sample(chart: Render, kubectl: str, tmp_path: Path) -> None:
    """By the named templates: container, volumes, and what the engine waits for at its end."""
    umbrella = tmp_path / "umbrella"
    shutil.copytree(Path(__file__).parent / "umbrella", umbrella)
    shutil.copytree(CHART, umbrella / "charts" / "lora-extproc")
    settings = yaml.safe_load((KUBERNETES / "vllm" / "stager.yaml").read_text())
    found = chart({"lora-extproc": {"stager": {"settings": settings}}}, directory=umbrella)
    [engine] = [pod for pod in pods(found) if pod.owner["metadata"]["name"] == "engine"]
    [sample] = pods(read(rendered(kubectl, "vllm")))
    assert engine.settings == sample.settings
    assert engine.spec["initContainers"] == sample.spec["initContainers"]
    assert engine.spec["containers"][0]["lifecycle"] == sample.spec["containers"][0]["lifecycle"]
    volumes = [volume for volume in sample.spec["volumes"] if volume["name"].startswith("stager-")]
    assert plain(engine.spec["volumes"]) == plain(volumes)


def test_the_readmes_values_are_values(chart: Render) -> None:
    """And the settings in them are settings."""
    [text] = re.findall(r"^```yaml\n(.*?)^```$", (CHART / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    found = chart(yaml.safe_load(text))
    router, stager = (_settings(found, name) for name in ("lora-extproc", "lora-extproc-stager"))
    assert router.pools[0].discovery
    assert stager.stager.origins


def test_the_chart_is_of_this_packages_version() -> None:
    """Its image's tag follows from that."""
    from extproc import __version__

    about = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert about["appVersion"] == __version__


def test_helm_finds_nothing_wrong_with_it(helm: str) -> None:
    """As who publishes it would."""
    assert "0 chart(s) failed" in run([helm, "lint", "--strict", str(CHART)])
