"""What is concluded from a vLLM's answers, and that nothing is concluded from any other."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path

import pytest
from aiohttp import web

from extproc.config.stager import EngineSettings
from extproc.core.artifact import adapter_name, versioned_name
from extproc.errors import EngineUnreachable
from extproc.process.sockets import listen
from extproc.stager.engine.api import RUNNING, Engine, Work
from tests.fakes.adapters import write_small
from tests.fakes.engine import running_engine

INFO = 'vllm:lora_requests_info{{max_lora="2",running_lora_adapters="{names}",waiting_lora_adapters="{names}"}} {time}'


class ScriptedEngine:
    """Answers with what stands in `answers` under "METHOD path"; a path that is not there hangs."""

    def __init__(self) -> None:
        self.answers: dict[str, web.Response] = {}
        self.exact: dict[str, Callable[[], web.Response]] = {}  # the same, made anew for each call; a slash at the path's end counts
        self.paths: list[str] = []
        self.headers: list[str | None] = []
        self.bodies: list[str] = []

    async def answer(self, request: web.Request) -> web.Response:
        self.headers.append(request.headers.get("authorization"))
        self.bodies.append(await request.text())
        self.paths.append(request.path)
        if (make := self.exact.get(f"{request.method} {request.path}")) is not None:
            return make()
        response = self.answers.get(f"{request.method} {request.path.rstrip('/')}")
        if response is None:
            await asyncio.Event().wait()
        assert response is not None
        return response


@pytest.fixture
async def scripted() -> AsyncIterator[tuple[ScriptedEngine, str]]:
    engine = ScriptedEngine()
    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", engine.answer)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield engine, f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


@pytest.fixture
async def engine(scripted: tuple[ScriptedEngine, str]) -> AsyncIterator[Engine]:
    engine = Engine(EngineSettings(url=scripted[1] + "/", timeout_s=5.0))
    yield engine
    await engine.close()


def metrics(*lines: str) -> web.Response:
    return web.Response(text="\n".join(("# HELP vllm:lora_requests_info x", "# TYPE vllm:lora_requests_info gauge", *lines, "")))


async def test_the_simulated_engine_is_understood(tmp_path: Path) -> None:
    """Registered, running, unloaded, healthy: over HTTP, with the paths and texts of a vLLM."""
    write_small(tmp_path / "acme" / "a")
    async with running_engine(tmp_path) as sim:
        engine = Engine(EngineSettings(url=sim.url))
        assert engine.exists
        assert await engine.why_not_ready() is None
        assert set((await engine.known()).adapters) == set()
        assert (await engine.requests()).running == set()
        await sim.ask("acme/a")
        assert set((await engine.known()).adapters) == {"acme/a"}
        assert [base.id for base in engine.bases] == ["base"]
        async with sim.adapters.use("acme/a"):
            assert (await engine.requests()).running == {"acme/a"}
        assert (await engine.requests()).running == set()
        await engine.unload("acme/a")
        await engine.unload("acme/a")
        assert set((await engine.known()).adapters) == set()
        await engine.close()


async def test_the_newest_series_tells_what_runs(scripted: tuple[ScriptedEngine, str], engine: Engine) -> None:
    """A vLLM never removes the older ones; their values are times."""
    lines = [INFO.format(names=names, time=time) for names, time in (("alpha", "1.79e9"), ("alpha,acme/b", "1.790000001e9"), ("", "1.7e9"))]
    scripted[0].answers["GET /metrics"] = metrics("vllm:num_requests_running 1.0", *lines)
    assert (await engine.requests()).running >= {"alpha", "acme/b"}
    scripted[0].answers["GET /metrics"] = metrics(*lines, INFO.format(names="", time="1.79000001e9"))
    assert (await engine.requests()).running == set()


async def test_names_that_wait_count_as_running(scripted: tuple[ScriptedEngine, str], engine: Engine) -> None:
    """Versions differ in whether the two labels repeat each other."""
    line = 'vllm:lora_requests_info{max_lora="1",running_lora_adapters="a",waiting_lora_adapters="b,c"} 1.0'
    scripted[0].answers["GET /metrics"] = metrics(line)
    assert (await engine.requests()).running >= {"a", "b", "c"}


async def test_hundreds_of_names_at_work_are_hundreds(scripted: tuple[ScriptedEngine, str], engine: Engine) -> None:
    """And a name of ours is found among them, however many commas it has. All runs of 400 names were half a gigabyte."""
    ours = ",".join("ab" * 58)
    names = [f"acme/adapter-{number:05}@sha256:{number:012x}" for number in range(400)]
    label = ",".join([*names, versioned_name(adapter_name(ours), "f" * 64), *names])
    scripted[0].answers["GET /metrics"] = metrics(INFO.format(names=label, time="1.79e9"))
    requests = await engine.requests()
    assert requests.running >= {*names, f"{ours}@sha256:{'f' * 12}"}
    assert requests.versions == {f"{number:012x}" for number in range(400)} | {"f" * 12}
    assert len(requests.running) < 10 * len(names) + 200 * 200
    assert requests.has_plain  # a part of the long name


async def test_no_series_means_nothing_ran_yet(scripted: tuple[ScriptedEngine, str], engine: Engine) -> None:
    """A vLLM that has just started."""
    scripted[0].answers["GET /metrics"] = metrics("vllm:num_requests_waiting 0.0")
    assert (await engine.requests()).running == set()


LOAD = """vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_waiting{engine="0",model_name="m"} 1.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="capacity"} 1.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.5"""


async def test_the_load_of_all_ranks_is_one(scripted: tuple[ScriptedEngine, str], engine: Engine) -> None:
    """Requests are added up; each rank has a cache of its own, so of those the mean counts."""
    second = LOAD.replace('engine="0"', 'engine="1"').replace(" 3.0", " 4.0").replace(" 0.5", " 0.0")
    scripted[0].answers["GET /metrics"] = metrics(LOAD, second, INFO.format(names="a", time="1.0"))
    work = await engine.work(adapters=True)
    assert work == Work(7.0, 2.0, 0.25, frozenset({"a"}))
    assert work.requests == 9


async def test_an_older_name_of_the_cache_s_use_is_understood(scripted: tuple[ScriptedEngine, str], engine: Engine) -> None:
    """Until vLLM 0.10."""
    scripted[0].answers["GET /metrics"] = metrics(LOAD.replace("vllm:kv_cache", "vllm:gpu_cache"))
    assert (await engine.work()).kv_usage == 0.5


async def test_metrics_that_say_nothing_of_requests_are_no_load_of_nought(scripted: tuple[ScriptedEngine, str], engine: Engine) -> None:
    """A page of something else, or a value that is none."""
    for text in ("python_info 1.0", LOAD.replace(" 3.0", " x")):
        scripted[0].exact = dict.fromkeys(("GET /metrics", "GET /metrics/"), partial(metrics, text))
        with pytest.raises(EngineUnreachable, match="metrics are none"):
            await engine.work()


async def test_only_the_series_that_tell_are_asked_for_where_the_server_can_choose(tmp_path: Path) -> None:
    """As a vLLM can, below a path of its own. The adapters' names are asked for only when they are wanted."""
    write_small(tmp_path / "a")
    async with running_engine(tmp_path) as sim:
        engine = Engine(EngineSettings(url=sim.url))
        await sim.ask("a")
        async with sim.adapters.use("a"):
            assert (await engine.work()).adapters == frozenset()
            assert (await engine.work(adapters=True)).adapters == {"a"}
            text = await engine._metrics(RUNNING)
        assert [line.partition("{")[0] for line in text.splitlines()] == [RUNNING]
        await engine.close()


@pytest.mark.parametrize("refusal", [404, 405, 200])
async def test_a_server_that_cannot_choose_is_asked_for_all(scripted: tuple[ScriptedEngine, str], engine: Engine, refusal: int) -> None:
    """It knows no such path, or answers with nothing of what was named. It is not tried again until the engine has been away."""
    scripted[0].exact["GET /metrics/"] = lambda: web.Response(status=refusal)
    scripted[0].exact["GET /metrics"] = lambda: metrics(LOAD)
    for _ in range(2):
        assert (await engine.work()).running == 3
    assert scripted[0].paths == ["/metrics/", "/metrics", "/metrics"]


async def test_names_with_commas_are_looked_for_within_bounds(scripted: tuple[ScriptedEngine, str], engine: Engine) -> None:
    """Of a thousand names that run, each run of parts could be one: half a million texts for each reading."""
    names = ",".join(f"acme/{number}" for number in range(1000))
    scripted[0].answers["GET /metrics"] = metrics(LOAD, INFO.format(names=f"one,with,commas,{names}", time="1.0"))
    adapters = (await engine.work(adapters=True)).adapters
    assert {"one,with,commas", "acme/999"} <= adapters
    assert len(adapters) < 3 * 1003


BODIES = {
    "500": lambda: web.Response(status=500),
    "404": lambda: web.json_response({"detail": "Not Found"}, status=404),
    "not JSON": lambda: web.Response(text="{", content_type="application/json"),
    "a list": lambda: web.json_response([]),
    "no data": lambda: web.json_response({"object": "list"}),
    "data is text": lambda: web.json_response({"data": "alpha"}),
    "items are text": lambda: web.json_response({"data": ["alpha"]}),
    "text": lambda: web.Response(text="hello"),
}


@pytest.mark.parametrize("kind", list(BODIES))
async def test_a_list_of_models_that_is_none_concludes_nothing(scripted: tuple[ScriptedEngine, str], engine: Engine, kind: str) -> None:
    """An empty list read out of nonsense would let files be deleted."""
    scripted[0].answers["GET /v1/models"] = BODIES[kind]()
    with pytest.raises(EngineUnreachable):
        await engine.known()


async def test_metrics_that_are_none_conclude_nothing(scripted: tuple[ScriptedEngine, str], engine: Engine) -> None:
    """A status, or a page of another kind."""
    for answer in (web.Response(status=503), web.json_response({})):
        scripted[0].answers["GET /metrics"] = answer
        with pytest.raises(EngineUnreachable):
            await engine.requests()


async def test_a_series_whose_value_is_no_number_concludes_nothing(scripted: tuple[ScriptedEngine, str], engine: Engine) -> None:
    """Not a ValueError, either."""
    scripted[0].answers["GET /metrics"] = metrics(INFO.format(names="a", time="soon"))
    with pytest.raises(EngineUnreachable):
        await engine.requests()


@pytest.mark.parametrize("status", [400, 401, 403, 500, 503])
async def test_an_unload_that_was_refused_is_not_done(scripted: tuple[ScriptedEngine, str], engine: Engine, status: int) -> None:
    """Only 200, and 404 for a name it does not know."""
    scripted[0].answers["POST /v1/unload_lora_adapter"] = web.Response(status=status)
    with pytest.raises(EngineUnreachable):
        await engine.unload("alpha")


async def test_an_engine_that_does_not_answer_is_unreachable_and_unhealthy(scripted: tuple[ScriptedEngine, str]) -> None:
    """Silent, or no longer there: which of them is said."""
    silent = Engine(EngineSettings(url=scripted[1], timeout_s=0.02, health_timeout_s=0.01))
    with listen("127.0.0.1:0") as free:
        port = free.getsockname()[1]
    gone = Engine(EngineSettings(url=f"http://127.0.0.1:{port}"))
    for engine, why in ((silent, "the engine did not answer /health within 0.01 s"), (gone, "the engine refused the connection")):
        for call in (engine.known(), engine.requests(), engine.unload("a")):
            with pytest.raises(EngineUnreachable):
                await call
        assert await engine.why_not_ready() == why
        await engine.close()


@pytest.mark.parametrize("silent", ["GET /is_sleeping", "POST /v1/unload_lora_adapter"])
async def test_a_question_after_health_is_as_short(scripted: tuple[ScriptedEngine, str], silent: str) -> None:
    """An engine that answers /health and hangs in what is asked with it hangs; a call to it may take far longer."""
    answers = scripted[0].answers
    answers["GET /health"] = web.Response()
    answers["GET /is_sleeping"] = web.Response(status=404)
    answers.pop(silent, None)
    engine = Engine(EngineSettings(url=scripted[1], timeout_s=3600, health_timeout_s=0.2))
    assert await engine.why_not_ready() == f"the engine did not answer {silent.partition(' ')[2]} within 0.2 s"
    await engine.close()


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False), (404, False), (500, False)])
async def test_health_is_200(scripted: tuple[ScriptedEngine, str], engine: Engine, status: int, healthy: bool) -> None:
    """A dying vLLM answers 503."""
    scripted[0].answers["GET /health"] = web.Response(status=status)
    scripted[0].answers["GET /is_sleeping"] = web.Response(status=404)
    scripted[0].answers["POST /v1/unload_lora_adapter"] = web.json_response({"error": {"message": "no such name"}}, status=404)
    assert (await engine.why_not_ready() is None) is healthy


async def test_the_api_key_of_the_environment_is_sent(scripted: tuple[ScriptedEngine, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As vLLM's `--api-key` wants it."""
    monkeypatch.setenv("MY_KEY", "secret")
    scripted[0].answers["GET /health"] = web.Response(status=503)
    engine = Engine(EngineSettings(url=scripted[1], api_key_env="MY_KEY"))
    await engine.why_not_ready()
    await engine.close()
    assert set(scripted[0].headers) == {"Bearer secret"}


async def test_no_url_means_no_engine() -> None:
    """Nobody is asked."""
    engine = Engine(EngineSettings(url=""))
    assert not engine.exists
    await engine.close()


async def test_a_key_in_a_file_is_read_anew_for_each_call(scripted: tuple[ScriptedEngine, str], tmp_path: Path) -> None:
    """It may be rotated; one that cannot be read concludes nothing."""
    file = tmp_path / "key"
    engine = Engine(EngineSettings(url=scripted[1], api_key_file=str(file)))
    for key in ("first", "second"):
        file.write_text(f"{key}\n")
        scripted[0].answers["GET /metrics"] = metrics("vllm:num_requests_waiting 0.0")
        await engine.requests()
    file.unlink()
    with pytest.raises(EngineUnreachable, match="api_key_file"):
        await engine.requests()
    await engine.close()
    assert scripted[0].headers == ["Bearer first", "Bearer second"]


@pytest.mark.parametrize("most", [1, 2])
async def test_at_most_so_many_adapters_are_loaded_at_once(tmp_path: Path, most: int) -> None:
    """Each load stalls what the engine generates."""
    async with running_engine(tmp_path) as sim:
        engine = Engine(EngineSettings(url=sim.url, max_loads=most))
        under_way = highest = 0

        async def count(path: str) -> web.Response | None:
            nonlocal under_way, highest
            under_way += 1
            highest = max(highest, under_way)
            await asyncio.sleep(0.01)
            under_way -= 1
            return web.Response(text="Success")

        sim.step = count
        await asyncio.gather(*(engine.load(str(number), tmp_path) for number in range(6)))
        await engine.close()
    assert highest == most


async def test_an_end_is_noticed_by_the_connection_that_it_closes(tmp_path: Path) -> None:
    """Not by the next look at its health."""
    async with running_engine(tmp_path) as sim:
        engine = Engine(EngineSettings(url=sim.url))
        hung_up = asyncio.create_task(engine.until_it_hangs_up())
        await asyncio.sleep(0.05)
        assert not hung_up.done()
        await sim.stop()
        async with asyncio.timeout(5):
            await hung_up
            await engine.until_it_hangs_up()  # nobody is there: at once
        await engine.close()


async def test_a_load_call_says_what_the_adapters_layout_asks_for(scripted: tuple[ScriptedEngine, str], engine: Engine) -> None:
    """vLLM reads experts in one tensor only where the call tells of them."""
    for options in (None, {"is_3d_lora_weight": True}):
        scripted[0].answers["POST /v1/load_lora_adapter"] = web.Response(text="Success")  # which can be sent once
        await engine.load("a", Path("/x"), options)
    assert [json.loads(body) for body in scripted[0].bodies] == [
        {"lora_name": "a", "lora_path": "/x"},
        {"lora_name": "a", "lora_path": "/x", "is_3d_lora_weight": True},
    ]


async def test_its_version_is_asked_once_and_again_when_it_was_away(scripted: tuple[ScriptedEngine, str]) -> None:
    """What is refused depends on it; one that does not say it counts as the newest."""
    answers = scripted[0].answers
    engine = Engine(EngineSettings(url=scripted[1], max_loras=1))
    answers["GET /version"] = web.json_response({"version": "0.31.0" + "x" * 100})
    await engine.learn_limits()
    assert engine.version == "0.31.0" + "x" * 44
    answers["GET /version"] = web.json_response({"version": "0.32.0"})
    await engine.learn_limits()
    assert engine.version.startswith("0.31")
    answers["GET /health"] = web.Response(status=503)
    assert await engine.why_not_ready()
    await engine.learn_limits()
    assert engine.version == "0.32.0"
    answers["GET /health"] = web.Response(status=503)
    assert await engine.why_not_ready()
    answers["GET /version"] = web.Response(status=404)
    await engine.learn_limits()
    assert engine.version == ""
    await engine.close()


@pytest.mark.parametrize("value", ["NaN", "+Inf", "-1"])
async def test_a_number_of_requests_that_is_none_is_told_to_nobody(scripted: tuple[ScriptedEngine, str], engine: Engine, value: str) -> None:
    """Routers take the mean of all engines."""
    scripted[0].exact = dict.fromkeys(("GET /metrics", "GET /metrics/"), partial(metrics, LOAD.replace(" 3.0", f" {value}")))
    with pytest.raises(EngineUnreachable, match="metrics are none"):
        await engine.work()
