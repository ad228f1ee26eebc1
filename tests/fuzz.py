"""`python -m tests.fuzz --minutes 10`: random bodies, forms, encodings and messages against what they must never do. Prints the input that did it."""

import argparse
import contextlib
import gzip
import random
import sys
import time
import zlib
from collections.abc import Callable

import brotli
import zstandard

from extproc.core import encodings, forms, scanner, verdict
from extproc.core.events import Decide, Judge, Mutation, RequestHeaders
from extproc.core.exchange import Exchange
from extproc.core.paths import Paths
from extproc.errors import InvalidRequest, LoraExtprocError
from extproc.router import wire
from tests.core import engine_forms
from tests.core.bodies import strict
from tests.fuzz_http2 import fuzz_frames, make_frames

SEEDS = (
    b'{"model":"demo/sql","messages":[{"role":"user","content":"hi \\u00e9 \\"q\\" {}[]:,"}],"temperature":0.7,"n":1,"stream":true,"stop":null}',
    b'{"messages":[{"model":"x"}],"mod\\u0065l":"a\\/b","x":-1.5e+10}',
    '{"model":"日本/語","a":{"b":[1,2,{"c":[]}]}}'.encode(),
    b'{"model":"a","model":"b"}',
    b'[{"model":"a"}]',
    b'{"model":{"model":"a"}}',
)
TOKENS = (
    b'"',
    b"\\",
    b"\\u",
    b"{",
    b"}",
    b"[",
    b"]",
    b":",
    b",",
    b'"model"',
    b'"model":"x"',
    b"null",
    b"1e9",
    b"-",
    b"0",
    b"\xff",
    b"\x00",
    b"\xef\xbb\xbf",
    b" ",
    b"\n",
    b"d83d",
)

FORM_TOKENS = (
    b"--b",
    b"\r\n--b",
    b"\r\n--b--",
    b"\r\n",
    b"\r\n\r\n",
    b"\r",
    b"\n",
    b"--",
    b"-",
    b";",
    b"=",
    b'"',
    b"\\",
    b'\\"',
    b"; name=model",
    b'; name="model"',
    b"; name=x",
    b"; name*=utf-8''model",
    b'; filename="',
    b"\r\nContent-Disposition: form-data; name=model",
    b"\r\nX: y",
    b"; charset=utf-16",
    b"; boundary=c",
    b" ",
    b"\t",
    b"\x00",
    b"\xff",
    b"model",
)


def mutated(rng: random.Random, data: bytes) -> bytes:
    """A few random edits."""
    body = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        at = rng.randint(0, len(body))
        match rng.randint(0, 4):
            case 0:
                body[at : at + rng.randint(0, 8)] = b""
            case 1:
                body[at:at] = rng.choice(TOKENS)
            case 2:
                body[at : at + 1] = bytes([rng.randint(0, 255)])
            case 3:
                other = rng.choice(SEEDS)
                start = rng.randint(0, len(other))
                body[at:at] = other[start : start + rng.randint(0, 30)]
            case _:
                end = min(len(body), at + rng.randint(0, 20))
                body[at:at] = body[at:end]
    return bytes(body)


def fuzz_body(rng: random.Random, body: bytes) -> None:
    """The verdict is the strict reference's, another value in its place is read instead, and the scanner agrees in any chunking."""
    expected = strict(body)
    found = scanner.Scanner()
    start = 0
    while start < len(body):
        step = rng.randint(1, 12)
        found.feed(body[start : start + step])
        start += step
    reading = None
    with contextlib.suppress(LoraExtprocError):
        reading = verdict.judge(body)
    said = reading.model if reading else None
    assert said == expected, f"verdict {said!r}, the reference says {expected!r}"
    if reading is None or reading.model is None:
        return
    assert found.model == expected, f"scanner {found.model!r}, verdict {expected!r}"
    padded = body + b" " * 1100  # beyond the size at which the value is looked for by its text
    assert verdict.judge(memoryview(padded)) == reading
    assert verdict.judge(padded, with_blocks=True)._replace(blocks=()) == reading
    renamed = body[: reading.begin] + b'"acme/a@sha256:0123456789ab"' + body[reading.end :]
    assert strict(renamed) == "acme/a@sha256:0123456789ab", f"renamed it reads {strict(renamed)!r}"


def fuzz_form(rng: random.Random, form: bytes) -> None:
    """Where a form is accepted, an engine reads the same model or refuses it."""
    content_type, _, body = form.partition(BETWEEN)
    header = content_type.decode("latin-1")
    try:
        reading = forms.read(body, forms.boundary(header))
        assert forms.read(memoryview(body), forms.boundary(header)) == reading
    except InvalidRequest:
        return
    assert (body[reading.begin : reading.end].decode() if reading.model is not None else None) == reading.model
    with contextlib.suppress(engine_forms.EngineRefuses):
        expected = engine_forms.models(header, body)
        assert expected == ([] if reading.model is None else [reading.model]), f"{reading.model!r} was read, an engine reads {expected!r}"


def fuzz_encoding(rng: random.Random, body: bytes) -> None:
    """What is decoded is what a decoder of the whole makes of it, and anything else is one of our errors."""
    names = tuple(rng.choice(list(WHOLE)) for _ in range(rng.choice((1, 1, 2))))
    limit = rng.choice((100, 10_000, 2**20))
    try:
        plain = encodings.decode(body, names, limit)
    except LoraExtprocError:
        plain = None
    expected: bytes | None = body
    for name in reversed(names):
        expected = WHOLE[name](expected) if expected is not None else None
    if plain is not None:
        assert len(plain) <= limit
        assert plain == expected, f"{names}: {plain[:50]!r}, another decoder says {expected and expected[:50]!r}"
    elif expected is not None and max(len(expected), len(WHOLE[names[-1]](body) or b"")) <= min(limit, encodings.MAX_RATIO * 1024):
        raise AssertionError(f"{names}: refused, another decoder says {expected[:50]!r}")


def fuzz_messages(rng: random.Random, messages: bytes) -> None:
    """Messages of any bytes: always an event, and never an exception out of the exchange."""
    exchange = Exchange(max_body_bytes=1000, model_header="x-model", allowed=Paths(), early_scan_bytes=0, judged_here_bytes=rng.choice((0, 10_000)))
    for message in messages.split(BETWEEN):
        event = wire.decode(message)
        if isinstance(event, RequestHeaders):
            media = rng.choice(("application/json", "text/plain", "multipart/form-data; boundary=b"))
            event.headers = {**event.headers, "content-type": media, ":path": rng.choice(("/v1/completions", "/v1/responses/1", "/tokenize"))}
        actions = list(exchange.receive(event))
        while actions:
            action = actions.pop(0)
            if isinstance(action, Decide):
                actions += exchange.decided(Mutation({"a": "b"}, model=rng.choice(("", "x@sha256:0"))))
            elif isinstance(action, Judge):
                try:
                    actions += exchange.judged(action.content.read(b"".join(action.pieces), 1000))
                except LoraExtprocError as error:
                    actions += exchange.failed(error)
            else:
                wire.encode(action)


MESSAGES = (
    bytes.fromhex("12180a140a120a063a6d6574686f641a04504f53541801") + b"\x5a\x02\x08\x04",
    b"\x12\x02\x0a\x00\x5a\x02\x08\x02",
    b"\x22\x10\x0a\x0c" + b'{"model":1}x' + b"\x10\x01",
    b"\x22\x1a\x0a\x16" + b'{"model":"demo/sql"}  ' + b"\x10\x01",
    b"\x32\x00",
    b"\x1a\x02\x18\x01",
    b"\x2a\x05\x0a\x03abc",
    b"\x3a\x00",
)
BETWEEN = b"<next>"
FORMS = (
    b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\ndemo/sql\r\n--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\nxx\r\n--b--\r\n',
    b"--b\r\nContent-Disposition: form-data; name=model\r\nContent-Type: text/plain; charset=utf-8\r\n\r\nx\r\n--b--",
    b'--b\r\nContent-Disposition: form-data; name=file; filename*=utf-8\'\'m; filename="a\\"; name=model"\r\n\r\n\r\n--c\r\n--b--\r\n',
)
CONTENT_TYPES = (b"multipart/form-data; boundary=b", b'multipart/form-data; charset="utf-8"; boundary="b"')


def made_form(rng: random.Random) -> bytes:
    content_type = rng.choice(CONTENT_TYPES)
    if rng.random() < 0.3:
        content_type = edited(rng, content_type, FORM_TOKENS)
    return content_type + BETWEEN + edited(rng, rng.choice(FORMS), FORM_TOKENS)


def edited(rng: random.Random, data: bytes, tokens: tuple[bytes, ...]) -> bytes:
    body = bytearray(data)
    for _ in range(rng.randint(0, 5)):
        at = rng.randint(0, len(body))
        body[at : at + rng.choice((0, 0, 0, 1, 2, 10))] = rng.choice((*tokens, bytes(body[at : at + rng.randint(0, 40)])))
    return bytes(body)


def whole_zlib(window_bits: int, members: int) -> Callable[[bytes], bytes | None]:
    """Python's own decoder of everything at once; None for what is broken, cut short, or goes on."""

    def decode(body: bytes) -> bytes | None:
        plain = b""
        with contextlib.suppress(zlib.error):
            for _ in range(members):
                decoder = zlib.decompressobj(window_bits)
                plain += decoder.decompress(body)
                body = decoder.unused_data
                if not decoder.eof:
                    return None
                if not body:
                    return plain
        return None

    return decode


def whole_deflate(body: bytes) -> bytes | None:
    is_zlib = len(body) >= 2 and body[0] & 15 == 8 and int.from_bytes(body[:2], "big") % 31 == 0
    return whole_zlib(15 if is_zlib else -15, 1)(body)


def whole_brotli(body: bytes) -> bytes | None:
    with contextlib.suppress(brotli.error):
        return bytes(brotli.decompress(body))
    return None


def whole_zstd(body: bytes) -> bytes | None:
    """Frame by frame, each decoded in one call."""
    plain = b""
    for _ in range(encodings.MAX_MEMBERS):
        decoder = zstandard.ZstdDecompressor(max_window_size=encodings.MAX_WINDOW_BYTES).decompressobj()
        try:
            plain += decoder.decompress(body)
        except zstandard.ZstdError:
            return None
        if not decoder.eof:
            return None
        body = decoder.unused_data
        if not body:
            return plain
    return None


WHOLE: dict[str, Callable[[bytes], bytes | None]] = {
    "gzip": whole_zlib(31, encodings.MAX_MEMBERS),
    "deflate": whole_deflate,
    "br": whole_brotli,
    "zstd": whole_zstd,
}


def raw_deflate(body: bytes) -> bytes:
    encoder = zlib.compressobj(wbits=-15)
    return encoder.compress(body) + encoder.flush()


def fast_brotli(body: bytes) -> bytes:
    return bytes(brotli.compress(body, quality=1))


ENCODERS: tuple[Callable[[bytes], bytes], ...] = (gzip.compress, zlib.compress, raw_deflate, fast_brotli, zstandard.compress)
FRAMES = (b"\x28\xb5\x2f\xfd", b"\x50\x2a\x4d\x18\x00\x00\x00\x00", b"\x1f\x8b\x08\x00", b"\x78\x9c", b"\x00", b"\x03\x00")


def made_encoding(rng: random.Random) -> bytes:
    body = rng.choice(SEEDS) * rng.choice((0, 1, 1, 30))
    for _ in range(rng.choice((1, 1, 1, 2))):
        encode = rng.choice(ENCODERS)
        cut = rng.randint(0, len(body))
        body = encode(body) if rng.random() < 0.8 else encode(body[:cut]) + encode(body[cut:])
    return edited(rng, body, FRAMES) if rng.random() < 0.5 else body


TARGETS: dict[str, Callable[[random.Random, bytes], None]] = {
    "body": fuzz_body,
    "form": fuzz_form,
    "encoding": fuzz_encoding,
    "messages": fuzz_messages,
    "frames": fuzz_frames,
}
make: dict[str, Callable[[random.Random], bytes]] = {
    "body": lambda rng: mutated(rng, rng.choice(SEEDS)),
    "form": made_form,
    "encoding": made_encoding,
    "messages": lambda rng: BETWEEN.join(mutated(rng, rng.choice(MESSAGES)) for _ in range(rng.randint(1, 8))),
    "frames": make_frames,
}


def main(minutes: float, seed: int) -> int:
    """Run until the time is over or something is found; the exit code."""
    rng = random.Random(seed)
    end = time.monotonic() + minutes * 60
    counts = dict.fromkeys(TARGETS, 0)
    while time.monotonic() < end:
        for name, target in TARGETS.items():
            for _ in range(200):
                data = b""
                try:
                    data = make[name](rng)
                    target(rng, data)
                except Exception as error:
                    print(f"{name}: {type(error).__name__}: {error}\nseed {seed}, input {data!r}")
                    raise
                counts[name] += 1
    print(f"nothing found: {', '.join(f'{count} {name}' for name, count in counts.items())} (seed {seed})")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    arguments = parser.parse_args()
    sys.exit(main(arguments.minutes, arguments.seed))
