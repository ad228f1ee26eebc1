"""With which credentials origins are asked, in whose interest first, and what of their answers is remembered: through whole stagers."""

import asyncio
import base64
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import close_session

from extproc.core.artifact import AdapterName
from extproc.errors import ModelNotFound, OriginFailed, OriginRefused
from extproc.stager.supply.job import Job
from extproc.stager.supply.source import ATTEMPTS
from tests.fakes.adapters import CONFIG, WEIGHTS, small_files
from tests.fakes.faulty import Fault, FaultyServer, running
from tests.fakes.hub import Hub
from tests.fakes.nodes import hub_origin, node, nothing_there, source_of, visible, web_origin
from tests.fakes.origin import FakeOrigin
from tests.fakes.wait import Clock, turns, until

NAME = "acme/sql"


@pytest.fixture
async def server() -> AsyncIterator[FaultyServer]:
    async with running(FaultyServer()) as server:
        for name in (NAME, "acme/legal", "other/one"):
            server.add(name, small_files())
        yield server


@pytest.fixture
async def hub(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Hub]:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    async with Hub() as hub:
        yield hub
        close_session()


def shown(server: FaultyServer, name: str = "") -> list[str]:
    """The credentials that came along, in order, each once in a row; for one adapter or for all."""
    all_of_them = [asked.authorization for asked in server.asked if asked.path.startswith(f"/{name}")]
    return [value for number, value in enumerate(all_of_them) if not number or value != all_of_them[number - 1]]


# -- credentials


async def test_a_token_of_the_environment_is_read_for_each_adapter(tmp_path: Path, server: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read when the process starts."""
    async with node(tmp_path / "node", web_origin(server.url, token_env="MY_TOKEN")) as stager:
        for token in ("one", "two"):
            monkeypatch.setenv("MY_TOKEN", token)
            await stager.ensure(NAME if token == "one" else "acme/legal")
        assert shown(server) == ["Bearer one", "Bearer two"]


async def test_a_token_file_may_be_rotated(tmp_path: Path, server: FaultyServer) -> None:
    """It is read anew, and a newline at its end is not part of it."""
    file = tmp_path / "token"
    async with node(tmp_path / "node", web_origin(server.url, token_file=str(file))) as stager:
        for name, token in ((NAME, "one\n"), ("acme/legal", "two")):
            file.write_text(token)
            await stager.ensure(name)
        assert shown(server) == ["Bearer one", "Bearer two"]


async def test_a_token_may_be_rotated_in_mid_download(tmp_path: Path, server: FaultyServer) -> None:
    """Of a download of an hour the next request already shows the new one."""
    file = tmp_path / "token"
    file.write_text("one")
    server.fault(WEIGHTS, at=1000, then=lambda: file.write_text("two") and None)
    async with node(tmp_path / "node", web_origin(server.url, token_file=str(file))) as stager:
        await stager.ensure(NAME)
        assert shown(server) == ["Bearer one", "Bearer two"]
        assert [asked.begin for asked in server.gets(WEIGHTS)] == [0, 1000]


@pytest.mark.parametrize("kind", ["http", "huggingface"])
async def test_a_token_file_that_cannot_be_read_is_a_refusal(tmp_path: Path, server: FaultyServer, hub: Hub, kind: str) -> None:
    """Nobody is asked without it, nothing is repeated, and the origin is not down for it. The message says why, and not where."""
    missing = str(tmp_path / "missing")
    origin = web_origin(server.url, token_file=missing) if kind == "http" else hub_origin(hub.url, token_file=missing)
    source = source_of(origin, Clock())
    async with node(tmp_path / "node", source, negative_ttl_s=0) as stager:
        for _ in range(6):
            with pytest.raises(OriginRefused, match="its token file cannot be read") as raised:
                await stager.ensure(NAME)
            assert missing not in raised.value.message
        assert source.breaker.failures == 0
        assert nothing_there(stager)
    assert server.asked == []
    assert hub.requests == []


async def test_adapters_may_have_tokens_of_their_own(tmp_path: Path, server: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """By pattern; the first that matches wins, and where its variable is not set, no other token is shown."""
    for variable, value in (("SQL", "sql"), ("ACME", "acme"), ("ALL", "all")):
        monkeypatch.setenv(variable, value)
    origin = web_origin(server.url, token_env="ALL", adapter_token_env={"acme/sq*": "SQL", "acme/*": "ACME", "secret/*": "UNSET"})
    server.add("secret/one", small_files())
    async with node(tmp_path / "node", origin) as stager:
        for name, token in ((NAME, "Bearer sql"), ("acme/legal", "Bearer acme"), ("other/one", "Bearer all"), ("secret/one", "")):
            await stager.ensure(name)
            assert shown(server, name) == [token]


async def test_a_user_makes_it_basic(tmp_path: Path, server: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The token is the password; both may be anything."""
    monkeypatch.setenv("PASSWORD", "pässword: with colons")
    async with node(tmp_path / "node", web_origin(server.url, username="user", token_env="PASSWORD")) as stager:
        await stager.ensure(NAME)
    (header,) = shown(server)
    scheme, _, pair = header.partition(" ")
    assert (scheme, base64.b64decode(pair).decode()) == ("Basic", "user:pässword: with colons")


async def test_without_a_token_none_is_shown(tmp_path: Path, server: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even the hub's, which a web server has no business with."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    async with node(tmp_path / "node", web_origin(server.url)) as stager:
        await stager.ensure(NAME)
    assert shown(server) == [""]


async def test_hub_repositories_may_have_tokens_of_their_own(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two private ones, each with a list of its own; files and listing are both asked with it."""
    for variable, value in (("HF_TOKEN", "hf_all"), ("SQL", "hf_sql")):
        monkeypatch.setenv(variable, value)
    hub.add(NAME, small_files(), private_token="hf_sql")
    hub.add("acme/legal", small_files(seed=1), private_token="hf_all")
    async with node(tmp_path / "node", hub_origin(hub.url, adapter_token_env={NAME: "SQL"})) as stager:
        for name in (NAME, "acme/legal"):
            await stager.ensure(name)
        assert visible(tmp_path / "node").keys() == {NAME, "acme/legal"}
    async with node(tmp_path / "swapped", hub_origin(hub.url, adapter_token_env={"acme/legal": "SQL"})) as stager:
        for name in (NAME, "acme/legal"):
            with pytest.raises(ModelNotFound):
                await stager.ensure(name)


async def test_no_secret_is_logged_or_told(tmp_path: Path, server: FaultyServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever goes wrong while it is shown."""
    caplog.set_level(logging.DEBUG, logger="extproc")
    monkeypatch.setenv("MY_TOKEN", "a-secret")
    origin = web_origin(server.url, username="user", token_env="MY_TOKEN")
    faults = (Fault(WEIGHTS, 99, status=401), Fault(WEIGHTS, 99, status=500), Fault(WEIGHTS, 99, at=0), Fault(WEIGHTS, 99, at=0, end="reset"))
    for number, fault in enumerate(faults):
        server.faults = [fault]
        async with node(tmp_path / f"{number}", origin) as stager:
            with pytest.raises(OriginFailed) as raised:
                await stager.ensure(NAME)
            told = raised.value.message + raised.value.openai_body().decode() + caplog.text
            assert "a-secret" not in told
            assert base64.b64encode(b"user:a-secret").decode() not in told


# -- what is remembered


@pytest.mark.parametrize(("status", "kind"), [(404, ModelNotFound), (403, OriginRefused), (401, OriginRefused)])
async def test_missing_and_forbidden_are_remembered_for_a_while(tmp_path: Path, server: FaultyServer, status: int, kind: type[Exception]) -> None:
    """The origin is asked once, then nobody for negative_ttl_s; then somebody again. The answer is the same meanwhile."""
    clock = Clock()
    server.fault(CONFIG, method="HEAD", times=99, status=status)
    async with node(tmp_path / "node", web_origin(server.url, archives=False), clock=clock, negative_ttl_s=20) as stager:
        messages = set()
        for _ in range(3):
            with pytest.raises(kind) as raised:
                await stager.ensure(NAME)
            messages.add(str(raised.value))
            clock.now += 6
        assert len(messages) == len(server.asked) == 1
        server.faults = []
        clock.now += 2
        assert (await stager.ensure(NAME)).staged


async def test_a_purge_forgets_that_it_was_forbidden(tmp_path: Path, server: FaultyServer) -> None:
    """Who has just been let in need not wait."""
    server.fault(CONFIG, method="HEAD", status=403)
    async with node(tmp_path / "node", web_origin(server.url)) as stager:
        with pytest.raises(OriginRefused):
            await stager.ensure(NAME)
        await stager.purge(NAME)
        assert (await stager.ensure(NAME)).staged


async def test_what_failed_is_not_remembered(tmp_path: Path, server: FaultyServer) -> None:
    """Neither as missing nor as forbidden: the next request asks anew."""
    async with node(tmp_path / "node", web_origin(server.url)) as stager:
        server.fault(CONFIG, method="HEAD", times=ATTEMPTS, status=500)
        with pytest.raises(OriginFailed):
            await stager.ensure(NAME)
        assert (await stager.ensure(NAME)).staged


async def test_missing_here_and_forbidden_there_is_forbidden(tmp_path: Path, server: FaultyServer) -> None:
    """And missing here and down there is down: nobody can say that there is none."""
    empty = FakeOrigin("empty")
    for status, kind in ((403, OriginRefused), (500, OriginFailed)):
        server.faults = []
        server.fault(CONFIG, method="HEAD", times=99, status=status)
        for order in ((empty, web_origin(server.url)), (web_origin(server.url), empty)):
            async with node(tmp_path / f"{status}-{order[0] is empty}", *order) as stager:
                with pytest.raises(kind) as raised:
                    await stager.ensure(NAME)
                assert type(raised.value) is kind


# -- in whose interest


async def test_a_request_in_the_same_turn_hurries_what_is_less_urgent(tmp_path: Path) -> None:
    """The order of events: who refreshes starts the flight, a request joins it before the flight has made its first step."""
    origin = FakeOrigin()
    for number, name in enumerate(("acme/first", "acme/between", "acme/both")):
        origin.add(name, small_files(seed=number))
    stall = origin.stall("acme/first", CONFIG)
    source = source_of(web_origin("http://nowhere", max_fetches=1), Clock())
    source.origin = origin
    async with node(tmp_path / "node", source) as stager:
        first = asyncio.create_task(stager.ensure("acme/first"))
        await stall.reached.wait()
        others = [asyncio.create_task(stager.ensure("acme/between", priority=Job.REFRESH))]
        await turns(100)
        others += [asyncio.create_task(stager.ensure("acme/both", priority=priority)) for priority in (Job.REFRESH, Job.REQUEST)]
        await until(lambda: all((job := stager.job(name)) is not None and job.phase == "check" for name in ("acme/between", "acme/both")))
        await turns()
        stall.release()
        await asyncio.gather(first, *others)
        order = [name for name, path in origin.fetched if path == CONFIG]
        assert order == ["acme/first", "acme/both", "acme/between"]


async def test_who_hurries_what_has_just_landed_hurries_no_later_flight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of events: a flight ends; before its waiters wake, a request asks for the same name; it is evicted; a prefetch brings it again."""
    origin = FakeOrigin()
    origin.add(NAME, small_files())
    async with node(tmp_path / "node", origin) as stager:
        flights = stager._flights
        ends = flights._count

        def hurried(*args: Any) -> None:
            flights._jobs.clear()
            flights.hurry(AdapterName(NAME), Job.REQUEST)
            ends(*args)

        monkeypatch.setattr(flights, "_count", hurried)
        await stager.ensure(NAME)
        assert flights._awaited == {}
