"""The command line, and the only place that exits: 0 done, 1 failed, 2 cannot start as asked.

Each command imports what it needs when it runs: the whole takes two seconds, and `up` starts nine processes.
"""

import asyncio
import dataclasses
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer

from . import __version__
from .config.credentials import RpcSettings
from .config.documentation import settings_table
from .config.origins import OriginSettings
from .config.read import load
from .config.settings import Settings, build_pools
from .errors import ConfigError, LoraExtprocError, StartError

if TYPE_CHECKING:
    from .client import Drained, StagerClient

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Route LoRA requests inside Envoy to the node that has the adapter on disk, and put it there first.",
)

ConfigFile = Annotated[Path | None, typer.Option("--config", help="Settings file (YAML). Without it: defaults.")]
RequiredConfigFile = Annotated[Path, typer.Option("--config", help="Settings file (YAML).")]
NodeName = Annotated[str, typer.Argument(metavar="NODE", help="The node's name or its endpoint's address in the settings' pools, or its stager's host:port.")]
StagerAddress = Annotated[str, typer.Option("--stager", help="The stager's gRPC address, host:port.", envvar="LORA_EXTPROC_STAGER")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
RpcConfigFile = Annotated[Path | None, typer.Option("--config", help="Settings file whose `rpc` holds the credentials.", envvar="LORA_EXTPROC_CONFIG")]
Sha256 = Annotated[str, typer.Option("--sha256", help="What the weights file must have; anything else is refused.")]
Sort = Literal["idle", "size", "checked", "name"]
TOKEN_ENV = "LORA_EXTPROC_TOKEN"  # noqa: S105  # the variable's name
DEFAULT_STAGER = "127.0.0.1:9102"


def main() -> NoReturn:
    """Run the command line. Our errors become one sentence and an exit code."""
    try:
        code = app(standalone_mode=False)  # what a command's typer.Exit carries is returned here, not raised
    except StartError as error:
        _fail(_in_words(error), 2)
    except LoraExtprocError as error:
        _fail(_in_words(error), 1)
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    except Exception as error:
        if type(error).__module__.startswith(("click", "typer")) and hasattr(error, "format_message"):
            _fail(error.format_message(), 2)
        raise
    sys.exit(code if isinstance(code, int) else 0)


def _in_words(error: BaseException) -> str:
    if isinstance(error, LoraExtprocError) and not isinstance(error, StartError):
        return f"{error.reason}: {error.message}"
    return str(error)


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
    engine: Annotated[str, typer.Option(help="`sim`, `vllm`, or the URLs of running model servers, separated by commas.")] = "sim",
    vllm_python: Annotated[Path | None, typer.Option(help="With `--engine vllm`: the Python that has vLLM. Default: this one.")] = None,
    model: Annotated[str, typer.Option(help="With `--engine vllm`: its `--model`. Default: a tiny one that is made here.")] = "",
    vllm_args: Annotated[str, typer.Option(help="With `--engine vllm`: more of its arguments, as one text.")] = "",
    offline: Annotated[bool, typer.Option("--offline", help="Leave the Hugging Face hub out.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Send one request of each kind, compare the answers, and exit.")] = False,
    config: ConfigFile = None,
) -> None:
    """Start everything on this machine: a real Envoy, a router, and nodes."""
    from .up import run, stack, vllm

    if check and (origin or engine != "sim"):
        raise StartError("--check runs with the demo adapters on simulated engines: leave --origin and --engine out")
    engines = () if engine in ("sim", "vllm") else tuple(url.strip() for url in engine.split(",") if url.strip())
    for url in engines:
        if not url.startswith("http://"):
            raise StartError(f"--engine {url}: `sim`, `vllm` or http://host:port is needed")
    if engine != "vllm" and (vllm_python or model or vllm_args):
        raise StartError("--vllm-python, --model and --vllm-args go with --engine vllm")
    if model and not origin:
        raise StartError("--model: the demo adapters are for the tiny model; say where yours are with --origin")
    server = vllm.Vllm(vllm.find_python(vllm_python), model, arguments=tuple(shlex.split(vllm_args))) if engine == "vllm" else None
    settings = _settings(config)
    origins = tuple(parse_origin(text) for text in origin or ())
    with tempfile.TemporaryDirectory(prefix="lora-extproc-") as temporary:
        where = directory or (Path(temporary) if check else Path("~/.cache/lora-extproc").expanduser())
        plan = stack.Plan(where.absolute(), port, nodes, origins, not (offline or check), engines, server, settings)
        succeeded = asyncio.run(run.run(plan, check=check))
    raise typer.Exit(0 if succeeded else 1)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def router(context: typer.Context, config: ConfigFile = None) -> None:
    """Run the ext_proc service.

    Beside --config, or instead of it, the flags that charts pass to an Endpoint Picker: --pool-name, --pool-namespace, --pool-group, or --endpoint-selector
    and --endpoint-target-ports, --kubeconfig; --grpc-port, --grpc-health-port, --metrics-port; --secure-serving[=false], --cert-path; --zap-encoder.
    """
    from .picker import with_flags
    from .process.cores import cores
    from .process.logs import set_up_logging
    from .process.loop import run

    if config is None and not context.args:
        raise StartError("router: --config FILE is needed, or --pool-name")
    settings = with_flags(_settings(config), context.args)
    set_up_logging(settings.log.level, settings.log.format)
    workers = settings.router.workers or cores()
    if workers > 1:
        from .router.workers.parent import serve as serve_with_workers

        run(lambda stop: serve_with_workers(settings, workers, stop))
    else:
        from .router.server import serve

        clusters = _clusters(settings)
        run(lambda stop: serve(settings, stop, clusters))


@app.command(hidden=True)
def router_worker(number: int, parent: int, commands: int, board: int, settings: int, api: str) -> None:
    """Run one of a router's workers. `lora-extproc router` starts it, and hands it three files by their numbers."""
    from .process.logs import set_up_logging
    from .process.loop import run
    from .router.workers.worker import inherited, work

    worker = inherited(number, parent, commands, board, settings, api)
    set_up_logging(worker.settings.log.level, worker.settings.log.format, f"worker {number}")
    clusters = _clusters(worker.settings)
    run(lambda stop: work(worker, stop, clusters))


def _clusters(settings: "Settings") -> dict[str, bytes] | None:
    """What Envoys that follow this router by xDS are told of each pool's cluster; None where they do not."""
    if settings.envoy.endpoints != "xds":
        return None
    from . import envoyconfig

    return envoyconfig.clusters(settings)


@app.command()
def stager(config: RequiredConfigFile) -> None:
    """Run the process that fills this node's directory."""
    from .process.logs import set_up_logging
    from .process.loop import run
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
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Requests that run at once; others wait.")] = 256,
    mixed_moe_format: Annotated[bool, typer.Option("--enable-mixed-moe-lora-format", help="Takes experts in one tensor, where the load call says so.")] = False,
    token_ms: Annotated[float, typer.Option(min=0, help="Time per token.")] = 0.0,
    load_ms: Annotated[float, typer.Option(min=0, help="Time that it takes to load an adapter.")] = 0.0,
    dev_mode: Annotated[bool, typer.Option("--dev-mode", help="As a vLLM with VLLM_SERVER_DEV_MODE=1.")] = False,
) -> None:
    """Run a simulated engine: vLLM's API, no model."""
    from .process.logs import set_up_logging
    from .process.loop import run
    from .sim.adapters import Adapters
    from .sim.app import SimEngine, serve

    set_up_logging("info")
    limits = {"max_loras": max_loras, "max_cpu_loras": max_cpu_loras, "max_lora_rank": max_lora_rank, "max_num_seqs": max_num_seqs}
    load_s = load_ms / 1000
    adapters = Adapters(base_model=base_model, root=root, cache_dir=directory, mixed_moe_format=mixed_moe_format, load_s=load_s, **limits)
    run(lambda stop: serve(SimEngine(adapters, token_s=token_ms / 1000, dev_mode=dev_mode), listen, stop))


@app.command("check")
def check_config(config: RequiredConfigFile) -> None:
    """Validate a settings file."""
    settings = load(config)
    endpoints = sum(len(pool.endpoints) for pool in settings.pools)
    typer.echo(f"{config}: valid; {len(settings.pools)} pools, {endpoints} endpoints, {len(settings.stager.origins)} origins")


@app.command()
def owner(
    model: Annotated[str, typer.Argument(help="What a request's body names as its `model`.")],
    config: RequiredConfigFile,
    header: Annotated[list[str] | None, typer.Option(help="A header of the request, `name: value`; may be repeated.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show who owns a request's key: the candidates in order, and why."""
    from .core.decision import Facts, Forward, PassThrough, Reject, decide
    from .core.maglev import key_hash
    from .core.paths import Kind, Path
    from .core.placement import Snapshot

    settings = load(config)
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in header or ())}
    facts = Facts("POST", Path(Kind.INFERENCE, "/v1/chat/completions"), headers, model)
    decision = decide(facts, Snapshot(build_pools(settings)), settings.router.policy())
    if isinstance(decision, Reject):
        raise ConfigError(decision.error.message)
    assert isinstance(decision, Forward | PassThrough), "a POST is forwarded or passed, where every endpoint is ready"
    pool = decision.pool
    key = decision.key or model
    order = pool.order(key)
    hashed = key_hash(key)
    if as_json:
        shown = {"model": model, "key": key, "pool": pool.name, "hash": hashed, "slot": hashed % pool.table.size}
        typer.echo(json.dumps(shown | {"candidates": [{"address": e.address, "node": e.node, "stager": e.stager} for e in order]}))
        return
    typer.echo(f"{key}: pool {pool.name}, hash {hashed:016x}, slot {hashed % pool.table.size} of {pool.table.size}")
    shares = pool.table.slots_per_endpoint()
    for place, endpoint in enumerate(order):
        why = "owner: holds the slot" if place == 0 else "next in the key's order, where those before are down or busier"
        share = 100 * shares[endpoint.address] / pool.table.size
        typer.echo(f"  {place + 1}. {endpoint.address} ({endpoint.node}, {share:.1f} % of the keys)  {why}")


@app.command()
def stage(name: str, stager: StagerAddress = DEFAULT_STAGER, sha256: Sha256 = "", config: RpcConfigFile = None, as_json: AsJson = False) -> None:
    """Put an adapter on a node's disk and wait until it is there."""
    from .client import Staged
    from .show import StageBar

    async def ask(client: "StagerClient") -> None:
        staged: Staged | None = None
        with StageBar(name, enabled=not as_json) as bar:
            async for event in client.stage(name, sha256):
                if isinstance(event, Staged):
                    staged = event
                else:
                    bar.show(event)
        assert staged is not None
        if as_json:
            shown = {"adapter": name, "digest": staged.digest, "staged": staged.staged, "origin": staged.origin, "bytes": staged.bytes}
            typer.echo(json.dumps(shown | {"waited_s": staged.waited_s, "lease_s": staged.lease_s}))
            return
        how = f"staged from {staged.origin} in {staged.waited_s:.2f} s" if staged.staged else "was there already"
        typer.echo(f"{name}: {how}, {staged.bytes} bytes, sha256 {staged.digest}")

    _ask(stager, config, ask)


@app.command("list")
def list_adapters(
    stager: StagerAddress = DEFAULT_STAGER,
    sort: Annotated[Sort, typer.Option(help="What comes first: the least recently used, the largest, the oldest in its check, or by name.")] = "idle",
    config: RpcConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Show what is on a node's disk, what holds it there, and what fills the disk."""

    async def ask(client: "StagerClient") -> None:
        disk = await client.list()
        if as_json:
            typer.echo(json.dumps(dataclasses.asdict(disk)))
            return
        from .show import show_list

        show_list(disk, sort)

    _ask(stager, config, ask)


@app.command()
def evict(name: str, stager: StagerAddress = DEFAULT_STAGER, config: RpcConfigFile = None, as_json: AsJson = False) -> None:
    """Remove an adapter from a node's disk, unless somebody holds it."""

    async def ask(client: "StagerClient") -> None:
        freed = await client.evict(name)
        _say(as_json, f"{name}: evicted, {freed} bytes freed", adapter=name, bytes=freed)

    _ask(stager, config, ask)


@app.command()
def purge(name: str, stager: StagerAddress = DEFAULT_STAGER, config: RpcConfigFile = None, as_json: AsJson = False) -> None:
    """Remove an adapter whoever leased or pinned it, and forget that it was not found. Only what the engine still reads stays."""

    async def ask(client: "StagerClient") -> None:
        freed = await client.purge(name)
        _say(as_json, f"{name}: purged, {freed} bytes freed", adapter=name, bytes=freed)

    _ask(stager, config, ask)


@app.command()
def pin(name: str, stager: StagerAddress = DEFAULT_STAGER, sha256: Sha256 = "", config: RpcConfigFile = None, as_json: AsJson = False) -> None:
    """Put an adapter on a node's disk and hold it there without an end."""

    async def ask(client: "StagerClient") -> None:
        digest = await client.pin(name, sha256=sha256)
        _say(as_json, f"{name}: pinned, sha256 {digest}", adapter=name, pinned=True, digest=digest)

    _ask(stager, config, ask)


@app.command()
def unpin(name: str, stager: StagerAddress = DEFAULT_STAGER, config: RpcConfigFile = None, as_json: AsJson = False) -> None:
    """Let a pinned adapter be evicted again when its time comes."""

    async def ask(client: "StagerClient") -> None:
        await client.pin(name, pinned=False)
        _say(as_json, f"{name}: no longer pinned", adapter=name, pinned=False)

    _ask(stager, config, ask)


@app.command()
def refresh(name: str, stager: StagerAddress = DEFAULT_STAGER, config: RpcConfigFile = None, as_json: AsJson = False) -> None:
    """Compare an adapter with its origin now; a new version replaces it."""

    async def ask(client: "StagerClient") -> None:
        changed, digest, revision = await client.refresh(name)
        text = f"{name}: {'a new version is there' if changed else 'is as its origin has it'}, sha256 {digest}"
        _say(as_json, text, adapter=name, changed=changed, digest=digest, revision=revision)

    _ask(stager, config, ask)


@app.command()
def verify(
    name: Annotated[str, typer.Argument(help="One adapter; all without it.")] = "",
    stager: StagerAddress = DEFAULT_STAGER,
    config: RpcConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Read adapters back from a node's disk and compare them with their digests. Exit code 1 if one differs; it is removed."""

    async def ask(client: "StagerClient") -> None:
        good = bad = 0
        async for found in client.verify(name):
            good, bad = (good + 1, bad) if found.ok else (good, bad + 1)
            what = "ok" if found.ok else f"{found.why}; {'removed' if found.removed else 'the engine may read it: it stays'}"
            _say(as_json, f"{found.adapter}: {what}, {found.bytes} bytes", **dataclasses.asdict(found))
        if not as_json:
            typer.echo(f"{good} good, {bad} damaged")
        if bad:
            raise typer.Exit(1)

    _ask(stager, config, ask)


@app.command()
def drain(
    node: NodeName,
    why: Annotated[str, typer.Option(help="Why, for logs and for who asks.")] = "",
    wait: Annotated[bool, typer.Option("--wait", help="Wait until the node is empty, and show how far it is.")] = False,
    timeout: Annotated[float, typer.Option(min=0, help="Seconds to wait at most; then the exit code is 1 and the node is still drained.")] = 300.0,
    config: RpcConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Have a node take nothing new, so that it can be stopped when nobody needs it any longer. Survives a restart of its stager."""
    from .emptying import drain as drain_client

    def say(state: "Drained") -> None:
        left = f"leased adapters: {state.leased}, requests in its engine: {state.requests:g}"
        _say(as_json, f"{node}: {'empty' if state.empty else f'drained; {left}'}", node=node, **dataclasses.asdict(state))

    async def ask(client: "StagerClient") -> None:
        if why_not := await drain_client(client, why, say, timeout if wait else None):
            typer.echo(f"lora-extproc: {node}: {why_not}", err=True)
            raise typer.Exit(1)

    _ask_all(_stagers_of(node, config), config, ask)


@app.command()
def undrain(node: NodeName, config: RpcConfigFile = None, as_json: AsJson = False) -> None:
    """Have a node take what comes again."""

    async def ask(client: "StagerClient") -> None:
        state = await client.undrain()
        text = f"{node}: still drained, since its stager is stopping" if state.draining else f"{node}: no longer drained"
        _say(as_json, text, node=node, **dataclasses.asdict(state))

    _ask_all(_stagers_of(node, config), config, ask)


def _stagers_of(node: str, config: Path | None) -> list[str]:
    """The stager of a node that the settings name, or that address. Raises ConfigError."""
    endpoints = [endpoint for pool in _settings(config).pools for endpoint in pool.endpoints]
    if found := sorted({e.stager for e in endpoints if e.stager and node in (e.node, e.address, e.stager)}):
        return found
    if ":" not in node:
        raise ConfigError(f"{node}: no node of the settings' pools is called so (--config), and it is no host:port of a stager")
    return [node]


def _say(as_json: bool, text: str, **fields: object) -> None:
    typer.echo(json.dumps(fields) if as_json else text)


def _ask(address: str, config: Path | None, ask: "Callable[[StagerClient], Awaitable[None]]") -> None:
    """Talk to one stager, with the credentials of the settings file or of the environment."""
    _ask_all([address], config, ask)


def _ask_all(addresses: Sequence[str], config: Path | None, ask: "Callable[[StagerClient], Awaitable[None]]") -> None:
    """The same with several at once, so that none waits for another. Raises the first error when all have ended; the others are printed."""
    from .client import StagerClient

    rpc = _settings(config).rpc
    if config is None and TOKEN_ENV in os.environ:
        rpc = RpcSettings(token_env=TOKEN_ENV)

    async def talk(address: str) -> None:
        async with StagerClient(address, rpc) as client:
            await ask(client)

    async def talk_to_all() -> list[BaseException | None]:
        return await asyncio.gather(*map(talk, addresses), return_exceptions=True)

    failures = [failure for failure in asyncio.run(talk_to_all()) if failure is not None]
    for failure in failures[1:]:
        if not isinstance(failure, typer.Exit):
            typer.echo(f"lora-extproc: {_in_words(failure)}", err=True)
    if failures:
        raise failures[0]


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
        return OriginSettings(type="http", url=text, allow_private=True)  # whoever types an address means it
    elif text.startswith(("/", "./", "~")):
        return OriginSettings(type="file", path=str(Path(text).expanduser().absolute()))
    raise StartError(f"--origin {text}: `hf`, `s3://bucket/prefix`, `https://host/prefix` or `/path` is needed")
