"""The engine's list of models: read in slices, the same as at once, and never trusted to be cut where it is not."""

import json

import msgspec
import pytest

from extproc.stager.engine.listed import SLICE_BYTES, Known, read_list
from tests.fakes.wait import Turns

COUNT = 3000
CARDS = [{"id": "base", "root": "/models/base", "parent": None, "max_model_len": 4096}] + [
    {
        "id": f"acme/{number}@sha256:{number:012x}",
        "object": "model",
        "root": f"/node/.store/{number:064x}",
        "parent": "base",
        "max_model_len": None,
        "permission": [{"id": f"modelperm-{number}", "allow_view": True}],
    }
    for number in range(COUNT)
]


def same(known: Known) -> bool:
    return [base.id for base in known.bases] == ["base"] and known.adapters == {card["id"]: card["root"] for card in CARDS[1:]}


@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")], ids=["as vLLM writes", "with spaces"])
async def test_a_long_list_is_read_in_slices(separators: tuple[str, str]) -> None:
    """Between two of them the loop has its turn."""
    body = json.dumps({"object": "list", "data": CARDS, "more": []}, separators=separators).encode()
    with Turns() as turns:
        assert same(await read_list(body))
    assert turns.count >= len(body) // (2 * SLICE_BYTES)


async def test_a_list_that_cannot_be_cut_is_read_whole() -> None:
    """Other engines' cards may begin otherwise, or hold objects that begin like a card."""
    otherwise = [dict(reversed(card.items())) for card in CARDS]
    assert same(await read_list(json.dumps({"data": otherwise}).encode()))
    inner = [{"id": card["id"], "adapters": [{"id": "x"}, {"id": "y" * 200}], **card} for card in CARDS]
    assert same(await read_list(json.dumps({"data": inner}).encode()))


@pytest.mark.parametrize("body", [b"", b"{}", b"[]", b'{"data": 1}', b'{"data": [1]}', b'{"data": [{"id": 1}]}', b'{"data": [' + b'{"id": "a"}, ' * 20_000])
async def test_what_is_no_list_is_an_error(body: bytes) -> None:
    """Short or long."""
    with pytest.raises(msgspec.DecodeError):
        await read_list(body)


async def test_names_are_found_by_what_they_lead_to() -> None:
    """By version, by directory and by themselves, without a look at all others."""
    known = Known()
    for name, root in (("a@sha256:1", "/x/.store/1"), ("b@sha256:1", "/x/.store/2"), ("plain", "/x/plain"), ("other", "/elsewhere/plain"), ("c", "/x/c")):
        known.add(name, root)
    assert known.candidates("1", (), ()) == {"a@sha256:1", "b@sha256:1"}
    assert known.candidates("2", {"2", "plain"}, {"c", "unknown"}) == {"b@sha256:1", "plain", "other", "c"}
