"""Commands that need nothing running."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from extproc import __version__
from extproc.cli import parse_origin
from extproc.config.documentation import settings_table
from extproc.errors import StartError

SETTINGS = {
    "pools": [
        {
            "name": "models",
            "base_models": ["base"],
            "endpoints": [{"address": f"10.0.0.{i}:8000", "stager": f"10.0.0.{i}:9102", "node": f"gpu-{i}"} for i in range(1, 4)],
        }
    ]
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump(SETTINGS))
    return path


def cli(*arguments: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-m", "extproc", *map(str, arguments)], capture_output=True, text=True, check=False)


def test_version() -> None:
    """On standard output, alone."""
    assert cli("--version").stdout.strip() == __version__


def test_check_says_what_it_read(config: Path) -> None:
    """Pools, endpoints and origins, counted."""
    assert cli("check", "--config", config).stdout == f"{config}: valid; 1 pools, 3 endpoints, 0 origins\n"


def test_check_names_every_complaint_by_path(tmp_path: Path) -> None:
    """Code 2, one line per complaint."""
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump({"router": {"bogus": 1, "table_size": 100}, "stager": {"max_bytes": -1}}))
    done = cli("check", "--config", path)
    assert done.returncode == 2
    assert [line.removeprefix(f"lora-extproc: {path}: ") for line in sorted(done.stderr.splitlines())] == [
        "router.bogus: no such setting",
        "router.table_size: 100 is not a prime up to 5000011",
        "stager.max_bytes: -1 Input should be greater than 0",
    ]


def test_owner_shows_the_order_and_why(config: Path) -> None:
    """The same order in words and in JSON, every endpoint once."""
    words = cli("owner", "demo/sql", "--config", config).stdout.splitlines()
    shown = json.loads(cli("owner", "demo/sql", "--config", config, "--json").stdout)
    order = [candidate["address"] for candidate in shown["candidates"]]
    assert sorted(order) == ["10.0.0.1:8000", "10.0.0.2:8000", "10.0.0.3:8000"]
    assert [line.split()[1] for line in words[1:]] == order
    assert "owner" in words[1]
    assert str(shown["slot"]) in words[0]


def test_envoy_config_prints_a_bootstrap(config: Path) -> None:
    """YAML on standard output."""
    rendered = yaml.safe_load(cli("envoy-config", "--config", config).stdout)
    assert [cluster["name"] for cluster in rendered["static_resources"]["clusters"]] == ["lora_extproc_router"]
    assert "ads_config" in rendered["dynamic_resources"]


def test_unknown_options_are_one_sentence() -> None:
    """Code 2, no traceback."""
    done = cli("up", "--bogus")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


@pytest.mark.parametrize(
    ("text", "kind", "field", "value"),
    [
        ("hf", "huggingface", "url", ""),
        ("s3://bucket/some/prefix", "s3", "prefix", "some/prefix"),
        ("s3://bucket", "s3", "bucket", "bucket"),
        ("https://host/prefix", "http", "url", "https://host/prefix"),
        ("/data/loras", "file", "path", "/data/loras"),
    ],
)
def test_origins_as_the_command_line_writes_them(text: str, kind: str, field: str, value: str) -> None:
    """The four forms."""
    origin = parse_origin(text)
    assert (origin.type, getattr(origin, field)) == (kind, value)


@pytest.mark.parametrize("text", ["", "s3://", "ftp://x", "bucket"])
def test_other_origins_are_refused(text: str) -> None:
    """With the forms that are understood."""
    with pytest.raises(StartError, match="is needed"):
        parse_origin(text)


def test_the_readme_lists_every_setting() -> None:
    """`lora-extproc settings` prints the table that stands there."""
    assert settings_table() in (Path(__file__).parents[1] / "README.md").read_text()


def test_a_router_needs_settings_or_the_flags_of_a_picker() -> None:
    """And refuses a flag that is neither: code 2, in one sentence."""
    done = cli("router")
    assert (done.returncode, done.stderr) == (2, "lora-extproc: router: --config FILE is needed, or --pool-name\n")
    done = cli("router", "--pool-name", "llama", "--leader-elect")
    assert done.returncode == 2
    assert "unrecognized arguments: --leader-elect" in done.stderr
