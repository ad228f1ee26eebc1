"""Large, encoded and form bodies are judged in processes of their own: some take a quarter of a second of one core, and the parser lets nobody else run.

A body lies in a memory file that both processes map: it is written once by the kernel, and of the verdict only numbers come back. A decoded body
comes back the same way. A judge that takes too long, or dies of a body, is replaced; the others do not notice.
"""

import asyncio
import logging
import mmap
import os
import pickle
import queue
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from ..core.content import Content
from ..core.pieces import Buffer
from ..core.reading import Reading
from ..errors import InvalidRequest, LoraExtprocError, Overloaded
from ..process.memory import keep_freed_memory

log = logging.getLogger(__name__)

MAX_PENDING = 256  # bodies that wait for a judge
JUDGE_S = 5.0  # twenty times what the worst body takes on an idle core
START_S = 60.0  # on a disk that has to be read first
MAX_WRITE_PIECES = 512  # below IOV_MAX
MEMORY_PER_BODY_BYTE = 8  # address space of a judge, beside what it needs by itself
OWN_MEMORY_BYTES = 2**30
_LENGTH = struct.Struct(">I")


class Judges:
    """A pool of judges. Waits are bounded in number by MAX_PENDING, and each in time by JUDGE_S.

    Bodies wait in the event loop, not in the queue of the threads: of a request that ends meanwhile nothing is kept there.
    """

    def __init__(self, count: int, max_body_bytes: int, *, with_blocks: bool = False) -> None:
        """`with_blocks`: a verdict has the hashes of the prompt's blocks, too."""
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="judge")
        self._idle: queue.SimpleQueue[_Judge] = queue.SimpleQueue()
        for _ in range(count):
            self._idle.put(_Judge(max_body_bytes, with_blocks=with_blocks))
        self._free = asyncio.Semaphore(count)
        self._pending = 0

    async def judge(self, content: Content, pieces: Sequence[Buffer]) -> Reading:
        """`Content.read` of the body that `pieces` are together. Raises what that raises, and Overloaded."""
        if self._pending >= MAX_PENDING:
            raise Overloaded(f"{self._pending} large bodies wait to be read; that is the limit")
        self._pending += 1
        try:
            await self._free.acquire()
        finally:
            self._pending -= 1
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Reading] = loop.create_future()  # asyncio.wrap_future makes a cycle, which would keep a decoded body
        work = self._threads.submit(self._judge, content, pieces)
        work.add_done_callback(lambda work: loop.call_soon_threadsafe(self._judged, work, answer))
        return await answer

    def _judged(self, work: "Future[Reading]", answer: "asyncio.Future[Reading]") -> None:
        """Only now is the judge free: a body whose client hung up is judged to its end, and must not let others queue up in the pool, with all they hold."""
        self._free.release()
        if answer.done():
            return  # nobody waits for it any more
        if work.cancelled():
            answer.cancel()
        elif error := work.exception():
            answer.set_exception(error)
            answer.exception()  # seen, also where its wait is cancelled in this very turn
        else:
            answer.set_result(work.result())

    def start(self) -> None:
        """Start the processes, so that the first body need not wait for one."""
        self._threads.submit(self._warm_up)

    async def stop(self) -> None:
        await asyncio.to_thread(self._threads.shutdown, cancel_futures=True)
        while not self._idle.empty():
            self._idle.get_nowait().stop()

    def _judge(self, content: Content, pieces: Sequence[Buffer]) -> Reading:
        judge = self._idle.get()
        try:
            return judge.ask(content, pieces)
        finally:
            self._idle.put(judge)

    def _warm_up(self) -> None:
        judges = [self._idle.get_nowait() for _ in range(self._idle.qsize())]
        for judge in judges:
            try:
                judge.start()
            except (OSError, EOFError) as error:  # the first body will try again, and say what is wrong
                log.error("a judge of bodies does not start: %s", type(error).__name__)
                judge.stop()
            self._idle.put(judge)


class _Judge:
    """One process and the socket to it. Used by one thread at a time."""

    def __init__(self, max_body_bytes: int, *, with_blocks: bool) -> None:
        self._arguments = (str(max_body_bytes), str(int(with_blocks)))
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    def start(self) -> None:
        """Start the process, unless it runs. Raises OSError or EOFError when it does not come up."""
        if self._process is not None and self._process.poll() is None:
            return
        self.stop()
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", __name__, str(theirs.fileno()), *self._arguments]
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)  # noqa: S603  # our own module
        self._socket = ours
        ours.settimeout(START_S)
        _receive(ours)  # it is ready: what its start takes is not counted against a body
        ours.settimeout(JUDGE_S)

    def stop(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def ask(self, content: Content, pieces: Sequence[Buffer]) -> Reading:
        """Have the body judged. Raises what the verdict raises; Overloaded if the judge takes too long or has died."""
        size = sum(map(len, pieces))
        body = os.memfd_create("body")
        try:
            _write(body, pieces)
            try:
                self.start()
                assert self._socket is not None
                _send(self._socket, content, [body])
                answer, fds = _receive(self._socket)
            except (OSError, EOFError) as error:  # a time-out is one
                log.error("a judge of bodies did not answer (%s) about %d bytes of %s; it is replaced", type(error).__name__, size, content)
                self.stop()
                raise Overloaded(f"the body of {size} bytes could not be read within {JUDGE_S:g} s") from None
        finally:
            os.close(body)
        if isinstance(answer, LoraExtprocError):
            raise answer
        assert isinstance(answer, Reading)
        return answer if not fds else answer._replace(plain=_mapped(fds[0]))


def _write(file: int, pieces: Sequence[Buffer]) -> None:
    """Let the kernel copy: this thread holds no lock meanwhile."""
    left = [memoryview(piece) for piece in pieces]
    while left:
        written = os.writev(file, left[:MAX_WRITE_PIECES])
        while left and written >= len(left[0]):
            written -= len(left.pop(0))
        if written:
            left[0] = left[0][written:]


def _mapped(file: int) -> memoryview:
    """What is in a memory file, as long as somebody looks at it. Takes the descriptor."""
    try:
        size = os.fstat(file).st_size
        return memoryview(mmap.mmap(file, size, prot=mmap.PROT_READ)) if size else memoryview(b"")
    finally:
        os.close(file)


# ---- what goes over the socket: a length, a pickled value, and files beside the first byte. Both ends are this module.


def _send(to: socket.socket, value: object, files: Sequence[int] = ()) -> None:
    message = pickle.dumps(value)
    socket.send_fds(to, [_LENGTH.pack(len(message))], list(files))
    to.sendall(message)


def _receive(source: socket.socket) -> tuple[object, list[int]]:
    """Raises EOFError when the other end is gone."""
    head, files, _, _ = socket.recv_fds(source, _LENGTH.size, 1)
    if len(head) < _LENGTH.size:
        raise EOFError
    (left,) = _LENGTH.unpack(head)
    parts = []
    while left:
        parts.append(source.recv(left))
        if not parts[-1]:
            raise EOFError
        left -= len(parts[-1])
    return pickle.loads(b"".join(parts)), files  # noqa: S301  # the other end is this module, too


# ---- the judge's side


def main(descriptor: int, max_body_bytes: int, *, with_blocks: bool) -> None:
    """Judge bodies until the router is gone."""
    import resource  # noqa: PLC0415  # here alone

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the router is asked to stop, and stops its judges
    limit = OWN_MEMORY_BYTES + MEMORY_PER_BODY_BYTE * max_body_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    keep_freed_memory()
    os.nice(5)  # a burst of large bodies leaves the cores to the requests that are answered at once
    source = socket.socket(fileno=descriptor)
    _send(source, "ready")
    while True:
        try:
            content, [file] = _receive(source)
        except (OSError, EOFError):
            return
        assert isinstance(content, Content)
        answer, files = _verdict(content, file, max_body_bytes, with_blocks=with_blocks)
        _send(source, answer, files)
        for made in files:
            os.close(made)


def _verdict(content: Content, file: int, max_body_bytes: int, *, with_blocks: bool) -> tuple[object, list[int]]:
    try:
        reading = content.read(_mapped(file), max_body_bytes, with_blocks=with_blocks)
        if reading.plain is None:
            return reading, []
        plain = os.memfd_create("plain")
        _write(plain, [reading.plain])
        return reading._replace(plain=None), [plain]
    except LoraExtprocError as error:
        return error.bare(), []
    except MemoryError:
        return InvalidRequest("the body takes more memory to read than it may"), []


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), with_blocks=sys.argv[3] == "1")
