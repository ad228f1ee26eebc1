"""What deploy/kubernetes and deploy/helm render, by the real kubectl and the real helm, as plain values."""

import os
import re
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from extproc.config.read import parse
from extproc.config.settings import Settings

DEPLOY = Path(__file__).parents[2] / "deploy"
KUBERNETES, CHART = DEPLOY / "kubernetes", DEPLOY / "helm" / "lora-extproc"
GOLDEN = Path(__file__).parent / "golden"
OUR_IMAGE = "lora-extproc"
# groups whose CRDs are not among those of LORA_EXTPROC_CRDS; golden files keep what was compared by hand
NO_CRD_HERE = ("monitoring.coreos.com", "networking.gke.io")
Manifest = dict[str, Any]
_SEPARATOR = "---\n"  # between two objects
_CRD = re.compile(r"^  group: (\S+)\n.*?^    kind: (\S+)\n", re.MULTILINE | re.DOTALL)
_HASH = re.compile(r"-[2456789bcdfghkmt]{10}$")  # that kustomize appends to the name of a ConfigMap that it makes: ten digits of a hash in its own letters


def kustomizations() -> list[str]:
    """The folders of deploy/kubernetes that are applied by themselves, and `folder+component` for each component that lies in one: what an overlay of a user's
    own would take together. Not those of rbac/, which are parts of others."""
    kinds = {file.parent.relative_to(KUBERNETES): yaml.safe_load(file.read_text())["kind"] for file in sorted(KUBERNETES.rglob("kustomization.yaml"))}
    whole = [folder for folder, kind in kinds.items() if kind == "Kustomization" and folder.parent != Path("rbac")]
    return [str(folder) for folder in whole] + [f"{part.parent}+{part.name}" for part in kinds if part.parent in whole and part not in whole]


@cache
def rendered(kubectl: str, overlay: str) -> str:
    """One of `kustomizations()`, as `kubectl apply -k` would apply it; or a directory of a test's."""
    folder, _, component = overlay.partition("+")
    if not component:
        return run([kubectl, "kustomize", str(KUBERNETES / folder)])
    with TemporaryDirectory() as directory:
        above = os.path.relpath(KUBERNETES / folder, Path(directory).resolve())
        (Path(directory) / "kustomization.yaml").write_text(yaml.dump({"resources": [above], "components": [f"{above}/{component}"]}))
        return run([kubectl, "kustomize", directory])


def own(kubectl: str, overlay: str) -> str:
    """Of what it renders, the objects that are not as the base has them, or as the folder does that a component lies in."""
    if overlay == "base":
        return rendered(kubectl, overlay)
    known = set(rendered(kubectl, overlay.partition("+")[0] if "+" in overlay else "base").split(_SEPARATOR))
    return _SEPARATOR.join(one for one in rendered(kubectl, overlay).split(_SEPARATOR) if one not in known)


def read(text: str) -> list[Manifest]:
    return [one for one in yaml.load_all(text, yaml.CSafeLoader) if one]


def run(command: Sequence[str], text: str | None = None, **environment: str) -> str:
    """What it says on its standard output. It must end well and have nothing to warn of."""
    done = subprocess.run(command, input=text, capture_output=True, text=True, env=os.environ | environment, timeout=60, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    assert not done.stderr, f"{' '.join(command)}: {done.stderr}"
    return done.stdout


def crds(files: Iterable[Path], kinds: Iterable[tuple[str, str]]) -> list[Manifest]:
    """Those of some kinds, each a group and a kind: read alone, since all take seconds to read and to install."""
    texts = _crd_texts(tuple(files))
    return [yaml.load(texts[kind], yaml.CSafeLoader) for kind in kinds if kind in texts]


@cache
def _crd_texts(files: tuple[Path, ...]) -> dict[tuple[str, str], str]:
    texts = (text for file in files for text in file.read_text().split("\n---\n"))
    return {(found[1], found[2]): text for text in texts if (found := _CRD.search(text)) is not None}


# ---- what the objects say


def named(found: Sequence[Manifest], kind: str, name: str) -> Manifest:
    """The one object of that kind and name, whatever hash its name ends with."""
    [one] = [one for one in found if one["kind"] == kind and unhashed(one["metadata"]["name"]) == name]
    return one


def unhashed(name: str) -> str:
    """Of a ConfigMap that kustomize has made, the name that it was given."""
    return _HASH.sub("", name)


@dataclass(frozen=True)
class Container:
    """One of a pod's that run as long as the pod does, or, where it is no `sidecar` and an init container, before it."""

    spec: Manifest
    is_initial: bool

    @property
    def runs_on(self) -> bool:
        return not self.is_initial or self.spec.get("restartPolicy") == "Always"

    @property
    def is_ours(self) -> bool:
        return str(self.spec["image"]).partition(":")[0] == OUR_IMAGE


@dataclass(frozen=True)
class Pod:
    """What an object makes pods of. `settings` are those of each of our containers that has a ConfigMap of them, by the container's name."""

    owner: Manifest
    spec: Manifest
    labels: dict[str, str]
    annotations: dict[str, str]
    settings: dict[str, Settings]

    @property
    def containers(self) -> list[Container]:
        initial = [Container(one, is_initial=True) for one in self.spec.get("initContainers", ())]
        return initial + [Container(one, is_initial=False) for one in self.spec["containers"]]


def pods(found: Sequence[Manifest]) -> Iterator[Pod]:
    """Of every object that has a template of pods."""
    for owner in found:
        template = owner.get("spec", {}).get("template")
        if isinstance(template, dict) and "containers" in template.get("spec", {}):
            yield Pod(
                owner, template["spec"], template["metadata"].get("labels", {}), template["metadata"].get("annotations", {}), _settings(found, template["spec"])
            )


def _settings(found: Sequence[Manifest], spec: Manifest) -> dict[str, Settings]:
    maps = {one["metadata"]["name"]: one["data"] for one in found if one["kind"] == "ConfigMap"}
    volumes = {one["name"]: one["configMap"]["name"] for one in spec.get("volumes", ()) if "configMap" in one}
    read: dict[str, Settings] = {}
    for container in (*spec.get("initContainers", ()), *spec["containers"]):
        for mount in container.get("volumeMounts", ()):
            if mount["name"] in volumes and "settings.yaml" in maps[volumes[mount["name"]]]:
                read[container["name"]] = parse(yaml.safe_load(maps[volumes[mount["name"]]]["settings.yaml"]), source=container["name"])
    return read


_UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30}


def quantity(text: str) -> float:
    """Bytes of a quantity, or CPUs."""
    if text[-2:] in _UNITS:
        return float(text[:-2]) * _UNITS[text[-2:]]
    return float(text[:-1]) / 1000 if text.endswith("m") else float(text)
