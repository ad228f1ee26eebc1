"""The engine's list of models, found by name, by version and by directory.

With twenty thousand adapters the list has up to ten megabytes. Read at once it would stop the event loop for a tenth of a second, in a thread too, since
a JSON reader does not let go of the interpreter. So it is cut before cards and read slice by slice, with a turn of the loop between two of them.
"""

import asyncio
import re
from collections.abc import Collection
from dataclasses import dataclass

import msgspec

SLICE_BYTES = 128 * 2**10  # read and sorted in some 2 ms
MAX_CARD_BYTES = 64 * 2**10  # vLLM's have about 500; in a list with a longer one no place to cut is looked for

_DATA = re.compile(rb'"data"\s*:\s*\[')
# Where one card ends and the next begins, as vLLM writes them. Inside of a string its quotes would be escaped, so this never matches there.
_NEXT_CARD = re.compile(rb'\}\s*(,)\s*\{\s*"id"\s*:')


@dataclass(frozen=True, slots=True)
class BaseCard:
    """A model that the engine serves without an adapter, as it lists it."""

    id: str
    root: str = ""
    max_model_len: int = 0  # 0: it does not say


class _Card(msgspec.Struct):
    id: str | None = None
    root: str | None = None
    parent: str | None = None
    max_model_len: int | float | None = None


class _List(msgspec.Struct):
    data: list[_Card]


_LIST = msgspec.json.Decoder(_List)
_CARDS = msgspec.json.Decoder(list[_Card])


class Known:
    """What the engine answers to by name."""

    def __init__(self) -> None:
        self.bases: tuple[BaseCard, ...] = ()
        self.adapters: dict[str, str] = {}  # name -> directory
        self._by_end: dict[str, str | list[str]] = {}  # last part of the directory -> names; one, as nearly always, without a list
        self._by_version: dict[str, str | list[str]] = {}  # what stands behind the last colon of the name, as a version's digits do -> names

    def add(self, name: str, root: str) -> None:
        """One more adapter."""
        self.adapters[name] = root
        for names, key in ((self._by_end, root.rpartition("/")[2]), (self._by_version, name.rpartition(":")[2])):
            there = names.setdefault(key, name)
            if there is not name:
                names[key] = [*there, name] if isinstance(there, list) else [there, name]

    def candidates(self, digits: str, ends: Collection[str], names: Collection[str]) -> set[str]:
        """Names that may lead to an artifact: those that end with its version's `digits`, lie in a directory that ends so, or are among `names`."""
        found = {name for name in names if name in self.adapters}
        for listed in (self._by_version.get(digits, ()), *(self._by_end.get(end, ()) for end in ends)):
            found.update((listed,) if isinstance(listed, str) else listed)
        return found

    def take(self, cards: list[_Card]) -> None:
        """Cards as they were listed: those with a parent are adapters."""
        for card in cards:
            if card.parent:
                self.add(str(card.id), str(card.root))
            else:
                length = card.max_model_len
                self.bases += (BaseCard(str(card.id), card.root or "", length if isinstance(length, int) else 0),)


async def read_list(body: bytes) -> Known:
    """What an answer to /v1/models says. Raises msgspec.DecodeError for one that is no list of models."""
    if len(body) > SLICE_BYTES and (data := _DATA.search(body, 0, SLICE_BYTES)) is not None:
        try:
            return await _read_slices(body, data.end())
        except msgspec.DecodeError:  # cut where no card ends: a list that is written otherwise than vLLM's
            return _sorted((await asyncio.to_thread(_LIST.decode, body)).data)
    return _sorted(_LIST.decode(body).data)


async def _read_slices(body: bytes, begin: int) -> Known:
    """The list whose first card begins at `begin`."""
    known, head, whole = Known(), body[:begin], memoryview(body)
    while (cut := _NEXT_CARD.search(body, begin + SLICE_BYTES, begin + SLICE_BYTES + MAX_CARD_BYTES)) is not None:
        known.take(_CARDS.decode(b"[" + whole[begin : cut.start(1)] + b"]"))
        begin = cut.end(1)
        await asyncio.sleep(0)
    if len(body) - begin > SLICE_BYTES + MAX_CARD_BYTES:
        raise msgspec.DecodeError("no card ends where one should")
    known.take(_LIST.decode(head + whole[begin:]).data)
    return known


def _sorted(cards: list[_Card]) -> Known:
    known = Known()
    known.take(cards)
    return known
