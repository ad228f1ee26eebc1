"""Every processing mode and both ways of steering, on the oldest and the newest Envoy."""

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from extproc.up.stack import Stack

from .client import Client, post_with_trailers, weights_of
from .conftest import StackFactory

pytestmark = pytest.mark.asyncio(loop_scope="module")

SETTINGS: dict[str, dict[str, Any]] = {
    "FULL_DUPLEX_STREAMED": {},
    "BUFFERED": {"envoy": {"processing_mode": "BUFFERED"}},
    "NONE": {"envoy": {"processing_mode": "NONE"}},
    "FULL_DUPLEX_STREAMED by cluster": {"router": {"steering": "cluster"}},
    "BUFFERED by cluster": {"envoy": {"processing_mode": "BUFFERED"}, "router": {"steering": "cluster"}},
}


@dataclass(frozen=True)
class Served:
    mode: str
    stack: Stack
    client: Client

    def naming(self, model: str) -> dict[str, str]:
        """In NONE the router sees no body: a header names the model."""
        return {"x_gateway_model_name": model} if self.mode == "NONE" else {}


@pytest_asyncio.fixture(loop_scope="module", scope="module", params=SETTINGS)
async def served(request: pytest.FixtureRequest, start: StackFactory, envoy: Path) -> AsyncIterator[Served]:
    async with start(SETTINGS[request.param], envoy=envoy) as stack:
        client = Client(stack.address)
        yield Served(request.param.split()[0], stack, client)
        await client.close()


async def test_cold_then_warm_with_the_adapters_own_weights(served: Served, origin: Path) -> None:
    """The engine's answer proves which bytes served."""
    for name in ("team/a", "team/deep/d", "flat"):
        for _ in range(2):
            answer = await served.client.chat(name, served.naming(name))
            assert (answer.status, answer.weights) == (200, weights_of(origin, name))


async def test_base_model_and_bodyless_requests_pass(served: Served) -> None:
    """Nothing is staged for them."""
    base = served.stack.base_model.served_name
    answer = await served.client.chat(base, served.naming(base))
    assert (answer.status, answer.weights) == (200, "base")
    models = await served.client.send("GET", "/v1/models")
    assert models.status == 200
    assert models.json["data"][0]["id"] == base


async def test_streamed_answers_come_through(served: Served, origin: Path) -> None:
    """Server-sent events to the last one."""
    answer = await served.client.chat("team/b", served.naming("team/b"), stream=True)
    events = [line for line in answer.text.splitlines() if line]
    assert (answer.status, events[-1]) == (200, "data: [DONE]")
    assert json.loads(events[0].removeprefix("data: "))["system_fingerprint"] == weights_of(origin, "team/b")


async def test_large_bodies_arrive_whole(served: Served, origin: Path) -> None:
    """Five megabytes, over every buffer but the configured one."""
    answer = await served.client.chat("team/c", served.naming("team/c"), padding=5_000_000)
    assert (answer.status, answer.weights) == (200, weights_of(origin, "team/c"))


@pytest.mark.parametrize(
    ("model", "status", "code"),
    [
        ("team/none", 404, "model_not_found"),
        ("../etc/passwd", 400, "invalid_request"),
        ("/abs", 400, "invalid_request"),
        ("team/broken", 422, "invalid_adapter"),
    ],
)
async def test_unusable_models_get_their_error(served: Served, model: str, status: int, code: str) -> None:
    """OpenAI-style JSON with the reason, from the router itself."""
    answer = await served.client.chat(model, served.naming(model))
    assert (answer.status, answer.code) == (status, code)
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-lora-extproc-reason"] == code


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"messages":[]}', b'{"model":1}', b'{"model":"team/a","model":"team/b"}', b'{"model":"\xff"}'])
async def test_bad_bodies_are_400(served: Served, body: bytes) -> None:
    """The engine never sees what the router could not read."""
    if served.mode == "NONE":
        return  # no body is shown
    answer = await served.client.post(body)
    if body == b"":
        assert answer.status == 400  # the engine's: a request without a body passes
    else:
        assert (answer.status, answer.code) == (400, "invalid_request")


async def test_clients_cannot_steer(served: Served, origin: Path) -> None:
    """Destination headers that a client sends have no effect."""
    lies = {"x_gateway_destination_endpoint": "127.0.0.1:1", "x_lora_extproc_cluster": "nowhere", "x_lora_extproc_no_retry": "1"}
    answer = await served.client.chat("team/a", lies | served.naming("team/a"))
    assert (answer.status, answer.weights) == (200, weights_of(origin, "team/a"))


async def test_engine_administration_is_forbidden(served: Served) -> None:
    """By whatever spelling of the path."""
    for path in ("/v1/unload_lora_adapter", "/v1//load_lora_adapter", "/v1/models/../load_lora_adapter", "/v1%2Fload_lora_adapter", "/adapters/x"):
        answer = await served.client.send("POST", path, b'{"lora_name":"team/a"}', content_type="application/json")
        assert (answer.status, answer.code) == (403, "forbidden"), path


async def test_a_body_over_the_limit_is_413(served: Served) -> None:
    """And the next request is served."""
    if served.mode == "NONE":
        return  # no body is shown
    answer = await served.client.chat("team/a", padding=51 * 2**20)
    assert answer.status == 413
    assert (await served.client.chat("team/a")).status == 200


async def test_request_trailers_arrive_and_the_body_once(served: Served, origin: Path) -> None:
    """Envoy sends such a body twice if the route has a retry policy; the engine would then read no JSON."""
    body = json.dumps({"messages": [{"role": "user", "content": "x" * 300_000}], "model": "team/a"}).encode()
    status, answer = await post_with_trailers(served.stack.address, body, served.naming("team/a"))
    assert status == 200, answer
    assert json.loads(answer)["system_fingerprint"] == weights_of(origin, "team/a")
