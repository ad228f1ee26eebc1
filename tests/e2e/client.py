"""What a client sends, and the evidence in what it gets back."""

import asyncio
import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import h2.config
import h2.connection
import h2.events


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


async def post_with_trailers(address: str, body: bytes, naming: dict[str, str]) -> tuple[int, bytes]:
    """One HTTP/2 request whose body ends in trailers."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    connection = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding=None))
    connection.initiate_connection()
    headers = {":method": "POST", ":path": "/v1/chat/completions", ":scheme": "http", ":authority": "test", "content-type": "application/json"}
    headers |= {name.replace("_", "-"): value for name, value in naming.items()}
    connection.send_headers(1, list(headers.items()))
    status, answer, sent, ended = 0, b"", 0, False
    try:
        while not ended:
            while sent < len(body) and (window := min(connection.local_flow_control_window(1), connection.max_outbound_frame_size)) > 0:
                connection.send_data(1, body[sent : sent + window])
                sent += window
                if sent >= len(body):
                    connection.send_headers(1, [("x-trailer", "1")], end_stream=True)
            writer.write(connection.data_to_send())
            await writer.drain()
            data = await asyncio.wait_for(reader.read(65536), 30)
            assert data, "the connection was closed"
            for event in connection.receive_data(data):
                if isinstance(event, h2.events.ResponseReceived):
                    status = next(int(value) for name, value in event.headers if name == b":status")
                elif isinstance(event, h2.events.DataReceived):
                    answer += event.data
                    connection.acknowledge_received_data(event.flow_controlled_length, 1)
                elif isinstance(event, h2.events.StreamEnded | h2.events.StreamReset):
                    ended = True
    finally:
        writer.close()
    return status, answer
