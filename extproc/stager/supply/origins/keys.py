"""All keys of a bucket below a prefix, page by page, without what the S3 client makes of a page.

That takes tens of milliseconds for a thousand keys, which would stop the event loop two hundred times for a hundred thousand adapters. So the page is
taken from the client as it came, and read in a thread.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from urllib.parse import unquote_plus
from xml.parsers import expat

from ...threads import Threads
from .names import Names

PARSED_BYTES = 2**15  # of a page at once, in less than a millisecond; then other threads have their turn
_is_raw: ContextVar[bool] = ContextVar("is_raw", default=False)  # whether the answer to this task's request is left as it came


def prepare(client: Any) -> None:
    """Let this client leave the pages alone that `tell_keys` asks for.

    With `*` for the service: of handlers for equally deep events the client calls those of wildcards first, and one of its own parses the page to
    look for errors in it.
    """
    client.meta.events.register_first("before-parse.*.ListObjectsV2", _leave)


async def tell_keys(client: Any, bucket: str, prefix: str, found: Names, threads: Threads) -> None:
    """Tell `found` of all keys, without `prefix`, until it is full. Raises what the client raises, and OSError for what is no page."""
    further: dict[str, str] = {}
    while not found.is_full():
        with _raw():
            answer = await client.list_objects_v2(Bucket=bucket, Prefix=prefix, EncodingType="url", **further)
        token = await threads.run(read_page, answer["Body"], prefix, found)
        if not token:
            return
        further = {"ContinuationToken": token}


def read_page(text: bytes, prefix: str, found: Names) -> str:
    """Tell `found` of the keys of one page; what continues after it, "" after the last. Raises OSError for what is no page."""
    page, parser = _Page(), expat.ParserCreate(namespace_separator="}")
    parser.buffer_text = True
    parser.StartElementHandler, parser.CharacterDataHandler, parser.EndElementHandler = page.starts, page.reads, page.ends
    try:
        for at in range(0, len(text), PARSED_BYTES):
            parser.Parse(text[at : at + PARSED_BYTES])
        parser.Parse(b"", True)
    except expat.ExpatError as error:
        raise OSError("a page of the listing is not XML") from error
    if page.root != "ListBucketResult":
        raise OSError(f"a page of the listing is <{page.root[:40]}>")
    for key in page.keys:
        found.add((unquote_plus(key) if page.is_quoted else key).removeprefix(prefix))
    return page.following


class _Page:
    """What of a ListBucketResult counts. No tree is made of it: a million elements would let the garbage collector look through the whole process."""

    def __init__(self) -> None:
        self.root = ""
        self.keys: list[str] = []
        self.is_quoted = False
        self.following = ""
        self._text = ""

    def starts(self, name: str, _attributes: object) -> None:
        self.root = self.root or name.rpartition("}")[2]
        self._text = ""

    def reads(self, text: str) -> None:
        self._text += text

    def ends(self, name: str) -> None:
        match name.rpartition("}")[2]:
            case "Key":
                self.keys.append(self._text)
            case "EncodingType":
                self.is_quoted = self._text == "url"
            case "NextContinuationToken":
                self.following = self._text
        self._text = ""


@contextmanager
def _raw() -> Iterator[None]:
    token = _is_raw.set(True)
    try:
        yield
    finally:
        _is_raw.reset(token)


def _leave(response_dict: dict[str, Any], customized_response_dict: dict[str, Any], **_: object) -> None:
    if _is_raw.get() and response_dict["status_code"] == 200:
        customized_response_dict["Body"] = response_dict["body"]
        response_dict["body"] = b"<ListBucketResult/>"
