"""What one node sends another, compared with the generated code."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc import chunks
from extproc.pb import stager_pb2 as pb


@given(st.binary(min_size=1, max_size=300) | st.sampled_from([127, 128, 16_383, 16_384, 2**20]).map(bytes))
def test_a_chunk_is_written_and_read_as_the_generated_code_does(data: bytes) -> None:
    """At every length of its length."""
    assert chunks.encode(data) == pb.ReadChunk(data=data).SerializeToString()
    assert bytes(chunks.decode(pb.ReadChunk(data=data).SerializeToString())) == data


@pytest.mark.parametrize("message", [b"", b"\x0a", b"\x0a\x05abc", b"\x12\x01a", b"\x0a\x01ab", b"\x0a\xff\xff\xff\xff\xff\x01"])
def test_what_is_no_chunk_is_not_read(message: bytes) -> None:
    """Cut short, too long, or another field."""
    with pytest.raises(ValueError, match="not a ReadChunk"):
        chunks.decode(message)
