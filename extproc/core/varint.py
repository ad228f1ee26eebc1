"""Numbers as protobuf writes them, seven bits to a byte: for the messages that are mostly one large field and not worth a copy by the generated code."""

NO_SIZE = 2**63  # more than any message has


def encode(value: int) -> bytes:
    """A number that is not negative."""
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def decode(message: bytes | memoryview, position: int) -> tuple[int, int]:
    """A number of at most five bytes and where it ends; NO_SIZE if it does not end there."""
    value = shift = 0
    for at in range(position, min(position + 5, len(message))):
        byte = message[at]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at + 1
        shift += 7
    return NO_SIZE, position
