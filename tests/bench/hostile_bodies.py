"""Hostile HTTP requests, each by name: what clients may send within Envoy's limits and `router.max_body_bytes`, chosen to cost the router most."""

import asyncio
import contextlib
import gzip
import os
import random
import zlib
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass, field

import brotli
import zstandard

from .harness import ADAPTER

MIB = 2**20
GIB = 2**30
MAX_BODY_BYTES = 50 * MIB  # what the benchmark's router allows
JSON, FORM = "application/json", "multipart/form-data; boundary=xyz"
MODEL = ADAPTER.encode()
HEAD = b'--xyz\r\nContent-Disposition: form-data; name="model"'
FIELD = b"--xyz\r\nContent-Disposition: form-data; name=x"


@dataclass(frozen=True)
class HttpInput:
    """One request, or one that is sent several times."""

    name: str
    body: Callable[[], bytes] = bytes  # made when it is needed
    content_type: str = JSON
    headers: Mapping[str, str] = field(default_factory=dict)
    path: str = "/v1/chat/completions"
    method: str = "POST"
    chunk: int = 0  # bytes per HTTP chunk; 0: with a content-length
    times: int = 1
    at_once: int = 1
    stops_after_s: float = 0.0  # send half of the body, wait, go away
    expected: str = "400"  # the answer's status, or several separated by `|`
    only_once: bool = False  # the first of equal inputs costs, the others find the answer made
    decodes_to: int = 0  # what counts as the body's size for the bound on memory, where that is more than was sent

    async def run(self, envoy: str, body: bytes) -> str:
        """What was answered, each answer once."""
        gate = asyncio.Semaphore(self.at_once)

        async def one() -> str:
            async with gate:
                return await send(envoy, self, body)

        answers = await asyncio.gather(*(one() for _ in range(self.times)))
        return " / ".join(sorted(set(answers)))

    def held_bytes(self, sent: int) -> int:
        """How much of bodies there is at once."""
        limit = min(MAX_BODY_BYTES, 200 * max(sent, 1024)) if "content-encoding" in self.headers else 0
        return max(sent, limit, self.decodes_to) * min(self.at_once, self.times)


async def send(address: str, request: HttpInput, body: bytes, timeout_s: float = 120.0) -> str:
    """Status and reason of the answer, or what happened instead."""
    host, _, port = address.rpartition(":")
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(host, int(port))
            try:
                sending = asyncio.create_task(_write(writer, request, body))
                try:
                    return await _answer(reader)
                finally:
                    sending.cancel()
                    with contextlib.suppress(asyncio.CancelledError, OSError):
                        await sending
            finally:
                writer.close()
    except TimeoutError:
        return f"no answer in {timeout_s:g} s"
    except (OSError, asyncio.IncompleteReadError) as error:
        return "left" if request.stops_after_s else type(error).__name__


async def _write(writer: asyncio.StreamWriter, request: HttpInput, body: bytes) -> None:
    length = {"transfer-encoding": "chunked"} if request.chunk else {"content-length": str(len(body))}
    if request.method in ("GET", "HEAD"):
        length = {}
    headers = {"host": "h", "content-type": request.content_type, **length, **request.headers}
    lines = [f"{request.method} {request.path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items() if value)]
    writer.write("\r\n".join(lines).encode("latin-1") + b"\r\n\r\n")
    if request.stops_after_s:
        writer.write(body[: len(body) // 2])
        await writer.drain()
        await asyncio.sleep(request.stops_after_s)
        writer.close()
        return
    async for piece in _pieces(body, request.chunk):
        writer.write(piece)
        await writer.drain()


async def _pieces(body: bytes, chunk: int) -> AsyncIterator[bytes]:
    if not chunk:
        for start in range(0, len(body), MIB):
            yield body[start : start + MIB]
        return
    for number, start in enumerate(range(0, len(body), chunk)):
        piece = body[start : start + chunk]
        yield b"%x\r\n%s\r\n" % (len(piece), piece)
        if number % 16 == 0:
            await asyncio.sleep(0)
    yield b"0\r\n\r\n"


async def _answer(reader: asyncio.StreamReader) -> str:
    head = await reader.readuntil(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    left = int(headers.get("content-length", "0"))
    while left > 0 and (piece := await reader.read(min(left, MIB))):
        left -= len(piece)
    return f"{lines[0].split()[1]} {headers.get('x-lora-extproc-reason', '')}".strip()


# ---- what is sent


def repeated(token: bytes, size: int, before: bytes = b"", after: bytes = b"") -> Callable[[], bytes]:
    return lambda: before + token * (size // len(token)) + after


def zstd_blocks(block: bytes, count: int, *, window: int = 0x58, frames: int = 1) -> Callable[[], bytes]:
    """Frames of equal blocks (RFC 8878, 3.1.1): header without a content size, the blocks, an empty last one."""
    return lambda: (b"\x28\xb5\x2f\xfd\x00" + bytes([window]) + block * count + b"\x01\x00\x00") * frames


def gzip_zeros(size: int, window_bits: int = 31) -> bytes:
    """Blocks that do not refer to one another, made once; the checksum at the end, which is wrong, is never reached."""
    encoder = zlib.compressobj(9, wbits=window_bits)
    start = encoder.compress(b"") + encoder.flush(zlib.Z_FULL_FLUSH)
    block = encoder.compress(bytes(MIB)) + encoder.flush(zlib.Z_FULL_FLUSH)
    return start + block * (size // MIB) + encoder.flush()


def brotli_zeros(size: int) -> bytes:
    encoder = brotli.Compressor(quality=5, lgwin=24)
    return bytes(b"".join(encoder.process(bytes(16 * MIB)) for _ in range(size // MIB // 16)) + encoder.finish())


def ordinary(size: int) -> bytes:
    """JSON for the adapter that is warm, of which half remains when it is compressed."""
    words = random.Random(1).randbytes(size // 2).hex(" ", 8).encode()
    return b'{"messages":[{"role":"user","content":"' + words[:size] + b'"}],"model":"' + MODEL + b'"}'


def form(parts: Iterable[bytes]) -> bytes:
    return b"".join(parts) + HEAD + b"\r\n\r\n" + MODEL + b"\r\n--xyz--\r\n"


RLE_128_KIB = (2**17 << 3 | 2).to_bytes(3, "little") + b"\x00"
SKIPPABLE = b"\x50\x2a\x4d\x18\x00\x00\x00\x00"
TAIL = b',"model":"' + MODEL + b'"}'


def encoded(name: str, encoding: str, body: Callable[[], bytes], expected: str = "413", decodes_to: int = 0) -> HttpInput:
    return HttpInput(name, body, headers={"content-encoding": encoding}, expected=expected, decodes_to=decodes_to)


def form_input(name: str, body: Callable[[], bytes], expected: str = "400", content_type: str = FORM) -> HttpInput:
    return HttpInput(name, body, content_type, expected=expected)


INPUTS = (
    # encodings
    encoded("brotli of 1 GiB", "br", lambda: brotli_zeros(GIB)),
    encoded("zstd of 1 GiB", "zstd", zstd_blocks(RLE_128_KIB, 8192)),
    encoded("zstd of 6 GiB", "zstd", zstd_blocks(RLE_128_KIB, 50_000)),
    encoded("gzip of 1 GiB", "gzip", lambda: gzip_zeros(GIB)),
    encoded("deflate of 1 GiB", "deflate", lambda: gzip_zeros(GIB, 15)),
    encoded("raw deflate of 1 GiB", "deflate", lambda: gzip_zeros(GIB, -15)),
    encoded("gzip of 1 GiB in brotli", "gzip, br", lambda: bytes(brotli.compress(gzip_zeros(GIB), quality=1))),
    encoded("brotli of 1 GiB in brotli", "br, br", lambda: bytes(brotli.compress(brotli_zeros(GIB)))),
    encoded("64 zstd frames of 64 MiB", "zstd", zstd_blocks(RLE_128_KIB, 512, frames=64)),
    encoded("100,000 zstd frames of nothing", "zstd", repeated(SKIPPABLE, 800_000), "400"),
    encoded("10,000 gzip members", "gzip", repeated(gzip.compress(b""), 200_000), "400"),
    encoded("zstd with a window of 128 MiB", "zstd", zstd_blocks(RLE_128_KIB, 10, window=0x88), "400"),
    encoded("10 MiB of empty zstd blocks", "zstd", zstd_blocks(b"\x00\x00\x00", 10 * MIB // 3), "400"),
    encoded("49 MiB of zstd that is skipped", "zstd", lambda: b"\x50\x2a\x4d\x18" + (49 * MIB).to_bytes(4, "little") + bytes(49 * MIB), "400"),
    encoded("20 MiB of ordinary JSON in gzip", "gzip", lambda: gzip.compress(ordinary(20 * MIB), 1), "200", decodes_to=20 * MIB),
    encoded("48 MiB of ordinary JSON in zstd", "zstd", lambda: zstandard.compress(ordinary(48 * MIB)), "200", decodes_to=48 * MIB),
    encoded("5,000 encodings", ",".join(["gzip"] * 5000), lambda: gzip.compress(b"{}"), "400"),
    # forms
    form_input("180,000 form parts", lambda: form([FIELD + b"\r\n\r\n\r\n"] * 180_000)),
    form_input("999 form parts", lambda: form([FIELD + b"\r\n\r\n\r\n"] * 999), "200"),
    form_input("64,000 parameters in a part", lambda: HEAD + b';a="b"' * 64_000 + b"\r\n\r\nx\r\n--xyz--"),
    form_input("1,000 parentheses in a part", lambda: HEAD + b"(" * 1000 + b"\r\n\r\nx\r\n--xyz--"),
    form_input("5,000 parentheses in content-type", lambda: b"x", content_type="multipart/form-data; boundary=b" + "(" * 5000),
    form_input("10,000 parameters in content-type", lambda: b"x", content_type="multipart/form-data" + ";a=b" * 10_000 + "; boundary=b"),
    form_input("10 MiB of almost boundaries", lambda: form([FIELD + b"; filename=y\r\n\r\n" + b"\r\n--xy" * (10 * MIB // 6) + b"\r\n"]), "200"),
    form_input(
        "10 MiB of almost long boundaries",
        lambda: b"--" + b"x" * 256 + FIELD[5:] + b"\r\n\r\n" + (b"\r\n--" + b"x" * 255) * (10 * MIB // 259),
        content_type="multipart/form-data; boundary=" + "x" * 256,
    ),
    form_input("999 heads of 8,000 backslashes", lambda: form([FIELD + b'; a="' + b"\\a" * 4000 + b'"\r\n\r\n\r\n'] * 999), "200"),
    form_input("49 MiB of a form without an end", lambda: FIELD + b"; filename=y\r\n\r\n" + os.urandom(MIB) * 49),
    form_input("10 MiB of line ends before a form", repeated(b"\r\n", 10 * MIB)),
    form_input("48 MiB of audio", lambda: form([FIELD + b"; filename=y\r\n\r\n" + os.urandom(MIB) * 48 + b"\r\n"]), "200"),
    # JSON
    HttpInput("10 MiB of keys", repeated(b'"":0,', 10 * MIB, b"{", TAIL[1:])),
    HttpInput("600,000 keys and the model's like", lambda: b'{"a":"' + MODEL + b'"' + b',"k":0' * 600_000 + TAIL[:-1] + b',"z":"' + MODEL + b'"}'),
    HttpInput("900,000 likes of the model", repeated(b'"' + MODEL + b'",', 900_000 * 16, b'{"x":[', b"0]" + TAIL), expected="200"),
    HttpInput("10 MiB of [", repeated(b"[", 10 * MIB, b'{"x":')),
    HttpInput('10 MiB of {"a":', repeated(b'{"a":', 10 * MIB)),
    HttpInput("10 MiB of [],", repeated(b"[],", 10 * MIB, b'{"x":[', b"0]" + TAIL), expected="200"),
    HttpInput("49 MiB of [],", repeated(b"[],", 49 * MIB, b'{"x":[', b"0]" + TAIL), expected="200"),
    HttpInput("49 MiB of empty strings", repeated(b'"",', 49 * MIB, b'{"x":[', b"0]" + TAIL), expected="200"),
    HttpInput("10 MiB of one number", repeated(b"9", 10 * MIB, b'{"x":', TAIL), expected="200"),
    HttpInput("10 MiB of escapes", repeated(b"\\u00e9", 10 * MIB, b'{"x":"', b'"' + TAIL), expected="200"),
    HttpInput("10 MiB of backslashes", repeated(b"\\\\", 10 * MIB, b'{"x":"', b'"' + TAIL), expected="200"),
    HttpInput("10 MiB of escaped quotes", repeated(b'\\"', 10 * MIB, b'{"x":"', b'"' + TAIL), expected="200"),
    HttpInput("10 MiB of surrogates, one unpaired", repeated(b"\\ud83d\\ude00", 10 * MIB, b'{"x":"', b'\\ud83d"' + TAIL)),
    HttpInput("10 MiB of spaces", repeated(b" ", 10 * MIB, b'{"x":0', TAIL), expected="200"),
    HttpInput("10 MiB of spaces alone", repeated(b" ", 10 * MIB)),
    HttpInput("a key of 10 MiB that is not ASCII", lambda: b'{"' + b"k" * (10 * MIB) + "😀".encode() + b'":0' + TAIL),
    HttpInput("a model of 10 MiB", repeated(b"m", 10 * MIB, b'{"model":"', b'"}')),
    HttpInput("20 MiB of emoji", repeated("😀".encode(), 20 * MIB, b'{"x":"', b'"' + TAIL), expected="200"),
    HttpInput("20 MiB, the last byte no UTF-8", repeated(b"x", 20 * MIB, b'{"x":"', b'\xff"' + TAIL)),
    HttpInput("10 MiB of UTF-16", lambda: '{"x":"'.encode("utf-16") + b"x\x00" * (5 * MIB)),
    HttpInput("10 MiB of NaN", repeated(b"NaN,", 10 * MIB, b'{"x":[')),
    HttpInput("49 MiB of ordinary JSON", lambda: ordinary(49 * MIB), expected="200"),
    HttpInput("one byte over the limit", repeated(b"x", MAX_BODY_BYTES + 1), expected="413"),
    # how it comes
    HttpInput("20,000 bytes, one by one", repeated(b"x", 20_000, b'{"x":"', b'"' + TAIL), chunk=1, expected="200"),
    HttpInput("1 MiB of [], in chunks of 100", repeated(b"[],", MIB, b'{"x":[', b"0]" + TAIL), chunk=100, expected="200"),
    HttpInput("200 bodies of 1 MiB that stop half way", repeated(b"x", MIB), times=200, at_once=200, stops_after_s=3.0, expected="left"),
    HttpInput("40 bodies in a row that are refused", repeated(b"x", 5 * MIB), times=40),
    HttpInput("16 bodies of 5 MiB at once", lambda: ordinary(5 * MIB), times=16, at_once=16, expected="200"),
    # headers
    HttpInput("a header of 50 KB", lambda: b"{" + TAIL[1:], headers={"x-filler": "x" * 50_000}, expected="200"),
    HttpInput("90 headers of 600 bytes", lambda: b"{}", headers={f"x-{n}": "y" * 600 for n in range(90)}),
    HttpInput("a time of 50,000 digits", lambda: b"{" + TAIL[1:], headers={"x-request-timeout": "9" * 50_000}, expected="400|200"),
    HttpInput("a path of 50 KB", lambda: b"{" + TAIL[1:], path="/v1/chat/completions?" + "%2e" * 16_000, expected="400|404|200"),
    HttpInput("a trace context of 50 KB", lambda: b"{" + TAIL[1:], headers={"traceparent": "0" * 50_000, "tracestate": "a=b,"}, expected="200"),
    HttpInput("2,000 invented models", lambda: b'{"model":"invented/x"}', times=2000, at_once=20, expected="404"),
    HttpInput("the list of models, 4 at once", content_type="", path="/v1/models", method="GET", times=4, at_once=4, expected="200", only_once=True),
)
