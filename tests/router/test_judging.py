"""Bodies that are judged in processes of their own: what comes back, and judges that hang or die."""

import asyncio
import contextlib
import fcntl
import gzip
import json
import os
import random
import signal
import socket
import sys
import termios
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from pathlib import Path

import brotli
import pytest
import pytest_asyncio

from extproc.core import verdict
from extproc.core.content import Content, Kind, of_headers
from extproc.core.pieces import Buffer
from extproc.core.prefix import MAX_BLOCKS
from extproc.errors import BodyTooLarge, InvalidRequest, LoraExtprocError, Overloaded
from extproc.router import judging
from extproc.router.judging import Judges
from tests.fakes.wait import turns, until

MAX_BODY_BYTES = 2**23
JSON = Content(Kind.JSON)
LARGE = json.dumps({"messages": random.Random(1).randbytes(2_500_000).hex(), "model": "demo/sql", "n": 1}).encode()
BROTLI, GZIP = ({"content-type": "application/json", "content-encoding": encoding} for encoding in ("br", "gzip"))

pytestmark = pytest.mark.asyncio(loop_scope="module")  # a judge takes a second to start


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def judges() -> AsyncIterator[Judges]:
    judges = Judges(1, MAX_BODY_BYTES, with_blocks=True)
    judges.start()
    yield judges
    await judges.stop()


def of(headers: Mapping[str, str]) -> Content:
    content = of_headers(headers)
    assert content is not None
    return content


def in_pieces(body: bytes, size: int = 16_384) -> tuple[Buffer, ...]:
    return tuple(memoryview(body)[first : first + size] for first in range(0, len(body), size))


async def process_of(judges: Judges) -> int:
    """The judge's process, when it runs and is idle."""
    await judges.judge(JSON, (b'{"model":"a"}',))
    (judge,) = [judges._idle.get_nowait()]
    judges._idle.put(judge)
    assert judge._process is not None
    return judge._process.pid


def memory_files(pids: Iterable[int]) -> list[str]:
    """What these processes have open or mapped of bodies."""
    found = []
    for pid in pids:
        found += [name for fd in Path(f"/proc/{pid}/fd").iterdir() if "memfd" in (name := _target(fd))]
        found += [line for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if "memfd" in line]
    return found


def _target(fd: Path) -> str:
    try:
        return str(fd.readlink())
    except FileNotFoundError:
        return ""


async def test_a_large_json_body_is_judged_from_its_pieces(judges: Judges) -> None:
    """Of the verdict only numbers come back."""
    reading = await judges.judge(JSON, in_pieces(LARGE))
    assert (reading.model, LARGE[reading.begin : reading.end], reading.plain) == ("demo/sql", b'"demo/sql"', None)


@pytest.mark.parametrize("headers", [{"content-type": "application/json"}, GZIP])
async def test_the_prompt_of_a_large_body_is_hashed_by_its_judge(judges: Judges, headers: Mapping[str, str]) -> None:
    """As one that is judged by the router itself."""
    body = gzip_of(LARGE) if "content-encoding" in headers else LARGE
    reading = await judges.judge(of(headers), in_pieces(body))
    assert reading.blocks == verdict.judge(LARGE, with_blocks=True).blocks
    assert len(reading.blocks) == MAX_BLOCKS


async def test_a_form_is_judged(judges: Judges) -> None:
    """25 MB of audio beside the name."""
    form = b'--x\r\ncontent-disposition: form-data; name="file"; filename="a.wav"\r\n\r\n' + bytes(1_000_000)
    form += b'\r\n--x\r\ncontent-disposition: form-data; name="model"\r\n\r\ndemo/sql\r\n--x--\r\n'
    reading = await judges.judge(of({"content-type": "multipart/form-data; boundary=x"}), in_pieces(form))
    assert (reading.model, form[reading.begin : reading.end]) == ("demo/sql", b"demo/sql")


def brotli_of(body: bytes) -> bytes:
    return bytes(brotli.compress(body, quality=1))


def gzip_of(body: bytes) -> bytes:
    return gzip.compress(body, 1)


@pytest.mark.parametrize(("headers", "encode"), [(BROTLI, brotli_of), (GZIP, gzip_of)])
async def test_an_encoded_body_comes_back_plain(judges: Judges, headers: Mapping[str, str], encode: Callable[[bytes], bytes]) -> None:
    """As a view of memory that the judge has written; it goes when nobody looks at it any more."""
    reading = await judges.judge(of(headers), in_pieces(encode(LARGE)))
    assert reading.model == "demo/sql"
    assert reading.plain == LARGE
    del reading
    await turns()
    assert memory_files([os.getpid()]) == []


@pytest.mark.parametrize(
    ("content", "body", "error", "message"),
    [
        (JSON, LARGE[:-1], InvalidRequest, "the body is not JSON: it ends in the middle of a value"),
        (JSON, LARGE[:-1] + b',"model":"b"}', InvalidRequest, "the body has `model` 2 times"),
        (of(GZIP), gzip_of(LARGE + LARGE), BodyTooLarge, str(MAX_BODY_BYTES)),
        (of(GZIP), b"plain", InvalidRequest, "gzip"),
    ],
    ids=["ends early", "two models", "too large", "not encoded"],
)
async def test_what_is_wrong_with_a_body_comes_back_as_itself(
    judges: Judges, content: Content, body: bytes, error: type[LoraExtprocError], message: str
) -> None:
    """The same class and sentence as of a body that is judged at once; the judge judges on."""
    pid = await process_of(judges)
    with pytest.raises(error, match=message) as caught:
        await judges.judge(content, in_pieces(body))
    assert type(caught.value) is error
    assert await process_of(judges) == pid


async def test_no_memory_file_is_left_open(judges: Judges) -> None:
    """Neither here nor there: well judged, ill judged, decoded."""
    pid = await process_of(judges)
    for content, body in ((JSON, LARGE), (JSON, b"{"), (of(BROTLI), brotli_of(LARGE))):
        for _ in range(3):
            with contextlib.suppress(InvalidRequest):
                await judges.judge(content, in_pieces(body))
    await until(lambda: memory_files([os.getpid(), pid]) == [])  # the judge closes its own behind its answer


def unread(sent: socket.socket) -> int:
    """How much of what was sent there has not been read."""
    return int.from_bytes(fcntl.ioctl(sent, termios.TIOCOUTQ, bytes(4)), sys.byteorder)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_judge_that_dies_or_hangs_in_the_middle_is_replaced(judges: Judges, how: signal.Signals, caplog: pytest.LogCaptureFixture) -> None:
    """Its body is answered 429, which is repeated; the next is judged by another process. Nothing is left of the first."""
    pid = await process_of(judges)
    judge = judges._idle.get_nowait()
    judges._idle.put(judge)
    sent = judge._socket
    assert sent is not None
    if how is signal.SIGSTOP:
        sent.settimeout(0.5)
    os.kill(pid, signal.SIGSTOP)  # before the body comes, so that it is in the middle when it dies
    judged = asyncio.create_task(judges.judge(JSON, in_pieces(LARGE)))
    await until(lambda: unread(sent))
    if how is signal.SIGKILL:
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(Overloaded, match=f"the body of {len(LARGE)} bytes could not be read within"):
        await judged
    assert "a judge of bodies did not answer (" in caplog.text
    assert (await judges.judge(JSON, in_pieces(LARGE))).model == "demo/sql"
    assert await process_of(judges) != pid
    assert not Path(f"/proc/{pid}").exists()
    assert memory_files([os.getpid()]) == []


async def test_a_judge_that_died_meanwhile_is_replaced_unseen(judges: Judges) -> None:
    """The next body waits for a new one, and that is all."""
    pid = await process_of(judges)
    os.kill(pid, signal.SIGKILL)
    await asyncio.to_thread(os.waitid, os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert (await judges.judge(JSON, in_pieces(LARGE))).model == "demo/sql"
    assert await process_of(judges) != pid


async def test_a_judge_takes_no_signal_that_stops_its_router(judges: Judges) -> None:
    """A terminal sends them to both; the router drains, and needs its judges for that."""
    pid = await process_of(judges)
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(pid, number)
    assert await process_of(judges) == pid


async def test_too_many_bodies_that_wait_are_refused(judges: Judges, monkeypatch: pytest.MonkeyPatch) -> None:
    """MAX_PENDING of them, beside those that are being judged; who hangs up gives its place and its body back."""
    monkeypatch.setattr(judging, "MAX_PENDING", 3)
    pid = await process_of(judges)
    os.kill(pid, signal.SIGSTOP)
    waiting = [asyncio.create_task(judges.judge(JSON, (b'{"model":"a"}',))) for _ in range(4)]
    await until(lambda: judges._pending == 3)
    with pytest.raises(Overloaded, match="3 large bodies wait to be read; that is the limit"):
        await judges.judge(JSON, (b"{}",))
    waiting[3].cancel()
    await until(lambda: judges._pending == 2)
    await until(lambda: judges._threads._work_queue.qsize() == 0)  # the one that is being judged has left it; who waits never entered
    last = asyncio.create_task(judges.judge(JSON, (b'{"model":"b"}',)))
    os.kill(pid, signal.SIGCONT)
    assert [(await task).model for task in (*waiting[:3], last)] == ["a", "a", "a", "b"]


async def test_a_body_whose_client_has_gone_does_not_keep_its_judge(judges: Judges) -> None:
    """It is judged to its end, for nobody, and then the next."""
    pid = await process_of(judges)
    os.kill(pid, signal.SIGSTOP)
    gone = asyncio.create_task(judges.judge(JSON, in_pieces(LARGE)))
    await until(lambda: memory_files([os.getpid()]))
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    os.kill(pid, signal.SIGCONT)
    assert (await judges.judge(JSON, (b'{"model":"a"}',))).model == "a"
    assert await process_of(judges) == pid


async def test_judges_end_with_their_router() -> None:
    """Those that ran and those that never did."""
    judges = Judges(2, MAX_BODY_BYTES)
    both = await asyncio.gather(*(judges.judge(JSON, (b'{"model":"a"}',)) for _ in range(8)))
    assert {reading.model for reading in both} == {"a"}
    waiting = [judges._idle.get_nowait() for _ in range(2)]
    pids = [judge._process.pid for judge in waiting if judge._process is not None]
    for judge in waiting:
        judges._idle.put(judge)
    await judges.stop()
    assert pids
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
