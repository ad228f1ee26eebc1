"""The reader of header blocks, beside the library that it replaces where it can."""

import contextlib
import random

import hpack
import pytest
from hpack.huffman import HuffmanEncoder
from hpack.huffman_constants import REQUEST_CODES, REQUEST_CODES_LENGTH
from hypothesis import given, settings
from hypothesis import strategies as st

from extproc.router.http2.frames import COMPRESSION_ERROR, ENHANCE_YOUR_CALM, ConnectionFault
from extproc.router.http2.headers import MAX_FIELDS, MAX_KNOWN, Blocks

PATH = "/envoy.service.ext_proc.v3.ExternalProcessor/Process"
GRPC = [(":method", "POST"), (":path", PATH), (":authority", "router"), (":scheme", "http"), ("te", "trailers"), ("content-type", "application/grpc")]
GIVE_UP_THE_TABLE = b"\x20"


def pinned() -> Blocks:
    """A reader whose peer has given up its table."""
    blocks = Blocks()
    blocks.pin()
    blocks.request(GIVE_UP_THE_TABLE + plain(GRPC))
    return blocks


def plain(fields: list[tuple[str, str]], huffman: bool = True) -> bytes:
    """A block of an encoder without a table."""
    encoder = hpack.Encoder()
    encoder.header_table_size = 0
    encoder.encode([])
    return encoder.encode(fields, huffman=huffman).removeprefix(GIVE_UP_THE_TABLE)


names = st.sampled_from(["traceparent", "x-forwarded-for", "user-agent", "grpc-timeout", "content-length", "cookie", "a", "n" * 200])
values = st.text("abc0129 ~{}\\", max_size=300)


@settings(max_examples=300)
@given(st.lists(st.tuples(names.filter(lambda name: name != "content-length"), values), max_size=8), st.booleans())
def test_it_reads_what_the_library_reads(more: list[tuple[str, str]], huffman: bool) -> None:
    """Whatever other headers there are, and however they are coded, the request is the same as through the library."""
    with_table = Blocks()
    block = hpack.Encoder().encode([*GRPC, *more], huffman=huffman)
    assert pinned().request(plain([*GRPC, *more], huffman)) == with_table.request(block)
    assert with_table.request(hpack.Encoder().encode(GRPC)).path == PATH


@settings(max_examples=500)
@given(st.binary(max_size=40))
def test_any_bytes_are_read_or_refused(block: bytes) -> None:
    """The walk refuses what the library refuses, and nothing else."""
    library = hpack.Decoder()
    library.header_table_size = library.max_allowed_table_size = 0
    try:
        library.decode(block, raw=True)
        readable = True
    except (hpack.HPACKError, IndexError):
        readable = False
    if readable:
        pinned().request(block)
    else:
        with pytest.raises(ConnectionFault) as caught:
            pinned().request(block)
        assert caught.value.code == COMPRESSION_ERROR


def test_strings_that_are_no_huffman_code_are_refused() -> None:
    """Also in values that nobody asks for: padding that is too long or not of ones, and the code for the end."""
    encoder = HuffmanEncoder(REQUEST_CODES, REQUEST_CODES_LENGTH)
    rng = random.Random(1)
    for _ in range(500):
        text = bytearray(encoder.encode(rng.randbytes(rng.randrange(6))))
        if text and rng.random() < 0.6:
            text[-1] ^= 1 << rng.randrange(8)
        text += b"\xff" * rng.randrange(3)
        library = hpack.Decoder()
        block = b"\x00\x01a" + bytes((0x80 | len(text),)) + text
        try:
            library.decode(block, raw=True)
        except hpack.HPACKError:
            with pytest.raises(ConnectionFault):
                pinned().request(plain(GRPC) + block)
        else:
            pinned().request(plain(GRPC) + block)


def test_a_table_is_understood_until_the_peer_gives_it_up() -> None:
    """A client that compresses before it has our settings, goes on for a while, and then says that it keeps none."""
    blocks = Blocks()
    encoder = hpack.Encoder()
    first, second = encoder.encode([*GRPC, ("x", "y")]), encoder.encode([*GRPC, ("x", "y")])
    assert len(second) < len(first)
    assert blocks.request(first).path == blocks.request(second).path == PATH
    blocks.pin()
    encoder.header_table_size = 0
    third, fourth = encoder.encode(GRPC), encoder.encode(GRPC)
    assert third.startswith(GIVE_UP_THE_TABLE)
    assert blocks.request(third).path == blocks.request(fourth).path == PATH
    with pytest.raises(ConnectionFault, match="decoded"):
        blocks.request(second)  # refers to a table that is gone


def test_a_table_cannot_be_had_again() -> None:
    """Neither at the beginning of a block nor inside."""
    for block in (b"\x21" + plain(GRPC), b"\x3f\xe1\x1f" + plain(GRPC), plain(GRPC) + b"\x20"):
        with pytest.raises(ConnectionFault) as caught:
            pinned().request(block)
        assert caught.value.code == COMPRESSION_ERROR


def test_more_fields_than_anybody_sends_are_refused() -> None:
    """One byte each in a block, many more as headers."""
    with pytest.raises(ConnectionFault) as caught:
        pinned().request(b"\x84" * (MAX_FIELDS + 1))
    assert caught.value.code == ENHANCE_YOUR_CALM


def test_what_is_remembered_is_bounded_and_renewed() -> None:
    """A thousand blocks with a trace each, and then a new one that comes often: it is known, and the memory has not grown."""
    blocks = pinned()
    for number in range(1000):
        assert blocks.request(plain([*GRPC, ("traceparent", f"00-{number:032x}-01")])).path == PATH
    often = plain([*GRPC, ("x-new", "1")])
    assert blocks.request(often) is blocks.request(often)
    assert max(len(blocks._requests), len(blocks._judged), len(blocks._strings)) <= MAX_KNOWN


@pytest.mark.parametrize("cut", range(1, len(plain(GRPC))))
def test_a_block_that_ends_too_early_is_refused_or_malformed(cut: int) -> None:
    """It is never taken for a whole one."""
    with contextlib.suppress(ConnectionFault):
        request = pinned().request(plain(GRPC)[:cut])
        assert request.malformed or request.status
