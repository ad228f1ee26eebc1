"""The simulated engine over HTTP: every status of the table observed on a real vLLM 0.32."""

import asyncio
import json
import re
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession

from extproc.sim.app import DEFAULT_TOKENS
from extproc.up.demo import BASE_MODEL
from tests.fakes.adapters import CONFIG, WEIGHTS, sha256, small_files, write_small
from tests.fakes.engine import RunningEngine, running_engine
from tests.fakes.wait import turns, until

MESSAGES = [{"role": "user", "content": "the quick brown fox"}]


@dataclass
class Client:
    """Speaks HTTP to one engine whose directory is `loras`."""

    http: ClientSession
    engine: RunningEngine
    loras: Path

    async def post(self, path: str, body: Any, **options: Any) -> tuple[int, Any]:
        sent = {"json": body} if not options else {"data": body, **options}
        async with self.http.post(self.engine.url + path, **sent) as response:
            text = await response.text()
            return response.status, json.loads(text) if response.content_type == "application/json" else text

    async def get(self, path: str) -> tuple[int, Any]:
        async with self.http.get(self.engine.url + path) as response:
            text = await response.text()
            return response.status, json.loads(text) if response.content_type == "application/json" else text

    async def chat(self, model: str, **more: Any) -> tuple[int, Any]:
        return await self.post("/v1/chat/completions", {"model": model, "messages": MESSAGES, "max_tokens": 6, **more})

    async def load(self, name: str, path: Path | str, **more: Any) -> tuple[int, Any]:
        return await self.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path), **more})

    async def unload(self, name: str) -> tuple[int, Any]:
        return await self.post("/v1/unload_lora_adapter", {"lora_name": name})

    async def models(self) -> dict[str, Any]:
        return {model["id"]: model for model in (await self.get("/v1/models"))[1]["data"]}


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[Client]:
    for seed, name in enumerate(("alpha", "beta", "acme/gamma")):
        write_small(tmp_path / name, seed=seed)
    async with running_engine(tmp_path, max_loras=1, max_cpu_loras=1) as engine, ClientSession() as http:
        yield Client(http, engine, tmp_path)


def change_config(directory: Path, **changes: Any) -> None:
    """Change keys of a configuration; ... leaves one out."""
    config = {**json.loads((directory / CONFIG).read_text()), **changes}
    (directory / CONFIG).write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


# -- answers


@pytest.mark.parametrize("name", ["alpha", "beta", "acme/gamma"])
async def test_an_answer_tells_its_weights(client: Client, name: str) -> None:
    """system_fingerprint is the SHA-256 of the weights' file, and so are the words."""
    status, answer = await client.chat(name)
    digest = sha256((client.loras / name / WEIGHTS).read_bytes())
    assert status == 200
    assert answer["system_fingerprint"] == digest
    assert answer["model"] == name
    assert digest in answer["choices"][0]["message"]["content"]
    assert answer["object"] == "chat.completion"
    assert answer["usage"]["completion_tokens"] == 6


@pytest.mark.parametrize("model", ["base", "", None])
async def test_the_base_model_answers_without_an_adapter(client: Client, model: str | None) -> None:
    """By its served name, and where the name is empty or missing."""
    body = {"messages": MESSAGES} if model is None else {"messages": MESSAGES, "model": model}
    status, answer = await client.post("/v1/chat/completions", body)
    assert (status, answer["model"], answer["system_fingerprint"]) == (200, "base", "base")
    assert answer["usage"]["completion_tokens"] == DEFAULT_TOKENS


async def test_completions_answer_with_text(client: Client) -> None:
    """The older API."""
    status, answer = await client.post("/v1/completions", {"model": "alpha", "prompt": "x"})
    assert (status, answer["object"]) == (200, "text_completion")
    assert sha256(small_files()[WEIGHTS]) in answer["choices"][0]["text"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_a_streamed_answer_is_the_same_in_pieces(client: Client, path: str) -> None:
    """One event per token, the last with its reason, then [DONE]."""
    body = {"model": "alpha", "messages": MESSAGES, "max_tokens": 7}
    async with client.http.post(client.engine.url + path, json={**body, "stream": True}) as response:
        assert response.content_type == "text/event-stream"
        events = [line.removeprefix("data: ") for line in (await response.text()).split("\n\n") if line]
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 6 + ["stop"]
    assert {chunk["system_fingerprint"] for chunk in chunks} == {sha256(small_files()[WEIGHTS])}
    pieces = [choice["delta"]["content"] if "delta" in (choice := chunk["choices"][0]) else choice["text"] for chunk in chunks]
    whole = (await client.post(path, body))[1]["choices"][0]
    assert "".join(pieces) == (whole["message"]["content"] if "message" in whole else whole["text"])


async def streamed(client: Client, path: str, **more: Any) -> list[dict[str, Any]]:
    """The chunks of a streamed answer of 7 tokens."""
    body = {"model": "alpha", "messages": MESSAGES, "max_tokens": 7, "stream": True, **more}
    async with client.http.post(client.engine.url + path, json=body) as response:
        events = [line.removeprefix("data: ") for line in (await response.text()).split("\n\n") if line]
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


@pytest.mark.parametrize("options", [{"include_usage": True}, {"include_usage": True, "continuous_usage_stats": False}])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_a_stream_ends_with_the_usage_that_was_asked_for(client: Client, path: str, options: dict[str, bool]) -> None:
    """One more chunk, whose choices are empty."""
    *chunks, last = await streamed(client, path, stream_options=options)
    assert all("usage" not in chunk and chunk["choices"] for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"] == {"prompt_tokens": 1, "completion_tokens": 7, "total_tokens": 8}
    assert (last["id"], last["object"]) == (chunks[0]["id"], chunks[0]["object"])


@pytest.mark.parametrize("options", [None, {}, {"include_usage": False}, {"include_usage": False, "continuous_usage_stats": True}])
async def test_a_stream_has_no_usage_unless_it_is_asked_for(client: Client, options: dict[str, bool] | None) -> None:
    """`continuous_usage_stats` alone is not enough."""
    assert not any("usage" in chunk for chunk in await streamed(client, "/v1/completions", stream_options=options))


async def test_each_chunk_counts_where_that_is_asked_for(client: Client) -> None:
    """And the last one as well."""
    chunks = await streamed(client, "/v1/chat/completions", stream_options={"include_usage": True, "continuous_usage_stats": True})
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3, 4, 5, 6, 7, 7]


@pytest.mark.parametrize("options", [{"include_usage": True}, {"include_usage": False}])
async def test_stream_options_without_a_stream_are_400(client: Client, options: dict[str, bool]) -> None:
    """In vLLM's words."""
    status, answer = await client.chat("alpha", stream_options=options)
    assert (status, answer["error"]["type"], answer["error"]["param"]) == (400, "BadRequestError", "stream_options")
    assert answer["error"]["message"] == "Stream options can only be defined when `stream=True`."


@pytest.mark.parametrize(
    ("body", "options"),
    [
        (b"{", {"headers": {"content-type": "application/json"}}),
        (b"[]", {"headers": {"content-type": "application/json"}}),
        (b"{}", {"headers": {"content-type": "text/plain"}}),
    ],
    ids=["not JSON", "a list", "other content type"],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"])
async def test_a_body_that_is_no_object_is_400(client: Client, path: str, body: bytes, options: dict[str, Any]) -> None:
    """Not 422."""
    status, answer = await client.post(path, body, **options)
    assert (status, answer["error"]["type"], answer["error"]["code"]) == (400, "Bad Request", 400)


@pytest.mark.parametrize("messages", [None, [], "hello"])
async def test_chat_needs_messages(client: Client, messages: Any) -> None:
    """A list that is not empty."""
    status, _ = await client.post("/v1/chat/completions", {"model": "base", "messages": messages})
    assert status == 400


# -- the resolver


def _no_config(directory: Path) -> None:
    (directory / CONFIG).unlink()


def _plain_file(directory: Path) -> None:
    shutil.rmtree(directory)
    directory.write_text("x")


def _other_base(directory: Path) -> None:
    change_config(directory, base_model_name_or_path=BASE_MODEL + "/")


def _other_type(directory: Path) -> None:
    change_config(directory, peft_type="IA3")


def _gone(directory: Path) -> None:
    shutil.rmtree(directory)


@pytest.mark.parametrize("spoil", [_gone, _no_config, _plain_file, _other_base, _other_type])
@pytest.mark.parametrize("name", ["alpha", "acme/gamma"])
async def test_what_the_resolver_does_not_find_is_404(client: Client, name: str, spoil: Any) -> None:
    """The base must be exactly equal, a slash at the end included."""
    spoil(client.loras / name)
    message = f"The model `{name}` does not exist. Valid aliases: base."
    assert await client.chat(name) == (404, {"error": {"message": message, "type": "NotFoundError", "param": "model", "code": 404}})


def _corrupt(directory: Path) -> None:
    (directory / WEIGHTS).write_bytes(b"\xff" * 100)


def _header_nonsense(directory: Path) -> None:
    (directory / WEIGHTS).write_bytes((10).to_bytes(8, "little") + b"{nonsense}")


def _truncated(directory: Path) -> None:
    (directory / WEIGHTS).write_bytes(small_files()[WEIGHTS][:-1])


def _no_weights(directory: Path) -> None:
    (directory / WEIGHTS).unlink()


def _rank_too_high(directory: Path) -> None:
    change_config(directory, r=64)


def _unknown_module(directory: Path) -> None:
    write_small(directory, modules=("zz_proj",))


def _no_rank(directory: Path) -> None:
    change_config(directory, r=...)


@pytest.mark.parametrize("spoil", [_corrupt, _header_nonsense, _truncated, _no_weights, _rank_too_high, _unknown_module, _no_rank])
async def test_what_cannot_be_loaded_is_400(client: Client, spoil: Any) -> None:
    """Why stands in the server's log only; the engine lives, and the name is not listed."""
    spoil(client.loras / "alpha")
    message = "LoRA adapter 'alpha' was found but could not be loaded."
    assert await client.chat("alpha") == (400, {"error": {"message": message, "type": "BadRequestError", "param": None, "code": 400}})
    assert set(await client.models()) == {"base"}
    assert (await client.chat("beta"))[0] == 200


async def test_a_configuration_that_is_no_json_is_400(client: Client) -> None:
    """With the parser's words."""
    (client.loras / "alpha" / CONFIG).write_text("{")
    status, answer = await client.chat("alpha")
    assert (status, answer["error"]["type"]) == (400, "BadRequestError")
    assert "Expecting property name enclosed in double quotes" in answer["error"]["message"]


@pytest.mark.parametrize("key", ["peft_type", "base_model_name_or_path"])
async def test_a_configuration_without_a_needed_key_is_500(client: Client, key: str) -> None:
    """The engine lives."""
    change_config(client.loras / "alpha", **{key: ...})
    error = {"message": f"'{key}'", "type": "InternalServerError", "param": None, "code": 500}
    assert await client.chat("alpha") == (500, {"error": error})
    assert client.engine.deaths == 0


async def test_a_tensor_of_another_rank_is_200(client: Client) -> None:
    """Silently accepted."""
    change_config(client.loras / "alpha", r=2)
    assert (await client.chat("alpha"))[0] == 200


# -- load and unload


async def test_load_and_unload(client: Client) -> None:
    """Bare text both times; a slash in the name is fine."""
    assert await client.load("x/1", client.loras / "alpha") == (200, "Success: LoRA adapter 'x/1' added successfully.")
    assert (await client.chat("x/1"))[1]["system_fingerprint"] == sha256(small_files()[WEIGHTS])
    assert await client.unload("x/1") == (200, "Success: LoRA adapter 'x/1' removed successfully.")
    assert (await client.chat("x/1"))[0] == 404


@pytest.mark.parametrize("spoil", [_other_base, _other_type, lambda path: change_config(path, peft_type=...)])
async def test_load_does_not_check_the_base(client: Client, spoil: Any) -> None:
    """Only the resolver does."""
    spoil(client.loras / "alpha")
    assert (await client.load("x1", client.loras / "alpha"))[0] == 200


async def test_loading_a_name_twice_is_400(client: Client) -> None:
    """In place it is 200, and the new files count at once."""
    await client.chat("alpha")
    status, answer = await client.load("alpha", client.loras / "alpha")
    message = "The lora adapter 'alpha' has already been loaded. If you want to load the adapter in place, set 'load_inplace' to True."
    assert (status, answer["error"]["message"], answer["error"]["type"]) == (400, message, "InvalidUserInput")
    write_small(client.loras / "alpha", seed=9)
    assert (await client.load("alpha", client.loras / "alpha", load_inplace=True))[0] == 200
    assert (await client.chat("alpha"))[1]["system_fingerprint"] == sha256(small_files(seed=9)[WEIGHTS])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_corrupt, "header too large"),
        (_truncated, "incomplete metadata, file not fully covered"),
        (_rank_too_high, "LoRA rank 64 is greater than max_lora_rank 8."),
        (_no_weights, "doesn't contain tensors"),
        (lambda path: (path / CONFIG).write_text("{"), ""),
        (_header_nonsense, ""),
    ],
    ids=["corrupt", "truncated", "rank", "no weights", "config not JSON", "header not JSON"],
)
async def test_loading_what_is_broken_is_500(client: Client, spoil: Any, words: str) -> None:
    """With why; nothing is registered."""
    spoil(client.loras / "alpha")
    status, answer = await client.load("x1", client.loras / "alpha")
    assert (status, answer["error"]["type"]) == (500, "InternalServerError")
    assert words in answer["error"]["message"]
    assert set(await client.models()) == {"base"}


async def test_loading_what_is_not_there_is_404(client: Client) -> None:
    """NotFoundError."""
    status, answer = await client.load("x1", client.loras / "nosuch")
    assert (status, answer["error"]["type"]) == (404, "NotFoundError")
    assert answer["error"]["message"].startswith("Loading lora x1 failed: No adapter found for")


async def test_loading_under_the_base_s_name_is_400(client: Client) -> None:
    """It would hide the base."""
    status, answer = await client.load("base", client.loras / "alpha")
    assert status == 400
    assert "conflicts with a served base model" in answer["error"]["message"]


async def test_an_empty_name_is_400(client: Client) -> None:
    """For both calls."""
    assert (await client.load("", client.loras / "alpha"))[0] == 400
    assert (await client.unload(""))[0] == 400


@pytest.mark.parametrize("body", [{}, {"lora_name": "x1"}, {"lora_path": "/x"}])
async def test_a_load_without_its_fields_is_400(client: Client, body: dict[str, str]) -> None:
    """Type "Bad Request", like a body that is not JSON."""
    status, answer = await client.post("/v1/load_lora_adapter", body)
    assert (status, answer["error"]["type"]) == (400, "Bad Request")


async def test_unloading_an_unknown_name_is_404(client: Client) -> None:
    """What the stager takes for done."""
    error = {"message": "The lora adapter 'x1' cannot be found.", "type": "NotFoundError", "param": None, "code": 404}
    assert await client.unload("x1") == (404, {"error": error})


# -- models, metrics, health


async def test_models_lists_what_was_asked_for(client: Client) -> None:
    """Not what lies on disk, nor what is in memory; also after its files are gone."""
    assert set(await client.models()) == {"base"}
    await client.chat("alpha")
    await client.chat("acme/gamma")
    shutil.rmtree(client.loras / "alpha")
    models = await client.models()
    assert set(models) == {"base", "alpha", "acme/gamma"}
    assert (models["base"]["root"], models["base"]["parent"]) == (BASE_MODEL, None)
    assert models["base"]["max_model_len"] is not None
    gamma = models["acme/gamma"]
    assert (gamma["root"], gamma["parent"], gamma["max_model_len"]) == (str(client.loras / "acme" / "gamma"), "base", None)


async def test_metrics_have_vllm_s_names(client: Client) -> None:
    """Both labels of lora_requests_info repeat what runs; an adapter that waits for a slot is in neither."""
    _, text = await client.get("/metrics")
    assert 'vllm:lora_requests_info{max_lora="1",running_lora_adapters="",waiting_lora_adapters=""} ' in text
    await client.chat("alpha")
    async with client.engine.adapters.use("alpha"):
        waiting = asyncio.create_task(client.chat("beta"))
        await until(lambda: "beta" in client.engine.adapters.registry)
        await turns()
        _, text = await client.get("/metrics")
        assert 'running_lora_adapters="alpha",waiting_lora_adapters="alpha"} ' in text
        assert 'vllm:num_requests_running{engine="0",model_name="base"} 1.0' in text
        assert not waiting.done()
    assert (await waiting)[0] == 200
    assert 'vllm:request_success_total{engine="0",model_name="base"} 2.0' in (await client.get("/metrics"))[1]
    values = re.findall(r"^vllm:lora_requests_info\{.*\} (\S+)$", text, re.MULTILINE)
    assert all(float(value) > 1.6e9 for value in values)


async def test_metrics_count_who_waits_for_a_slot(client: Client) -> None:
    """The one sign of a request that will read its adapter's files later."""
    await client.chat("alpha")
    async with client.engine.adapters.use("alpha"):
        waiting = asyncio.create_task(client.chat("beta"))
        await until(lambda: "beta" in client.engine.adapters.registry)
        await turns(200)
        _, text = await client.get("/metrics")
        assert not waiting.done()
    await waiting
    assert 'vllm:num_requests_waiting{engine="0",model_name="base"} 1.0' in text


async def test_other_adapters_wait_while_the_base_runs_along(client: Client) -> None:
    """max_loras counts adapters only."""
    await client.chat("alpha")
    async with client.engine.adapters.use("alpha"):
        waiting = asyncio.create_task(client.chat("beta"))
        assert (await client.chat("base"))[0] == 200
        assert (await client.chat("alpha"))[0] == 200
        assert not waiting.done()
    assert (await waiting)[0] == 200


async def test_health_and_version(client: Client) -> None:
    """As Envoy and people ask."""
    assert await client.get("/health") == (200, "")
    status, version = await client.get("/version")
    assert (status, set(version)) == (200, {"version"})


# -- death


async def test_it_dies_of_files_that_are_gone_after_they_fell_out_of_memory(client: Client) -> None:
    """500, 503 to the health check, 500 to everybody else, and the process ends itself."""
    await client.chat("alpha")
    shutil.rmtree(client.loras / "alpha")
    await client.chat("beta")
    status, answer = await client.chat("alpha")
    message = "EngineCore encountered an issue. See stack trace (above) for the root cause."
    assert (status, answer["error"]["message"]) == (500, message)
    assert (await client.get("/health"))[0] == 503
    assert (await client.chat("beta"))[0] == 500
    assert (await client.chat("base"))[0] == 500
    assert (await client.get("/v1/models"))[0] == 200
    await until(lambda: client.engine.deaths)


async def test_it_lives_while_the_adapter_is_in_memory(client: Client) -> None:
    """Files gone, adapter resident: every request is answered."""
    await client.chat("alpha")
    shutil.rmtree(client.loras / "alpha")
    for _ in range(3):
        assert (await client.chat("alpha"))[1]["system_fingerprint"] == sha256(small_files()[WEIGHTS])
    assert client.engine.deaths == 0
    assert (await client.get("/health"))[0] == 200


async def test_it_lives_when_it_was_told_to_forget_first(client: Client) -> None:
    """Unload, delete: the next request is 404."""
    await client.chat("alpha")
    await client.unload("alpha")
    shutil.rmtree(client.loras / "alpha")
    await client.chat("beta")
    assert (await client.chat("alpha"))[0] == 404
    assert client.engine.deaths == 0


async def test_a_stream_in_flight_survives_an_unload(client: Client) -> None:
    """Unloading forgets the name; what runs goes on to its end."""
    await client.chat("alpha")
    async with client.engine.adapters.use("alpha") as loaded:
        assert (await client.unload("alpha"))[0] == 200
        shutil.rmtree(client.loras / "alpha")
        assert loaded.sha256 == sha256(small_files()[WEIGHTS])
    assert (await client.chat("alpha"))[0] == 404
    assert client.engine.deaths == 0
