"""The DNS source: what a real name server says of a zone, and what a scripted one does wrong."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import dns.message
import pytest

from extproc.config.discovery import DnsSourceSettings
from extproc.discovery.dns import RETRY_S, DnsSource
from extproc.discovery.source import Failed, Seen, Shown
from extproc.up.processes import free_ports
from tests.fakes.dns import NameServer, reply, running_nsd, scripted_dns

from .scripted import addresses, rows

ZONE = """
vllm          IN A    10.0.0.2
vllm          IN A    10.0.0.1
vllm          IN AAAA 2001:db8::1
vllm2         IN A    10.9.9.9
slow     3600 IN CNAME vllm
_http._tcp.vllm IN SRV 10 5 8000 b
_http._tcp.vllm IN SRV 10 9 8001 a
_http._tcp.vllm IN SRV 20 0 8000 spare
_gone._tcp.vllm IN SRV 0 0 8000 a
_gone._tcp.vllm IN SRV 0 0 8000 nowhere
_off._tcp.vllm  IN SRV 0 0 0 .
a             IN A    10.0.1.1
b             IN AAAA 2001:db8::2
spare         IN A    10.0.1.3
"""


def source(*servers: str, **more: Any) -> DnsSource:
    name = {"name": "vllm.test."} | ({} if more.get("record") == "SRV" else {"port": 8000})
    return DnsSource(DnsSourceSettings(**{"type": "dns", "servers": servers, "min_ttl_s": 0.01, "timeout_s": 1.0, **name, **more}))


async def look_up(*servers: str, **more: Any) -> tuple[Seen, float]:
    """What a look-up brings, and for how long that holds."""
    return await asyncio.to_thread(source(*servers, **more)._look_up)


async def seen_by(*servers: str, **more: Any) -> Seen:
    return (await look_up(*servers, **more))[0]


@asynccontextmanager
async def zone(directory: Path, records: str = ZONE, **more: Any) -> AsyncIterator[NameServer]:
    async with running_nsd(directory, records, **more) as server:
        yield server


# ---- what a zone says


async def test_addresses_become_endpoints(tmp_path: Path) -> None:
    """With the port, and the stager's, of the settings; IPv4 and IPv6 by sources of their own."""
    async with zone(tmp_path) as server:
        assert rows(await seen_by(server.address, stager_port=9102)) == [
            ("10.0.0.1:8000", "", "10.0.0.1:9102", "", "", False),
            ("10.0.0.2:8000", "", "10.0.0.2:9102", "", "", False),
        ]
        assert rows(await seen_by(server.address, record="AAAA", stager_port=9102)) == [("[2001:db8::1]:8000", "", "[2001:db8::1]:9102", "", "", False)]
        assert addresses(await seen_by(server.address, name="slow.test.")) == ["10.0.0.1:8000", "10.0.0.2:8000"]


async def test_srv_records_have_ports_and_names(tmp_path: Path) -> None:
    """The name is the node. Less preferred targets are for when the others are gone, and the targets may have addresses of either kind."""
    async with zone(tmp_path) as server:
        assert rows(await seen_by(server.address, record="SRV", name="_http._tcp.vllm.test.", stager_port=9102)) == [
            ("10.0.1.1:8001", "a.test", "10.0.1.1:9102", "", "", False),
            ("[2001:db8::2]:8000", "b.test", "[2001:db8::2]:9102", "", "", False),
        ]


async def test_a_target_without_an_address_is_left_out(tmp_path: Path) -> None:
    """A pod that has gone is in the SRV records for a while yet."""
    async with zone(tmp_path) as server:
        seen = await seen_by(server.address, record="SRV", name="_gone._tcp.vllm.test.")
    assert isinstance(seen, Shown)
    assert (addresses(seen), seen.left_out) == (["10.0.1.1:8000"], ("target nowhere.test has no address",))


async def test_a_name_that_has_none_is_an_empty_set(tmp_path: Path) -> None:
    """Whether it exists without such records, does not exist, or says that there is no such service. Each says so."""
    async with zone(tmp_path) as server:
        assert await seen_by(server.address, name="a.test.", record="AAAA") == Shown((), note="the name has no AAAA records")
        assert await seen_by(server.address, name="nothing.test.") == Shown((), note="the name does not exist (NXDOMAIN)")
        off = await seen_by(server.address, name="_off._tcp.vllm.test.", record="SRV")
        assert off == Shown((), note="its SRV record says that there is no such service")


async def test_a_name_that_the_server_does_not_know_is_a_failure(tmp_path: Path) -> None:
    """It refuses: somebody else would know."""
    async with zone(tmp_path) as server:
        seen = await seen_by(server.address, name="vllm.example.")
    assert isinstance(seen, Failed)
    assert "answered REFUSED" in seen.why


async def test_the_shortest_ttl_of_an_answer_counts(tmp_path: Path) -> None:
    """Of a chain of names, of an SRV record's targets, and of a denial by its SOA record; within the settings' bounds."""
    async with zone(tmp_path, "vllm 7 IN A 10.0.0.1\nalias 20 IN CNAME vllm\n_s 25 IN SRV 0 0 8000 vllm\nlong 3600 IN A 10.0.0.1", denial_s=9) as server:
        for expected, more in (
            (7, {"name": "alias.test."}),
            (7, {"name": "_s.test.", "record": "SRV"}),
            (1, {"name": "nothing.test."}),  # RFC 2308: the smaller of the SOA record's TTL, which is 1 here, and its last field
            (30, {"name": "long.test."}),
        ):
            assert (await look_up(server.address, **more))[1] == expected


async def test_a_thousand_addresses_are_read_over_tcp(tmp_path: Path) -> None:
    """The server cuts such an answer off over UDP."""
    async with zone(tmp_path, "\n".join(f"vllm IN A 10.0.{n // 250}.{n % 250 + 1}" for n in range(1000))) as server:
        assert len(addresses(await seen_by(server.address))) == 1000


async def test_a_zone_that_changes_is_followed(tmp_path: Path) -> None:
    """When the TTL is over."""
    async with zone(tmp_path) as server, aclosing(source(server.address, max_ttl_s=0.05).sets()) as sets:
        assert addresses(await anext(sets)) == ["10.0.0.1:8000", "10.0.0.2:8000"]
        server.write("vllm IN A 10.0.0.3")
        async with asyncio.timeout(10):
            async for seen in sets:
                if addresses(seen) == ["10.0.0.3:8000"]:
                    break


async def test_a_name_server_that_stops_and_starts_is_followed(tmp_path: Path) -> None:
    """The failure is said, then the set again."""
    async with zone(tmp_path) as server, aclosing(source(server.address, max_ttl_s=0.05, timeout_s=0.2).sets()) as sets:
        assert isinstance(await anext(sets), Shown)
        await server.stop()
        async with asyncio.timeout(20):
            async for seen in sets:
                if isinstance(seen, Failed):
                    break
            await server.start()
            async for seen in sets:
                if isinstance(seen, Shown):
                    break


# ---- what goes wrong


@pytest.mark.parametrize("rcode", ["SERVFAIL", "REFUSED", "FORMERR", "NOTIMP"])
async def test_an_error_of_the_server_is_a_failure(rcode: str) -> None:
    """It does not say that there are none."""
    async with scripted_dns(lambda query: reply(query, rcode=rcode)) as server:
        seen, again_s = await look_up(server.address)
    assert isinstance(seen, Failed)
    assert server.address.replace(":", "@") in seen.why
    assert again_s == RETRY_S


async def test_silence_is_a_failure_after_its_time() -> None:
    """Lost packets say nothing of a name."""
    async with scripted_dns(lambda query: None) as server:
        assert await seen_by(server.address, timeout_s=0.2) == Failed("no name server answered within 0.2 s")


async def test_what_is_no_dns_is_a_failure() -> None:
    """Be it noise, the answer to another question, or one that is broken."""
    for noise in (b"", b"\0" * 11, b"\xff" * 600):
        async with scripted_dns(lambda query, noise=noise: noise) as server:  # type: ignore[misc]
            assert isinstance(await seen_by(server.address, timeout_s=0.2), Failed)


async def test_the_next_server_is_asked_when_one_fails() -> None:
    """In their order; no failure is said."""

    def good(query: dns.message.Message) -> dns.message.Message:
        return reply(query, "vllm.test. 1 IN A 10.0.0.1")

    away = f"127.0.0.1:{free_ports(1)[0]}"
    async with scripted_dns(lambda query: reply(query, rcode="SERVFAIL")) as broken, scripted_dns(good) as healthy:
        assert addresses(await seen_by(broken.address, away, healthy.address)) == ["10.0.0.1:8000"]
        assert broken.asked == ["udp vllm.test. IN A"]


async def test_an_answer_that_is_cut_off_is_asked_for_again_over_tcp() -> None:
    """What fits is not the set."""

    def answer(query: dns.message.Message) -> dns.message.Message:
        if len(server.asked) == 1:
            return reply(query, "vllm.test. 1 IN A 10.0.0.1", is_cut=True)
        return reply(query, "vllm.test. 1 IN A 10.0.0.1", "vllm.test. 1 IN A 10.0.0.2")

    async with scripted_dns(answer) as server:
        assert addresses(await seen_by(server.address)) == ["10.0.0.1:8000", "10.0.0.2:8000"]
        assert server.asked == ["udp vllm.test. IN A", "tcp vllm.test. IN A"]


async def test_a_target_that_cannot_be_looked_up_fails_the_whole() -> None:
    """The set would be smaller by those whose name server has a bad moment."""

    def answer(query: dns.message.Message) -> dns.message.Message:
        match query.question[0].to_text():
            case "vllm.test. IN SRV":
                return reply(query, "vllm.test. 1 IN SRV 0 0 8000 a.test.", "vllm.test. 1 IN SRV 0 0 8000 b.test.")
            case "a.test. IN A":
                return reply(query, "a.test. 1 IN A 10.0.0.1")
            case _:
                return reply(query, rcode="SERVFAIL")

    async with scripted_dns(answer) as server:
        assert isinstance(await seen_by(server.address, record="SRV"), Failed)


async def test_addresses_that_come_with_the_srv_records_are_not_asked_for() -> None:
    """A thousand targets are one question then."""

    def answer(query: dns.message.Message) -> dns.message.Message:
        message = reply(query, "vllm.test. 1 IN SRV 0 0 8000 a.test.")
        message.additional = reply(query, "a.test. 1 IN A 10.0.0.1", "other.test. 1 IN A 10.0.0.9").answer
        return message

    async with scripted_dns(answer) as server:
        assert rows(await seen_by(server.address, record="SRV")) == [("10.0.0.1:8000", "a.test", "", "", "", False)]
        assert server.asked == ["udp vllm.test. IN SRV"]


async def test_an_address_that_no_endpoint_can_have_is_left_out() -> None:
    """As a name server that blocks a name answers."""
    async with scripted_dns(lambda query: reply(query, "vllm.test. 1 IN A 0.0.0.0", "vllm.test. 1 IN A 10.0.0.1")) as server:
        seen = await seen_by(server.address)
    assert isinstance(seen, Shown)
    assert (addresses(seen), seen.left_out) == (["10.0.0.1:8000"], ("record '0.0.0.0:8000' is no machine's address",))


async def test_a_ttl_of_zero_is_not_a_loop() -> None:
    """The lower bound of the settings holds."""
    async with (
        scripted_dns(lambda query: reply(query, "vllm.test. 0 IN A 10.0.0.1")) as server,
        aclosing(source(server.address, min_ttl_s=30, max_ttl_s=60).sets()) as sets,
    ):
        await anext(sets)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await anext(sets)
        assert len(server.asked) == 1


async def test_a_set_that_is_the_same_is_the_same_object() -> None:
    """Name servers turn their answers round; nothing has changed, and nothing is done for it."""
    turn = 0

    def answer(query: dns.message.Message) -> dns.message.Message:
        nonlocal turn
        turn += 1
        records = ["vllm.test. 0 IN A 10.0.0.1", "vllm.test. 0 IN A 10.0.0.2"]
        return reply(query, *(records if turn % 2 else reversed(records)))

    async with scripted_dns(answer) as server, aclosing(source(server.address).sets()) as sets:
        assert await anext(sets) is await anext(sets)


@pytest.mark.parametrize("additional", [("a.test. 1 IN A 10.0.0.1", "a.test. 1 IN AAAA 2001:db8::1"), ("a.test. 1 IN AAAA 2001:db8::1",), ()])
async def test_a_target_with_addresses_of_both_kinds_is_one_endpoint(additional: tuple[str, ...]) -> None:
    """Whichever of them its name server sends along."""

    def answer(query: dns.message.Message) -> dns.message.Message:
        kind = query.question[0].to_text().split()[-1]
        if kind != "SRV":
            return reply(query, "a.test. 1 IN A 10.0.0.1" if kind == "A" else "a.test. 1 IN AAAA 2001:db8::1")
        message = reply(query, "vllm.test. 1 IN SRV 0 0 8000 a.test.")
        message.additional = reply(query, *additional).answer
        return message

    async with scripted_dns(answer) as server:
        assert addresses(await seen_by(server.address, record="SRV")) == ["10.0.0.1:8000"]
