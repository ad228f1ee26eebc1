"""The header of a safetensors file by the format's own rules, read in steps that are bounded each: a thread may stop between any two of them.

A file is 8 bytes with the header's length, the header (a JSON object: tensor name -> dtype, shape and range, and `__metadata__`), and the data,
which the ranges cover without holes (https://github.com/huggingface/safetensors, "Format"). A JSON parser that is given a whole header holds the
interpreter for as long as the header's author wants; here it is given one tensor's description at a time, out of a window of some kilobytes.
"""

import codecs
import re
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from json import JSONDecoder
from json.decoder import scanstring  # type: ignore[attr-defined]  # the stubs leave it out
from typing import IO, Any, NoReturn

from ...errors import InvalidAdapter
from ..threads import Steps
from .files import WEIGHTS_FILE, foreign, refuse

PREFIX_BYTES = 8
MAX_HEADER_BYTES = 32 * 2**20  # the format allows 100 MB; 138,000 tensors, two for each expert of the largest models, take 22 MB
MAX_TENSORS = 150_000
MAX_UNUSUAL_TENSORS = 50_000  # that are not written as the format's own writer or Python's json does: each costs ten microseconds
MAX_METADATA = 10_000  # entries; real ones have up to a hundred
MAX_DIMENSIONS = 8  # a LoRA matrix has 2, stacked experts 3
MAX_NAME_CHARACTERS = 1024  # real ones have up to 150
MAX_DESCRIPTION_CHARACTERS = 4096  # of one tensor: real ones have up to 100
MAX_TEXT_CHARACTERS = 2**20  # of one value in __metadata__, where some trainers keep their whole settings
MAX_SPACE_CHARACTERS = 4 * 2**20  # between all items together: the format's writer puts up to 7, an indented header of 20 MB has 3 million
MAX_NUMBER = 2**63 - 1  # readers keep sizes and ranges in machine words
READ_BYTES = 2**16
TENSORS_PER_STEP = 1000  # some milliseconds

# dtype -> bits, as safetensors 0.8 names them
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E5M2FNUZ": 8, "F8_E4M3FNUZ": 8, "F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip

_SPACE = re.compile(r"[ \t\n\r]*")
_N = r"(?:0|[1-9][0-9]{0,18})"
# A tensor as the format's own writer spells it, or Python's json: read in one go, three times as fast as JSON in general.
_USUAL = re.compile(
    rf'([^"\\\x00-\x1f]{{1,200}})": ?{{"dtype": ?"([A-Z0-9_]{{1,16}})", ?"shape": ?\[({_N}(?:, ?{_N}){{0,7}})\], ?"data_offsets": ?\[({_N}), ?({_N})\]}}'
)


@dataclass(slots=True)
class Header:
    """What a header says of the data. Few objects for each tensor: the interpreter frees hundreds of thousands in one piece, and nobody else runs."""

    data_begin: int  # in the file, in bytes
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)  # by name; equal ones are one object
    names: list[str] = field(default_factory=list)  # in the order of the data, without empty tensors
    ends: "array[int]" = field(default_factory=lambda: array("q"))  # of each of those, in bytes of the data; it begins where the one before ends
    runs: list[tuple[str, int]] = field(default_factory=list)  # dtype and end of each run of neighbours that have it

    @property
    def data_bytes(self) -> int:
        return self.ends[-1] if self.ends else 0

    def name_at(self, offset: int) -> str:
        """Whose byte of the data it is."""
        return self.names[bisect_right(self.ends, offset)]

    def clear(self) -> None:
        """Give the memory back one by one: 150,000 names are freed in one piece otherwise, in the event loop where the last to hold them is an error."""
        self.names.clear()
        while self.shapes:
            self.shapes.popitem()


def header_length(first: bytes, file_size: int) -> int:
    """How many bytes of header follow the first 8 of a file. Raises InvalidAdapter."""
    if what := foreign(first):
        refuse(WEIGHTS_FILE, what)
    if len(first) < PREFIX_BYTES:
        refuse(WEIGHTS_FILE, f"has {len(first)} bytes: no safetensors header")
    length = int.from_bytes(first[:PREFIX_BYTES], "little")
    if length > file_size - PREFIX_BYTES:
        refuse(WEIGHTS_FILE, f"is no safetensors file, or cut short: its header would be longer than its {file_size} bytes")
    if length > MAX_HEADER_BYTES:
        refuse(WEIGHTS_FILE, f"has a header of {length} bytes; the limit is {MAX_HEADER_BYTES}")
    return length


def read_header(file: IO[bytes], file_size: int) -> Steps[Header]:
    """All of it, checked. `file` stands at its begin and need not go on behind the header. Raises InvalidAdapter."""
    length = header_length(file.read(PREFIX_BYTES), file_size)
    header = Header(PREFIX_BYTES + length)
    try:
        yield from _read(header, file, length, file_size)
    except InvalidAdapter:
        header.clear()
        raise
    return header


def _read(header: Header, file: IO[bytes], length: int, file_size: int) -> Steps[None]:
    layout = _Layout(header)
    unusual = 0
    text = _Text(file, length)
    if text.peek() != "{":
        refuse(WEIGHTS_FILE, "has a header that does not begin with '{'")
    has_metadata = False
    for name, usual in text.members(_USUAL):
        if name in header.shapes or (has_metadata and name == "__metadata__"):
            refuse(WEIGHTS_FILE, f"has a broken header: a name appears twice, {name[:100]!r}")
        if usual is not None:
            _, dtype, shape, begin, end = usual.groups()
            layout.take(name, dtype, list(map(int, shape.split(","))), int(begin), int(end))
        elif name == "__metadata__":
            has_metadata = True
            yield from _read_metadata(text)
        else:
            layout.take(name, *_described(name, text.value()))
            unusual += 1
            if unusual > MAX_UNUSUAL_TENSORS:
                refuse(WEIGHTS_FILE, f"has over {MAX_UNUSUAL_TENSORS} tensors that are written in another way than the format's own writer does")
        if len(header.shapes) > MAX_TENSORS:
            refuse(WEIGHTS_FILE, f"has over {MAX_TENSORS} tensors")
        if len(header.shapes) % TENSORS_PER_STEP == 0:
            yield
    if text.next():
        refuse(WEIGHTS_FILE, "has a broken header: something follows its end")
    layout.check(file_size - header.data_begin)


def _read_metadata(text: "_Text") -> Steps[None]:
    """Null, or an object of texts, which nobody here reads."""
    first = text.next()
    text.back()
    if first != "{":
        if text.value() is not None:
            refuse(WEIGHTS_FILE, "has a __metadata__ that is not made of strings")
        return
    for number, _ in enumerate(text.members(), 1):
        if number > MAX_METADATA:
            refuse(WEIGHTS_FILE, f"has over {MAX_METADATA} entries in its __metadata__")
        if text.next() != '"':
            refuse(WEIGHTS_FILE, "has a __metadata__ that is not made of strings")
        text.string(MAX_TEXT_CHARACTERS)
        if number % TENSORS_PER_STEP == 0:
            yield


def _described(name: str, raw: Any) -> tuple[str, list[int], int, int]:
    """dtype, shape, begin and end out of a tensor's JSON."""
    if not isinstance(raw, dict) or not {"dtype", "shape", "data_offsets"} <= raw.keys():
        refuse(WEIGHTS_FILE, f"tensor {name[:100]!r} lacks dtype, shape or data_offsets")
    dtype, shape, offsets = raw["dtype"], raw["shape"], raw["data_offsets"]
    numbers = (*shape, *offsets) if isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2 else (None,)
    if not all(type(number) is int and number >= 0 for number in numbers):
        refuse(WEIGHTS_FILE, f"tensor {name[:100]!r} has a shape or range that is not made of whole numbers")
    return dtype if isinstance(dtype, str) else "", shape, offsets[0], offsets[1]


class _Layout:
    """Ranges without holes or overlap: each begins where one ends. They mostly come in that order, and are kept only while they do not."""

    def __init__(self, header: Header) -> None:
        self._header = header
        self._at = 0  # up to here the data is covered
        self._later: dict[int, tuple[int, str, str]] = {}  # begin -> end, dtype and name of what begins elsewhere
        self._known: dict[tuple[int, ...], tuple[int, ...]] = {}  # shapes that were seen: an adapter has a handful

    def take(self, name: str, dtype: str, shape: list[int], begin: int, end: int) -> None:
        """One more tensor, if what is said of it agrees. Raises InvalidAdapter."""
        if len(shape) > MAX_DIMENSIONS:
            refuse(WEIGHTS_FILE, f"tensor {name[:100]!r} has {len(shape)} dimensions; the limit is {MAX_DIMENSIONS}")
        bits = DTYPE_BITS.get(dtype)
        if bits is None:
            refuse(WEIGHTS_FILE, f"tensor {name[:100]!r} has an unknown dtype, {dtype[:20]!r}")
        count = 1
        for number in shape:
            count *= number
            if count > MAX_NUMBER or number > MAX_NUMBER:  # while multiplying: a product of long numbers takes long
                refuse(WEIGHTS_FILE, f"tensor {name[:100]!r} has a shape of over {MAX_NUMBER} elements")
        if not begin <= end <= MAX_NUMBER:
            refuse(WEIGHTS_FILE, f"tensor {name[:100]!r} has a range that ends before it begins, or too late")
        if count * bits != (end - begin) * 8:
            refuse(WEIGHTS_FILE, f"tensor {name[:100]!r}: shape {shape} of {dtype} does not take {end - begin} bytes")
        known = tuple(shape)
        self._header.shapes[name] = self._known.setdefault(known, known)
        if begin == self._at < end:
            self._cover(end, dtype, name)
        elif begin < end and (begin < self._at or self._later.setdefault(begin, (end, dtype, name))[2] != name):
            refuse(WEIGHTS_FILE, f"tensor {name[:100]!r} begins at byte {begin} of the data, where another does or goes on")

    def _cover(self, end: int, dtype: str, name: str) -> None:
        header = self._header
        while True:
            self._at = end
            header.names.append(name)
            header.ends.append(end)
            if header.runs and header.runs[-1][0] == dtype:
                header.runs[-1] = (dtype, end)
            else:
                header.runs.append((dtype, end))
            if end not in self._later:
                return
            end, dtype, name = self._later.pop(end)

    def check(self, data_bytes: int) -> None:
        """After the last. Raises InvalidAdapter."""
        if self._later:
            begin = min(self._later)
            name = self._later[begin][2]
            while self._later:  # one by one, as Header.clear
                self._later.popitem()
            refuse(WEIGHTS_FILE, f"tensor {name[:100]!r} begins at byte {begin} of the data; {self._at} was expected")
        if self._at != data_bytes:
            refuse(WEIGHTS_FILE, f"tensors take {self._at} bytes; the file holds {data_bytes} (cut short or padded)")


class _Text:
    """A window on the header's text: the file is read and decoded as far as the next item may reach, and what was read is dropped."""

    def __init__(self, file: IO[bytes], length: int) -> None:
        self._file = file
        self._left = length
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        self._parse = JSONDecoder(object_pairs_hook=_unique).raw_decode
        self._text = ""
        self._at = 0
        self._space = 0  # characters of it that were passed over

    def peek(self) -> str:
        """The very next character."""
        self._fill(1)
        return self._text[self._at : self._at + 1]

    def next(self) -> str:
        """The next character that is no white space; "" at the end."""
        while True:
            space = _SPACE.match(self._text, self._at)
            assert space is not None
            self._space += space.end() - self._at
            if self._space > MAX_SPACE_CHARACTERS:
                refuse(WEIGHTS_FILE, f"has a header with over {MAX_SPACE_CHARACTERS} characters of white space")
            self._at = space.end() + 1
            if self._at <= len(self._text):
                return self._text[self._at - 1]
            self._at = len(self._text)
            if not self._left:
                return ""
            self._fill(1)

    def back(self) -> None:
        """Before the character that `next` has just given."""
        self._at -= 1

    def members(self, whole: re.Pattern[str] | None = None) -> Iterator[tuple[str, re.Match[str] | None]]:
        """The names in the object that begins here. Each comes with the match of `whole`, if that reads a name (without its opening quote) and its
        value; otherwise whoever asks reads the value before asking for the next.
        """
        if self.next() != "{":
            self._broken()
        after = self.next()
        while after != "}":
            if after != '"':
                self._broken()
            self._fill(MAX_DESCRIPTION_CHARACTERS)
            if whole is not None and (match := whole.match(self._text, self._at)):
                self._at = match.end()
                yield match[1], match
            else:
                name = self.string(MAX_NAME_CHARACTERS)
                if self.next() != ":":
                    self._broken()
                yield name, None
            after = self.next()
            if after == ",":
                after = self.next()
                if after == "}":
                    self._broken()
            elif after != "}":
                self._broken()

    def string(self, max_characters: int) -> str:
        """The text whose opening quote was read."""
        self._fill(max_characters + 1)
        value: str
        try:
            value, end = scanstring(self._text, self._at, True)
            value.encode()
        except ValueError:  # an unpaired surrogate, too
            self._broken()
        if len(value) > max_characters:
            refuse(WEIGHTS_FILE, f"has a text of over {max_characters} characters in its header")
        self._at = end
        return value

    def value(self) -> Any:
        """A value that fits into the window."""
        self.next()
        self.back()
        self._fill(MAX_DESCRIPTION_CHARACTERS)
        try:
            value, self._at = self._parse(self._text, self._at)
        except (ValueError, RecursionError):
            self._broken()
        return value

    def _fill(self, count: int) -> None:
        """Have `count` characters ahead, unless the header ends before."""
        while len(self._text) - self._at < count and self._left:
            piece = self._file.read(min(READ_BYTES, self._left))
            if not piece:
                refuse(WEIGHTS_FILE, "is cut short in its header")
            self._left -= len(piece)
            try:
                self._text = self._text[self._at :] + self._decode(piece, not self._left)
            except UnicodeDecodeError:
                refuse(WEIGHTS_FILE, "has a broken header: it is not UTF-8")
            self._at = 0

    def _broken(self) -> NoReturn:
        refuse(WEIGHTS_FILE, f"has a broken header: no JSON of tensors, or a description of over {MAX_DESCRIPTION_CHARACTERS} characters")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name appears twice")
    return result
