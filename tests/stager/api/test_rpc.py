"""Every method of the stager's service but Watch, over a real gRPC server: deadlines, holders, what crosses and what is refused."""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import grpc.aio
import pytest

from extproc.client import (
    SERVICE,
    Evicted,
    Loading,
    NodeState,
    Progress,
    Published,
    Refreshed,
    Staged,
    StagerClient,
    Woken,
)
from extproc.config.origins import OriginSettings
from extproc.config.stager import PeerSettings
from extproc.core.artifact import ArtifactId, adapter_name
from extproc.errors import (
    BY_NAME,
    AdapterInUse,
    InvalidAdapter,
    InvalidRequest,
    LoraExtprocError,
    ModelNotFound,
    NotPermitted,
    Overloaded,
    PrefetchGivenUp,
)
from extproc.pb import stager_pb2 as pb
from extproc.stager.api import grpc as service_module
from extproc.stager.api.grpc import READ_BYTES
from extproc.stager.books.holdings import Named
from extproc.stager.supply.origins.file import FileOrigin
from extproc.up.demo import write_adapter
from tests.fakes.adapters import CONFIG, WEIGHTS, sha256, size_of, small_files, write_small
from tests.fakes.origin import FakeOrigin
from tests.fakes.wait import Clock, until

from ..conftest import ServeNode, labels_of, next_of

SIZE = size_of(small_files())


# -- Ensure, Release


async def test_a_deadline_that_passes_ends_the_wait_not_the_fetch(serve_node: ServeNode, origin: FakeOrigin) -> None:
    """The next call finds what the first had asked for; it was fetched once."""
    origin.add("acme/a", small_files())
    stall = origin.stall("acme/a", WEIGHTS)
    node = await serve_node()
    async with grpc.aio.insecure_channel(node.address) as channel:
        ensure = channel.unary_unary(f"/{SERVICE}/Ensure", pb.EnsureRequest.SerializeToString, pb.EnsureReply.FromString)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await ensure(pb.EnsureRequest(adapter="acme/a"), timeout=0.2)
    assert raised.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert stall.reached.is_set()
    stall.release()
    await until(lambda: len(node.stager.node.holdings))
    assert not (await node.ask().ensure("acme/a")).staged
    assert set(origin.fetched.values()) == {1}


async def test_a_prefetch_leases_nothing_and_keeps_its_room_for_as_long_as_it_says(origin: FakeOrigin, serve_node: ServeNode, clock: Clock) -> None:
    """As Ensure and as Stage."""
    for number in range(3):
        origin.add(f"acme/{number}", small_files(seed=number))
    node = await serve_node(max_bytes=SIZE, high_watermark=1.0)
    router = node.ask("router")
    brought = await router.ensure("acme/0", prefetch=True, keep_s=100.0, loading=Loading.VERSIONED)
    assert (brought.staged, brought.lease_s, brought.loaded) == (True, 0.0, False)
    assert await router.release() == 0
    said: list[Progress] = []
    with pytest.raises(PrefetchGivenUp):
        await router.ensure("acme/1", prefetch=True, keep_s=100.0)
    clock.now += 101
    assert (await router.ensure("acme/1", prefetch=True, keep_s=100.0, on_progress=said.append)).staged
    assert (await router.ensure("acme/2")).staged
    assert [adapter.name for adapter in (await router.list()).adapters] == ["acme/2"]


@pytest.mark.parametrize("keep_s", [float("nan"), float("inf"), -1.0])
async def test_a_prefetch_is_kept_for_a_time(serve_node: ServeNode, origin: FakeOrigin, keep_s: float) -> None:
    """And not for what is none."""
    origin.add("acme/0", small_files())
    with pytest.raises(InvalidRequest, match=r"keep_seconds: .* is no number of seconds"):
        await (await serve_node()).ask().ensure("acme/0", prefetch=True, keep_s=keep_s)


@pytest.mark.parametrize("wakes", [True, False])
async def test_a_wake_up_is_told_to_watchers_who_want_it(serve_node: ServeNode, origin: FakeOrigin, wakes: bool) -> None:
    """Behind what tells that the adapter is there. A prefetch is none."""
    for number in range(2):
        origin.add(f"acme/{number}", small_files(seed=number))
    node = await serve_node()
    client = node.ask("router")
    watching = client.watch(wakes=wakes)
    await next_of(watching, NodeState)
    await client.ensure("acme/0", prefetch=True)
    for name in ("acme/0", "acme/0", "acme/1"):
        await client.ensure(name)
    await client.evict("acme/1") if await client.release("acme/1") else None
    seen = []
    async for event in watching:
        if isinstance(event, Woken | Published | Evicted):
            seen.append(event)
        if isinstance(event, Evicted):
            break
    expected = [Published("acme/0"), Woken("acme/0"), Published("acme/1"), Woken("acme/1"), Evicted("acme/1")]
    assert seen == [event for event in expected if wakes or not isinstance(event, Woken)]


async def test_an_adapter_stays_until_every_holder_gave_it_back(serve_node: ServeNode, origin: FakeOrigin) -> None:
    """Each router's lease is its own, also where both were waiting for the same flight."""
    origin.add("acme/a", small_files())
    node = await serve_node()
    one, other, nobody = node.ask("router 1"), node.ask("router 2"), node.ask()
    await asyncio.gather(one.ensure("acme/a"), other.ensure("acme/a"))
    assert await one.release("acme/a") == 1
    with pytest.raises(AdapterInUse, match="300 s more"):
        await nobody.evict("acme/a")
    assert await one.release() == 0
    assert await other.release("acme/elsewhere") == 0
    assert await other.release() == 1
    assert await nobody.evict("acme/a") == SIZE


async def test_release_without_a_name_gives_back_all_of_one_holder(serve_node: ServeNode, origin: FakeOrigin) -> None:
    """And nothing of another's."""
    for seed, name in enumerate(("acme/a", "acme/b")):
        origin.add(name, small_files(seed=seed))
    node = await serve_node()
    one, other = node.ask("router 1"), node.ask("router 2")
    for client, name in ((one, "acme/a"), (one, "acme/b"), (other, "acme/b")):
        await client.ensure(name)
    assert await one.release() == 2
    assert [(a.name, a.leased_seconds) for a in (await one.list()).adapters] == [("acme/a", 0.0), ("acme/b", 300.0)]


async def test_a_sha256_that_can_be_none_is_refused_before_anything_is_fetched(serve_node: ServeNode, origin: FakeOrigin) -> None:
    """By every method that takes one."""
    origin.add("acme/a", small_files())
    client = (await serve_node()).ask()
    for stated in ("abc", "g" * 64, "a" * 63, "a" * 65, "../" + "a" * 61, "0x" + "a" * 62):
        for call in (client.ensure("acme/a", stated), anext(client.stage("acme/a", stated)), client.pin("acme/a", sha256=stated)):
            with pytest.raises(InvalidRequest, match="is not 64 hexadecimal digits"):
                await call
    assert not origin.fetched


async def test_other_content_than_asked_for_is_refused(serve_node: ServeNode, origin: FakeOrigin) -> None:
    """On its way and on disk; the digest may be written in capitals."""
    files = small_files()
    origin.add("acme/a", files)
    client = (await serve_node()).ask()
    for name in ("cold", "warm"):
        with pytest.raises(InvalidAdapter, match="SHA-256"):
            await client.ensure("acme/a", "0" * 64)
        if name == "cold":
            assert (await client.ensure("acme/a", sha256(files[WEIGHTS]).upper())).staged


async def test_one_caller_s_digest_is_not_another_s(serve_node: ServeNode, origin: FakeOrigin) -> None:
    """Who stated none, or the right one, and waited for the flight of who stated a wrong one, is served by the next; who repeats the wrong one is not."""
    files = small_files()
    origin.add("acme/a", files)
    stall = origin.stall("acme/a", WEIGHTS)
    node = await serve_node()
    client = node.ask()
    calls = [asyncio.create_task(client.ensure("acme/a", "0" * 64))]
    await stall.reached.wait()
    calls += [asyncio.create_task(client.ensure("acme/a", stated)) for stated in ("0" * 64, "", "", sha256(files[WEIGHTS]))]
    await until(lambda: node.stager._in_flight.waiters(adapter_name("acme/a")) == len(calls))
    stall.release()
    came = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(outcome) for outcome in came] == [InvalidAdapter, InvalidAdapter, Staged, Staged, Staged]
    assert origin.fetched["acme/a", WEIGHTS] == 2


# -- Stage


async def test_stage_shows_how_far_it_is_and_answers_at_last(serve_node: ServeNode, origin: FakeOrigin) -> None:
    """Phase, origin and bytes while it goes on, then what Ensure answers."""
    files = small_files()
    origin.add("acme/a", files)
    stall = origin.stall("acme/a", WEIGHTS)
    client = (await serve_node()).ask()
    staging = client.stage("acme/a", sha256(files[WEIGHTS]))
    seen: list[Progress | Staged] = [await anext(staging)]
    await stall.reached.wait()
    half = len(files[CONFIG]) + len(files[WEIGHTS]) // 2
    while seen[-1] != Progress("fetch", "fake", half, sum(map(len, files.values()))):
        seen.append(await anext(staging))
    stall.release()
    seen += [event async for event in staging]
    *before, last = seen
    assert isinstance(last, Staged)
    assert (last.staged, last.origin, last.bytes) == (True, "fake", SIZE)
    assert last.digest == (await client.list()).adapters[0].digest
    assert all(isinstance(event, Progress) for event in before)


async def test_stage_of_what_is_there_is_the_answer_alone(serve_node: ServeNode, origin: FakeOrigin) -> None:
    """Nothing flies."""
    origin.add("acme/a", small_files())
    client = (await serve_node()).ask()
    await client.ensure("acme/a")
    assert [type(event) for event in [event async for event in client.stage("acme/a")]] == [Staged]


async def test_who_leaves_a_stage_leaves_the_flight(serve_node: ServeNode, origin: FakeOrigin) -> None:
    """Like a cancelled Ensure."""
    origin.add("acme/a", small_files())
    stall = origin.stall("acme/a", WEIGHTS)
    node = await serve_node()
    client = node.ask()
    staging = client.stage("acme/a")
    await anext(staging)
    await stall.reached.wait()
    await client.close()
    await until(lambda: not node.stager._in_flight.waiters(node.stager._flights.names()[0]))
    stall.release()
    await until(lambda: len(node.stager.node.holdings))
    assert set(origin.fetched.values()) == {1}


# -- errors


async def all_of(events: AsyncIterator[object]) -> list[object]:
    return [event async for event in events]


@pytest.mark.parametrize("name", sorted(BY_NAME))
async def test_every_error_crosses_by_every_method_that_stages(serve_node: ServeNode, origin: FakeOrigin, name: str) -> None:
    """The class, which carries the status, and the text."""
    kind = BY_NAME[name]
    client = (await serve_node(negative_ttl_s=0.0)).ask()
    for method in ("Ensure", "Stage", "Pin"):
        adapter = f"acme/{method}"
        origin.add(adapter, small_files())
        origin.fetch_failures = [kind(f"why: ü, {method}") for _ in range(9)]
        calls: dict[str, Callable[[str], Awaitable[object]]] = {"Ensure": client.ensure, "Stage": lambda name: all_of(client.stage(name)), "Pin": client.pin}
        with pytest.raises(LoraExtprocError) as raised:
            await calls[method](adapter)
        assert type(raised.value).__name__ == name
        if "is down" not in raised.value.message:  # by now its breaker is open
            assert raised.value.message == f"why: ü, {method}"


async def test_what_is_not_there_is_not_found_whatever_is_asked(serve_node: ServeNode) -> None:
    """Purge alone has nothing against it: there is nothing left to do."""
    client = (await serve_node()).ask()
    for call in (client.ensure("acme/a"), client.pin("acme/a"), client.evict("acme/a"), client.refresh("acme/a"), anext(client.verify("acme/a"))):
        with pytest.raises(ModelNotFound):
            await call
    assert await client.find("acme/a") is None
    assert await client.purge("acme/a") == 0
    await client.pin("acme/a", pinned=False)


async def test_no_method_takes_a_name_that_leads_elsewhere(serve_node: ServeNode, origin: FakeOrigin) -> None:
    """Refused at the door: the origin is not asked, nothing is removed."""
    node = await serve_node()
    client = node.ask("router")
    for name in ("", "..", "../up", "/etc/passwd", "a/../../b", "a//b", "a/.store", ".store", ".store/" + "a" * 64, "a\0b", "a\\..\\b", "a" * 300):
        calls: list[Awaitable[object]] = [client.ensure(name), anext(client.stage(name)), client.pin(name), client.pin(name, pinned=False)]
        calls += [client.evict(name), client.purge(name), client.refresh(name), client.find(name)]
        calls += [client.release(name), anext(client.verify(name))] if name else []  # there, none is all
        for call in calls:
            with pytest.raises(InvalidRequest):
                await call
    assert not origin.resolved
    assert not node.stager.node.holdings.pins


# -- Pin, Purge, Refresh, Verify


async def test_a_pin_holds_without_an_end_until_it_is_taken_back(serve_node: ServeNode, origin: FakeOrigin, clock: Clock) -> None:
    """It puts the adapter there first."""
    files = small_files()
    origin.add("acme/a", files)
    client = (await serve_node()).ask()
    digest = await client.pin("acme/a", sha256=sha256(files[WEIGHTS]))
    clock.now += 10**6
    (shown,) = (await client.list()).adapters
    assert (shown.digest, shown.pinned, shown.leased_seconds) == (digest, True, 0.0)
    with pytest.raises(AdapterInUse, match="pinned"):
        await client.evict("acme/a")
    await client.pin("acme/a", pinned=False)
    assert not (await client.list()).adapters[0].pinned
    assert await client.evict("acme/a") == SIZE


async def test_what_is_refused_is_not_pinned(serve_node: ServeNode, origin: FakeOrigin) -> None:
    """A wrong digest leaves no pin that would refuse every later version."""
    origin.add("acme/a", small_files())
    node = await serve_node()
    client = node.ask()
    with pytest.raises(InvalidAdapter):
        await client.pin("acme/a", sha256="0" * 64)
    assert not node.stager.node.holdings.pins
    assert (await client.ensure("acme/a")).staged


async def test_purge_asks_no_holder(serve_node: ServeNode, origin: FakeOrigin, node: Path) -> None:
    """Leased and pinned, it goes, and its pin with it."""
    origin.add("acme/a", small_files())
    served = await serve_node()
    client = served.ask("router")
    await client.pin("acme/a")
    assert await client.purge("acme/a") == SIZE
    assert (await client.list()).adapters == ()
    assert not served.stager.node.holdings.pins
    assert not (node / "acme").exists()


async def test_purge_forgets_that_it_was_not_found(serve_node: ServeNode, origin: FakeOrigin) -> None:
    """What was uploaded a moment later need not wait for `negative_ttl_s`."""
    client = (await serve_node()).ask()
    with pytest.raises(ModelNotFound):
        await client.ensure("acme/a")
    origin.add("acme/a", small_files())
    with pytest.raises(ModelNotFound):
        await client.ensure("acme/a")
    await client.purge("acme/a")
    assert (await client.ensure("acme/a")).staged


async def test_refresh_brings_a_new_version_and_says_so(serve_node: ServeNode, tmp_path: Path) -> None:
    """To who asked, and to who watches; nothing new is no change."""
    root = tmp_path / "origin"
    write_small(root / "acme/a")
    node = await serve_node(FileOrigin(OriginSettings(type="file", path=str(root))))
    client = node.ask()
    first = (await client.ensure("acme/a")).digest
    changed, digest, revision = await client.refresh("acme/a")
    assert (changed, digest) == (False, first)
    watching = client.watch()
    await anext(watching)
    write_small(root / "acme/a", seed=1)
    os.utime(root / "acme/a" / CONFIG, ns=(1, 1))  # another time, whatever the clock's grain
    changed, digest, now = await client.refresh("acme/a")
    assert changed
    assert digest != first
    assert now != revision
    assert digest == (await client.ensure("acme/a")).digest
    assert await next_of(watching, Refreshed) == Refreshed("acme/a")


async def test_refresh_tells_why_it_failed_and_keeps_what_is_here(serve_node: ServeNode, origin: FakeOrigin) -> None:
    """The list says it, too."""
    origin.add("acme/a", small_files())
    client = (await serve_node()).ask()
    await client.ensure("acme/a")
    del origin.files["acme/a"]
    with pytest.raises(ModelNotFound):
        await client.refresh("acme/a")
    (shown,) = (await client.list()).adapters
    assert shown.refresh_error.startswith("model_not_found: ")
    assert not (await client.ensure("acme/a")).staged


async def test_verify_removes_what_is_damaged(serve_node: ServeNode, origin: FakeOrigin, node: Path) -> None:
    """One answer per adapter, as each is read; held or not, the damaged one goes, and watchers hear of it."""
    for seed, name in enumerate(("acme/a", "acme/b", "acme/c")):
        origin.add(name, small_files(seed=seed))
    served = await serve_node()
    client = served.ask()
    for name in ("acme/a", "acme/b", "acme/c"):
        await client.pin(name)
    watching = client.watch()
    await anext(watching)
    weights = node / "acme/b" / WEIGHTS
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    found = [result async for result in client.verify()]
    assert [(result.adapter, result.ok, result.removed) for result in found] == [("acme/a", True, False), ("acme/b", False, True), ("acme/c", True, False)]
    assert (found[1].why, found[1].bytes) == (f"{WEIGHTS} is not what was published", SIZE)
    assert await next_of(watching, Evicted) == Evicted("acme/b")
    assert [result.adapter async for result in client.verify("acme/c")] == ["acme/c"]
    assert (await client.ensure("acme/b")).staged


async def test_verify_removes_damaged_content_under_all_its_names(serve_node: ServeNode, origin: FakeOrigin, node: Path) -> None:
    """While one name were left, who stages another would be given the damaged content as if it had just arrived."""
    files = small_files()
    for name in ("acme/a", "acme/b"):
        origin.add(name, files)
    client = (await serve_node()).ask()
    for name in ("acme/a", "acme/b"):
        await client.ensure(name)
    (node / "acme/a" / WEIGHTS).write_bytes(b"damaged")
    found = [result async for result in client.verify("acme/b")]
    assert [(result.adapter, result.ok, result.removed) for result in found] == [("acme/a", False, True), ("acme/b", False, True)]
    assert (await client.list()).adapters == ()
    assert (await client.ensure("acme/b")).staged
    assert (node / "acme/b" / WEIGHTS).read_bytes() == files[WEIGHTS]


async def test_who_may_change_nothing_may_still_stage(serve_node: ServeNode, origin: FakeOrigin) -> None:
    """A port that others can reach without credentials: everything that removes or holds is off, and says why."""
    origin.add("acme/a", small_files())
    client = (await serve_node(destructive=False)).ask("router")
    assert (await client.ensure("acme/a")).staged
    for method, call in {
        "Pin": client.pin("acme/a"),
        "Evict": client.evict("acme/a"),
        "Purge": client.purge("acme/a"),
        "Verify": anext(client.verify()),
    }.items():
        with pytest.raises(NotPermitted, match=f"{method} is off: stager.listen is not on loopback"):
            await call
    with pytest.raises(NotPermitted):
        await client.pin("acme/a", pinned=False)
    assert [event async for event in client.stage("acme/a")]
    assert await client.release() == 1
    assert await client.find("acme/a") is not None
    assert (await client.list()).adapters


async def test_a_list_of_many_thousands_arrives(serve_node: ServeNode) -> None:
    """Over gRPC's default limit of 4 MiB per message."""
    node = await serve_node()
    for number in range(30_000):
        digest = f"{number:064x}"
        node.stager.node.holdings.index.add(ArtifactId(digest), 4096, 0.0)
        node.stager.node.holdings.put(adapter_name(f"some-organization/adapter-{number:040d}"), Named(ArtifactId(digest), "fake", "1"))
    listed = await node.ask().list()
    assert len(listed.adapters) == 30_000
    assert listed.used_bytes == 30_000 * 4096


# -- Find, Read


async def test_find_tells_what_another_node_needs_to_know(serve_node: ServeNode, origin: FakeOrigin) -> None:
    """Files with size and digest, in one revision or any."""
    files = small_files()
    origin.add("acme/a", files)
    node = await serve_node()
    client = node.ask()
    await client.ensure("acme/a")
    found = await client.find("acme/a", "1")
    assert found is not None
    assert found == await client.find("acme/a")
    assert (found.instance, found.revision, found.origin) == (node.stager.instance, "1", "fake")
    assert {file.path: (file.size, file.sha256) for file in found.files} == {path: (len(data), sha256(data)) for path, data in files.items()}
    assert await client.find("acme/a", "2") is None


async def read_all(client: StagerClient, digest: str, path: str, offset: int = 0) -> bytes:
    return b"".join([chunk async for chunk in client.read(digest, path, offset)])


async def test_read_gives_a_file_from_any_offset(serve_node: ServeNode, tmp_path: Path) -> None:
    """In messages of at most a mebibyte; the end of the file is the end of the stream."""
    weights = write_adapter(tmp_path / "origin/acme/a", seed=0, hidden=2048, layers=20).read_bytes()
    assert len(weights) > 2 * READ_BYTES
    node = await serve_node(FileOrigin(OriginSettings(type="file", path=str(tmp_path / "origin"))))
    client = node.ask()
    digest = (await client.ensure("acme/a")).digest
    for offset in (0, 1, READ_BYTES, len(weights) - 1, len(weights)):
        assert await read_all(client, digest, WEIGHTS, offset) == weights[offset:]
    assert max([len(chunk) async for chunk in client.read(digest, WEIGHTS)]) == READ_BYTES
    assert labels_of(node.stager, "lora_extproc_sent_bytes_total")[()] == sum(len(weights) - o for o in (0, 0, 1, READ_BYTES, len(weights) - 1))


LEADING_AWAY = ["", ".", "..", "../..", "/", "/etc/passwd", "../../secret", ".lora-extproc.json", "./" + CONFIG, CONFIG + "/", CONFIG + "/..", CONFIG + "\0"]
LEADING_AWAY += [CONFIG + "\0/../../secret", "acme", "a" * 300, "a" * 70_000, "%2e%2e/secret", "..\\secret", "~", "file:///etc/passwd"]
NO_DIGEST = ["", ".", "..", "../..", "/", "/etc", "acme/a", ".store", "a" * 64, "A" * 64, "\0", "@", "@acme/a", "{}@acme/a", "{}/", "../.store/{}", "{}\0"]


async def test_read_gives_nothing_but_an_artifact_s_own_files(serve_node: ServeNode, origin: FakeOrigin, node: Path) -> None:
    """Neither what lies outside nor our own notes; and it is the caller's mistake, not ours. A digest is a key of what is known, never a path."""
    origin.add("acme/a", small_files())
    (node.parent / "secret").write_text("secret")
    client = (await serve_node()).ask()
    known = (await client.ensure("acme/a")).digest
    for digest, path in [(known, path) for path in LEADING_AWAY] + [(digest.format(known), CONFIG) for digest in NO_DIGEST]:
        with pytest.raises(ModelNotFound):
            await read_all(client, digest, path)
    assert await read_all(client, known, CONFIG) == origin.files["acme/a"][CONFIG]


async def test_read_stays_within_one_artifact(serve_node: ServeNode, origin: FakeOrigin) -> None:
    """With the other's digest, each file is had; through a neighbour's, none."""
    for seed, name in enumerate(("acme/a", "acme/b")):
        origin.add(name, small_files(seed=seed))
    client = (await serve_node()).ask()
    one, other = [(await client.ensure(name)).digest for name in ("acme/a", "acme/b")]
    for path in (f"../{other}/{CONFIG}", f"{other}/{CONFIG}", other):
        with pytest.raises(ModelNotFound):
            await read_all(client, one, path)
    assert await read_all(client, other, CONFIG) == origin.files["acme/b"][CONFIG]


async def test_what_others_put_here_is_not_sent(serve_node: ServeNode, node: Path) -> None:
    """A link in such a directory leads wherever its owner likes; a file of it is not held to any digest."""
    write_small(node / "theirs/v1.0")
    (node.parent / "secret").write_text("secret")
    (node / "theirs/v1.0/notes.txt").symlink_to(node.parent / "secret")
    served = await serve_node(scan_s=1e-6)
    client = served.ask()
    await client.ensure("theirs/v1.0")
    (entry,) = served.stager.node.holdings.index.entries()
    assert entry.id.endswith("@theirs/v1.0")
    for path in ("notes.txt", CONFIG, "../../../secret", ".."):
        for digest in (entry.id, entry.id.partition("@")[0]):
            with pytest.raises(ModelNotFound):
                await read_all(client, digest, path)
    assert await client.find("theirs/v1.0") is None


async def test_names_with_dots_and_marks_are_names(serve_node: ServeNode, origin: FakeOrigin) -> None:
    """Staged, found and read like any other: only whole parts mean something to a file system."""
    client = (await serve_node()).ask()
    for seed, name in enumerate(("acme/v1.0", "acme/a..b", "a.b.c", "acme/x@1", "acme/x@main/sub.dir", "acme/%2e%2e", "acme/[/b]")):
        origin.add(name, small_files(seed=seed))
        digest = (await client.ensure(name)).digest
        assert (await client.find(name)) is not None
        assert await read_all(client, digest, CONFIG) == origin.files[name][CONFIG]


async def test_an_offset_behind_the_end_is_the_caller_s_mistake(serve_node: ServeNode, origin: FakeOrigin) -> None:
    """However far; the place it took is free again."""
    files = small_files()
    origin.add("acme/a", files)
    client = (await serve_node(peers=PeerSettings(max_reads=1))).ask()
    digest = (await client.ensure("acme/a")).digest
    for behind in (1, 2**31, 2**62, 2**63 - 10_000, 2**63, 2**64 - 10_000):
        with pytest.raises(InvalidRequest, match="behind its end"):
            await read_all(client, digest, WEIGHTS, len(files[WEIGHTS]) + behind)
    assert await read_all(client, digest, WEIGHTS) == files[WEIGHTS]


async def test_only_so_many_files_are_sent_at_once(serve_node: ServeNode, origin: FakeOrigin) -> None:
    """One more is told to look elsewhere. Who goes away in the middle leaves its place, and its hold of the adapter."""
    origin.add("acme/a", small_files())
    node = await serve_node(peers=PeerSettings(max_reads=1, max_bytes_per_s=1))  # nothing is sent within this test
    slow, other = node.ask("slow"), node.ask()
    digest = (await slow.ensure("acme/a")).digest
    await slow.release()
    reading = asyncio.create_task(read_all(slow, digest, WEIGHTS))
    await until(lambda: any(entry.reads for entry in node.stager.node.holdings.index.entries()))
    with pytest.raises(Overloaded, match="as many as"):
        await read_all(other, digest, WEIGHTS)
    (shown,) = (await other.list()).adapters
    assert shown.leased_seconds == 0.0  # nobody is sent here for it
    with pytest.raises(AdapterInUse, match="sent to another node"):
        await other.evict("acme/a")
    reading.cancel()
    await until(lambda: not any(entry.reads for entry in node.stager.node.holdings.index.entries()))
    for path in (CONFIG, "nothing"):  # errors give it back as well
        with pytest.raises(ModelNotFound):
            await read_all(other, "0" * 64, path)
    assert await other.evict("acme/a") == SIZE


async def test_a_reader_that_does_not_read_is_cut_off(serve_node: ServeNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its connection lives, and it takes one message and no more: its place and its hold of the artifact are free again."""
    monkeypatch.setattr(service_module, "READER_S", 0.2)
    write_adapter(tmp_path / "origin/acme/a", seed=0, hidden=2048, layers=40)
    node = await serve_node(FileOrigin(OriginSettings(type="file", path=str(tmp_path / "origin"))), peers=PeerSettings(max_reads=1))
    client = node.ask()
    digest = (await client.ensure("acme/a")).digest
    reading = client.read(digest, WEIGHTS)
    assert await anext(reading)
    (entry,) = node.stager.node.holdings.index.entries()
    assert entry.reads == 1
    await until(lambda: not entry.reads)
    assert await read_all(client, digest, CONFIG)
    await reading.aclose()


async def test_a_peer_that_reads_is_no_demand(serve_node: ServeNode, origin: FakeOrigin) -> None:
    """What it reads stays as long as that takes; the order of use and the count of what is leased are as before."""
    for seed, name in enumerate(("acme/old", "acme/new")):
        origin.add(name, small_files(seed=seed))
    node = await serve_node()
    client = node.ask("router")
    digest = (await client.ensure("acme/old")).digest
    await client.release()
    await client.ensure("acme/new")
    stager, index = node.stager, node.stager.node.holdings.index
    before = ([entry.id for entry in index.entries()], stager.demand)
    with stager.reading(digest, WEIGHTS):
        assert ([entry.id for entry in index.entries()], stager.demand) == before
        assert not index.leave(ArtifactId(digest), stager.node.clock() + 1000)
    assert ([entry.id for entry in index.entries()], stager.demand) == before


async def test_what_is_sent_keeps_to_its_rate(serve_node: ServeNode, origin: FakeOrigin) -> None:
    """All readers together: what is over the first second's worth takes its time."""
    files = small_files()
    origin.add("acme/a", files)
    rate = 2 * len(files[WEIGHTS])
    client = (await serve_node(peers=PeerSettings(max_bytes_per_s=rate))).ask()
    digest = (await client.ensure("acme/a")).digest
    loop = asyncio.get_running_loop()
    began = loop.time()
    await asyncio.gather(*(read_all(client, digest, WEIGHTS) for _ in range(3)))
    assert loop.time() - began >= 3 * len(files[WEIGHTS]) / rate - 1.0
