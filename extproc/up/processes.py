"""Child processes that cannot outlive their parent: the kernel kills them when it dies, however it dies."""

import asyncio
import contextlib
import ctypes
import os
import random
import signal
import socket
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import StartError

_PR_SET_PDEATHSIG = 1  # prctl(2): "Set the parent-death signal of the calling process"; kept across execve
_LOG_LINES = 5
_REAPED_S = 10.0  # a killed process is gone within milliseconds, unless the machine is busy or the kernel waits for its disk
LOWEST_PORT = 15_000  # above what services are known by


@dataclass(slots=True)
class Child:
    """One running program with its log file."""

    name: str
    process: Process
    log: Path
    command: Sequence[str]
    environment: Mapping[str, str] | None = None  # None: as the parent's

    def last_words(self) -> str:
        """The end of its log."""
        lines = self.log.read_text(errors="replace").strip().splitlines() if self.log.exists() else []
        return "\n".join(lines[-_LOG_LINES:])


async def spawn(name: str, command: Sequence[str], log_directory: Path, *, pipe_output: bool = False, environment: Mapping[str, str] | None = None) -> Child:
    """Start a program. Its standard error goes to `<log_directory>/<name>.log`; its output too, unless it is wanted as a pipe."""
    log = log_directory / f"{name}.log"
    with log.open("ab") as file:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=PIPE if pipe_output else file,
            stderr=file,
            start_new_session=True,  # Ctrl-C reaches the parent alone, which stops the children in order
            preexec_fn=_die_with_parent(),
            limit=2**20,
            env=environment,
        )
    return Child(name, process, log, command, environment)


def python(*arguments: str) -> list[str]:
    """A command that runs this package's own command line."""
    return [sys.executable, "-m", "extproc", *arguments]


async def stop(children: Sequence[Child], grace_s: float) -> None:
    """SIGTERM to all, SIGKILL to those still there after `grace_s` seconds; returns when they are gone."""
    alive = [child for child in children if child.process.returncode is None]
    for child in alive:
        with contextlib.suppress(ProcessLookupError):
            child.process.terminate()
    waits = [asyncio.create_task(child.process.wait()) for child in alive]
    if waits:
        await asyncio.wait(waits, timeout=grace_s)
    for child in alive:
        if child.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                child.process.kill()
    if waits:
        await asyncio.wait(waits, timeout=_REAPED_S)  # not for ever: what a killed process has started may hold its output open
    for child in children:
        kill_family(child)


def kill_family(child: Child) -> None:
    """What a child has started, and left behind when it was killed: each child leads a group of its own. A vLLM's workers outlive it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.process.pid, signal.SIGKILL)


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that nobody listens on now, all different.

    From below those that the system gives to outgoing connections: an engine takes half a minute until Envoy is started, and in that time one of
    them would now and then be somebody's.
    """
    below = _first_outgoing_port()
    ports: list[int] = []
    with contextlib.ExitStack() as held:
        while len(ports) < count:
            wanted = random.randrange(LOWEST_PORT, below) if below > LOWEST_PORT + 1000 else 0  # noqa: S311  # nothing secret
            with contextlib.suppress(OSError):
                ports.append(held.enter_context(socket.create_server(("127.0.0.1", wanted))).getsockname()[1])
    return ports


def _first_outgoing_port() -> int:
    try:
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError):
        return 0


def check_port_is_free(host: str, port: int) -> None:
    """Raises StartError if somebody listens on `port` already."""
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        raise StartError(f"port {port} cannot be used: {error.strerror}; choose another with --port") from None


def _die_with_parent() -> Callable[[], None] | None:
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl  # looked up before the fork: the child may not import
    parent = os.getpid()

    def in_child() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it died between the fork and the call above
            os._exit(1)

    return in_child
