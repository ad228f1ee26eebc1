"""What a request body is by its headers, and the reading of it: JSON or a form, plain or encoded."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

import msgspec

from . import encodings, forms, verdict
from .pieces import Buffer
from .reading import Reading

__all__ = ["Buffer", "Content", "Kind", "Reading", "of_headers"]


class Kind(Enum):
    """How the model is found in it."""

    JSON = "application/json"
    FORM = "multipart/form-data"


_JSON = Kind.JSON  # as the states of core/exchange.py


@dataclass(frozen=True, slots=True)
class Content:
    """A body that names a model."""

    kind: Kind
    boundary: bytes = b""  # of a form
    encodings: tuple[str, ...] = ()  # in the order in which they were applied; () = plain

    @property
    def can_be_scanned(self) -> bool:
        """Whether the model can be seen before the body is complete."""
        return self.kind is _JSON and not self.encodings

    def read(self, body: Buffer, max_bytes: int, *, with_blocks: bool = False) -> Reading:
        """Judge the whole body: the model that it names, and where; `with_blocks`, the hashes of its prompt's blocks, which a form has none of.

        Raises InvalidRequest, or BodyTooLarge if it decodes to over `max_bytes`.
        """
        if not self.encodings:
            return verdict.judge(body, with_blocks=with_blocks) if self.kind is _JSON else forms.read(body, self.boundary)
        plain = encodings.decode(body, self.encodings, max_bytes)
        reading = verdict.judge(plain, with_blocks=with_blocks) if self.kind is _JSON else forms.read(plain, self.boundary)
        return reading._replace(plain=plain)

    def spelled(self, model: str) -> bytes:
        """`model` as it is written in such a body: `body[:begin] + spelled + body[end:]` names it instead of the one that was read."""
        return msgspec.json.encode(model) if self.kind is _JSON else model.encode()


_PLAIN_JSON = Content(Kind.JSON)


def of_headers(headers: Mapping[str, str]) -> Content | None:
    """What the headers announce; None for a body that names no model and passes. Raises InvalidRequest for what cannot be read."""
    given = headers.get("content-type", "")
    if given == "application/json" and "content-encoding" not in headers:  # as of nearly every request
        return _PLAIN_JSON
    media_type = given.partition(";")[0].strip(" \t").lower()
    if media_type == Kind.JSON.value or media_type.endswith("+json"):
        return Content(Kind.JSON, b"", encodings.of_header(headers.get("content-encoding", "")))
    if media_type == Kind.FORM.value:
        return Content(Kind.FORM, forms.boundary(given), encodings.of_header(headers.get("content-encoding", "")))
    return None
