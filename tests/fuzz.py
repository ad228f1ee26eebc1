"""`python -m tests.fuzz --minutes 10`: random bodies, messages and frames against what they must never do. Prints the input that did it."""

import argparse
import contextlib
import random
import sys
import time
from collections.abc import Callable

from extproc.core import content, scanner
from extproc.core.events import Decide, Mutation, RequestHeaders
from extproc.core.exchange import Exchange
from extproc.errors import LoraExtprocError
from extproc.router import wire
from tests.core.test_scanner import strict

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
    """The verdict is the strict reference's, and the scanner agrees with a verdict that is a model, in any chunking."""
    try:
        verdict: str | None = scanner.judge(body)
    except LoraExtprocError:
        verdict = None
    assert verdict == strict(body), f"verdict {verdict!r}, the reference says {strict(body)!r}"
    found = scanner.Scanner()
    start = 0
    while start < len(body):
        step = rng.randint(1, 12)
        found.feed(body[start : start + step])
        start += step
    assert verdict is None or found.model == verdict, f"scanner {found.model!r}, verdict {verdict!r}"
    if verdict is not None:
        fuzz_rename(body, verdict)


def fuzz_rename(body: bytes, old: str) -> None:
    """Another model is read where one was, and taken back the body is what it was."""
    new = "acme/a@sha256:0123456789ab"
    renamed = scanner.rename(body, old, new)
    assert strict(renamed) == new, f"renamed it reads {strict(renamed)!r}"
    walk = scanner.Scanner()
    walk.feed(body)
    begin, end = walk.span
    assert (renamed[:begin], renamed[len(renamed) - len(body) + end :]) == (body[:begin], body[end:])


def fuzz_form(rng: random.Random, body: bytes) -> None:
    """Forms and compressed bodies: an answer or one of our errors."""
    for kind, encoding in ((content.Kind.FORM, ""), (content.Kind.JSON, rng.choice(("gzip", "deflate", "br", "zstd")))):
        with contextlib.suppress(LoraExtprocError):
            content.Content(kind, b"b", encoding).model(body, 2**20)


def fuzz_messages(rng: random.Random, messages: bytes) -> None:
    """Messages of any bytes: always an event, and never an exception out of the exchange."""
    exchange = Exchange(max_body_bytes=1000, early_scan_bytes=0)
    for message in messages.split(BETWEEN):
        event = wire.decode(message)
        if isinstance(event, RequestHeaders):
            event.headers = {**event.headers, "content-type": rng.choice(("application/json", "text/plain", "multipart/form-data; boundary=b"))}
        for action in exchange.receive(event):
            if isinstance(action, Decide):
                for reply in exchange.decided(Mutation({"a": "b"}, model=rng.choice(("", "x@sha256:0")))):
                    assert not isinstance(reply, Decide)
                    wire.encode(reply)
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
FORM = b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\ndemo/sql\r\n--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\nxx\r\n--b--\r\n'
TARGETS: dict[str, Callable[[random.Random, bytes], None]] = {"body": fuzz_body, "form": fuzz_form, "messages": fuzz_messages}
make: dict[str, Callable[[random.Random], bytes]] = {
    "body": lambda rng: mutated(rng, rng.choice(SEEDS)),
    "form": lambda rng: mutated(rng, FORM),
    "messages": lambda rng: BETWEEN.join(mutated(rng, rng.choice(MESSAGES)) for _ in range(rng.randint(1, 8))),
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
