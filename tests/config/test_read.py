"""From a file to settings: defaults that hold, and complaints that name their path."""

from pathlib import Path
from typing import Any

import pytest

from extproc.config.read import load, parse
from extproc.config.settings import Settings
from extproc.core.decision import HashOn
from extproc.core.endpoint import Endpoint
from extproc.errors import ConfigError


def complaints(raw: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(raw, source="it.yaml")
    lines = str(caught.value).splitlines()
    assert all(line.startswith("it.yaml: ") for line in lines)
    return [line.removeprefix("it.yaml: ") for line in lines]


def complaint(raw: Any) -> str:
    [line] = complaints(raw)
    return line


def pool(name: str = "p", *addresses: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "endpoints": [{"address": address} for address in addresses], **more}


def found_by(*sources: dict[str, Any]) -> dict[str, Any]:
    return {"pools": [{"name": "p", "discovery": list(sources)}]}


# ---- what holds


def test_the_defaults_are_valid_as_they_stand() -> None:
    """Defaults are not checked when they are used, so they are checked here: written out and read again."""
    assert parse({}, source="") == Settings()
    assert parse(Settings().model_dump(mode="json"), source="") == Settings()


def test_a_full_file_is_read(tmp_path: Path) -> None:
    """With every group in it."""
    file = tmp_path / "settings.yaml"
    file.write_text(
        """
        pools:
        - name: llama
          base_models: [llama-3]
          adapters: ["org/*"]
          endpoints:
          - {address: 10.0.0.1:8000, stager: 10.0.0.1:9102, node: one}
          - {address: "[2001:db8::1]:8000"}
          discovery:
          - {type: file, path: /etc/fleet.yaml}
          - {type: dns, name: vllm.local, port: 8000, stager_port: 9102}
          - {type: dns, name: _http._tcp.vllm.local, record: SRV}
          - {type: etcd, endpoints: ["http://one:2379", "https://two:2379"], prefix: /fleet/llama/}
        discovery: {dir: /var/lib/fleet, keep_empty_s: 60}
        router: {hash_on: header:X-Session/model, steering: cluster, http_listen: "", table_size: 251}
        stager: {dir: /data, max_bytes: 1000, origins: [{type: file, path: /adapters}, {type: s3, bucket: b}, {type: http, url: "http://o"}, {type: huggingface}]}
        envoy: {processing_mode: BUFFERED, admin: ""}
        log: {level: debug}
        """
    )
    settings = load(file)
    assert settings.pools[0].members() == (Endpoint("10.0.0.1:8000"), Endpoint("[2001:db8::1]:8000"))
    assert [(e.node, e.stager) for e in settings.pools[0].members()] == [("one", "10.0.0.1:9102"), ("[2001:db8::1]:8000", "")]
    assert [source.label for source in settings.pools[0].discovery] == [
        "file /etc/fleet.yaml",
        "dns A vllm.local:8000",
        "dns SRV _http._tcp.vllm.local",
        "etcd /fleet/llama/",
    ]
    assert (settings.discovery.dir, settings.discovery.keep_empty_s) == ("/var/lib/fleet", 60)
    assert settings.router.policy().hash_on == HashOn("x-session", with_model=True)
    assert [origin.type for origin in settings.stager.origins] == ["file", "s3", "http", "huggingface"]
    assert settings.envoy.processing_mode == "BUFFERED"
    assert settings.log.level == "debug"


@pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n", "null\n", "{}\n"])
def test_an_empty_file_means_the_defaults(tmp_path: Path, text: str) -> None:
    """There is one meaning an empty file can have."""
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    assert load(file) == Settings()


# ---- what is complained of


@pytest.mark.parametrize(
    ("raw", "path"),
    [
        ({"rooter": {}}, "rooter"),
        ({"router": {"listne": "a:1"}}, "router.listne"),
        ({"pools": [{"name": "a", "endpoint": []}]}, "pools.0.endpoint"),
        ({"pools": [{"name": "a"}, {"name": "b", "endpoints": [{"address": "a:1", "weight": 1}]}]}, "pools.1.endpoints.0.weight"),
        ({"pools": [{"name": "a", "discovery": [{"type": "file", "path": "/f", "pth": "/g"}]}]}, "pools.0.discovery.0.pth"),
        ({"stager": {"engine": {"key": "x"}}}, "stager.engine.key"),
        ({"stager": {"origins": [{"type": "file", "path": "/a", "pth": "/b"}]}}, "stager.origins.0.pth"),
    ],
)
def test_an_unknown_key_is_named_by_its_path(raw: Any, path: str) -> None:
    """A misspelled setting is not silently the default. Its value is not repeated: it may be a secret in the wrong place."""
    assert complaint(raw) == f"{path}: no such setting"


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({"router": {"table_size": 100}}, "router.table_size: 100 is not a prime up to 5000011"),
        ({"router": {"table_size": 5_000_077}}, "router.table_size: 5000077 is not a prime up to 5000011"),
        ({"router": {"table_size": 0}}, "router.table_size: 0 is not a prime up to 5000011"),
        ({"router": {"listen": "9002"}}, "router.listen: '9002' is not host:port"),
        ({"router": {"listen": ":9002"}}, "router.listen: ':9002' is not host:port"),
        ({"router": {"listen": ""}}, "router.listen: '' is not host:port"),
        ({"router": {"listen": "a:"}}, "router.listen: 'a:' is not host:port"),
        ({"router": {"listen": "a:65536"}}, "router.listen: 'a:65536' is not host:port"),
        ({"router": {"listen": "a:-1"}}, "router.listen: 'a:-1' is not host:port"),
        ({"router": {"listen": "a:²"}}, "router.listen: 'a:²' is not host:port"),
        ({"router": {"http_listen": "x"}}, "router.http_listen: 'x' is not host:port"),
        ({"pools": [pool("p", "http://10.0.0.1:8000")]}, "pools.0.endpoints.0.address: 'http://10.0.0.1:8000' is not host:port"),
        ({"pools": [pool("p", "10.0.0.1:8000/v1")]}, "pools.0.endpoints.0.address: '10.0.0.1:8000/v1' is not host:port"),
        ({"pools": [pool("p", "10.0.0.1")]}, "pools.0.endpoints.0.address: '10.0.0.1' is not host:port"),
        ({"pools": [{"name": "p", "endpoints": [{"address": "a:1", "stager": "b"}]}]}, "pools.0.endpoints.0.stager: 'b' is not host:port"),
        ({"router": {"hash_on": "tennant"}}, "router.hash_on: 'tennant' is none of model, tenant, tenant/model, header:NAME, header:NAME/model"),
        ({"router": {"stage_deadline_s": 0}}, "router.stage_deadline_s: 0 Input should be greater than 0"),
        ({"router": {"stage_deadline_s": "soon"}}, "router.stage_deadline_s: 'soon' Input should be a valid number"),
        ({"router": {"max_body_bytes": 0}}, "router.max_body_bytes: 0 Input should be greater than 0"),
        ({"router": {"max_retry_endpoints": 0}}, "router.max_retry_endpoints: 0 Input should be greater than or equal to 1"),
        ({"router": {"max_retry_endpoints": 17}}, "router.max_retry_endpoints: 17 Input should be less than or equal to 16"),
        ({"router": {"steering": "header"}}, "router.steering: 'header' Input should be 'endpoint' or 'cluster'"),
        ({"router": {"drain_s": -1}}, "router.drain_s: -1 Input should be greater than or equal to 0"),
        ({"router": {"max_streams": 0}}, "router.max_streams: 0 Input should be greater than or equal to 1"),
        ({"router": None}, "router: None Input should be a valid dictionary or instance of RouterSettings"),
        ({"stager": {"max_bytes": -1}}, "stager.max_bytes: -1 Input should be greater than 0"),
        ({"stager": {"negative_ttl_s": -0.1}}, "stager.negative_ttl_s: -0.1 Input should be greater than or equal to 0"),
        ({"stager": {"engine": {"max_lora_rank": -1}}}, "stager.engine.max_lora_rank: -1 Input should be greater than or equal to 0"),
        ({"stager": {"origins": [{"type": "ftp"}]}}, "stager.origins.0.type: 'ftp' Input should be 'file', 'huggingface', 's3' or 'http'"),
        ({"stager": {"origins": [{"type": "huggingface"}, {"type": "s3"}]}}, "stager.origins.1: an origin of type s3 needs bucket"),
        ({"stager": {"origins": [{"type": "file", "url": "x"}]}}, "stager.origins.0: an origin of type file needs path"),
        ({"stager": {"origins": [{"type": "http", "path": "x"}]}}, "stager.origins.0: an origin of type http needs url"),
        (
            {"stager": {"origins": [{"type": "huggingface", "mirror_of": "file"}, {"type": "file", "path": "/a"}]}},
            "stager: origins.0.mirror_of: 'file' is no earlier origin",
        ),
        (
            found_by({"type": "zookeeper"}),
            "pools.0.discovery.0: Input tag 'zookeeper' found using 'type' does not match any of the expected tags: 'file', 'dns', 'etcd', 'kubernetes'",
        ),
        (found_by({"type": "file", "path": ""}), "pools.0.discovery.0.path: '' String should have at least 1 character"),
        (found_by({"type": "file", "path": "/a"}, {"type": "file", "path": "/a"}), "pools.0.discovery: source 'file /a' appears more than once"),
        (found_by({"type": "dns", "name": "a"}), "pools.0.discovery.0: record A needs port"),
        (found_by({"type": "dns", "name": "a", "record": "SRV", "port": 1}), "pools.0.discovery.0: record SRV needs no port: the records say it"),
        (found_by({"type": "dns", "name": "a", "port": 1, "min_ttl_s": 60}), "pools.0.discovery.0: min_ttl_s 60 is above max_ttl_s (30)"),
        (found_by({"type": "dns", "name": "a", "port": 1, "servers": ["b:53"]}), "pools.0.discovery.0.servers: 'b:53' is no ip:port"),
        (found_by({"type": "etcd", "endpoints": [], "prefix": "/a/"}), "pools.0.discovery.0.endpoints: Tuple should have at least 1 item"),
        (found_by({"type": "etcd", "endpoints": ["a:2379"], "prefix": "/a/"}), "pools.0.discovery.0.endpoints: 'a:2379' is no URL as http://host:2379"),
        (found_by({"type": "etcd", "endpoints": ["http://u:secret@a"], "prefix": "/"}), "pools.0.discovery.0.endpoints: 'a' is no URL as http://host:2379"),
        (found_by({"type": "etcd", "endpoints": ["http://a"], "prefix": "/a"}), "pools.0.discovery.0.prefix: '/a' does not end with '/': a key of '/a2' would"),
        (
            found_by({"type": "etcd", "endpoints": ["http://a"], "prefix": "/", "username": "u"}),
            "pools.0.discovery.0: username needs password_env or password_file",
        ),
        (found_by({"type": "kubernetes"}), "pools.0.discovery.0: one of inference_pool, service and selector is needed, and no second one"),
        (found_by({"type": "kubernetes", "inference_pool": "a", "service": "b"}), "pools.0.discovery.0: one of inference_pool, service and selector is"),
        (found_by({"type": "kubernetes", "selector": "app=a"}), "pools.0.discovery.0: selector needs ports, the model servers' in each pod"),
        (found_by({"type": "kubernetes", "service": "a", "ports": [8000]}), "pools.0.discovery.0: selector needs ports, the model servers' in each pod"),
        (found_by({"type": "kubernetes", "inference_pool": "a", "port_names": ["http"]}), "pools.0.discovery.0: port_names belongs to service"),
        (found_by({"type": "kubernetes", "service": "A/b"}), "pools.0.discovery.0.service: 'A/b' is no name of Kubernetes"),
        (found_by({"type": "etcd", "endpoints": ["http://a"], "prefix": "/", "key_file": "k"}), "pools.0.discovery.0: cert_file and key_file need each other"),
        ({"discovery": {"debounce_s": 3}}, "discovery: debounce_s 3 is above debounce_max_s (2)"),
        ({"discovery": {"keep_empty_s": -1}}, "discovery.keep_empty_s: -1 Input should be greater than or equal to 0"),
        ({"envoy": {"processing_mode": "STREAMED"}}, "envoy.processing_mode: 'STREAMED' Input should be 'FULL_DUPLEX_STREAMED', 'BUFFERED' or 'NONE'"),
        ({"envoy": {"hold_s": 60}}, "envoy.hold_s: 60 is below router.stage_deadline_s (120)"),
        ({"log": {"level": "loud"}}, "log.level: 'loud' Input should be 'debug', 'info', 'warning' or 'error'"),
        ({"pools": [{"name": ""}]}, "pools.0.name: '' String should have at least 1 character"),
        ({"pools": [pool("a"), pool("a")]}, "pools: name 'a' appears more than once"),
        ({"pools": [pool("a", "a:1"), pool("b", "b:1", "a:1")]}, "pools: endpoint 'a:1' appears more than once"),
        ({"pools": [pool("a", base_models=["m"]), pool("b", base_models=["m"])]}, "pools: base model 'm' appears more than once"),
    ],
)
def test_a_bad_value_is_named_by_its_path(raw: Any, expected: str) -> None:
    """Path, value, and what is wrong with it, in one line."""
    assert complaint(raw).startswith(expected)


def test_a_missing_value_is_named_by_its_path() -> None:
    """What has no default must be there."""
    assert complaint({"pools": [{}]}).startswith("pools.0.name: ")
    assert complaint({"pools": [{"name": "a", "endpoints": [{}]}]}).startswith("pools.0.endpoints.0.address: ")
    assert complaint({"stager": {"origins": [{}]}}).startswith("stager.origins.0.type: ")


def test_each_complaint_has_its_line() -> None:
    """All at once, so that one reading of the log is enough."""
    lines = complaints({"rooter": 1, "router": {"table_size": 4, "steering": "x"}, "log": {"level": 1}})
    assert sorted(line.split(":")[0] for line in lines) == ["log.level", "rooter", "router.steering", "router.table_size"]


def test_an_absurd_table_size_is_complained_of_like_any_other() -> None:
    """A number too large for a float is still only a bad value."""
    assert complaint({"router": {"table_size": 10**400 + 1}}).startswith("router.table_size: ")


@pytest.mark.parametrize(
    "path", ["router.stage_deadline_s", "router.drain_s", "envoy.hold_s", "envoy.health_interval_s", "stager.lease_s", "stager.engine.timeout_s"]
)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_time_is_a_finite_number(path: str, value: float) -> None:
    """YAML spells endless as `.inf`; no timer of Envoy's or of the operating system's does."""
    raw: Any = value
    for name in reversed(path.split(".")):
        raw = {name: raw}
    assert any(line.startswith(f"{path}: ") for line in complaints(raw))


@pytest.mark.parametrize("raw", [[], "text", 7, [{"pools": []}]])
def test_settings_are_a_mapping(raw: Any) -> None:
    """Anything else is one complaint about the whole."""
    assert complaint(raw) == "the settings are not a mapping"


def test_a_key_that_is_no_text_is_complained_of() -> None:
    """YAML has such keys."""
    assert complaint({1: 2}).startswith("1: ")


# ---- files


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """With the operating system's word for it."""
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: No such file or directory$"):
        load(tmp_path / "nowhere.yaml")


def test_a_directory_is_no_file(tmp_path: Path) -> None:
    """The same."""
    with pytest.raises(ConfigError, match=r"Is a directory$"):
        load(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        b"router: [",
        b"a: b: c",
        b"\t- x",
        b"\xff\xfe\xfd",
        b"a: \x00",
        b"router: {listen: !!python/object/apply:os.system [id]}",
        b"? [a]\n: b",
        b"router: {drain_s: 2001-99-99}",
        b"router: {max_body_bytes: " + b"9" * 5000 + b"}",
    ],
    ids=["unclosed", "two colons", "tab", "no text", "nul", "python tag", "list as key", "impossible date", "endless number"],
)
def test_what_is_not_yaml_is_a_complaint(tmp_path: Path, text: bytes) -> None:
    """Whatever the reader stumbles over, it names the file."""
    file = tmp_path / "settings.yaml"
    file.write_bytes(text)
    with pytest.raises(ConfigError, match=r"settings\.yaml"):
        load(file)
