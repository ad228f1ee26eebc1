"""Clients that look first: they take a model from the list, and ask for that one."""

import asyncio
import json
import shutil
from pathlib import Path

from extproc.config.origins import OriginSettings
from extproc.up.demo import write_adapter

from .client import Client, weights_of
from .conftest import NAMES, StackFactory


async def test_what_is_listed_before_anything_is_staged_is_served(start: StackFactory, origin: Path) -> None:
    """Through Envoy: the first of the list is asked for, and answered with its weights; every card is there, and what no origin has is not."""
    async with start(nodes=2, routers=2) as stack:
        client = Client(stack.address)
        try:
            assert not any(node.directory.joinpath(name).exists() for node in stack.nodes for name in NAMES)
            base, *cards = (await client.send("GET", "/v1/models")).json["data"]
            assert [card["id"] for card in cards] == sorted((*NAMES, "team/broken"))
            assert {card["parent"] for card in cards} == {base["id"]}
            first = cards[0]["id"]
            answer = await client.chat(first)
            assert (answer.status, answer.weights) == (200, weights_of(origin, first))
            for card in cards:
                found = await client.send("GET", f"/v1/models/{card['id']}")
                assert (found.status, json.loads(found.text)) == (200, card)
            missing = await client.send("GET", "/v1/models/team/none")
            assert (missing.status, missing.code) == (404, "model_not_found")
            assert (await client.chat("team/broken")).status == 422
            async with asyncio.timeout(10):  # each router hears of it by its own watch
                while "team/broken" in (await client.send("GET", "/v1/models")).text:
                    await asyncio.sleep(0.05)
            refused = await client.send("GET", "/v1/models/team/broken")
            assert (refused.status, refused.code) == (404, "model_not_found")
        finally:
            await client.close()


async def test_what_an_origin_gets_and_loses_is_in_the_next_lists(start: StackFactory, origin: Path, tmp_path: Path) -> None:
    """As soon as a listing is older than the setting says. One model's card needs no listing."""
    root = tmp_path / "own"
    shutil.copytree(origin / "team/a", root / "a")
    async with start({"stager": {"list_s": 0.1}}, nodes=1, origins=(OriginSettings(type="file", path=str(root)),)) as stack:
        client = Client(stack.address)
        try:

            async def listed() -> list[str]:
                return [card["id"] for card in (await client.send("GET", "/v1/models")).json["data"]][1:]

            assert await listed() == ["a"]
            write_adapter(root / "b", seed=3, rank=8, hidden=512, layers=2)
            assert (await client.send("GET", "/v1/models/b")).status == 200
            shutil.rmtree(root / "a")
            async with asyncio.timeout(10):
                while await listed() != ["b"]:
                    await asyncio.sleep(0.05)
        finally:
            await client.close()
