"""A shared token, mutual TLS, both or neither, between real stagers and their clients; and what is refused without any."""

import asyncio
import contextlib
import json
import os
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import grpc.aio
import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from google.protobuf.message import Message

from extproc import credentials
from extproc.channel import Line
from extproc.client import SERVICE, NodeState, StagerClient
from extproc.config.credentials import RpcSettings
from extproc.config.origins import OriginSettings
from extproc.config.settings import Settings
from extproc.config.stager import EngineSettings, StagerSettings
from extproc.errors import CredentialsRefused, NotPermitted, StagerUnavailable, StartError
from extproc.pb import ext_proc_pb2 as ext_proc
from extproc.pb import stager_pb2 as pb
from extproc.router.server import PROCESS_METHOD
from extproc.stager.server import Server
from extproc.up.processes import Child, free_ports, python, spawn, stop
from tests.fakes.adapters import write_small
from tests.fakes.certificates import Authority, Pair
from tests.fakes.wait import Clock, until
from tests.router.fakes import body, headers
from tests.router.test_http2 import open_stream

TOKEN = "a-token-of-this-test"


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def stager_pair(authority: Authority) -> Pair:
    return authority.pair("stager", "127.0.0.1", "localhost")


@pytest.fixture
def router_pair(authority: Authority) -> Pair:
    return authority.pair("router")


@pytest.fixture
def token_file(tmp_path: Path) -> str:
    path = tmp_path / "token"
    path.write_text(f"{TOKEN}\n")
    return str(path)


Serve = Callable[..., Awaitable[int]]


@pytest.fixture
async def serve(tmp_path: Path) -> AsyncIterator[Serve]:
    """Starts a stager with these credentials; the port it is reached at."""
    write_small(tmp_path / "origin/acme/a")
    origins = (OriginSettings(type="file", path=str(tmp_path / "origin")),)
    servers: list[Server] = []

    async def start(rpc: RpcSettings | None = None, host: str = "127.0.0.1") -> int:
        (port,) = free_ports(1)
        directory = str(tmp_path / f"node-{len(servers)}")
        stager = StagerSettings(listen=f"{host}:{port}", http_listen="", dir=directory, engine=EngineSettings(url=""), origins=origins, drain_s=0)
        servers.append(Server(Settings(stager=stager, rpc=rpc or RpcSettings())))
        await servers[-1].start()
        return port

    yield start
    for server in servers:
        await server.stop()


async def outcome(port: int, rpc: RpcSettings | None = None, host: str = "127.0.0.1") -> str:
    """What comes of Ensure with these credentials: "served", or the name of the error."""
    async with StagerClient(f"{host}:{port}", rpc) as client:
        try:
            await client.ensure("acme/a")
        except (NotPermitted, StagerUnavailable) as error:
            return type(error).__name__
    return "served"


# -- the token


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "is empty"),
        (b" \n\t ", "is empty"),
        (b"one\ntwo\n", "holds more than one line of printable ASCII"),
        ("tökén".encode(), "holds more than one line of printable ASCII"),
        (b"\xff\xfe\x00", "holds more than one line of printable ASCII"),
        (b"a\0b", "holds more than one line of printable ASCII"),
        (None, "cannot be read: No such file or directory"),
    ],
)
def test_a_file_that_holds_no_token_is_one_clear_error(tmp_path: Path, content: bytes | None, complaint: str) -> None:
    """Naming the file, never what is in it."""
    path = tmp_path / "token"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(StartError, match=complaint) as raised:
        credentials.Tokens(RpcSettings(token_file=str(path)))
    assert str(path) in str(raised.value)
    assert "two" not in str(raised.value)


def test_a_variable_that_holds_no_token_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unset, empty, or with what cannot stand in a header."""
    rpc = RpcSettings(token_env="THIS_TESTS_TOKEN")
    monkeypatch.delenv("THIS_TESTS_TOKEN", raising=False)
    with pytest.raises(StartError, match=r"rpc\.token_env: the environment has no THIS_TESTS_TOKEN"):
        credentials.token(rpc)
    monkeypatch.setenv("THIS_TESTS_TOKEN", " \n")
    with pytest.raises(StartError, match="the environment has no THIS_TESTS_TOKEN"):
        credentials.token(rpc)
    monkeypatch.setenv("THIS_TESTS_TOKEN", "se\ncret")
    with pytest.raises(StartError, match="THIS_TESTS_TOKEN holds more than one line") as raised:
        credentials.token(rpc)
    assert "cret" not in str(raised.value)
    monkeypatch.setenv("THIS_TESTS_TOKEN", f"{TOKEN}\n")  # as `$(cat file)` would not, but a mounted secret does
    assert next(credentials.Tokens(rpc).to_try()) == (("authorization", f"Bearer {TOKEN}"),)


@pytest.mark.parametrize(
    "shown", [None, "", "Bearer", "Bearer ", TOKEN, f"bearer{TOKEN}", f"Basic {TOKEN}", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", "Bearer ü", b"\xff"]
)
def test_only_the_token_itself_matches(shown: str | bytes | None) -> None:
    """Nothing that is near it, and nothing raises."""
    assert not credentials.matches(shown, TOKEN)
    assert credentials.matches(f"Bearer {TOKEN}", TOKEN)
    assert credentials.matches(f"Bearer {TOKEN}".encode(), TOKEN)


async def test_a_caller_without_the_token_gets_nothing(serve: Serve, tmp_path: Path, token_file: str) -> None:
    """No method answers, the streams neither; the refusal names the setting and no secret."""
    port = await serve(RpcSettings(token_file=token_file))
    (tmp_path / "wrong").write_text("another-token")
    for rpc in (None, RpcSettings(token_file=str(tmp_path / "wrong"))):
        async with StagerClient(f"127.0.0.1:{port}", rpc, "someone") as client:
            calls: list[Awaitable[object]] = [client.ensure("acme/a"), client.release(), client.list(), client.pin("acme/a"), client.evict("acme/a")]
            calls += [client.purge("acme/a"), client.refresh("acme/a"), client.find("acme/a"), anext(client.stage("acme/a"))]
            calls += [anext(client.watch()), anext(client.verify()), anext(client.read("0" * 64, "adapter_config.json"))]
            for call in calls:
                with pytest.raises(CredentialsRefused, match=r"a valid token is needed: rpc\.token_env or rpc\.token_file") as raised:
                    await call
                assert TOKEN not in str(raised.value)
    assert await outcome(port, RpcSettings(token_file=token_file)) == "served"


async def test_nothing_but_bearer_and_the_token_opens_a_call(serve: Serve, token_file: str) -> None:
    """Whatever else stands in the metadata, in whatever case its key was sent."""
    port = await serve(RpcSettings(token_file=token_file))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        list_ = channel.unary_unary(f"/{SERVICE}/List", pb.ListRequest.SerializeToString, pb.ListReply.FromString)
        wrong = [(), (("authorization", TOKEN),), (("authorization", f"Basic {TOKEN}"),), (("x-authorization", f"Bearer {TOKEN}"),)]
        wrong += [(("authorization", "Bearer x"), ("authorization", f"Bearer {TOKEN}"))]
        for metadata in wrong:
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await list_(pb.ListRequest(), metadata=metadata)
            assert raised.value.code() == grpc.StatusCode.UNAUTHENTICATED
        await list_(pb.ListRequest(), metadata=(("authorization", f"Bearer {TOKEN}"),))
        unknown = channel.unary_unary(f"/{SERVICE}/Nothing", pb.ListRequest.SerializeToString, pb.ListReply.FromString)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await unknown(pb.ListRequest())
        assert raised.value.code() in (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.UNAUTHENTICATED)


async def test_a_stager_that_wants_no_token_takes_no_offence_at_one(serve: Serve, token_file: str) -> None:
    """So that routers can get it first, when a fleet gets its token."""
    assert await outcome(await serve(), RpcSettings(token_file=token_file)) == "served"


# -- mutual TLS


async def test_who_shows_a_certificate_of_the_authority_is_served(serve: Serve, authority: Authority, stager_pair: Pair, router_pair: Pair) -> None:
    """By address and by name, both of which the stager's certificate has."""
    port = await serve(authority.rpc(stager_pair))
    for host in ("127.0.0.1", "localhost"):
        assert await outcome(port, authority.rpc(router_pair), host) == "served"


async def test_who_shows_none_is_refused(serve: Serve, authority: Authority, stager_pair: Pair) -> None:
    """Neither over TLS without a certificate, nor without TLS."""
    port = await serve(authority.rpc(stager_pair))
    trusting = grpc.ssl_channel_credentials(authority.ca_file.read_bytes())
    async with grpc.aio.secure_channel(f"127.0.0.1:{port}", trusting) as channel:
        list_ = channel.unary_unary(f"/{SERVICE}/List", pb.ListRequest.SerializeToString, pb.ListReply.FromString)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await list_(pb.ListRequest())
        assert raised.value.code() == grpc.StatusCode.UNAVAILABLE
    assert await outcome(port) == "StagerUnavailable"


async def test_certificates_of_another_authority_are_refused(serve: Serve, tmp_path: Path, authority: Authority, stager_pair: Pair) -> None:
    """The client's by the stager, the stager's by the client."""
    other = Authority(tmp_path, "other")
    stranger = other.pair("stranger")
    port = await serve(authority.rpc(stager_pair))
    assert await outcome(port, other.rpc(stranger, trusted=authority)) == "StagerUnavailable"
    assert await outcome(port, authority.rpc(authority.pair("router"), trusted=other)) == "StagerUnavailable"


async def test_a_client_with_tls_does_not_talk_to_a_stager_without(serve: Serve, authority: Authority, router_pair: Pair) -> None:
    """It would show its token to whoever listens there."""
    assert await outcome(await serve(), authority.rpc(router_pair)) == "StagerUnavailable"


async def test_one_name_in_all_stagers_certificates(serve: Serve, authority: Authority, router_pair: Pair) -> None:
    """`rpc.server_name` is what is looked for instead of the address; another name is as good as none."""
    port = await serve(authority.rpc(authority.pair("stager", "stagers.internal")))
    assert await outcome(port, authority.rpc(router_pair)) == "StagerUnavailable"
    assert await outcome(port, authority.rpc(router_pair, server_name="routers.internal")) == "StagerUnavailable"
    assert await outcome(port, authority.rpc(router_pair, server_name="stagers.internal")) == "served"


async def shown_by(port: int, authority: Authority, pair: Pair) -> int:
    """The serial number of the certificate that a new connection is greeted with."""
    context = ssl.create_default_context(cafile=str(authority.ca_file))
    context.load_cert_chain(pair.cert, pair.key)
    context.set_alpn_protocols(["h2"])
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    try:
        certificate = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        return x509.load_der_x509_certificate(certificate).serial_number
    finally:
        writer.transport.abort()


def serial_of(pair: Pair) -> int:
    return x509.load_pem_x509_certificate(pair.cert.read_bytes()).serial_number


async def test_files_that_are_replaced_are_used_for_new_connections(serve: Serve, tmp_path: Path, authority: Authority, stager_pair: Pair) -> None:
    """Without a restart, and without breaking those that there are. Half a pair is not used; the old one goes on."""
    router_pair = authority.pair("router")
    port = await serve(authority.rpc(stager_pair))
    async with StagerClient(f"127.0.0.1:{port}", authority.rpc(router_pair)) as old:
        await old.ensure("acme/a")
        first = serial_of(stager_pair)
        assert await shown_by(port, authority, router_pair) == first
        authority.pair("stager", "127.0.0.1")
        second = serial_of(stager_pair)
        assert second != first
        assert await shown_by(port, authority, router_pair) == second
        stager_pair.key.write_bytes(authority.pair("elsewhere").key.read_bytes())
        assert await shown_by(port, authority, router_pair) == second
        assert await outcome(port, authority.rpc(router_pair)) == "served"
        assert not (await old.ensure("acme/a")).staged
    other = Authority(tmp_path, "next")  # the authority itself is replaced: by now the old one's certificates count for nothing
    assert other.pair("stager", "127.0.0.1") == stager_pair
    other.ca_file.replace(authority.ca_file)
    assert await outcome(port, other.rpc(router_pair, trusted=authority)) == "StagerUnavailable"
    assert await outcome(port, other.rpc(other.pair("router"), trusted=authority)) == "served"


def test_files_that_cannot_be_used_are_one_clear_error(authority: Authority, stager_pair: Pair, tmp_path: Path) -> None:
    """Before any port is opened or any stager is asked: later, it would only look like a network that is down."""
    garbage = tmp_path / "garbage.pem"
    garbage.write_text("-----BEGIN CERTIFICATE-----\nno\n-----END CERTIFICATE-----\n")
    encrypted = tmp_path / "encrypted.pem"
    key = serialization.load_pem_private_key(stager_pair.key.read_bytes(), None)
    secret = serialization.BestAvailableEncryption(b"a password")
    encrypted.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, secret))
    good = authority.rpc(stager_pair)
    for name, path in (
        ("cert_file", garbage),
        ("key_file", garbage),
        ("ca_file", garbage),
        ("key_file", encrypted),
        ("key_file", authority.pair("another").key),
        ("cert_file", tmp_path / "nothing"),
        ("key_file", tmp_path / "nothing"),
        ("ca_file", tmp_path / "nothing"),
        ("ca_file", tmp_path),
    ):
        bad = good.model_copy(update={name: str(path)})
        for use in (credentials.server_credentials, credentials.Identity):
            with pytest.raises(StartError, match="rpc: ") as raised:
                use(bad)
            assert str(path) in str(raised.value)
            assert "\n" not in str(raised.value)


# -- rotation


@pytest.fixture
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credentials, "LOOK_S", 0.0)


def rewrite(path: str | Path, text: str) -> None:
    """In one rename, as a mounted secret changes."""
    fresh = Path(f"{path}.new")
    fresh.write_text(text)
    fresh.replace(path)


def test_a_token_file_is_read_again_at_most_every_second(token_file: str) -> None:
    """Or at once, when somebody shows another."""
    clock = Clock()
    tokens = credentials.Tokens(RpcSettings(token_file=token_file), clock)
    rewrite(token_file, "second")
    assert tokens.accepts(f"Bearer {TOKEN}")
    assert tokens.current == TOKEN
    clock.now += credentials.LOOK_S
    assert tokens.accepts(f"Bearer {TOKEN}")
    assert tokens.current == "second"
    rewrite(token_file, "third")
    assert tokens.accepts("Bearer third")


def test_the_token_before_is_accepted_for_a_while(token_file: str) -> None:
    """And the one before that no longer."""
    clock = Clock()
    tokens = credentials.Tokens(RpcSettings(token_file=token_file, token_grace_s=60), clock)
    rewrite(token_file, "second")
    clock.now += 1
    assert tokens.accepts("Bearer second")
    clock.now += 59
    assert tokens.accepts(f"Bearer {TOKEN}")
    clock.now += 1
    assert not tokens.accepts(f"Bearer {TOKEN}")
    rewrite(token_file, "third")
    assert tokens.accepts("Bearer third")
    assert tokens.accepts("Bearer second")
    assert not tokens.accepts(f"Bearer {TOKEN}")
    assert not tokens.accepts("Bearer ")


@pytest.mark.parametrize("content", [None, "", "two\nlines", "tökén"])
def test_a_token_file_that_is_being_replaced_changes_nothing(token_file: str, content: str | None) -> None:
    """Gone, empty or half written: what it held before goes on until it holds a token again."""
    clock = Clock()
    tokens = credentials.Tokens(RpcSettings(token_file=token_file), clock)
    Path(token_file).unlink() if content is None else Path(token_file).write_text(content)
    clock.now += 1
    assert tokens.accepts(f"Bearer {TOKEN}")
    assert not tokens.accepts("Bearer ")
    assert next(tokens.to_try()) == (("authorization", f"Bearer {TOKEN}"),)
    rewrite(token_file, "second")
    assert tokens.accepts("Bearer second")


def test_a_caller_that_is_turned_away_tries_the_new_token_then_the_one_before(token_file: str) -> None:
    """Each once: the other side may have read its file already, or not yet."""
    clock = Clock()
    tokens = credentials.Tokens(RpcSettings(token_file=token_file), clock)

    def tried() -> list[str]:
        return [metadata[0][1].removeprefix("Bearer ") for metadata in tokens.to_try()]

    assert tried() == [TOKEN]
    rewrite(token_file, "second")
    assert tried() == [TOKEN, "second"]
    assert tried() == ["second", TOKEN]
    rewrite(token_file, "third")
    assert tried() == ["second", "third", TOKEN] or tried() == ["third", "second"]


class Traffic:
    """Calls of every kind without a pause, and a Watch, all of which must succeed. `last` is how many there were."""

    def __init__(self, client: StagerClient) -> None:
        self._client = client
        self.calls = 0
        self.states = 0
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> "Traffic":
        self._tasks = [asyncio.create_task(self._call()), asyncio.create_task(self._watch())]
        await self.goes_on()
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        for ended in await asyncio.gather(*self._tasks, return_exceptions=True):
            assert isinstance(ended, asyncio.CancelledError), ended

    async def goes_on(self) -> None:
        """Until some calls more have been answered."""
        upto = self.calls + 20
        while self.calls < upto:
            for task in self._tasks:
                if task.done():
                    task.result()
            await asyncio.sleep(0.001)

    async def _call(self) -> None:
        while True:
            await self._client.ensure("acme/a")
            _ = [event async for event in self._client.stage("acme/a")]
            self.calls += 1

    async def _watch(self) -> None:
        async for event in self._client.watch(0.1):
            self.states += isinstance(event, NodeState)


@pytest.mark.usefixtures("looks_often")
@pytest.mark.parametrize("first", ["stager", "router"])
async def test_a_token_is_rotated_under_load(serve: Serve, tmp_path: Path, token_file: str, first: str) -> None:
    """Whoever has the new one first: no call fails. When the grace is over, the old one opens nothing."""
    files = {"stager": token_file, "router": str(tmp_path / "router-token")}
    rewrite(files["router"], TOKEN)
    port = await serve(RpcSettings(token_file=files["stager"], token_grace_s=3600))
    async with StagerClient(f"127.0.0.1:{port}", RpcSettings(token_file=files["router"])) as client, Traffic(client) as traffic:
        for side in (first, *(files.keys() - {first})):
            rewrite(files[side], "second")
            await traffic.goes_on()
    rewrite(files["router"], "third")
    port = await serve(RpcSettings(token_file=files["router"], token_grace_s=0))
    rewrite(files["router"], "fourth")
    (tmp_path / "old").write_text("third")
    assert await outcome(port, RpcSettings(token_file=files["router"])) == "served"
    assert await outcome(port, RpcSettings(token_file=str(tmp_path / "old"))) == "CredentialsRefused"


async def has_moved(client: StagerClient, traffic: Traffic, line: Line, states: int) -> None:
    """New calls and the Watch go elsewhere, and nothing is left on the old channel."""
    await until(lambda: client._channel._line is not line)
    await until(lambda: traffic.states > states)
    await until(lambda: not line.calls)


@pytest.mark.usefixtures("looks_often")
@pytest.mark.parametrize("first", ["stager", "router"])
@pytest.mark.parametrize("authority_too", [False, True])
async def test_certificates_are_rotated_under_load(
    serve: Serve, tmp_path: Path, authority: Authority, stager_pair: Pair, router_pair: Pair, first: str, authority_too: bool
) -> None:
    """By the same authority, or by a new one that both sides trust beside the old one first. No call fails; new calls, and the Watch, go by the new ones."""
    rpc = {}
    for side, pair in (("stager", stager_pair), ("router", router_pair)):
        ca_file = tmp_path / f"{side}-ca.pem"
        ca_file.write_bytes(authority.ca_file.read_bytes())
        rpc[side] = authority.rpc(pair).model_copy(update={"ca_file": str(ca_file)})
    port = await serve(rpc["stager"])
    order = (first, "router" if first == "stager" else "stager")
    async with StagerClient(f"127.0.0.1:{port}", rpc["router"]) as client, Traffic(client) as traffic:
        signs, both = authority, authority.ca_file.read_text()
        if authority_too:
            signs = Authority(tmp_path, "next")
            both += signs.ca_file.read_text()
            for side in order:
                rewrite(rpc[side].ca_file, both)
                await traffic.goes_on()
        for side in order:
            line, states = client._channel._line, traffic.states
            signs.pair(side, "127.0.0.1")
            await traffic.goes_on()
            if side == "router":
                await has_moved(client, traffic, line, states)
        if authority_too:
            for side in order:
                rewrite(rpc[side].ca_file, signs.ca_file.read_text())
                await traffic.goes_on()
        assert await shown_by(port, signs, Pair(Path(rpc["router"].cert_file), Path(rpc["router"].key_file))) == serial_of(stager_pair)
        await until(lambda: not client._channel._closing)


@pytest.mark.usefixtures("looks_often")
async def test_a_client_s_withdrawn_authority_is_trusted_no_more(
    serve: Serve, tmp_path: Path, authority: Authority, stager_pair: Pair, router_pair: Pair
) -> None:
    """New calls go over a connection that does not trust it, or fail; they do not fall back on the old one."""
    other = Authority(tmp_path, "other")
    port = await serve(authority.rpc(stager_pair))
    ca_file = tmp_path / "trusted.pem"
    ca_file.write_bytes(authority.ca_file.read_bytes() + other.ca_file.read_bytes())
    async with StagerClient(f"127.0.0.1:{port}", authority.rpc(router_pair).model_copy(update={"ca_file": str(ca_file)})) as client:
        await client.ensure("acme/a")
        ca_file.write_bytes(other.ca_file.read_bytes())
        with pytest.raises(StagerUnavailable):
            await client.ensure("acme/a")


@pytest.mark.usefixtures("looks_often")
async def test_half_a_pair_is_not_shown(serve: Serve, authority: Authority, stager_pair: Pair, router_pair: Pair) -> None:
    """Between the rename of a certificate and that of its key calls go on with the old ones."""
    port = await serve(authority.rpc(stager_pair))
    async with StagerClient(f"127.0.0.1:{port}", authority.rpc(router_pair)) as client:
        await client.ensure("acme/a")
        line, key = client._channel._line, router_pair.key.read_text()
        authority.pair("router")
        fresh = router_pair.key.read_text()
        rewrite(router_pair.key, key)
        for _ in range(5):
            await client.ensure("acme/a")
        assert client._channel._line is line
        assert client._channel._coming is None
        rewrite(router_pair.key, fresh)
        await client.ensure("acme/a")
        await until(lambda: client._channel._line is not line)
        await client.ensure("acme/a")


# -- both


async def test_with_both_neither_is_enough_alone(serve: Serve, authority: Authority, stager_pair: Pair, router_pair: Pair, token_file: str) -> None:
    """The certificate opens the connection, the token the call."""
    port = await serve(authority.rpc(stager_pair, token_file=token_file))
    assert await outcome(port, authority.rpc(router_pair, token_file=token_file)) == "served"
    assert await outcome(port, authority.rpc(router_pair)) == "CredentialsRefused"
    assert await outcome(port, RpcSettings(token_file=token_file)) == "StagerUnavailable"


# -- none, and who reaches the port


@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.9.9.9:1", "[::1]:1", "::1:1", "localhost:1"])
def test_what_only_this_machine_reaches(address: str) -> None:
    """In the forms that settings may have."""
    assert credentials.is_loopback(address)


@pytest.mark.parametrize("address", ["0.0.0.0:1", "[::]:1", ":::1", "10.0.0.1:1", "node.example:1", "localhost.example:1", "127.0.0.1.example:1", "127.1:1"])
def test_what_others_may_reach(address: str) -> None:
    """Whatever is not certain to be loopback."""
    assert not credentials.is_loopback(address)


async def may_change(port: int, rpc: RpcSettings | None = None) -> dict[str, bool]:
    """What of the methods that remove or hold is permitted; Ensure must be."""
    async with StagerClient(f"127.0.0.1:{port}", rpc, "someone") as client:

        async def verify() -> None:
            _ = [found async for found in client.verify()]

        async def evict() -> None:
            await client.ensure("acme/a")
            await client.release()
            await client.evict("acme/a")

        assert (await client.ensure("acme/a")).staged
        calls = {
            "pin": client.pin("acme/a"),
            "unpin": client.pin("acme/a", pinned=False),
            "verify": verify(),
            "purge": client.purge("acme/a"),
            "evict": evict(),
        }
        return {name: await is_permitted(call) for name, call in calls.items()}


async def is_permitted(call: Awaitable[object]) -> bool:
    try:
        await call
    except NotPermitted:
        return False
    return True


EVERYTHING = dict.fromkeys(("pin", "unpin", "verify", "purge", "evict"), True)
NOTHING = dict.fromkeys(EVERYTHING, False)


async def test_without_credentials_only_this_machine_may_remove(serve: Serve) -> None:
    """A stager that others can reach stages for whoever asks, and removes for nobody."""
    assert await may_change(await serve(host="0.0.0.0")) == NOTHING
    assert await may_change(await serve(host="127.0.0.1")) == EVERYTHING


async def test_with_credentials_whoever_has_them_may(serve: Serve, authority: Authority, stager_pair: Pair, router_pair: Pair, token_file: str) -> None:
    """A token or a certificate, wherever it listens."""
    with_token = RpcSettings(token_file=token_file)
    assert await may_change(await serve(with_token, host="0.0.0.0"), with_token) == EVERYTHING
    assert await may_change(await serve(authority.rpc(stager_pair), host="0.0.0.0"), authority.rpc(router_pair)) == EVERYTHING


# -- whole processes


class System:
    """A router and two stagers as processes, with one settings file each."""

    def __init__(self, directory: Path, rpc: RpcSettings, stager_rpc: RpcSettings | None = None) -> None:
        self._directory = directory
        self._rpc, self._stager_rpc = rpc, stager_rpc or rpc
        self._children: list[Child] = []
        ports = free_ports(7)
        self.stagers = [f"127.0.0.1:{port}" for port in ports[:2]]
        self.stagers_http = [f"127.0.0.1:{port}" for port in ports[2:4]]
        self.router, self.router_health, self.router_http = (f"127.0.0.1:{port}" for port in ports[4:])
        self.config = directory / "router.yaml"

    async def __aenter__(self) -> "System":
        try:
            await self._start()
        except BaseException:
            await stop(self._children, 5.0)
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await stop(self._children, 5.0)

    async def cli(self, *arguments: str, **environment: str) -> tuple[int, str, str]:
        """Exit code, standard output, standard error."""
        where = {**os.environ, **environment}
        process = await asyncio.create_subprocess_exec(
            *python(*arguments), env=where, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        out, err = await process.communicate()
        return process.returncode or 0, out.decode(), err.decode()

    async def ensure(self, adapter: str) -> ext_proc.ProcessingResponse:
        """One request for the adapter, as a gateway shows it to the router; the first answer."""
        async with grpc.aio.insecure_channel(self.router) as channel:
            call = open_stream(channel, PROCESS_METHOD)
            for message in (headers(), body(json.dumps({"model": adapter}).encode())):
                await call.write(_bytes(message))
            answer = ext_proc.ProcessingResponse.FromString(await call.read())
            await call.done_writing()
            while isinstance(await call.read(), bytes):
                pass
            return answer

    async def down(self) -> list[str | None]:
        """Why the router counts each endpoint as down, as its Watch streams tell it."""
        async with aiohttp.ClientSession() as session, session.get(f"http://{self.router_http}/v1/endpoints") as answer:
            return [endpoint["down"] for endpoint in await answer.json()]

    async def hears_everybody(self) -> bool:
        """Before its first attempt to listen, a router counts everybody as ready."""
        return await self.down() == [None, None]

    async def until(self, is_so: Callable[[], Awaitable[bool]]) -> None:
        """Wait for processes that are starting."""
        async with asyncio.timeout(30):
            while True:
                assert all(child.process.returncode is None for child in self._children), [child.last_words() for child in self._children]
                with contextlib.suppress(aiohttp.ClientError):
                    if await is_so():
                        return
                await asyncio.sleep(0.05)

    async def is_ready(self) -> bool:
        async with aiohttp.ClientSession() as session:
            for address in (*self.stagers_http, self.router_http):
                async with session.get(f"http://{address}/readyz") as answer:
                    if answer.status != 200:
                        return False
        return True

    async def _start(self) -> None:
        endpoints = [{"address": f"127.0.0.{i}:9", "stager": address, "node": f"node-{i}"} for i, address in enumerate(self.stagers, 1)]
        shared: dict[str, Any] = {"pools": [{"name": "models", "endpoints": endpoints}]}
        router = {"listen": self.router, "health_listen": self.router_health, "http_listen": self.router_http, "lameduck_s": 0}
        self.config.write_text(yaml.safe_dump({**shared, "router": router, "rpc": self._rpc.model_dump()}))
        for number, (listen, http_listen) in enumerate(zip(self.stagers, self.stagers_http, strict=True), 1):
            stager: dict[str, Any] = {"listen": listen, "http_listen": http_listen, "dir": str(self._directory / f"node-{number}"), "engine": {"url": ""}}
            stager["drain_s"] = 0
            stager["origins"] = [{"type": "file", "path": str(self._directory / "origin")}]
            file = self._directory / f"stager-{number}.yaml"
            file.write_text(yaml.safe_dump({**shared, "stager": stager, "rpc": self._stager_rpc.model_dump()}))
            self._children.append(await spawn(f"stager-{number}", python("stager", "--config", str(file)), self._directory))
        self._children.append(await spawn("router", python("router", "--config", str(self.config)), self._directory))


def _bytes(message: Message) -> bytes:
    return message.SerializeToString()


async def works(system: System, **environment: str) -> None:
    """Watch, Ensure through the router, a copy from the peer, and the command line, each with its credentials."""
    await system.until(system.is_ready)
    await system.until(system.hears_everybody)
    assert (await system.ensure("acme/a")).HasField("request_headers")
    settings = ("--config", str(system.config)) if not environment else ()
    listed = []
    for address in system.stagers:
        code, out, err = await system.cli("list", "--json", "--stager", address, *settings, **environment)
        assert (code, err) == (0, "")
        listed.append([adapter["name"] for adapter in json.loads(out)["adapters"]])
    assert sorted(listed) == [[], ["acme/a"]]
    other = system.stagers[listed.index([])]
    code, out, err = await system.cli("stage", "acme/a", "--json", "--stager", other, *settings, **environment)
    assert (code, json.loads(out)["staged"]) == (0, True), err
    sent = [await metric(address, "lora_extproc_sent_bytes_total") for address in system.stagers_http]
    assert sorted(value > 0 for value in sent) == [False, True]
    code, out, err = await system.cli("purge", "acme/a", "--stager", other, *settings, **environment)
    assert (code, out.startswith("acme/a: purged, ")) == (0, True), err
    assert await system.hears_everybody()


async def metric(address: str, name: str) -> float:
    """One sample without labels."""
    async with aiohttp.ClientSession() as session, session.get(f"http://{address}/metrics") as answer:
        return next(float(line.split()[1]) for line in (await answer.text()).splitlines() if line.startswith(f"{name} "))


async def test_a_whole_system_with_a_token(tmp_path: Path, token_file: str) -> None:
    """Router, stagers, peers and commands all show it; who does not is told so in one sentence."""
    write_small(tmp_path / "origin/acme/a")
    async with System(tmp_path, RpcSettings(token_file=token_file)) as system:
        await works(system, LORA_EXTPROC_TOKEN=TOKEN)
        for environment, code, sentence in (
            ({}, 1, f"no_endpoint: stager {system.stagers[0]}: a valid token is needed: rpc.token_env or rpc.token_file"),
            ({"LORA_EXTPROC_TOKEN": "wrong"}, 1, f"no_endpoint: stager {system.stagers[0]}: a valid token is needed: rpc.token_env or rpc.token_file"),
            ({"LORA_EXTPROC_TOKEN": ""}, 2, "rpc.token_env: the environment has no LORA_EXTPROC_TOKEN"),
        ):
            assert await system.cli("list", "--stager", system.stagers[0], **environment) == (code, "", f"lora-extproc: {sentence}\n")
        code, out, _ = await system.cli("list", "--json", "--config", str(system.config), "--stager", system.stagers[0])
        assert (code, "adapters" in json.loads(out)) == (0, True)
        async with aiohttp.ClientSession() as session, session.post(f"http://{system.stagers_http[0]}/v1/purge", json={"adapter": "acme/a"}) as answer:
            assert answer.status == 403


async def test_a_whole_system_with_mutual_tls(tmp_path: Path, authority: Authority, router_pair: Pair) -> None:
    """The command line shows the certificate of its settings file."""
    write_small(tmp_path / "origin/acme/a")
    name = "stagers.internal"
    stagers = authority.rpc(authority.pair("stager", name), server_name=name)
    async with System(tmp_path, authority.rpc(router_pair, server_name=name), stagers) as system:
        await works(system)
        unavailable = f"lora-extproc: no_endpoint: stager {system.stagers[0]}: unavailable\n"
        assert await system.cli("list", "--stager", system.stagers[0]) == (1, "", unavailable)


async def test_a_router_with_the_wrong_token_says_so_once(tmp_path: Path, token_file: str) -> None:
    """Its endpoints are down, and why stands in the log and in the list: of the stager, and of each change that follows; not twice a second."""
    write_small(tmp_path / "origin/acme/a")
    (tmp_path / "wrong").write_text("another-token")
    async with System(tmp_path, RpcSettings(token_file=str(tmp_path / "wrong")), RpcSettings(token_file=token_file)) as system:

        async def is_turned_away() -> bool:
            return all("a valid token is needed" in (why or "") for why in await system.down())

        await system.until(is_turned_away)
        answer = await system.ensure("acme/a")
        assert answer.immediate_response.status.code == 503
        await asyncio.sleep(1.2)  # two more attempts
    log = (tmp_path / "router.log").read_text()
    assert len(system.stagers) <= log.count("a valid token is needed") <= 3 * len(system.stagers)
    assert TOKEN not in log
    assert "another-token" not in log


async def test_a_process_that_cannot_have_its_credentials_ends_with_one_sentence(tmp_path: Path) -> None:
    """Router and stager alike, with code 2."""
    (tmp_path / "token").write_text("\n")
    system = System(tmp_path, RpcSettings())
    pools = [{"name": "models", "endpoints": [{"address": "127.0.0.1:9", "stager": system.stagers[0]}]}]
    raw = {"pools": pools, "rpc": {"token_file": str(tmp_path / "token")}, "router": {"listen": system.router, "health_listen": "", "http_listen": ""}}
    raw["stager"] = {"listen": system.stagers[0], "http_listen": "", "dir": str(tmp_path / "node"), "engine": {"url": ""}}
    system.config.write_text(yaml.safe_dump(raw))
    for command in ("router", "stager", "list"):
        code, out, err = await system.cli(command, "--config", str(system.config))
        assert (code, out, err) == (2, "", f"lora-extproc: rpc.token_file {tmp_path / 'token'} is empty\n")
