"""The flags of an Endpoint Picker, as charts of the Gateway API Inference Extension and of llm-d write them."""

from typing import Any

import pytest

from extproc.config.read import parse
from extproc.config.settings import Settings
from extproc.errors import ConfigError, StartError
from extproc.picker import with_flags

LWEPP = "--pool-name llama --pool-namespace llm --pool-group inference.networking.k8s.io --zap-encoder json --grpc-port 9002 --grpc-health-port 9003"


def flags(text: str, settings: Settings | None = None) -> Settings:
    return with_flags(settings or Settings(), text.split())


def source(settings: Settings, pool: int = 0, at: int = 0) -> dict[str, Any]:
    return settings.pools[pool].discovery[at].model_dump()


def test_what_the_conformance_suite_passes_is_a_router_of_that_pool() -> None:
    """Its pods are found, its stagers are at the settings' port, and the service listens where the chart's Service leads, encrypted as the reference is."""
    settings = flags(LWEPP)
    [pool] = settings.pools
    assert pool.name == "llama"
    found = source(settings)
    assert (found["type"], found["inference_pool"], found["namespace"], found["stager_port"]) == ("kubernetes", "llama", "llm", 9102)
    assert (settings.router.listen, settings.router.health_listen, settings.router.http_listen) == ("0.0.0.0:9002", "0.0.0.0:9003", "0.0.0.0:9090")
    assert settings.router.tls.mode == "self-signed"
    assert settings.log.format == "json"


@pytest.mark.parametrize(
    ("text", "mode"),
    [("--secure-serving", "self-signed"), ("--secure-serving=true", "self-signed"), ("--secure-serving=false", "off"), ("--secure-serving=0", "off")],
)
def test_a_boolean_is_written_as_go_writes_it(text: str, mode: str) -> None:
    """Alone, or with its value behind `=`; the flag behind it is not its value."""
    assert flags(f"{text} --pool-name llama").router.tls.mode == mode
    assert flags(f"--pool-name llama {text}").router.tls.mode == mode


def test_a_selector_and_ports_are_a_pool_too() -> None:
    """llm-d's, where there is no InferencePool; several ports are data-parallel ranks."""
    found = source(flags("--endpoint-selector app=vllm,tier=gpu --endpoint-target-ports 8000,8001"))
    assert (found["selector"], found["ports"]) == ("app=vllm,tier=gpu", (8000, 8001))


def test_a_certificate_of_the_charts_is_used() -> None:
    """llm-d mounts a TLS secret at --cert-path."""
    tls = flags("--pool-name llama --cert-path /certs").router.tls
    assert (tls.mode, tls.cert_file, tls.key_file) == ("files", "/certs/tls.crt", "/certs/tls.key")


def test_flags_add_to_the_settings_and_change_nothing_else() -> None:
    """The pool keeps the base models that a settings file gives it; without a pool's name the settings' own listeners and TLS stay."""
    given = parse(
        {"pools": [{"name": "llama", "base_models": ["base"]}], "router": {"stage_deadline_s": 7}, "stager": {"listen": "0.0.0.0:9999"}}, source="test"
    )
    settings = flags("--pool-name llama --secure-serving=false", given)
    [pool] = settings.pools
    assert pool.base_models == ("base",)
    assert source(settings)["stager_port"] == 9999
    assert settings.router.stage_deadline_s == 7
    assert flags("--metrics-port 9100", given).router == given.router.model_copy(update={"http_listen": "0.0.0.0:9100"})
    assert with_flags(given, []) is given


def test_the_conformance_suites_picker_is_asked_for_by_a_flag_and_never_serves_models() -> None:
    """Its manifests have flags alone, and its echo servers have no stager; a settings file with base models is of a router that clients must not aim."""
    settings = flags(f"{LWEPP} --conformance")
    assert settings.router.conformance
    assert source(settings)["stager_port"] == 0
    assert not flags(LWEPP).router.conformance
    serves = parse({"pools": [{"name": "llama", "base_models": ["base"]}]}, source="test")
    with pytest.raises(ConfigError, match=r"router\.conformance: pool 'llama' serves 'base'"):
        flags("--pool-name llama --conformance", serves)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("--leader-elect", "unrecognized arguments: --leader-elect; flags that are known: --pool-name"),
        ("--pool", "unrecognized arguments: --pool;"),
        ("--grpc-port 99999", "--grpc-port: '99999' is no port"),
        ("--secure-serving=maybe", "--secure-serving: 'maybe' is neither true nor false"),
        ("--pool-group inference.networking.x-k8s.io", "--pool-group: invalid choice"),
    ],
)
def test_a_flag_that_means_nothing_here_is_refused(text: str, complaint: str) -> None:
    """With those that do."""
    with pytest.raises(StartError) as raised:
        flags(text)
    assert complaint in str(raised.value)
    assert len(str(raised.value)) <= 300


def test_a_selector_without_ports_is_a_complaint_of_the_settings() -> None:
    """The pods' ports are nowhere else."""
    with pytest.raises(ConfigError, match="selector needs ports"):
        flags("--endpoint-selector app=vllm")
