"""The generated code is that of the definitions, and the definitions are upstream's."""

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from envoy_data_plane.envoy.config.core import v3 as core
from envoy_data_plane.envoy.config.endpoint import v3 as endpoint
from envoy_data_plane.envoy.service.discovery import v3 as discovery
from envoy_data_plane.envoy.service.ext_proc import v3 as ext_proc
from envoy_data_plane.envoy.type import v3 as envoy_type
from envoy_data_plane.google import rpc

from extproc.pb import ext_proc_pb2, xds_pb2

UPSTREAM = {ext_proc_pb2: (ext_proc, core, envoy_type), xds_pb2: (discovery, endpoint, core, rpc)}  # where the messages of each subset are
OURS = [(pb, name) for pb in UPSTREAM for name in pb.DESCRIPTOR.message_types_by_name]
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


@pytest.mark.parametrize(("pb", "name"), [pytest.param(pb, name, id=name) for pb, name in OURS])
def test_field_numbers_are_upstreams(pb: ModuleType, name: str) -> None:
    """Every field of the subsets has upstream's number under upstream's name."""
    ours = pb.DESCRIPTOR.message_types_by_name[name].fields_by_name
    upstream = next(getattr(module, name) for module in UPSTREAM[pb] if hasattr(module, name))
    theirs = {field.name: field.metadata["betterproto"].number for field in upstream.__dataclass_fields__.values()}
    assert {field: descriptor.number for field, descriptor in ours.items()}.items() <= theirs.items()
