"""What a client sends, and the evidence in what it gets back."""

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    text: str

    @property
    def json(self) -> dict[str, Any]:
        parsed = json.loads(self.text)
        assert isinstance(parsed, dict)
        return parsed

    @property
    def weights(self) -> str:
        """SHA-256 of the weights the engine answered with."""
        return str(self.json["system_fingerprint"])

    @property
    def code(self) -> str:
        return str(self.json["error"]["code"])


class Client:
    """A plain HTTP/1.1 client of one stack."""

    def __init__(self, address: str) -> None:
        self._url = f"http://{address}"
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60), connector=aiohttp.TCPConnector(limit=0))

    async def close(self) -> None:
        await self._session.close()

    async def send(self, method: str, path: str, data: bytes | None = None, **headers: str) -> Answer:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        async with self._session.request(method, self._url + path, data=None if data is None else io.BytesIO(data), headers=names) as response:
            return Answer(response.status, {k.lower(): v for k, v in response.headers.items()}, await response.text())

    async def post(self, data: bytes, **headers: str) -> Answer:
        return await self.send("POST", "/v1/chat/completions", data, **{"content_type": "application/json", **headers})

    async def chat(self, model: str, headers: Mapping[str, str] | None = None, *, padding: int = 0, stream: bool = False) -> Answer:
        messages = [{"role": "user", "content": "x" * padding}]
        return await self.post(json.dumps({"messages": messages, "stream": stream, "model": model}).encode(), **(headers or {}))


def weights_of(origin: Path, name: str) -> str:
    with (origin / name / "adapter_model.safetensors").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
