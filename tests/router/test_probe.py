"""Whether an engine lives, asked over a real connection."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from extproc.router.probe import Probe
from extproc.up.processes import free_ports
from tests.fakes.wait import PATIENCE_S, turns

ANSWER = "HTTP/1.1 {} x\r\ncontent-length: 0\r\nlocation: /elsewhere\r\n\r\n"


@contextlib.asynccontextmanager
async def engine(answer: str | None) -> AsyncIterator[str]:
    """A server that answers every connection so; None: with nothing, as a process that is stopped does."""
    over = asyncio.Event()
    asked: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readline())
        if answer is None:
            await over.wait()
        else:
            writer.write(answer.encode())
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        over.set()
        server.close()
        await server.wait_closed()
        await turns()  # until its connections are closed, too, for which Python 3.11 does not wait
    assert set(asked) <= {b"GET /health HTTP/1.1\r\n"}


@pytest.mark.parametrize(
    ("answer", "lives"),
    [
        (ANSWER.format(200), True),
        (ANSWER.format(404), True),  # it knows no such path, and says so
        (ANSWER.format(307), True),  # not followed: who redirects lives
        (ANSWER.format(503), False),
        (ANSWER.format(500), False),
        ("", False),
        ("no HTTP at all\r\n\r\n", False),
    ],
)
async def test_an_engine_lives_that_answers(answer: str, lives: bool) -> None:
    """Without an error of its own."""
    async with engine(answer) as address:
        probe = Probe(PATIENCE_S, PATIENCE_S)
        assert await probe.answers(address) is lives
        await probe.close()


async def test_an_engine_that_says_nothing_does_not_live() -> None:
    """Its connections are accepted by the kernel."""
    async with engine(None) as address:
        probe = Probe(connect_s=0.05, answer_s=0.05)
        assert await probe.answers(address) is False
        await probe.close()


async def test_an_engine_is_not_taken_for_dead_because_others_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where many have to be asked, each has its time from its turn on."""
    monkeypatch.setattr("extproc.router.probe.AT_ONCE", 1)
    async with engine(None) as hanging, engine(ANSWER.format(200)) as alive:
        probe = Probe(connect_s=0.2, answer_s=0.2)
        assert await asyncio.gather(*(probe.answers(address) for address in (hanging, hanging, alive))) == [False, False, True]
        await probe.close()


async def test_an_engine_that_is_not_there_does_not_live() -> None:
    """Nor does an address that is none."""
    probe = Probe()
    assert await probe.answers(f"127.0.0.1:{free_ports(1)[0]}") is False
    assert await probe.answers("not an address:1") is False
    await probe.close()


async def test_a_probe_that_was_never_used_is_closed_too() -> None:
    """Where every stager was well."""
    await Probe().close()
