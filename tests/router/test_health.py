"""Health checks and the drain: a watch never ends by itself, so it must not hold one up."""

import asyncio

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from extproc.router.health import Health
from extproc.router.transport import Listener

Status = health_pb2.HealthCheckResponse


async def test_a_drain_ends_watches_at_once() -> None:
    """They hear NOT_SERVING and then the end; an hour of draining is not waited for."""
    health = Health()
    health.set_serving(True)
    listener = Listener("127.0.0.1:0", health.methods(), 100)
    await listener.start()
    async with grpc.aio.insecure_channel(listener.address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == Status.SERVING
        health.drain()
        stopping = asyncio.create_task(listener.stop(3600))
        assert (await watch.read()).status == Status.NOT_SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await watch.read()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        await stopping


async def test_a_watch_that_comes_while_draining_is_answered_and_ended() -> None:
    """It would be the next to wait for."""
    health = Health()
    health.set_serving(True)
    health.drain()
    listener = Listener("127.0.0.1:0", health.methods(), 100)
    await listener.start()
    async with grpc.aio.insecure_channel(listener.address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == Status.NOT_SERVING
        with pytest.raises(grpc.aio.AioRpcError):
            await watch.read()
    await listener.stop(3600)
