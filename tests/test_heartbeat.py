"""Silence on a stream, on a loop whose time the test makes pass: when it is told, when it ends the stream, and whose silence it was."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from extproc.heartbeat import GONE_AT_LEAST_S, SILENT_SLACK_S, Heard, Heartbeat, Listener, Silence, Silent
from tests.fakes.wait import VirtualLoop

Main = Callable[[VirtualLoop], Coroutine[Any, Any, None]]


def run(main: Main) -> None:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        loop = runner.get_loop()
        assert isinstance(loop, VirtualLoop)
        runner.run(main(loop))


def speaking(*pauses: float | str) -> Callable[[], Coroutine[Any, Any, str | None]]:
    """Reads: a message after each pause; what is no number ends the stream, or never comes."""
    left = list(pauses)

    async def read() -> str | None:
        pause = left.pop(0) if left else "end"
        if pause == "never":
            await asyncio.Event().wait()
        if isinstance(pause, str):
            return None
        await asyncio.sleep(pause)
        return f"after {pause}"

    return read


def shown(item: str | Silent | Heard) -> object:
    return Silent(round(item.seconds, 3)) if isinstance(item, Silent) else item


async def told(listener: Listener[str]) -> list[tuple[float, Any]]:
    """All that it yields, with the times at which, and what it raises at the end."""
    seen: list[tuple[float, Any]] = []
    loop = asyncio.get_running_loop()
    began = loop.time()
    try:
        async for item in listener.listen():
            seen.append((round(loop.time() - began, 3), shown(item)))  # noqa: PERF401  # what came before the error counts
    except Silence as silence:
        seen.append((round(loop.time() - began, 3), str(silence)))
    return seen


def test_who_speaks_in_time_is_never_silent() -> None:
    """One heartbeat may be late, or lost."""

    async def main(_: VirtualLoop) -> None:
        seen = await told(Listener(speaking(0.5, 0.5, 1.04, 0.5), Heartbeat(0.5)))
        assert [item for _, item in seen] == ["after 0.5", "after 0.5", "after 1.04", "after 0.5"]

    run(main)


@pytest.mark.parametrize(("every_s", "silent_s", "gone_s"), [(0.5, 1.05, 3.0), (2.0, 4.05, 12.0), (0.1, 0.25, GONE_AT_LEAST_S)])
def test_who_says_nothing_is_silent_then_gone(every_s: float, silent_s: float, gone_s: float) -> None:
    """After two heartbeats and after six, counted from the last word, or from the beginning if there was none."""

    async def main(_: VirtualLoop) -> None:
        assert await told(Listener(speaking("never"), Heartbeat(every_s))) == [
            (silent_s, Silent(silent_s)),
            (gone_s, f"silent for {gone_s:.1f} s"),
        ]
        seen = await told(Listener(speaking(0.2, "never"), Heartbeat(every_s)))
        assert [at for at, _ in seen] == [0.2, round(0.2 + silent_s, 3), round(0.2 + gone_s, 3)]

    run(main)
    assert SILENT_SLACK_S == 0.05


def test_who_speaks_again_is_heard_before_what_was_said() -> None:
    """Once each time, however often."""

    async def main(_: VirtualLoop) -> None:
        seen = [item for _, item in await told(Listener(speaking(2.0, 0.1, 2.5), Heartbeat(0.5)))]
        assert seen == [Silent(1.05), Heard(), "after 2.0", "after 0.1", Silent(1.05), Heard(), "after 2.5"]

    run(main)


def test_a_stream_that_ends_after_a_silence_is_not_heard_again() -> None:
    """Its end is no word."""

    async def main(_: VirtualLoop) -> None:
        async def read() -> str | None:
            await asyncio.sleep(1.2)
            return None

        assert [item for _, item in await told(Listener(read, Heartbeat(0.5)))] == [Silent(1.05)]

    run(main)


def test_the_silence_of_who_need_not_speak_proves_nothing() -> None:
    """As of an older stager, once its first word has said so."""

    async def main(_: VirtualLoop) -> None:
        beat = Heartbeat(0.5)
        listener = Listener(speaking(0.1, 86_400.0), beat)
        seen = []
        async for item in listener.listen():
            seen.append(item)
            beat.every_s = 0.0
        assert seen == ["after 0.1", "after 86400.0"]

    run(main)


def test_who_was_stopped_itself_blames_nobody() -> None:
    """Order of events: this process is stopped for a minute, the other side speaks meanwhile, and the timers run out before the words are read."""

    async def main(loop: VirtualLoop) -> None:
        spoken = asyncio.Event()

        async def read() -> str | None:
            await spoken.wait()
            return "there"

        listening = Listener(read, Heartbeat(0.5)).listen()
        first = asyncio.ensure_future(anext(listening))
        await asyncio.sleep(0.1)
        loop.jump(60.0)
        await asyncio.sleep(0.1)
        assert not first.done()
        spoken.set()
        assert await first == "there"
        await listening.aclose()

    run(main)


def test_leaving_ends_the_read_first() -> None:
    """Whoever closes the listener may then close what it reads from: at a word, in a silence, or while it waits."""

    async def main(_: VirtualLoop) -> None:
        ended = []

        async def read() -> str | None:
            try:
                await asyncio.sleep(2.0)
                return "word"
            finally:
                ended.append(True)

        for count in range(3):
            ended.clear()
            listening = Listener(read, Heartbeat(0.5)).listen()
            for _turn in range(count):
                await anext(listening)
            waiting = asyncio.ensure_future(anext(listening))
            await asyncio.sleep(0.01)
            waiting.cancel()
            await asyncio.wait({waiting})
            await listening.aclose()
            assert ended

    run(main)
