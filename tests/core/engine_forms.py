"""How an engine reads a form: python-multipart's parser, used as Starlette uses it for vLLM and SGLang."""

import codecs
import logging
from dataclasses import dataclass, field

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # it warns of each form that it refuses


class EngineRefuses(Exception):
    """It would answer 400."""


@dataclass
class Part:
    """One field or file."""

    name: str = ""
    value: bytes = b""
    is_file: bool = False
    disposition: bytes | None = None
    line: list[bytes] = field(default_factory=lambda: [b"", b""])


def text(raw: bytes, charset: str) -> str:
    """Starlette's `_user_safe_decode`."""
    try:
        return raw.decode(charset)
    except (UnicodeDecodeError, LookupError):
        return raw.decode("latin-1")


def read(content_type: str, body: bytes) -> list[Part]:
    """The parts in order. Raises EngineRefuses."""
    _, parameters = parse_options_header(content_type)
    try:
        charset = codecs.lookup(parameters.get(b"charset", b"utf-8").decode("latin-1")).name
    except LookupError:
        charset = "latin-1"
    if b"boundary" not in parameters:
        raise EngineRefuses("no boundary")
    parts: list[Part] = []
    ended: list[Part] = []

    def header_field(data: bytes, start: int, end: int) -> None:
        parts[-1].line[0] += data[start:end]

    def header_value(data: bytes, start: int, end: int) -> None:
        parts[-1].line[1] += data[start:end]

    def header_end() -> None:
        name, value = parts[-1].line
        if name.lower() == b"content-disposition":
            parts[-1].disposition = value
        parts[-1].line = [b"", b""]

    def headers_finished() -> None:
        _, options = parse_options_header(parts[-1].disposition)
        if b"name" not in options:
            raise EngineRefuses("a part without a name")
        parts[-1].name = text(options[b"name"], charset)
        parts[-1].is_file = b"filename" in options

    def data(data: bytes, start: int, end: int) -> None:
        parts[-1].value += data[start:end]

    try:
        MultipartParser(
            parameters[b"boundary"],
            {
                "on_part_begin": lambda: parts.append(Part()),
                "on_part_data": data,
                "on_part_end": lambda: ended.append(parts[-1]),
                "on_header_field": header_field,
                "on_header_value": header_value,
                "on_header_end": header_end,
                "on_headers_finished": headers_finished,
            },
        ).write(body)
    except FormParserError as error:
        raise EngineRefuses(str(error)) from error
    return ended


def models(content_type: str, body: bytes) -> list[str | None]:
    """What it takes for `model`, None for a file of that name. Raises EngineRefuses."""
    return [None if part.is_file else part.value.decode("utf-8", "replace") for part in read(content_type, body) if part.name == "model"]
