"""The commands that ask a running stager, against one: what they print, in words and as JSON, and what the shell is told."""

import fcntl
import io
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
import urllib.request
import zlib
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import yaml

from extproc.cli import main
from extproc.client import Disk, OnDisk
from extproc.show import show_list
from extproc.up.demo import write_adapter
from extproc.up.processes import free_ports
from tests.fakes.adapters import WEIGHTS, read_files, sha256, size_of, write_small

SLOW_BYTES_PER_S = 4 * 2**20
COMMANDS = ("stage", "pin", "unpin", "evict", "purge", "refresh", "verify", "list")
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("LORA_EXTPROC_")}


@dataclass
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Its output, which must be one line of JSON."""
        assert (self.code, self.err) == (0, "")
        assert self.out.count("\n") == 1
        return json.loads(self.out)


@dataclass
class Running:
    """A stager, where its adapters come from, and where they go."""

    address: str
    origin: Path
    slow: Path
    directory: Path

    def environment(self, **more: str) -> dict[str, str]:
        return {**ENVIRONMENT, "LORA_EXTPROC_STAGER": self.address, **more}

    def cli(self, *arguments: str, **environment: str) -> Done:
        """A command in this process: a hundred starts of Python would take longer than all that they are started for."""
        out, err = io.StringIO(), io.StringIO()
        with (
            patch.object(sys, "argv", ["lora-extproc", *arguments]),
            patch.dict(os.environ, self.environment(**environment), clear=True),
            redirect_stdout(out),
            redirect_stderr(err),
            pytest.raises(SystemExit) as ended,
        ):
            main()
        assert isinstance(ended.value.code, int)
        return Done(ended.value.code, out.getvalue(), err.getvalue())

    def shell(self, *arguments: str) -> Done:
        """A command as the shell runs it."""
        command = [sys.executable, "-m", "extproc", *arguments]
        done = subprocess.run(command, env=self.environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        return Done(done.returncode, done.stdout, done.stderr)

    def add(self, name: str, version: int = 0) -> Path:
        """A small adapter at the origin, with content that no other has: equal content would be shared with another test's."""
        return write_small(self.origin / name, seed=zlib.crc32(f"{name} {version}".encode()))


@pytest.fixture(scope="module")
def stager(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One process for all tests of the file: each has adapters of its own. Leases end at once, so that none is in another's way."""
    root = tmp_path_factory.mktemp("commands")
    for name in ("origin", "slow"):
        (root / name).mkdir()
    port, http_port = free_ports(2)
    origins = [
        {"type": "file", "name": "near", "path": str(root / "origin")},
        {"type": "file", "name": "far", "path": str(root / "slow"), "max_bytes_per_s": SLOW_BYTES_PER_S},
    ]
    settings = {"listen": f"127.0.0.1:{port}", "http_listen": f"127.0.0.1:{http_port}", "dir": str(root / "node"), "lease_s": 0.01}
    settings |= {"engine": {"url": ""}, "origins": origins, "negative_ttl_s": 0, "drain_s": 0}
    (root / "stager.yaml").write_text(yaml.safe_dump({"stager": settings}))
    with (root / "log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-m", "extproc", "stager", "--config", str(root / "stager.yaml")], env=ENVIRONMENT, stderr=log)
    try:
        until_ready(process, f"http://127.0.0.1:{http_port}/readyz")
        yield Running(f"127.0.0.1:{port}", root / "origin", root / "slow", root / "node")
    finally:
        process.terminate()
        assert process.wait(10) == 0


def until_ready(process: "subprocess.Popen[bytes]", url: str) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        assert process.poll() is None
        with suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(0.05)
    raise AssertionError("it did not get ready")


# -- stage


def test_stage_in_words(stager: Running) -> None:
    """What was done, then that there was nothing to do. No bar where nobody looks."""
    name = "stage/words"
    files = read_files(stager.add(name))
    cold, warm = stager.shell("stage", name), stager.cli("stage", name)
    assert re.fullmatch(rf"{name}: staged from near in \d+\.\d\d s, {size_of(files)} bytes, sha256 [0-9a-f]{{64}}\n", cold.out)
    assert re.fullmatch(rf"{name}: was there already, {size_of(files)} bytes, sha256 [0-9a-f]{{64}}\n", warm.out)
    assert (cold.code, cold.err, warm.code, warm.err) == (0, "", 0, "")
    assert read_files(stager.directory / name) == files


def test_stage_as_json(stager: Running) -> None:
    """One object, numbers as numbers."""
    name = "stage/json"
    files = read_files(stager.add(name))
    cold, warm = stager.cli("stage", name, "--json").json, stager.cli("stage", name, "--json").json
    assert set(cold) == {"adapter", "digest", "staged", "origin", "bytes", "waited_s", "lease_s"}
    assert (cold["adapter"], cold["staged"], cold["origin"], cold["bytes"]) == (name, True, "near", size_of(files))
    assert (warm["staged"], warm["digest"]) == (False, cold["digest"])


def test_stage_holds_the_weights_to_a_digest(stager: Running) -> None:
    """Right, in either case of its letters; wrong; none at all."""
    name = "stage/digest"
    right = sha256(read_files(stager.add(name))[WEIGHTS])
    wrong = stager.cli("stage", name, "--sha256", "0" * 64)
    assert (wrong.code, wrong.out) == (1, "")
    assert wrong.err == f"lora-extproc: invalid_adapter: {WEIGHTS} has SHA-256 {right}; {'0' * 64} is pinned\n"
    assert stager.cli("stage", name, "--sha256", "abc").err == "lora-extproc: invalid_request: sha256: 'abc' is not 64 hexadecimal digits\n"
    assert stager.cli("stage", name, "--sha256", right.upper(), "--json").json["staged"]
    late = stager.cli("stage", name, "--sha256", "0" * 64)
    assert (late.code, late.err) == (1, f"lora-extproc: invalid_adapter: the weights of {name} have SHA-256 {right}; {'0' * 64} is asked for\n")


def on_a_terminal(stager: Running, *arguments: str) -> tuple[int, str]:
    """Exit code, and what somebody sees who runs the command in a terminal of 140 columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 140, 0, 0))
    environment = stager.environment(TERM="xterm-256color")
    process = subprocess.Popen([sys.executable, "-m", "extproc", *arguments], env=environment, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    seen = b""
    with suppress(OSError):  # EIO: the last who had it open is gone
        while data := os.read(ours, 2**16):
            seen += data
    os.close(ours)
    return process.wait(), re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen.decode())


def test_stage_shows_a_bar_with_rate_and_time_left(stager: Running) -> None:
    """On a terminal: phase and origin, bytes of bytes, bytes per second, time. At the end one line stays."""
    name = "far/large"
    weights = write_adapter(stager.slow / name, seed=0, hidden=4096, layers=16, rank=16)
    assert weights.stat().st_size > 2 * SLOW_BYTES_PER_S - 100_000
    code, seen = on_a_terminal(stager, "stage", name)
    assert code == 0
    assert f"{name}: fetch from far" in seen
    assert re.search(r"\d+\.\d/8\.4 MB", seen)
    assert re.search(r"\d+(\.\d)? [kM]B/s", seen)
    assert re.search(r"0:00:0\d", seen)
    assert re.search(rf"{name}: staged from far in \d+\.\d\d s, \d+ bytes", seen.splitlines()[-1])


def test_stage_as_json_shows_no_bar(stager: Running) -> None:
    """On a terminal neither: somebody's program reads it."""
    name = "stage/json-terminal"
    stager.add(name)
    code, seen = on_a_terminal(stager, "stage", name, "--json")
    assert code == 0
    assert json.loads(seen)["adapter"] == name


def _heed_interrupts() -> None:
    """Who runs the tests in the background has them ignored, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_an_interrupted_stage_leaves_the_fetch_alone(stager: Running) -> None:
    """Ctrl-C ends the waiting: code 130, no traceback. The stager goes on."""
    name = "far/interrupted"
    write_adapter(stager.slow / name, seed=1, hidden=4096, layers=16, rank=16)
    command = [sys.executable, "-m", "extproc", "stage", name]
    process = subprocess.Popen(command, env=stager.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=_heed_interrupts)  # noqa: PLW1509  # one system call
    while not list((stager.directory / ".staging").glob(f"*/{WEIGHTS}")):
        assert process.poll() is None
        time.sleep(0.01)
    while process.poll() is None:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.5)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, "")
    assert "Traceback" not in err
    assert stager.cli("stage", name, "--json").json["bytes"] > SLOW_BYTES_PER_S


# -- list


def listed(stager: Running, prefix: str) -> list[dict[str, Any]]:
    """Of the whole list what is this test's."""
    return [adapter for adapter in stager.cli("list", "--json").json["adapters"] if adapter["name"].startswith(prefix)]


def test_list_is_a_table_with_the_budget_below(stager: Running) -> None:
    """Name, size, age, hold, origin, check and digest of each; whole names also where they are long or look like markup."""
    names = ["list/[red]b", "list/" + "-".join(["a-long-name"] * 10), "list/plain"]
    for name in names:
        stager.add(name)
        stager.cli("pin" if name == "list/plain" else "stage", name)
    done = stager.cli("list")
    assert (done.code, done.err) == (0, "")
    heading = [cell.strip() for cell in done.out.splitlines()[1].strip("┃").split("┃")]
    assert heading == ["adapter", "size", "idle", "held by", "origin", "checked", "digest"]
    rows = {cells[0]: cells for line in done.out.splitlines() if line.startswith("│") and (cells := [c.strip() for c in line.strip("│").split("│")])}
    assert set(names) <= set(rows)
    for adapter in listed(stager, "list/"):
        name, size, idle, held, origin, checked, digest = rows[adapter["name"]]
        assert (size, origin, digest) == ("0.0 MiB", "near", adapter["digest"][:12])
        assert re.fullmatch(r"\d+ s", idle)
        assert re.fullmatch(r"\d+ s ago", checked)
        assert held == ("pin" if name == "list/plain" else "-")
    assert re.fullmatch(r"\d+\.\d MiB used, 0\.0 MiB reserved, limit 102400\.0 MiB", done.out.splitlines()[-1])


def test_list_as_json_has_every_field(stager: Running) -> None:
    """And the budget in bytes."""
    stager.add("list-json/a")
    stager.cli("stage", "list-json/a")
    whole = stager.cli("list", "--json").json
    assert set(whole) == {"adapters", "used_bytes", "reserved_bytes", "max_bytes"}
    (adapter,) = listed(stager, "list-json/")
    assert set(adapter) == set(OnDisk.__slots__)
    assert (adapter["pinned"], adapter["adopted"], adapter["refresh_error"]) == (False, False, "")


def test_list_on_a_terminal_keeps_to_its_width(stager: Running) -> None:
    """And folds what does not fit, so that nothing is lost."""
    name = "list/" + "x" * 200
    stager.add(name)
    stager.cli("stage", name)
    code, seen = on_a_terminal(stager, "list")
    assert code == 0
    assert max(map(len, seen.splitlines())) <= 140
    assert sum(line.split("│")[1].count("x") for line in seen.splitlines() if line.startswith("│") and "xxxx" in line) == 200


def on_disk(name: str, **fields: Any) -> OnDisk:
    plain = {"digest": "d" * 64, "bytes": 2**20, "origin": "near", "revision": "1", "idle_seconds": 0.0, "leased_seconds": 0.0, "pinned": False}
    plain |= {
        "checked_seconds": 0.0,
        "refresh_error": "",
        "adopted": False,
        "loaded": False,
    }
    return OnDisk(name=name, **{**plain, **fields})


@pytest.mark.parametrize(("sort", "order"), [("idle", "bca"), ("size", "cab"), ("checked", "acb"), ("name", "abc")])
def test_list_sorts_by_what_is_asked(capsys: pytest.CaptureFixture[str], sort: str, order: str) -> None:
    """As it comes, the least recently used first; the largest; the longest unchecked; by name."""
    disk = (on_disk("b", bytes=1, checked_seconds=-1.0), on_disk("c", bytes=3, checked_seconds=5.0), on_disk("a", bytes=2, checked_seconds=9.0))
    show_list(Disk(disk, 0, 0, 0), sort)
    assert "".join(line[2] for line in capsys.readouterr().out.splitlines() if line.startswith("│")) == order


def test_list_says_what_holds_each_and_why_a_check_failed(capsys: pytest.CaptureFixture[str]) -> None:
    """All that holds it; the error as it is, whatever it looks like."""
    held = on_disk("a", pinned=True, leased_seconds=12.3, adopted=True)
    failed = on_disk("b", refresh_error="origin_failed: [/bold] it is [red]down", checked_seconds=7.0)
    show_list(Disk((held, failed, on_disk("c", checked_seconds=-1.0)), 0, 0, 0), "idle")
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert [row[3] for row in rows] == ["pin, lease, 12 s, its owner", "-", "-"]
    assert [row[5] for row in rows] == ["0 s ago", "origin_failed: [/bold] it is [red]down", "-"]


def test_list_takes_no_other_order(stager: Running) -> None:
    """Code 2: it was asked for wrongly."""
    done = stager.cli("list", "--sort", "colour")
    assert (done.code, done.out) == (2, "")
    assert "colour" in done.err
    for sort in ("idle", "size", "checked", "name"):
        assert stager.cli("list", "--sort", sort).code == 0


# -- the others


def test_pin_evict_unpin(stager: Running) -> None:
    """Held, it is not evicted: code 1 and the reason. In words."""
    name = "pin/words"
    size = size_of(read_files(stager.add(name)))
    assert re.fullmatch(rf"{name}: pinned, sha256 [0-9a-f]{{64}}\n", stager.cli("pin", name).out)
    assert listed(stager, name)[0]["pinned"]
    refused = stager.cli("evict", name)
    assert (refused.code, refused.out, refused.err) == (1, "", f"lora-extproc: in_use: {name} is pinned\n")
    assert stager.cli("unpin", name).out == f"{name}: no longer pinned\n"
    assert stager.cli("evict", name).out == f"{name}: evicted, {size} bytes freed\n"
    assert not (stager.directory / name).exists()
    again = stager.cli("evict", name)
    assert (again.code, again.err) == (1, f"lora-extproc: model_not_found: {name} is not on this node\n")


def test_pin_evict_unpin_purge_as_json(stager: Running) -> None:
    """One object each."""
    name = "pin/json"
    files = read_files(stager.add(name))
    pinned = stager.cli("pin", name, "--sha256", sha256(files[WEIGHTS]), "--json").json
    assert pinned == {"adapter": name, "pinned": True, "digest": listed(stager, name)[0]["digest"]}
    assert stager.cli("unpin", name, "--json").json == {"adapter": name, "pinned": False}
    assert stager.cli("evict", name, "--json").json == {"adapter": name, "bytes": size_of(files)}
    assert stager.cli("pin", name, "--sha256", "0" * 64).code == 1
    stager.cli("pin", name)
    assert stager.cli("purge", name, "--json").json == {"adapter": name, "bytes": size_of(files)}
    assert stager.cli("purge", name, "--json").json == {"adapter": name, "bytes": 0}


def test_refresh_says_whether_the_origin_has_another(stager: Running) -> None:
    """In words and as JSON; why not, if it cannot be compared."""
    name = "refresh/it"
    weights = stager.add(name) / WEIGHTS
    first = stager.cli("stage", name, "--json").json["digest"]
    assert stager.cli("refresh", name).out == f"{name}: is as its origin has it, sha256 {first}\n"
    stager.add(name, 1)
    os.utime(weights, ns=(1, 1))
    changed = stager.cli("refresh", name, "--json").json
    assert (changed["adapter"], changed["changed"], changed["revision"] != "") == (name, True, True)
    assert changed["digest"] == listed(stager, name)[0]["digest"] != first
    stager.add(name, 2)
    os.utime(weights, ns=(2, 2))
    assert stager.cli("refresh", name).out.startswith(f"{name}: a new version is there, sha256 ")
    weights.write_bytes(b"broken")
    failed = stager.cli("refresh", name)
    assert (failed.code, failed.out) == (1, "")
    assert failed.err.startswith("lora-extproc: invalid_adapter: ")
    assert listed(stager, name)[0]["refresh_error"].startswith("invalid_adapter: ")


def test_verify_names_each_and_fails_for_the_damaged(stager: Running) -> None:
    """Code 1 if one differs, and that one is removed; in words and as JSON."""
    for name in ("verify/a", "verify/b", "verify/c"):
        stager.add(name)
        stager.cli("stage", name)
    size = listed(stager, "verify/a")[0]["bytes"]
    one = stager.cli("verify", "verify/a")
    assert (one.code, one.out) == (0, f"verify/a: ok, {size} bytes\n1 good, 0 damaged\n")
    assert stager.cli("verify", "verify/a", "--json").json["ok"]
    (stager.directory / "verify/b" / WEIGHTS).write_bytes(b"damaged")
    done = stager.shell("verify")
    assert (done.code, done.err) == (1, "")
    assert f"verify/b: {WEIGHTS} is not what was published; removed, {size} bytes\n" in done.out
    assert done.out.splitlines()[-1].endswith(" good, 1 damaged")
    assert stager.cli("verify").code == 0
    (stager.directory / "verify/c" / WEIGHTS).write_bytes(b"damaged")
    lines = stager.cli("verify", "verify/c", "--json")
    (found,) = map(json.loads, lines.out.splitlines())
    assert (lines.code, lines.err) == (1, "")
    assert found | {"digest": ""} == {
        "adapter": "verify/c",
        "digest": "",
        "bytes": size,
        "ok": False,
        "why": f"{WEIGHTS} is not what was published",
        "removed": True,
    }


# -- drain

NODE_STATE = {"draining", "empty", "leased", "requests"}


def test_drain_waits_until_the_node_is_empty(stager: Running) -> None:
    """It says how far it is, and what it takes no more; undrained, it takes it again. In words and as JSON."""
    stager.add("drain/it")
    done = stager.cli("drain", stager.address, "--why", "its disk is replaced", "--wait")
    assert (done.code, done.err) == (0, "")
    first, *_, last = done.out.splitlines()
    assert first == f"{stager.address}: drained; leased adapters: 0, requests in its engine: 0"
    assert last == f"{stager.address}: empty"
    refused = stager.cli("stage", "drain/it")
    assert refused.err == "lora-extproc: no_endpoint: drain/it: this node drains, and takes no adapter that it does not serve already\n"
    again = stager.cli("drain", stager.address, "--wait", "--json").json
    assert (set(again), again["empty"]) == (NODE_STATE | {"node"}, True)
    assert stager.cli("undrain", stager.address, "--json").json["draining"] is False
    assert stager.cli("undrain", stager.address).out == f"{stager.address}: no longer drained\n"
    assert stager.cli("stage", "drain/it").code == 0


def test_drain_gives_up_waiting_and_the_node_is_drained_all_the_same(stager: Running) -> None:
    """Code 1. It cannot be empty sooner than what was sent under a lease has arrived."""
    done = stager.cli("drain", stager.address, "--wait", "--timeout", "0.01")
    assert done.code == 1
    assert done.err == f"lora-extproc: {stager.address}: not empty after 0.01 s; it is still drained\n"
    assert stager.cli("drain", stager.address, "--json").json["draining"]
    stager.cli("undrain", stager.address)


def test_drain_takes_a_node_s_name_from_the_settings(stager: Running, tmp_path: Path) -> None:
    """Or its endpoint's address; a name that they do not have is no address either: code 2."""
    endpoints = [{"address": "10.1.1.1:8000", "node": "node-1", "stager": stager.address}, {"address": "10.1.1.2:8000", "node": "node-2"}]
    (tmp_path / "fleet.yaml").write_text(yaml.safe_dump({"pools": [{"name": "models", "endpoints": endpoints}]}))
    for node in ("node-1", "10.1.1.1:8000", stager.address):
        assert stager.cli("drain", node, "--config", str(tmp_path / "fleet.yaml"), "--json").json["node"] == node
        assert stager.cli("undrain", node, "--config", str(tmp_path / "fleet.yaml")).out == f"{node}: no longer drained\n"
    unknown = stager.cli("drain", "node-2", "--config", str(tmp_path / "fleet.yaml"))
    assert (unknown.code, unknown.out) == (2, "")
    assert unknown.err == "lora-extproc: node-2: no node of the settings' pools is called so (--config), and it is no host:port of a stager\n"


def test_all_stagers_of_a_node_are_told_though_one_does_not_answer(stager: Running, tmp_path: Path) -> None:
    """Code 1, and which one it was."""
    dead = f"127.0.0.1:{free_ports(1)[0]}"
    endpoints = [{"address": f"10.1.1.1:800{n}", "node": "node-1", "stager": address} for n, address in enumerate(sorted((dead, stager.address)))]
    (tmp_path / "fleet.yaml").write_text(yaml.safe_dump({"pools": [{"name": "models", "endpoints": endpoints}]}))
    for command in ("drain", "undrain"):
        done = stager.cli(command, "node-1", "--config", str(tmp_path / "fleet.yaml"))
        assert (done.code, done.out.count("\n")) == (1, 1)
        assert dead in done.err
        assert stager.cli("drain" if command == "drain" else "undrain", stager.address, "--json").json["draining"] is (command == "drain")


# -- what goes wrong


def test_what_is_not_there_is_said_in_one_sentence(stager: Running) -> None:
    """Code 1; purge and unpin have nothing against it."""
    for command in ("stage", "pin", "evict", "refresh", "verify"):
        done = stager.cli(command, "nobody/has-it")
        assert (done.code, done.out, done.err.count("\n")) == (1, "", 1)
        assert done.err.startswith("lora-extproc: model_not_found: ")
    assert stager.cli("purge", "nobody/has-it").out == "nobody/has-it: purged, 0 bytes freed\n"
    assert stager.cli("unpin", "nobody/has-it").code == 0


def test_a_name_that_leads_elsewhere_is_refused(stager: Running) -> None:
    """By every command that takes one, before anything is done."""
    for command in COMMANDS[:-1]:
        done = stager.cli(command, "../../etc")
        assert (done.code, done.out) == (1, "")
        assert done.err == "lora-extproc: invalid_request: model: '../../etc' has a part that starts with a dot\n"


def test_a_stager_that_is_not_running_is_said_in_one_sentence(stager: Running) -> None:
    """At once, by every command."""
    (port,) = free_ports(1)
    for command in COMMANDS:
        done = stager.cli(command, *(["acme/a"] if command != "list" else []), "--stager", f"127.0.0.1:{port}")
        assert done == Done(1, "", f"lora-extproc: no_endpoint: stager 127.0.0.1:{port}: unavailable\n")
    assert stager.shell("list", "--stager", f"127.0.0.1:{port}") == done


def test_what_is_asked_for_wrongly_ends_with_two(stager: Running, tmp_path: Path) -> None:
    """A missing name, an unknown option, a settings file that is none."""
    (tmp_path / "bad.yaml").write_text("rpc: {bogus: 1}")
    for arguments in (("stage",), ("stage", "a", "--bogus"), ("list", "extra"), ("evict", "a", "--config", str(tmp_path / "bad.yaml"))):
        done = stager.cli(*arguments)
        assert (done.code, done.out, done.err.count("\n")) == (2, "", 1), arguments
        assert done.err.startswith("lora-extproc: ")
    assert stager.shell("stage").code == 2
    assert stager.cli("list", LORA_EXTPROC_CONFIG=str(tmp_path / "bad.yaml")).code == 2
