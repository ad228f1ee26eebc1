"""Programs for tests: on PATH, in $KUBEBUILDER_ASSETS, of a wheel beside this Python, or packed beside the repository."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BIN = Path(__file__).parents[3] / "shared" / "bin"


def asset(name: str, directory: Path) -> str:
    """Where the program is. One that is packed is unpacked into `directory`; where there is none, the test is skipped."""
    places = (os.environ.get("PATH", ""), os.environ.get("KUBEBUILDER_ASSETS", ""), str(Path(sys.executable).parent))
    found = shutil.which(name, path=os.pathsep.join(places))
    if found:
        return found
    unpack = BIN / "unpack"
    if not unpack.exists():
        pytest.skip(f"{name} is neither on PATH nor in $KUBEBUILDER_ASSETS, and there is no {unpack}")
    subprocess.run([unpack, directory, name], check=True)
    if not (directory / name).exists():
        pytest.skip(f"{name} is neither on PATH nor in $KUBEBUILDER_ASSETS, and {unpack} does not have it")
    return str(directory / name)
