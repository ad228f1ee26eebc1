"""`ReadChunk` of protos/stager.proto, read and written by hand: the generated code would copy each byte that one node sends another four times more."""

from .core import varint


def encode(data: bytes) -> bytes:
    """The message with these bytes."""
    return b"".join((b"\x0a", varint.encode(len(data)), data))


def decode(message: bytes) -> memoryview:
    """The bytes of a message, without a copy. Raises ValueError for what `encode` does not write."""
    size, position = varint.decode(message, 1)
    if message[:1] != b"\x0a" or position + size != len(message):
        raise ValueError("not a ReadChunk with all its data")
    return memoryview(message)[position:]
