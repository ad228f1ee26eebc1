"""The generated code is that of the definitions, and the definitions are upstream's."""

import subprocess
import sys
from pathlib import Path

import pytest
from envoy_data_plane.envoy.service.ext_proc import v3 as upstream

from extproc.pb import ext_proc_pb2

ROOT = Path(__file__).parents[1]


def test_generated_files_are_current(tmp_path: Path) -> None:
    """The command of protos/README.md changes nothing."""
    protos = sorted((ROOT / "protos").glob("*.proto"))
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", str(ROOT / "protos"), f"--python_out={tmp_path}", f"--pyi_out={tmp_path}"]
    subprocess.run([*command, *map(str, protos)], check=True)
    for made in tmp_path.iterdir():
        ours = (ROOT / "extproc" / "pb" / made.name).read_text()
        # The first lines name the compiler's version, which may be newer than the one the files were made with.
        assert _without_versions(ours) == _without_versions(made.read_text()), f"{made.name}: run the command of protos/README.md"


def _without_versions(text: str) -> list[str]:
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith(("DESCRIPTOR", "from google.protobuf.internal"))), 0)
    return lines[start:]


@pytest.mark.parametrize("name", [m for m in dir(ext_proc_pb2) if hasattr(getattr(ext_proc_pb2, m), "DESCRIPTOR") and hasattr(upstream, m)])
def test_field_numbers_are_upstreams(name: str) -> None:
    """Every field of the subset has upstream's number under upstream's name."""
    ours = getattr(ext_proc_pb2, name).DESCRIPTOR.fields_by_name
    theirs = {field.name: field.metadata["betterproto"].number for field in getattr(upstream, name).__dataclass_fields__.values()}
    assert {field: descriptor.number for field, descriptor in ours.items()}.items() <= theirs.items()
