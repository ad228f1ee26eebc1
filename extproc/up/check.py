"""`up --check`: every kind of request once, for real, each answer compared with what it should be."""

import asyncio
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
from rich.console import Console
from rich.table import Table

from . import demo
from .stack import Stack

REQUEST_S = 30.0
LOG_S = 5.0  # Envoy is told to write its access log ten times a second


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request: what came back, and what is wrong with it (empty: nothing)."""

    what: str
    model: str
    status: int
    note: str
    complaints: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Expected:
    """What the answer has to be. None: not looked at."""

    status: int
    outcome: str | None = None  # of the router, as Envoy's access log prints it
    weights: str | None = None  # SHA-256 of the weights the engine answered with
    code: str | None = None  # of an error


async def check(stack: Stack, console: Console) -> bool:
    """Send the requests, print the table; whether every answer was as it should be."""
    checker = _Checker(stack)
    reader = asyncio.create_task(checker.read_log(), name="access log")
    try:
        outcomes = await checker.run()
    finally:
        reader.cancel()
        await checker.close()
    table = Table("request", "model", "status", "what happened", "verdict")
    for outcome in outcomes:
        table.add_row(outcome.what, outcome.model, str(outcome.status), outcome.note, "; ".join(outcome.complaints) or "ok")
    console.print(table)
    wrong = sum(bool(outcome.complaints) for outcome in outcomes)
    console.print(f"{len(outcomes) - wrong} of {len(outcomes)} answers were as they should be")
    return not wrong


class _Checker:
    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._records: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=REQUEST_S))

    async def close(self) -> None:
        await self._session.close()

    async def read_log(self) -> None:
        async for record in self._stack.access_log():
            self._records.put_nowait(record)

    async def run(self) -> Sequence[Outcome]:
        outcomes = []
        for name in demo.NAMES:
            weights = await asyncio.to_thread(_sha256, self._stack, name)
            outcomes.append(await self._ask("cold", _chat(name), Expected(200, "staged", weights)))
            outcomes.append(await self._ask("warm", _chat(name), Expected(200, "hit", weights)))
        base = self._stack.base_model.served_name
        outcomes.append(await self._ask("base model", _chat(base), Expected(200, "pass")))
        streamed = demo.NAMES[0]
        weights = await asyncio.to_thread(_sha256, self._stack, streamed)
        outcomes.append(await self._ask("streamed", _chat(streamed, stream=True), Expected(200, "hit", weights)))
        outcomes.append(await self._ask("unknown", _chat("demo/no-such-adapter"), Expected(404, code="model_not_found")))
        outcomes.append(await self._ask("bad body", b'{"model": "demo/sql", ', Expected(400, code="invalid_request")))
        outcomes.append(await self._ask("bad name", _chat("../../etc/passwd"), Expected(400, code="invalid_request")))
        return outcomes

    async def _ask(self, what: str, body: bytes, expected: Expected) -> Outcome:
        url = f"http://{self._stack.address}/v1/chat/completions"
        try:
            async with self._session.post(url, data=body, headers={"content-type": "application/json"}) as response:
                status, text = response.status, await response.text()
                is_stream = response.content_type == "text/event-stream"
            record = await asyncio.wait_for(self._records.get(), LOG_S)
        except (aiohttp.ClientError, TimeoutError) as error:
            return Outcome(what, _model(body), 0, type(error).__name__, ("no answer",))
        complaints = [f"status {expected.status} was expected"] if status != expected.status else []
        if expected.outcome is not None and record.get("outcome") != expected.outcome:
            complaints.append(f"outcome {expected.outcome} was expected, got {record.get('outcome')}")
        answer = _last_event(text) if is_stream else _parse(text)
        if expected.weights is not None and answer.get("system_fingerprint") != expected.weights:
            complaints.append("the engine answered with other weights")
        if expected.code is not None and answer.get("error", {}).get("code") != expected.code:
            complaints.append(f"error code {expected.code} was expected")
        return Outcome(what, _model(body), status, _note(record, answer), tuple(complaints))


def _note(record: dict[str, Any], answer: dict[str, Any]) -> str:
    if "error" in answer:
        return str(answer["error"].get("message", ""))[:60]
    waited = f", waited {record['waited_ms']:.0f} ms" if record.get("waited_ms") else ""
    origin = f" from {record['origin']}" if record.get("origin") else ""
    return f"{record.get('outcome')}{origin} on {record.get('owner')}{waited}"


def _chat(model: str, *, stream: bool = False) -> bytes:
    messages = [{"role": "user", "content": "hi"}]
    return json.dumps({"messages": messages, "model": model, "stream": stream}).encode()


def _model(body: bytes) -> str:
    return str(_parse(body).get("model", "-"))


def _parse(text: str | bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(text)
    except ValueError:
        return {}
    return parsed if isinstance(parsed, dict) else {}


def _last_event(text: str) -> dict[str, Any]:
    """The last event before `[DONE]`; empty if the stream did not end with it."""
    events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return _parse(events[-2]) if len(events) > 1 and events[-1] == "[DONE]" else {}


def _sha256(stack: Stack, name: str) -> str:
    with (stack.origin / name / "adapter_model.safetensors").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
