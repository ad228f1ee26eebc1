"""A body in the pieces that it came in: another value put into it, and cut into messages, as views. Nothing large is copied."""

from collections.abc import Sequence

Buffer = bytes | memoryview
Pieces = Buffer | tuple[Buffer, ...]  # one piece is handled faster than a tuple of one

JOINED_BYTES = 62_000  # a body up to this size is joined when it is changed: one write of it costs less than three


def size_of(pieces: Pieces) -> int:
    """Bytes of all pieces together."""
    return sum(map(len, pieces)) if isinstance(pieces, tuple) else len(pieces)


def spliced(pieces: Sequence[Buffer], begin: int, end: int, value: bytes) -> list[Buffer]:
    """The body with `value` for what stands from `begin` to `end`."""
    if len(pieces) == 1 and len(pieces[0]) <= JOINED_BYTES:
        view = memoryview(pieces[0])
        return [b"".join((view[:begin], value, view[end:]))]
    changed: list[Buffer] = []
    at = 0
    for piece in pieces:
        size = len(piece)
        if begin < at + size and end > at:
            view = memoryview(piece)
            if begin >= at:
                changed += (view[: begin - at], value)
            changed.append(view[max(0, end - at) :])
        else:
            changed.append(piece)
        at += size
    return [piece for piece in changed if len(piece)]


def cut(pieces: Sequence[Buffer], max_bytes: int) -> list[Pieces]:
    """The body in parts of `max_bytes`, the last of what is left; none of them empty."""
    if len(pieces) == 1 and len(pieces[0]) <= max_bytes:
        return [piece for piece in pieces if len(piece)]
    parts: list[Pieces] = []
    part: list[Buffer] = []
    room = max_bytes
    for piece in pieces:
        view = memoryview(piece)
        while view:
            taken, view = view[:room], view[room:]
            part.append(taken)
            room -= len(taken)
            if not room:
                parts.append(one(part))
                part, room = [], max_bytes
    if part:
        parts.append(one(part))
    return parts


def one(pieces: Sequence[Buffer]) -> Pieces:
    """A single piece by itself, several as a tuple."""
    return pieces[0] if len(pieces) == 1 else tuple(pieces)
