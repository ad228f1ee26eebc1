"""Origins and peers that go wrong, and content that changes or is easily confused."""

import asyncio
import time
from pathlib import Path

from extproc.client import StagerClient
from extproc.config.credentials import RpcSettings
from extproc.up.demo import write_adapter
from tests.fakes.adapters import CONFIG, WEIGHTS, read_files

from .. import faults
from ..load import Request
from ..scene import Scene

BAD_S, BAD_PER_S = 14.0, 2.0
ASKED_TO_WAIT_S = 15
REPLACED_EVERY_S = 4.0
NEAR = (
    *("near/sql", "near/SQL", "near/Sql", "near/sq1", "near/sqI", "near/sql-", "near/sql_", "near/sql.", "near/s.ql", "near/sql.v1"),
    *("nearsql", "sql/near", "near/s%71l", "near/sqlé", "near/sqle\u0301", "near/ｓql"),
)


async def one_bad(scene: Scene) -> None:
    """A client goes on asking for an adapter whose configuration is answered 500; all else at the origin is well."""
    await scene.origin.put("bad/one")
    await scene.run(faults.CALM_S, at_least=2.0)
    scene.fault()
    asked: list[asyncio.Task[Request]] = []
    with scene.origin.answering(f"bad/one/{CONFIG}", status=500):
        for _ in range(round(max(8.0, BAD_S * scene.scale) * BAD_PER_S)):
            asked.append(asyncio.create_task(scene.load.ask("bad/one")))
            await asyncio.sleep(1 / BAD_PER_S)
        answers = await asyncio.gather(*asked)
    scene.mended()
    await scene.run(faults.AFTER_S, at_least=3.0)
    scene.note("502 for the bad one", sum(answer.status == 502 for answer in answers))
    scene.note("the bad one when it is well", (await _until_well(scene, "bad/one")).status)


async def _until_well(scene: Scene, name: str, patience_s: float = 5.0) -> Request:
    deadline = time.monotonic() + patience_s
    while (answer := await scene.load.ask(name)).failed and time.monotonic() < deadline:
        await asyncio.sleep(0.2)
    return answer


async def asked_to_wait(scene: Scene) -> None:
    """The origin wants to be left alone, while a transfer that began before stands still and breaks off."""
    origin = scene.origin
    await origin.put("slow/one")
    await scene.run(faults.CALM_S, at_least=2.0)
    stalled = origin.fault(f"slow/one/{WEIGHTS}", at=2000, end="stall")
    slow = asyncio.create_task(scene.load.ask("slow/one", {"x-request-timeout": "60s"}))
    while not stalled.taken:
        await asyncio.sleep(0.01)
    scene.fault()
    with origin.answering(status=503, headers={"retry-after": str(ASKED_TO_WAIT_S)}):
        before = len(origin.asked)
        while len(origin.asked) == before:  # the next cold request meets it
            await asyncio.sleep(0.01)
        told = time.monotonic()
        await asyncio.sleep(1.0)  # what is on its way arrives
    asked = len(origin.asked)
    await asyncio.sleep(told + ASKED_TO_WAIT_S - 1.0 - time.monotonic())
    scene.note("requests at the origin meanwhile", len(origin.asked) - asked)
    await asyncio.sleep(told + ASKED_TO_WAIT_S - time.monotonic())
    scene.mended()
    await scene.run(10.0, at_least=8.0)
    await slow


async def peer_stops(scene: Scene) -> None:
    """A copy from a peer is half way when the peer's stager hangs. Beside it: what the same costs from the origin."""
    first, second = scene.others  # the hanging one owns few warm adapters: they are not what this is about
    directory = scene.directory / "big"
    for seed, name in enumerate(("big/one", "big/two"), 1):
        await asyncio.to_thread(write_adapter, directory / name, seed=seed, rank=32, hidden=512, layers=16)
        await scene.origin.put(name, read_files(directory / name))
    theirs, ours = (StagerClient(scene.fleet.node(name).stager, RpcSettings()) for name in (first, second))
    try:
        await _stage(theirs, "big/one")
        began = time.monotonic()
        await _stage(ours, "big/two")
        from_origin_s = time.monotonic() - began
        copying = asyncio.create_task(_stage(ours, "big/one"))
        staging = scene.fleet.node(second).directory / ".staging"
        while not copying.done() and await asyncio.to_thread(_bytes_below, staging) < 100_000:
            await asyncio.sleep(0.01)
        scene.note("the copy was half way", not copying.done())
        scene.fault()
        async with faults.stopped(lambda _scene: [f"{first}-stager"])(scene):
            with scene.timed("from the hang to the end of the copy"):
                await asyncio.wait_for(copying, 120.0)
            scene.note("from the origin alone", from_origin_s)
            scene.note("the hang cost", scene.record.figures["from the hang to the end of the copy"] - from_origin_s)
            await scene.run(faults.AFTER_S, at_least=3.0)
        scene.mended()
    finally:
        await theirs.close()
        await ours.close()
    await scene.run(3.0, at_least=2.0)


async def _stage(client: StagerClient, name: str) -> None:
    async for _ in client.stage(name):
        pass


def _bytes_below(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*.safetensors*") if path.is_file())


async def replaced(scene: Scene) -> None:
    """New content under every warm name, again and again, also while the one before is being fetched."""
    await scene.run(faults.CALM_S, at_least=2.0)
    scene.fault()
    put: dict[tuple[str, int], float] = {}
    for turn in range(max(3, round(5 * scene.scale))):
        scene.origin.delay_s = 0.3 if turn % 2 else 0.0
        for name in scene.load.warm:
            await scene.origin.put(name)
            put[name, scene.origin.newest(name)] = time.monotonic()
            if turn % 2:
                await asyncio.sleep(0.1)
        await asyncio.sleep(REPLACED_EVERY_S if turn % 2 else 1.0)
    scene.origin.delay_s = 0.0
    await scene.run(12.0, at_least=10.0)
    answered = [request for request in scene.record.requests if request.version is not None and request.model in scene.load.warm]
    scene.note("old after new for", old_after_new_s(answered))
    newer = {key: at for key, at in put.items() if (key[0], key[1] + 1) not in put}  # the last of each name: nothing came after
    scene.note(
        "old for", max(max((q.began - at for q in answered if q.model == name and q.version != version), default=0.0) for (name, version), at in newer.items())
    )


def old_after_new_s(requests: list[Request]) -> float:
    """From the first answer of a version to the last request that an older one still answered, at most; 0: none did."""
    longest_s = 0.0
    for name in {request.model for request in requests}:
        asked = [request for request in requests if request.model == name]
        first: dict[int, float] = {}  # by version, when it first answered
        for request in asked:
            version = request.version or 0
            first[version] = min(request.ended, first.get(version, request.ended))
        for request in asked:
            longest_s = max(longest_s, *(request.began - at if version > (request.version or 0) else 0.0 for version, at in first.items()))
    return longest_s


async def near(scene: Scene) -> None:
    """Names that differ in case, a dot, an encoding or a look, each with its own weights, three times."""
    for name in NEAR:
        await scene.origin.put(name)
    scene.fault()
    answers: list[Request] = []
    for _ in range(3):
        answers += await asyncio.gather(*(scene.load.ask(name) for name in NEAR))
        await scene.run(1.0, at_least=0.5)
    scene.mended()
    scene.note("names with their own weights", len(NEAR) - len({answer.model for answer in answers if answer.failed}))
