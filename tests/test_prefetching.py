"""A router and a stager over gRPC: what others ask for is expected here, brought there, and found used."""

from pathlib import Path

from extproc.client import StagerClient
from extproc.config.read import parse
from extproc.config.stager import EngineSettings, StagerSettings
from extproc.core.artifact import AdapterName
from extproc.metrics import StagerMetrics
from extproc.process.grpc import grpc_server
from extproc.router.server import Server
from extproc.stager.api.grpc import StagerService
from extproc.stager.engine.api import Engine
from extproc.stager.stager import Stager
from extproc.stager.supply.source import Source
from extproc.up.processes import free_ports
from tests.fakes.adapters import small_files
from tests.fakes.origin import FakeOrigin
from tests.fakes.wait import Clock, until

NAME = AdapterName("acme/a")
PERIOD_S = 1830.0


async def test_a_router_has_brought_what_another_router_is_asked_for_every_half_hour(tmp_path: Path) -> None:
    """It never served a request for it. Time is the router's own."""
    origin, clock = FakeOrigin(), Clock()
    origin.add(NAME, small_files())
    settings = StagerSettings(dir=str(tmp_path / "node"), engine=EngineSettings(url=""))
    stager = Stager(settings, [Source(origin)], Engine(settings.engine), StagerMetrics())
    await stager.open()
    serving = grpc_server()
    StagerService(stager).register(serving)
    address = f"127.0.0.1:{serving.add_insecure_port('127.0.0.1:0')}"
    await serving.start()
    pools = [{"name": "models", "endpoints": [{"address": "127.0.0.1:1", "stager": address}]}]
    own = {"listen": f"127.0.0.1:{free_ports(1)[0]}", "health_listen": "", "http_listen": "", "lameduck_s": 0, "prefetch": "disk"}
    router, other = Server(parse({"pools": pools, "router": own}, source="test")), StagerClient(address, holder="another router")
    prefetching, copies = router._prefetching, router._residency.copies
    assert prefetching is not None
    prefetching._clock = clock
    await router.start()
    await until(lambda: stager.node.changes._watchers)
    for _ in range(4):
        await other.ensure(NAME)
        await until(lambda: (seen := prefetching._histories._of.get(NAME)) is not None and seen.seen_at == clock.now)
        await other.release()
        await other.evict(NAME)
        await until(lambda: not copies.of(NAME))
        clock.now += PERIOD_S
    prefetching.look()
    await until(lambda: copies.of(NAME))
    assert stager.demand[0] == 0
    assert not (await other.ensure(NAME)).staged
    used = {"by": "idle_times", "result": "used"}
    await until(lambda: router.metrics.registry.get_sample_value("lora_extproc_prefetches_ended_total", used))
    await router.stop()
    await other.close()
    await serving.stop(None)
    await stager.close()


def test_nothing_is_expected_unless_the_settings_say_so() -> None:
    """The default is off."""
    assert Server(parse({"pools": [{"name": "models"}]}, source="test"))._prefetching is None
