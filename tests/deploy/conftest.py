"""The programs that read manifests, and, for each module that asks, an API server that has every kind which a manifest of ours may name."""

from pathlib import Path

import pytest

from tests.fakes.assets import asset


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where those go that are packed."""
    return tmp_path_factory.mktemp("programs")


@pytest.fixture(scope="session")
def kubectl(programs: Path) -> str:
    return asset("kubectl", programs)


@pytest.fixture(scope="session")
def helm(programs: Path) -> str:
    return asset("helm", programs)
