"""The etcd source, on a real etcd: keys that come and go, and members that stop, hang, forget and ask who is there."""

import asyncio
import logging
import ssl
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from extproc.config.discovery import EtcdSourceSettings
from extproc.core.endpoint import Endpoint
from extproc.core.fleet import Found
from extproc.discovery import etcd as etcd_module
from extproc.discovery.etcd import EtcdSource
from extproc.discovery.etcd_api import Compacted, Etcd, EtcdFailed
from extproc.discovery.source import Failed, Seen, Shown
from extproc.up.processes import free_ports
from tests.fakes.certificates import Authority
from tests.fakes.etcd import EtcdServer, running_etcd
from tests.fakes.relay import Relay

from .scripted import Listener, addresses, rows

PREFIX = "/fleet/llama/"


def settings(*members: str, **more: Any) -> EtcdSourceSettings:
    return EtcdSourceSettings(**{"type": "etcd", "endpoints": members, "prefix": PREFIX, "timeout_s": 2.0, **more})


@asynccontextmanager
async def listening(*members: str, **more: Any) -> AsyncIterator[Listener]:
    listener = Listener()
    task = asyncio.create_task(listener.listen(EtcdSource(settings(*members, **more)).sets()))
    try:
        yield listener
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def first(*members: str, **more: Any) -> Seen:
    async with aclosing(EtcdSource(settings(*members, **more)).sets()) as sets:
        return await anext(sets)


@pytest.fixture
async def etcd(tmp_path: Path) -> AsyncIterator[EtcdServer]:
    async with running_etcd(tmp_path) as server:
        yield server


async def test_keys_that_come_change_and_go_are_followed(etcd: EtcdServer) -> None:
    """Each in a new whole set; keys beside the prefix are somebody else's."""
    await etcd.put(PREFIX + "a", "10.0.0.1:8000")
    await etcd.put("/fleet/llama2/a", "10.9.9.9:8000")
    await etcd.put("/fleet/llama", "10.9.9.9:8000")
    async with listening(etcd.url) as listener:
        await listener.until("10.0.0.1:8000")
        await etcd.put(PREFIX + "b", {"address": "10.0.0.2:8000", "stager": "10.0.0.2:9102", "node": "b", "instance": "uid", "leaving": True})
        await listener.until("10.0.0.1:8000", "10.0.0.2:8000")
        assert rows(listener.said[-1])[1] == ("10.0.0.2:8000", "b", "10.0.0.2:9102", "uid", "", True)
        await etcd.put(PREFIX + "a", "10.0.0.3:8000")
        await listener.until("10.0.0.3:8000", "10.0.0.2:8000")
        await etcd.put("/fleet/llama2/b", "10.9.9.9:8000")
        await etcd.delete(PREFIX + "b")
        await listener.until("10.0.0.3:8000")
        await etcd.delete_below(PREFIX)
        await listener.until()
        assert not [seen for seen in listener.said if isinstance(seen, Failed)]


async def test_a_key_whose_lease_ends_is_gone(etcd: EtcdServer) -> None:
    """A node that died withdraws itself."""
    await etcd.put(PREFIX + "a", "10.0.0.1:8000")
    await etcd.put(PREFIX + "b", "10.0.0.2:8000", lease=await etcd.lease(2))
    async with listening(etcd.url) as listener:
        await listener.until("10.0.0.1:8000", "10.0.0.2:8000")
        await listener.until("10.0.0.1:8000")


async def test_a_prefix_without_keys_is_an_empty_set(etcd: EtcdServer) -> None:
    """etcd says so; whether that is believed is not the source's to say."""
    assert await first(etcd.url) == Shown(())


async def test_a_bad_value_is_named_by_its_key_and_left_out(etcd: EtcdServer) -> None:
    """Be it no JSON, no endpoint, or no value of a sensible size."""
    await etcd.put(PREFIX + "good", "10.0.0.1:8000")
    await etcd.call("kv/put", {"key": "L2ZsZWV0L2xsYW1hL3Rvcm4=", "value": "ewo="})  # /fleet/llama/torn: {
    await etcd.put(PREFIX + "empty", {})
    await etcd.put(PREFIX + "long", {"address": "10.0.0.2:8000", "node": "x" * 5000})
    seen = await first(etcd.url)
    assert addresses(seen) == ["10.0.0.1:8000"]
    assert isinstance(seen, Shown)
    assert seen.left_out == (
        "key '/fleet/llama/torn' is no JSON",
        "key '/fleet/llama/empty' has no address",
        "key '/fleet/llama/long' has 5040 bytes; 4096 is the limit",
    )


async def test_of_two_keys_with_one_address_the_one_written_last_counts(etcd: EtcdServer) -> None:
    """A pod that was replaced keeps its key for the time of its lease. The order of the names says nothing."""
    await etcd.put(PREFIX + "z-old", {"address": "10.0.0.1:8000", "instance": "old"})
    await etcd.put(PREFIX + "a-new", {"address": "10.0.0.1:8000", "instance": "new"})
    assert rows(await first(etcd.url)) == [("10.0.0.1:8000", "", "", "new", "", False)]


async def test_a_prefix_of_thousands_is_read_in_pages(etcd: EtcdServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of one revision."""
    monkeypatch.setattr("extproc.discovery.etcd_api.PAGE_KEYS", 100)
    await etcd.put_many({f"{PREFIX}{n:04}": f"10.0.{n // 250}.{n % 250 + 1}:8000" for n in range(1050)})
    assert len(addresses(await first(etcd.url))) == 1050
    monkeypatch.setattr("extproc.discovery.etcd_api.MAX_ENTRIES", 1000)
    assert await first(etcd.url) == Failed(f"{PREFIX} has more than 1000 keys")


async def test_many_changes_are_few_sets(etcd: EtcdServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A set is not made for every event, and a value is read once however often sets are made."""
    read: list[bytes] = []
    inner = etcd_module._read_value

    def counted(value: bytes) -> object:
        read.append(value)
        return inner(value)

    monkeypatch.setattr(etcd_module, "_read_value", counted)
    await etcd.put_many({f"{PREFIX}{n}": f"10.0.0.{n}:8000" for n in range(1, 101)})
    async with listening(etcd.url) as listener:
        await listener.until(*(f"10.0.0.{n}:8000" for n in range(1, 101)))
        for n in range(101, 201):
            await etcd.put(f"{PREFIX}{n}", f"10.0.0.{n}:8000")
        await listener.until(*(f"10.0.0.{n}:8000" for n in range(1, 201)))
        assert len(listener.said) < 50
        assert len(read) == 200


# ---- members that fail


async def test_a_member_that_is_away_is_said_and_found_when_it_is_back(tmp_path: Path) -> None:
    """With the keys as they are then."""
    async with running_etcd(tmp_path) as server:
        await server.put(PREFIX + "a", "10.0.0.1:8000")
        async with listening(server.url) as listener:
            await listener.until("10.0.0.1:8000")
            await server.stop()
            await listener.until_failed(server.url)
            await server.start()
            await listener.until("10.0.0.1:8000")


async def test_the_next_member_is_asked_when_one_is_away(etcd: EtcdServer) -> None:
    """That is no failure of the source."""
    await etcd.put(PREFIX + "a", "10.0.0.1:8000")
    assert addresses(await first(f"http://127.0.0.1:{free_ports(1)[0]}", etcd.url)) == ["10.0.0.1:8000"]


async def test_a_member_that_hangs_is_left_for_the_next(etcd: EtcdServer) -> None:
    """It keeps its connections, so only its silence tells. Nothing that was changed meanwhile is missed."""
    await etcd.put(PREFIX + "a", "10.0.0.1:8000")
    async with Relay(etcd.port) as relay, listening(f"http://{relay.address}", etcd.url, timeout_s=0.3) as listener:
        await listener.until("10.0.0.1:8000")
        relay.freeze()
        await etcd.put(PREFIX + "b", "10.0.0.2:8000")
        await listener.until("10.0.0.1:8000", "10.0.0.2:8000")
        assert not [seen for seen in listener.said if isinstance(seen, Failed)]


async def test_the_only_member_that_hangs_is_said(etcd: EtcdServer) -> None:
    """And followed again when it goes on."""
    await etcd.put(PREFIX + "a", "10.0.0.1:8000")
    async with Relay(etcd.port) as relay, listening(f"http://{relay.address}", timeout_s=0.3) as listener:
        await listener.until("10.0.0.1:8000")
        relay.freeze()
        await listener.until_failed("did not answer within 0.3 s")
        relay.thaw()
        await listener.until("10.0.0.1:8000")


async def test_a_connection_that_breaks_loses_no_change(etcd: EtcdServer) -> None:
    """The keys are listed anew, those deleted meanwhile are gone."""
    await etcd.put(PREFIX + "a", "10.0.0.1:8000")
    await etcd.put(PREFIX + "b", "10.0.0.2:8000")
    async with Relay(etcd.port) as relay, listening(f"http://{relay.address}") as listener:
        await listener.until("10.0.0.1:8000", "10.0.0.2:8000")
        relay.cut()
        await listener.until_failed()
        await etcd.delete(PREFIX + "a")
        relay.mend()
        await listener.until("10.0.0.2:8000")


async def test_a_watch_that_has_gone_deaf_is_noticed(etcd: EtcdServer, caplog: pytest.LogCaptureFixture) -> None:
    """Its packets are dropped somewhere, while the member answers everything else."""
    caplog.set_level(logging.DEBUG)
    await etcd.put(PREFIX + "a", "10.0.0.1:8000")
    async with Relay(etcd.port, mark=b"/v3/watch") as relay, listening(f"http://{relay.address}", timeout_s=1.0) as listener:
        await listener.until("10.0.0.1:8000")
        await etcd.put(PREFIX + "b", "10.0.0.2:8000")
        await listener.until("10.0.0.1:8000", "10.0.0.2:8000")  # the watch is there
        relay.freeze()
        await etcd.delete(PREFIX + "a")
        await listener.until_failed("did not show that on its watch")
        relay.thaw()
        await listener.until("10.0.0.2:8000")


async def test_a_quiet_watch_is_not_taken_for_a_deaf_one(etcd: EtcdServer) -> None:
    """However often the member is asked, and whatever others write meanwhile."""
    await etcd.put(PREFIX + "a", "10.0.0.1:8000")
    async with Relay(etcd.port) as relay, listening(f"http://{relay.address}", timeout_s=0.5) as listener:  # a busy machine answers within that
        await listener.until("10.0.0.1:8000")
        for n in range(10):
            await etcd.put("/elsewhere", n)
            await asyncio.sleep(0.2)
        assert len(listener.said) == 1


async def test_a_history_that_is_compacted_is_listed_anew(etcd: EtcdServer, caplog: pytest.LogCaptureFixture) -> None:
    """Between the list and the watch: the list is read; the watch's request is on its way; others write, and the history is compacted; the watch arrives,
    and its revision is no longer known.
    """
    caplog.set_level(logging.INFO)
    await etcd.put(PREFIX + "a", "10.0.0.1:8000")
    async with Relay(etcd.port, mark=b"/v3/watch") as relay:
        relay.freeze()
        async with listening(f"http://{relay.address}") as listener:
            await listener.until("10.0.0.1:8000")
            await etcd.put(PREFIX + "b", "10.0.0.2:8000")
            await etcd.compact(await etcd.put("/elsewhere", 1))
            relay.thaw()
            await listener.until("10.0.0.1:8000", "10.0.0.2:8000")
        assert not [seen for seen in listener.said if isinstance(seen, Failed)]
    assert "the keys are listed anew" in caplog.text


async def test_a_watch_from_a_compacted_revision_says_so(etcd: EtcdServer) -> None:
    """The caller must list; every other end is a failure of the member."""
    for n in range(5):
        await etcd.put(PREFIX + "a", f"10.0.0.{n + 1}:8000")
    await etcd.compact(await etcd.put(PREFIX + "a", "10.0.0.9:8000"))
    async with Etcd(settings(etcd.url), etcd.url) as client, aclosing(client.watch(1)) as changes:
        with pytest.raises(Compacted, match="has compacted its history to revision"):
            await anext(changes)
        with pytest.raises(Compacted, match="has been compacted"):
            await client._range(PREFIX.encode(), revision=2)  # as a page of a long list


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n<html>", "does not answer as etcd does"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2000\r\n\r\n" + b" " * 2000, "answers with more than 1000 bytes at once"),
        (b"HTTP/1.1 503 Busy\r\nContent-Length: 4\r\n\r\nbusy", "answered 503"),
        (b"HTTP/1.1 307 Elsewhere\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n", "answered 307"),
        (b"", ""),
        (b"\x16\x03\x01" * 100, ""),
    ],
)
async def test_a_server_that_is_no_etcd_is_said(answer: bytes, complaint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it answers. It is not followed elsewhere, where our token would go, too."""
    monkeypatch.setattr("extproc.discovery.etcd_api.MAX_ANSWER_BYTES", 1000)

    async def web(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(web, "127.0.0.1", 0)
    try:
        seen = await first(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    finally:
        server.close()
    assert isinstance(seen, Failed)
    assert complaint in seen.why
    assert len(seen.why) <= 300


# ---- who asks


async def test_a_cluster_with_authentication_wants_user_and_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the environment or from a file. What is refused is a failure of the source, and says no password."""
    (tmp_path / "password").write_text("right\n")
    monkeypatch.setenv("RIGHT", "right")
    monkeypatch.setenv("WRONG", "secret")
    async with running_etcd(tmp_path) as server:
        await server.put(PREFIX + "a", "10.0.0.1:8000")
        await server.demand_passwords("router", "right")
        assert addresses(await first(server.url, username="router", password_env="RIGHT")) == ["10.0.0.1:8000"]
        assert addresses(await first(server.url, username="router", password_file=str(tmp_path / "password"))) == ["10.0.0.1:8000"]
        for refused in (await first(server.url, username="router", password_env="WRONG"), await first(server.url)):
            assert isinstance(refused, Failed)
            assert "etcdserver: " in refused.why
            assert "secret" not in refused.why


async def test_a_token_that_has_ended_is_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A login is good for five minutes by etcd's default; here for a second."""
    monkeypatch.setenv("PASSWORD", "right")
    async with running_etcd(tmp_path, "--auth-token-ttl", "1") as server:
        await server.put(PREFIX + "a", "10.0.0.1:8000")
        await server.demand_passwords("router", "right")
        async with Etcd(settings(server.url, username="router", password_env="PASSWORD"), server.url) as client:
            assert (await client.latest())[0] == 1
            token = client._token
            await asyncio.sleep(3)
            assert (await client.latest())[0] == 1
            assert client._token != token


async def test_certificates_are_verified_and_shown(tmp_path: Path) -> None:
    """An etcd that wants a certificate of its clients gets ours; one that somebody else signed is not spoken to."""
    authority, stranger = Authority(tmp_path), Authority(tmp_path, "stranger")
    its, ours = authority.pair("etcd", "127.0.0.1"), authority.pair("router")
    context = ssl.create_default_context(cafile=authority.ca_file)
    context.load_cert_chain(ours.cert, ours.key)
    options = ["--cert-file", str(its.cert), "--key-file", str(its.key), "--client-cert-auth", "--trusted-ca-file", str(authority.ca_file)]
    async with running_etcd(tmp_path, *options, tls=context) as server:
        await server.put(PREFIX + "a", "10.0.0.1:8000")
        shown = {"cert_file": str(ours.cert), "key_file": str(ours.key)}
        assert addresses(await first(server.url, ca_file=str(authority.ca_file), **shown)) == ["10.0.0.1:8000"]
        for refused in (
            await first(server.url, ca_file=str(stranger.ca_file), **shown),
            await first(server.url, ca_file=str(authority.ca_file)),
            await first(server.url, ca_file=str(tmp_path / "none.pem")),
        ):
            assert isinstance(refused, Failed)
            assert len(refused.why) <= 300


async def test_a_password_file_that_cannot_be_read_is_said(etcd: EtcdServer) -> None:
    """Like a member that cannot be asked: it may be being replaced."""
    async with Etcd(settings(etcd.url, username="router", password_file="/none"), etcd.url) as client:
        with pytest.raises(EtcdFailed, match="password_file"):
            await client.latest()


def test_a_value_is_an_endpoint() -> None:
    """As an entry of a file, written as JSON."""
    assert isinstance(etcd_module._read_value(b'"10.0.0.1:8000"'), Found)


async def test_members_that_list_their_keys_and_watch_nothing_are_asked_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a proxy, or for want of a permission: all are asked in turn, then that is said, and then there is a pause."""
    asked = 0

    async def follow(self: EtcdSource, member: str) -> AsyncGenerator[Seen, None]:
        nonlocal asked
        asked += 1
        yield Shown((Found(Endpoint("10.0.0.1:8000")),))
        raise EtcdFailed(f"{member} ended the watch")

    monkeypatch.setattr(EtcdSource, "_follow", follow)
    async with listening("http://127.0.0.1:1", "http://127.0.0.1:2", "http://127.0.0.1:3", timeout_s=60) as listener:
        await listener.until_failed("ended the watch")
        before = asked
        await asyncio.sleep(0.3)
        assert (before, asked) == (3, 3)
