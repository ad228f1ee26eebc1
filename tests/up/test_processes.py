"""How the processes of a stack end."""

import sys
from pathlib import Path

from extproc.up.processes import spawn, stop

STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(600)"


async def test_what_is_killed_is_gone_when_it_returns(tmp_path: Path) -> None:
    """Though no grace is given: a process that is left would outlive the loop that knows of it."""
    children = [await spawn(f"stubborn-{number}", [sys.executable, "-c", STUBBORN], tmp_path, pipe_output=True) for number in range(8)]
    for child in children:
        assert child.process.stdout is not None
        assert await child.process.stdout.readline() == b"ready\n"
    await stop(children, 0.0)
    assert [child.process.returncode for child in children] == [-9] * 8
