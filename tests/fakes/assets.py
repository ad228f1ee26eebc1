"""Programs for tests that no package registry has: on PATH, in $KUBEBUILDER_ASSETS, or packed beside the repository."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

BIN = Path(__file__).parents[3] / "shared" / "bin"


def asset(name: str, directory: Path) -> str:
    """Where the program is. One that is packed is unpacked into `directory`; where there is none, the test is skipped."""
    found = shutil.which(name, path=os.pathsep.join((os.environ.get("PATH", ""), os.environ.get("KUBEBUILDER_ASSETS", ""))))
    if found:
        return found
    unpack = BIN / "unpack"
    if not unpack.exists():
        pytest.skip(f"{name} is neither on PATH nor in $KUBEBUILDER_ASSETS, and there is no {unpack}")
    subprocess.run([unpack, directory, name], check=True)
    return str(directory / name)
