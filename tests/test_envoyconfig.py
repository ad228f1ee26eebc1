"""The rendered bootstraps: as kept in envoy/, and accepted by the oldest and the newest Envoy."""

import subprocess
from pathlib import Path

import pytest
import yaml
from envoy_data_plane.envoy.config.cluster import v3 as cluster

from extproc.config.read import parse
from extproc.config.settings import Settings
from extproc.envoyconfig import build, clusters, render
from extproc.errors import ConfigError

KEPT = Path(__file__).parents[1] / "envoy"

_ONE_POOL = [
    {
        "name": "models",
        "base_models": ["meta-llama/Llama-3.1-8B"],
        "endpoints": [
            {"address": "10.0.0.11:8000", "stager": "10.0.0.11:9102", "node": "gpu-1"},
            {"address": "10.0.0.12:8000", "stager": "10.0.0.12:9102", "node": "gpu-2"},
        ],
    }
]
_TWO_POOLS = [
    {**_ONE_POOL[0], "adapters": ["llama/*"]},
    {"name": "qwen", "base_models": ["Qwen/Qwen3-8B"], "endpoints": [{"address": "10.0.1.11:8000", "stager": "10.0.1.11:9102"}]},
]
_STATIC = {"endpoints": "static"}
RENDERED: dict[str, dict[str, object]] = {
    "full-duplex": {"pools": _ONE_POOL, "envoy": _STATIC},
    "full-duplex-xds": {"pools": _ONE_POOL},
    "buffered": {"pools": _ONE_POOL, "envoy": {"processing_mode": "BUFFERED", **_STATIC}},
    "none": {"pools": _ONE_POOL, "envoy": {"processing_mode": "NONE", **_STATIC}},
    "full-duplex-cluster": {"pools": _TWO_POOLS, "router": {"steering": "cluster"}, "envoy": _STATIC},
    "buffered-cluster": {"pools": _TWO_POOLS, "router": {"steering": "cluster"}, "envoy": {"processing_mode": "BUFFERED", **_STATIC}},
    "none-cluster": {"pools": _TWO_POOLS, "router": {"steering": "cluster"}, "envoy": {"processing_mode": "NONE", **_STATIC}},
}


def _settings(name: str) -> Settings:
    return parse(RENDERED[name], source=name)


@pytest.mark.parametrize("name", RENDERED)
def test_kept_files_are_what_the_code_renders(name: str, update_golden: bool) -> None:
    """envoy/<name>.yaml is the rendering of the settings above it; --update-golden rewrites it."""
    text = render(_settings(name))
    kept = KEPT / f"{name}.yaml"
    if update_golden:
        kept.write_text(text)
    assert kept.read_text() == text


def test_every_kept_file_is_rendered() -> None:
    """No file in envoy/ is without its settings."""
    assert {path.stem for path in KEPT.glob("*.yaml")} == set(RENDERED)


@pytest.mark.parametrize("name", RENDERED)
def test_envoy_accepts_it(name: str, envoy: Path) -> None:
    """`envoy --mode validate` on the oldest and the newest version."""
    done = subprocess.run([str(envoy), "--mode", "validate", "-c", str(KEPT / f"{name}.yaml")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_typed_message_reads_back() -> None:
    """The YAML, read by the typed definitions, is the same message."""
    message = build(_settings("full-duplex"))
    again = type(message).from_dict(yaml.safe_load(render(_settings("full-duplex"))))
    assert again == message


def test_clusters_of_xds_are_those_of_the_bootstrap() -> None:
    """But for where their endpoints come from, and that an endpoint which has gone is not kept until its health check fails."""
    by_xds = clusters(parse({"pools": _TWO_POOLS, "router": {"steering": "cluster"}}, source="test"))
    static = build(_settings("full-duplex-cluster")).static_resources
    assert static is not None
    expected = {message.name: message for message in static.clusters if message.name in by_xds}
    assert by_xds.keys() == {"models", "qwen"}
    for name, encoded in by_xds.items():
        message = cluster.Cluster.parse(encoded)
        assert (message.type, message.ignore_health_on_host_removal, message.load_assignment) == (cluster.ClusterDiscoveryType.EDS, True, None)
        message.type, message.ignore_health_on_host_removal, message.eds_cluster_config = cluster.ClusterDiscoveryType.STATIC, False, None
        expected[name].load_assignment = None
        assert message == expected[name]


@pytest.mark.parametrize(
    ("raw", "complaint"),
    [
        ({}, "at least one"),
        ({"pools": _TWO_POOLS}, "use 'cluster'"),
        ({"pools": _ONE_POOL, "envoy": {"processing_mode": "NONE", "hold_s": 4000}}, "over 3600"),
        ({"pools": [{"name": "p", "endpoints": [{"address": "vllm-1:8000"}]}]}, "by IP address"),
        ({"pools": [{"name": "p"}], "envoy": _STATIC}, "use 'xds'"),
    ],
)
def test_what_envoy_could_not_serve_is_refused(raw: dict[str, object], complaint: str) -> None:
    """A configuration that would only fail at run time is a ConfigError now."""
    with pytest.raises(ConfigError, match=complaint):
        render(parse(raw, source="test"))


def test_a_pool_that_computes_prompts_is_no_cluster() -> None:
    """Its engines are asked by the sidecars of those that decode; with them alone one cluster is enough for steering by endpoint."""
    decode = {**_ONE_POOL[0], "role": "decode"}
    prefill = {**_TWO_POOLS[1], "role": "prefill", "base_models": decode["base_models"]}
    settings = parse({"pools": [prefill, decode], "envoy": _STATIC}, source="it.yaml")
    raw = yaml.safe_load(render(settings))
    assert [cluster["name"] for cluster in raw["static_resources"]["clusters"] if cluster["name"] in ("models", "qwen")] == ["models"]
    assert clusters(settings).keys() == {"models"}
