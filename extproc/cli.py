"""The command line, and the only place that exits: 0 done, 1 failed, 2 cannot start as asked.

Each command imports what it needs when it runs: the whole takes two seconds, and `up` starts nine processes.
"""

import asyncio
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from . import __version__
from .config import OriginSettings, Settings, build_pools, load, settings_table
from .errors import ConfigError, LoraExtprocError, StartError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Route LoRA requests inside Envoy to the node that has the adapter on disk, and put it there first.",
)

ConfigFile = Annotated[Path | None, typer.Option("--config", help="Settings file (YAML). Without it: defaults.")]
RequiredConfigFile = Annotated[Path, typer.Option("--config", help="Settings file (YAML).")]
StagerAddress = Annotated[str, typer.Option("--stager", help="The stager's gRPC address, host:port.", envvar="LORA_EXTPROC_STAGER")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
DEFAULT_STAGER = "127.0.0.1:9102"


def main() -> NoReturn:
    """Run the command line. Our errors become one sentence and an exit code."""
    try:
        app(standalone_mode=False)
    except StartError as error:
        _fail(str(error), 2)
    except LoraExtprocError as error:
        _fail(f"{error.reason}: {error.message}", 1)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    except Exception as error:
        if type(error).__module__.startswith(("click", "typer")) and hasattr(error, "format_message"):
            _fail(error.format_message(), 2)
        raise
    sys.exit(0)


def _fail(message: str, code: int) -> NoReturn:
    for line in message.splitlines():
        sys.stderr.write(f"lora-extproc: {line}\n")
    sys.exit(code)


def _settings(path: Path | None) -> Settings:
    return Settings() if path is None else load(path)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
def up(
    port: Annotated[int, typer.Option(min=1, max=65535, help="Where clients come in.")] = 10000,
    nodes: Annotated[int, typer.Option(min=1, max=16, help="Nodes, each a stager and an engine.")] = 3,
    directory: Annotated[Path | None, typer.Option("--dir", help="Where everything lies. Default: ~/.cache/lora-extproc.")] = None,
    origin: Annotated[list[str] | None, typer.Option(help="`hf`, `s3://bucket/prefix`, `https://host/prefix` or `/path`; repeatable.")] = None,
    engine: Annotated[str, typer.Option(help="`sim`, or the URLs of running model servers, separated by commas.")] = "sim",
    offline: Annotated[bool, typer.Option("--offline", help="Leave the Hugging Face hub out.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Send one request of each kind, compare the answers, and exit.")] = False,
    config: ConfigFile = None,
) -> None:
    """Start everything on this machine: a real Envoy, a router, and nodes."""
    from .up import run, stack

    if check and (origin or engine != "sim"):
        raise StartError("--check runs with the demo adapters on simulated engines: leave --origin and --engine out")
    engines = () if engine == "sim" else tuple(url.strip() for url in engine.split(",") if url.strip())
    for url in engines:
        if not url.startswith("http://"):
            raise StartError(f"--engine {url}: `sim` or http://host:port is needed")
    settings = _settings(config)
    origins = tuple(parse_origin(text) for text in origin or ())
    with tempfile.TemporaryDirectory(prefix="lora-extproc-") as temporary:
        where = directory or (Path(temporary) if check else Path("~/.cache/lora-extproc").expanduser())
        plan = stack.Plan(where.absolute(), port, nodes, origins, not (offline or check), engines, settings)
        succeeded = asyncio.run(run.run(plan, check=check))
    raise typer.Exit(0 if succeeded else 1)


@app.command()
def router(config: RequiredConfigFile) -> None:
    """Run the ext_proc service."""
    from .process import run, set_up_logging
    from .router.server import serve

    settings = load(config)
    set_up_logging(settings.log.level, settings.log.format)
    run(lambda stop: serve(settings, stop))


@app.command()
def stager(config: RequiredConfigFile) -> None:
    """Run the process that fills this node's directory."""
    from .process import run, set_up_logging
    from .stager.server import serve

    settings = load(config)
    set_up_logging(settings.log.level, settings.log.format)
    run(lambda stop: serve(settings, stop))


@app.command()
def sim(
    listen: Annotated[str, typer.Option(help="ip:port.")] = "127.0.0.1:8000",
    directory: Annotated[str, typer.Option("--dir", help="Where adapters are looked for.")] = ".",
    base_model: Annotated[str, typer.Option(help="The served name of the base model.")] = "base",
    root: Annotated[str, typer.Option(help="What adapters must name as their base. Empty: anything.")] = "",
    max_loras: Annotated[int, typer.Option(min=1, help="Adapters that run at once.")] = 4,
    max_cpu_loras: Annotated[int, typer.Option(min=1, help="Adapters kept in memory.")] = 16,
    max_lora_rank: Annotated[int, typer.Option(min=1, help="Higher ranks are refused.")] = 512,
    token_ms: Annotated[float, typer.Option(min=0, help="Time per token.")] = 0.0,
) -> None:
    """Run a simulated engine: vLLM's API, no model."""
    from .process import run, set_up_logging
    from .sim.adapters import Adapters
    from .sim.app import SimEngine, serve

    set_up_logging("info")
    adapters = Adapters(base_model=base_model, root=root, cache_dir=directory, max_loras=max_loras, max_cpu_loras=max_cpu_loras, max_lora_rank=max_lora_rank)
    run(lambda stop: serve(SimEngine(adapters, token_s=token_ms / 1000), listen, stop))


@app.command("check")
def check_config(config: RequiredConfigFile) -> None:
    """Validate a settings file."""
    settings = load(config)
    endpoints = sum(len(pool.endpoints) for pool in settings.pools)
    typer.echo(f"{config}: valid; {len(settings.pools)} pools, {endpoints} endpoints, {len(settings.stager.origins)} origins")


@app.command()
def owner(
    key: Annotated[str, typer.Argument(help="An adapter, or whatever router.hash_on makes of a request.")],
    config: RequiredConfigFile,
    as_json: AsJson = False,
) -> None:
    """Show who owns a key: the candidates in order, and why."""
    from .core.maglev import key_hash
    from .core.placement import Snapshot

    settings = load(config)
    snapshot = Snapshot(build_pools(settings))
    pool = snapshot.base_pool(key) or snapshot.adapter_pool(key)
    if pool is None:
        raise ConfigError(f"no pool serves {key!r}")
    order = pool.candidates(key)
    hashed = key_hash(key)
    if as_json:
        shown = {"key": key, "pool": pool.name, "hash": hashed, "slot": hashed % pool.table.size}
        typer.echo(json.dumps(shown | {"candidates": [{"address": e.address, "node": e.node, "stager": e.stager} for e in order]}))
        return
    typer.echo(f"{key}: pool {pool.name}, hash {hashed:016x}, slot {hashed % pool.table.size} of {pool.table.size}")
    shares = pool.table.slots_per_endpoint()
    for place, endpoint in enumerate(order):
        why = "owner: holds the slot" if place == 0 else "next by highest random weight, if those before are down"
        share = 100 * shares[endpoint.address] / pool.table.size
        typer.echo(f"  {place + 1}. {endpoint.address} ({endpoint.node}, {share:.1f} % of the keys)  {why}")


@app.command()
def stage(name: str, stager: StagerAddress = DEFAULT_STAGER, as_json: AsJson = False) -> None:
    """Put an adapter on a node's disk and wait until it is there."""

    from .client import StagerClient

    async def ask() -> None:
        async with StagerClient(stager) as client:
            staged = await client.ensure(name)
        if as_json:
            shown = {"adapter": name, "digest": staged.digest, "staged": staged.staged, "origin": staged.origin, "bytes": staged.bytes}
            typer.echo(json.dumps(shown | {"waited_s": staged.waited_s, "lease_s": staged.lease_s}))
            return
        how = f"staged from {staged.origin} in {staged.waited_s:.2f} s" if staged.staged else "was there already"
        typer.echo(f"{name}: {how}, {staged.bytes} bytes, sha256 {staged.digest}")

    asyncio.run(ask())


@app.command("list")
def list_adapters(stager: StagerAddress = DEFAULT_STAGER, as_json: AsJson = False) -> None:
    """Show what is on a node's disk, least recently used first."""

    from .client import StagerClient

    async def ask() -> None:
        async with StagerClient(stager) as client:
            reply = await client.list()
        if as_json:
            from google.protobuf.json_format import MessageToDict

            typer.echo(json.dumps(MessageToDict(reply, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)))
            return
        from rich.console import Console
        from rich.table import Table

        table = Table("adapter", "size", "idle", "leased", "origin", "digest")
        for a in reply.adapters:
            leased = f"{a.leased_seconds:.0f} s" if a.leased_seconds else "-"
            table.add_row(a.name, f"{a.bytes / 2**20:.1f} MiB", f"{a.idle_seconds:.0f} s", leased, a.origin, a.digest[:12])
        console = Console()
        console.print(table)
        used, reserved, limit = reply.used_bytes / 2**20, reply.reserved_bytes / 2**20, reply.max_bytes / 2**20
        console.print(f"{used:.1f} MiB used, {reserved:.1f} MiB reserved, limit {limit:.1f} MiB", highlight=False)

    asyncio.run(ask())


@app.command()
def evict(name: str, stager: StagerAddress = DEFAULT_STAGER) -> None:
    """Remove an adapter from a node's disk, unless somebody holds it."""

    from .client import StagerClient

    async def ask() -> None:
        async with StagerClient(stager) as client:
            freed = await client.evict(name)
        typer.echo(f"{name}: evicted, {freed} bytes freed")

    asyncio.run(ask())


@app.command("envoy-config")
def envoy_config(config: RequiredConfigFile) -> None:
    """Print a complete Envoy bootstrap for the settings."""
    from .envoyconfig import render

    typer.echo(render(load(config)), nl=False)


@app.command("settings")
def show_settings() -> None:
    """Print every setting with its default and meaning, as a Markdown table."""
    typer.echo(settings_table(), nl=False)


def parse_origin(text: str) -> OriginSettings:
    """An origin as the command line writes it. Raises StartError."""
    if text in ("hf", "huggingface"):
        return OriginSettings(type="huggingface")
    if text.startswith("s3://"):
        bucket, _, prefix = text.removeprefix("s3://").partition("/")
        if bucket:
            return OriginSettings(type="s3", bucket=bucket, prefix=prefix, endpoint=os.environ.get("AWS_ENDPOINT_URL", ""))
    elif text.startswith(("http://", "https://")):
        return OriginSettings(type="http", url=text)
    elif text.startswith(("/", "./", "~")):
        return OriginSettings(type="file", path=str(Path(text).expanduser().absolute()))
    raise StartError(f"--origin {text}: `hf`, `s3://bucket/prefix`, `https://host/prefix` or `/path` is needed")
