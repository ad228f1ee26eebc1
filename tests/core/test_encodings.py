"""Content encodings: what is decoded, what is refused, and that nothing unfolds beyond its limit."""

import gzip
import json
import random
import subprocess
import sys
import textwrap
import zlib
from collections.abc import Callable
from functools import partial

import brotli
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from extproc.core.encodings import MAX_MEMBERS, MAX_RATIO, decode, of_header
from extproc.errors import BodyTooLarge, InvalidRequest

LIMIT = 2**20


def raw_deflate(plain: bytes) -> bytes:
    encoder = zlib.compressobj(wbits=-15)
    return encoder.compress(plain) + encoder.flush()


def zstd_streamed(plain: bytes) -> bytes:
    """Without the size in its header, as a client writes that does not know it beforehand."""
    encoder = zstandard.ZstdCompressor().compressobj()
    return encoder.compress(plain) + encoder.flush()


ENCODERS: list[tuple[str, Callable[[bytes], bytes]]] = [
    ("gzip", gzip.compress),
    ("deflate", zlib.compress),
    ("deflate", raw_deflate),
    ("br", partial(brotli.compress, quality=5)),
    ("zstd", zstandard.compress),
    ("zstd", zstd_streamed),
]
each_encoder = pytest.mark.parametrize(("name", "encode"), ENCODERS)
SKIPPABLE = b"\x50\x2a\x4d\x18\x05\x00\x00\x00abcde"  # RFC 8878, 3.1.2


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ("", ()),
        ("identity", ()),
        ("UTF-8", ()),
        ("none", ()),
        (" , identity ,", ()),
        ("GZIP", ("gzip",)),
        ("x-gzip", ("gzip",)),
        ("gzip, identity", ("gzip",)),
        ("gzip,\tbr", ("gzip", "br")),
    ],
)
def test_what_says_nothing_is_nothing(value: str, names: tuple[str, ...]) -> None:
    """Clients name the character set there, or that there is none."""
    assert of_header(value) == names


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("compress", "'compress' is not understood; gzip, deflate, br and zstd are"),
        ("gzip, aws-chunked", "'aws-chunked' is not understood"),
        ("gzip;q=1", "'gzip;q=1' is not understood"),
        ("x" * 10_000, "'x{40}' is not understood"),
        ("gzip, br, zstd", "3 encodings, one upon another; 2 is the limit"),
        (",".join(["gzip"] * 5000), "5000 encodings"),
    ],
)
def test_unknown_encodings_and_too_many_are_named(value: str, why: str) -> None:
    """With those that are understood, and the limit."""
    with pytest.raises(InvalidRequest, match=f"^content-encoding: {why}"):
        of_header(value)


@each_encoder
@given(plain=st.binary(max_size=5000), as_view=st.booleans())
@settings(deadline=None)
def test_every_encoding_gives_the_body_back(name: str, encode: Callable[[bytes], bytes], plain: bytes, as_view: bool) -> None:
    """What was compressed is what is judged."""
    body = encode(plain)
    assert decode(memoryview(body) if as_view else body, (name,), LIMIT) == plain


@each_encoder
def test_large_bodies_come_in_many_pieces(name: str, encode: Callable[[bytes], bytes]) -> None:
    """Text that compresses as text does, in more than one window of each decoder."""
    rng = random.Random(1)
    plain = json.dumps([rng.choice(["alpha", "beta", str(rng.random())]) for _ in range(200_000)]).encode()
    assert decode(encode(plain), (name,), 2**23) == plain


@each_encoder
@pytest.mark.parametrize(("other", "encode_other"), ENCODERS)
def test_two_encodings_are_taken_off_in_reverse_order(name: str, encode: Callable[[bytes], bytes], other: str, encode_other: Callable[[bytes], bytes]) -> None:
    """The header lists them as they were applied (RFC 9110, 8.4)."""
    assert decode(encode_other(encode(b'{"model":"a"}')), (name, other), LIMIT) == b'{"model":"a"}'


@each_encoder
def test_what_is_cut_short_is_refused(name: str, encode: Callable[[bytes], bytes]) -> None:
    """At any byte, the last one included."""
    whole = encode(b'{"model":"a"}' * 20)
    for size in range(len(whole)):
        with pytest.raises(InvalidRequest, match=f"is not {name}"):
            decode(whole[:size], (name,), LIMIT)


@each_encoder
@pytest.mark.parametrize("rest", [b"x", b"\x00", b"\n", b"no such thing" * 10_000])
def test_what_goes_on_after_its_end_is_refused(name: str, encode: Callable[[bytes], bytes], rest: bytes) -> None:
    """An engine that reads on, and one that does not, would read different bodies."""
    with pytest.raises(InvalidRequest, match=f"is not {name}"):
        decode(encode(b'{"model":"a"}' * 20) + rest, (name,), LIMIT)


@pytest.mark.parametrize(("name", "encode"), [("gzip", gzip.compress), ("zstd", zstandard.compress), ("zstd", zstd_streamed)])
def test_several_members_are_one_body(name: str, encode: Callable[[bytes], bytes]) -> None:
    """RFC 1952, 2.2 and RFC 8878, 3.1 allow them; more than any client writes are refused."""
    assert decode(encode(b'{"model":') + encode(b"") + encode(b'"a"}'), (name,), LIMIT) == b'{"model":"a"}'
    assert decode(encode(b"ab") * MAX_MEMBERS, (name,), LIMIT) == b"ab" * MAX_MEMBERS
    with pytest.raises(InvalidRequest, match=f"over {MAX_MEMBERS} {name}"):
        decode(encode(b"ab") * (MAX_MEMBERS + 1), (name,), LIMIT)


def test_skippable_frames_count() -> None:
    """They decode to nothing, and still each begins anew."""
    assert decode(SKIPPABLE + zstandard.compress(b"a") + SKIPPABLE, ("zstd",), LIMIT) == b"a"
    with pytest.raises(InvalidRequest, match=f"over {MAX_MEMBERS} zstd frames"):
        decode(SKIPPABLE * (MAX_MEMBERS + 1), ("zstd",), LIMIT)


@each_encoder
def test_bodies_are_limited_by_size_and_by_ratio(name: str, encode: Callable[[bytes], bytes]) -> None:
    """To the byte, and whichever is less."""
    plain = random.Random(2).randbytes(3000) * 20
    body = encode(plain)
    assert decode(body, (name,), len(plain)) == plain
    with pytest.raises(BodyTooLarge, match=f"over {len(plain) - 1} bytes"):
        decode(body, (name,), len(plain) - 1)
    bomb = encode(bytes(50 * 2**20))
    with pytest.raises(BodyTooLarge, match=f"over {MAX_RATIO * max(len(bomb), 1024)} bytes"):
        decode(bomb, (name,), 2**40)


def test_the_ratio_is_that_of_the_whole_stack() -> None:
    """Two encodings do not square it."""
    bomb = gzip.compress(gzip.compress(bytes(20 * 2**20)))
    with pytest.raises(BodyTooLarge, match=f"over {MAX_RATIO * 1024} bytes"):
        decode(bomb, ("gzip", "gzip"), 2**40)


def test_a_window_beyond_the_limit_is_refused() -> None:
    """A frame may ask its decoder for gigabytes of window."""
    parameters = zstandard.ZstdCompressionParameters(window_log=27, enable_ldm=True)
    encoder = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    body = encoder.compress(b"a" * 10_000) + encoder.flush()
    with pytest.raises(InvalidRequest, match="is not zstd"):
        decode(body, ("zstd",), LIMIT)


# ---- memory


def zstd_bomb(size: int) -> bytes:
    """Blocks of one repeated byte (RFC 8878, 3.1.1.2.2): 4 bytes for 128 KiB each."""
    block = 2**17
    header = b"\x28\xb5\x2f\xfd\x00\x58"  # no content size, window 2 MiB
    return header + ((block << 3 | 2).to_bytes(3, "little") + b"\x00") * (size // block - 1) + (block << 3 | 3).to_bytes(3, "little") + b"\x00"


def gzip_bomb(size: int) -> bytes:
    """Blocks that do not refer to one another, made once; the checksum at the end is never reached."""
    encoder = zlib.compressobj(9, wbits=31)
    start = encoder.compress(b"") + encoder.flush(zlib.Z_FULL_FLUSH)
    block = encoder.compress(bytes(2**20)) + encoder.flush(zlib.Z_FULL_FLUSH)
    return start + block * (size // 2**20) + encoder.flush()


def brotli_bomb(size: int) -> bytes:
    encoder = brotli.Compressor(quality=1, lgwin=24)
    return bytes(b"".join(encoder.process(bytes(2**20)) for _ in range(size // 2**20)) + encoder.finish())


GIB = 2**30
BOMBS: dict[str, tuple[tuple[str, ...], Callable[[], bytes]]] = {
    "brotli": (("br",), lambda: brotli_bomb(GIB)),
    "zstd": (("zstd",), lambda: zstd_bomb(GIB)),
    "gzip": (("gzip",), lambda: gzip_bomb(GIB)),
    "gzip in brotli": (("gzip", "br"), lambda: brotli.compress(gzip_bomb(GIB))),
    "zstd in zstd": (("zstd", "zstd"), lambda: zstandard.compress(zstd_bomb(GIB))),
    "many members": (("gzip",), lambda: gzip.compress(bytes(2**21)) * 64),
    "many frames": (("zstd",), lambda: zstd_bomb(2**26) * 16),
    "a frame that states its size": (("zstd",), lambda: b"\x28\xb5\x2f\xfd\xe0" + (2**40).to_bytes(8, "little") + zstd_bomb(GIB)[6:]),
}
CHILD = """
import resource, sys
from extproc.core.encodings import decode
from extproc.errors import BodyTooLarge, InvalidRequest
body = sys.stdin.buffer.read()
now = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (now + 64 * 2**20,) * 2)
try:
    print("decoded", len(decode(body, tuple(sys.argv[1].split(",")), 10 * 2**20)))
except (BodyTooLarge, InvalidRequest) as error:
    print(type(error).__name__)
"""


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_in_little_memory(name: str) -> None:
    """A gibibyte of zeros, in a process that can take 64 MiB more than it has."""
    encodings, make = BOMBS[name]
    child = subprocess.run([sys.executable, "-c", textwrap.dedent(CHILD), ",".join(encodings)], input=make(), capture_output=True, check=False, timeout=120)
    assert child.stdout.decode().strip() in ("BodyTooLarge", "InvalidRequest"), child.stderr.decode()
