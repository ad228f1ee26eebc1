"""deploy/compose: the file against the specification's schema, its settings against its services, and the whole of it started from the very file."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from extproc.config.read import load
from extproc.envoyconfig import render

COMPOSE = Path(__file__).parents[2] / "deploy" / "compose"
sys.path.insert(0, str(COMPOSE))

from following import Follower, Step, steps  # noqa: E402  # they are no package
from topology import Topology, TopologyError  # noqa: E402

CHECK_S = 240


@pytest.fixture(scope="module")
def services() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = yaml.safe_load((COMPOSE / "compose.yaml").read_text())["services"]
    return found


def judged(file: Path) -> "subprocess.CompletedProcess[str]":
    """By the schema of the compose specification, which check-jsonschema carries."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_file_follows_the_compose_specification(tmp_path: Path) -> None:
    """And the schema would say if it did not."""
    done = judged(COMPOSE / "compose.yaml")
    assert done.returncode == 0, done.stdout
    broken = tmp_path / "compose.yaml"
    broken.write_text((COMPOSE / "compose.yaml").read_text().replace("depends_on:", "waits_for:"))
    assert judged(broken).returncode == 1


def test_envoys_configuration_is_what_the_settings_render(update_golden: bool) -> None:
    """--update-golden rewrites it."""
    text = render(load(COMPOSE / "settings.yaml"))
    kept = COMPOSE / "envoy.yaml"
    if update_golden:
        kept.write_text(text)
    assert kept.read_text() == text


def test_the_settings_name_the_services_where_they_are(services: dict[str, dict[str, Any]]) -> None:
    """Each endpoint is at the fixed address of its node, with the stager that shares it; routers and the S3 server have the names of services."""
    settings = load(COMPOSE / "settings.yaml")
    [pool] = settings.pools
    nodes = {name: service["networks"]["default"]["ipv4_address"] for name, service in services.items() if name.startswith("node-")}
    assert {endpoint.node: endpoint.address for endpoint in pool.endpoints} == {name: f"{address}:8000" for name, address in nodes.items()}
    assert {endpoint.stager for endpoint in pool.endpoints} == {f"{name}:{settings.stager.listen.rpartition(':')[2]}" for name in nodes}
    for number in range(1, len(nodes) + 1):
        assert {services[f"{part}-{number}"]["network_mode"] for part in ("engine", "stager", "vllm")} == {f"service:node-{number}"}
    assert [address.partition(":")[0] for address in settings.envoy.router.split(",")] == [name for name in services if name.startswith("router-")]
    assert settings.stager.origins[0].endpoint.partition("://")[2].partition(":")[0] in services


def test_prometheus_scrapes_every_router_and_stager() -> None:
    """At the ports of the settings."""
    settings = load(COMPOSE / "settings.yaml")
    jobs = yaml.safe_load((COMPOSE / "prometheus.yaml").read_text())["scrape_configs"]
    targets = {job["job_name"]: set(job["static_configs"][0]["targets"]) for job in jobs}
    assert targets["router"] == {f"router-{n}:{settings.router.http_listen.rpartition(':')[2]}" for n in (1, 2)}
    assert targets["stager"] == {f"{endpoint.node}:{settings.stager.http_listen.rpartition(':')[2]}" for endpoint in settings.pools[0].endpoints}


def test_real_and_simulated_engines_have_the_limits_that_the_settings_state(services: dict[str, dict[str, Any]]) -> None:
    """A stager refuses by them what its engine could not load."""
    engine = load(COMPOSE / "settings.yaml").stager.engine
    limits = {"--max-loras": engine.max_loras, "--max-cpu-loras": engine.max_cpu_loras, "--max-lora-rank": engine.max_lora_rank}
    for number in (1, 2, 3):
        simulated, real = services[f"engine-{number}"]["command"], services[f"vllm-{number}"]["command"]
        for flag, limit in limits.items():
            assert simulated[simulated.index(flag) + 1] == str(limit)
            assert f"{flag}={limit}" in real


def test_containers_of_ours_have_no_more_rights_than_they_need(services: dict[str, dict[str, Any]]) -> None:
    """All but the one that writes demonstration adapters into another's volume, and ends."""
    ours = {name: service for name, service in services.items() if "lora-extproc" in service["image"]}
    assert len(ours) == 12
    for name, service in ours.items():
        assert service["read_only"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["cap_drop"] == ([] if name == "demo" else ["ALL"])
        assert ("user" in service) == (name == "demo")


def test_the_readme_is_followed_from_the_very_file() -> None:
    """`deploy/compose/check`: every service as a process, every command of the README, and what it says one sees."""
    done = subprocess.run([sys.executable, str(COMPOSE / "check")], capture_output=True, text=True, timeout=CHECK_S, check=False)
    if done.returncode == 2 and "no namespaces" in done.stderr and not os.environ.get("CI"):
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if not line.startswith(" ")]
    assert len(lines) == len(list(steps((COMPOSE / "README.md").read_text())))
    assert [line for line in lines if not line.startswith("ok ")] == [line for line in lines if "docker build" in line]


# ---- the follower itself


class Scripted(Topology):
    """Answers with what it was given; starts nothing."""

    def __init__(self, said: str, code: int = 0) -> None:
        self._said, self._code = said, code

    def publishing(self, port: int) -> str:
        return "envoy"

    def run(self, name: str, command: Any) -> "subprocess.CompletedProcess[str]":
        return subprocess.CompletedProcess([name, *command], self._code, self._said, "it failed")


def test_a_readme_is_commands_and_what_is_seen_behind_them() -> None:
    """The text below a block belongs to its last command; a block of something else to none."""
    readme = "a\n```sh\n# not this\nfirst -a \\\n  -b\nsecond\n```\nb\n```text\nx…\ny\n```\n```yaml\nz: 1\n```\n```sh\nthird\n```\n```text\nw\n```\n"
    assert list(steps(readme)) == [Step("first -a    -b"), Step("second", ("x…", "y")), Step("third", ("w",))]


def test_an_answer_that_the_readme_does_not_show_is_told() -> None:
    """Line by line, with `…` for anything and no other wildcard."""
    follower = Follower(Scripted('head\n{"a": [1], "b": "*"}\n'))
    assert follower.follow(Step("curl localhost:10000", ('…"a": [1]…', "head"))) == ""
    assert "no line like '…\"a\": [?]…'" in follower.follow(Step("curl localhost:10000", ('…"a": [?]…',)))


def test_a_command_that_fails_or_is_not_known_is_an_error() -> None:
    """A README whose command nobody can run proves nothing."""
    with pytest.raises(TopologyError, match="code 22: it failed"):
        Follower(Scripted("", 22)).follow(Step("curl -f localhost:10000"))
    with pytest.raises(TopologyError, match="not known how to run this here"):
        Follower(Scripted("")).follow(Step("docker compose pause"))
