"""One of several processes does the work: the one that holds a Lease, as client-go's leader election does.

The holder writes `renewTime` every RETRY_S. Another takes the Lease when it has seen no write for the duration that the Lease states, by its own clock:
clocks of two machines are never compared. A holder that could not write for RENEW_S stops its work, which is LEASE_S - RENEW_S before anybody else may
begin. Every write names the version that was read, so of two that take the Lease at once one is refused.

| the Lease says | who asks | what follows |
| --- | --- | --- |
| there is none, or it has no holder | anybody | it is taken |
| the holder is who asks | the holder | it is renewed |
| another holder, which wrote within the duration | anybody else | wait |
| another holder, and nothing was written for the duration | anybody else | it is taken |
"""

import asyncio
import contextlib
import datetime
import logging
import random
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from .api import Api
from .failures import Conflict, KubernetesFailed, NotFound
from .objects import LEASES, Object

log = logging.getLogger(__name__)

# client-go's numbers: LeaseDuration, RenewDeadline, RetryPeriod
LEASE_S = 15.0
RENEW_S = 10.0
RETRY_S = 2.0
JITTER = 1.2  # of the wait of those who do not hold it, as there


class LeaseSpec(msgspec.Struct, rename="camel"):
    holder_identity: str | None = None
    lease_duration_seconds: int | None = None
    acquire_time: str | None = None
    renew_time: str | None = None
    lease_transitions: int | None = None


class Lease(Object):
    spec: LeaseSpec = msgspec.field(default_factory=LeaseSpec)


def wanted(lease: Lease | None, identity: str, unchanged_s: float, now: datetime.datetime) -> LeaseSpec | None:
    """What `identity` writes to hold the Lease; None while another does. `unchanged_s`: for how long it was seen as it is. Pure."""
    text = now.astimezone(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    if lease is None:
        return LeaseSpec(identity, int(LEASE_S), text, text, 0)
    held = lease.spec
    if held.holder_identity == identity:
        return LeaseSpec(identity, int(LEASE_S), held.acquire_time or text, text, held.lease_transitions or 0)
    if held.holder_identity and unchanged_s < (held.lease_duration_seconds or LEASE_S):
        return None
    return LeaseSpec(identity, int(LEASE_S), text, text, (held.lease_transitions or 0) + 1)


class Leader:
    """`await Leader(api, namespace, name, identity).lead(work)`."""

    def __init__(self, api: Api, namespace: str, name: str, identity: str) -> None:
        """`identity`: of this process alone, as the pod's name."""
        self._api = api
        self._namespace = namespace
        self._name = name
        self._identity = identity
        self._seen: Lease | None = None
        self._seen_at = 0.0  # when it was seen to change, by the loop's clock

    async def lead(self, work: Callable[[], Awaitable[None]]) -> None:
        """Await `work` while this process holds the Lease: it is cancelled when the Lease is lost, and begun anew when it is held again. Returns when `work`
        does. The Lease is given up at the end, so that another need not wait for it to run out."""
        while True:
            await self._take()
            log.info("lease %s/%s is held by this process, %s", self._namespace, self._name, self._identity)
            working = asyncio.ensure_future(work())
            try:
                await self._hold(working)
            finally:
                working.cancel()
                await asyncio.gather(working, return_exceptions=True)
                await self._give_up()
            if not working.cancelled():
                return working.result()

    async def _take(self) -> None:
        """Try until it is held."""
        while True:
            if await self._attempt():
                return
            await asyncio.sleep(RETRY_S * random.uniform(1, 1 + JITTER))  # noqa: S311

    async def _hold(self, working: "asyncio.Future[None]") -> None:
        """Renew until the work has ended or the Lease is lost."""
        now = asyncio.get_running_loop().time
        renewed_at = now()
        while True:
            done, _ = await asyncio.wait({working}, timeout=RETRY_S)
            if done:
                return
            attempt_at = now()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(renewed_at + RENEW_S - attempt_at):
                    if await self._attempt():
                        renewed_at = attempt_at
            holder = self._seen.spec.holder_identity if self._seen is not None else None
            if holder not in (None, self._identity) or now() - renewed_at >= RENEW_S:
                log.warning("lease %s/%s is lost: %s", self._namespace, self._name, f"{holder} holds it" if holder != self._identity else "it was not renewed")
                return

    async def _attempt(self) -> bool:
        """Whether the Lease is held now."""
        try:
            lease = await self._read()
            spec = wanted(lease, self._identity, asyncio.get_running_loop().time() - self._seen_at, datetime.datetime.now(datetime.UTC))
            if spec is not None:
                self._look_at(await self._write(lease, spec))
        except Conflict:
            return False  # somebody else was first; the next look shows who
        except KubernetesFailed as error:
            log.warning("lease %s/%s: %s", self._namespace, self._name, error)
            return False
        return spec is not None

    async def _read(self) -> Lease | None:
        try:
            lease = await self._api.get(LEASES, self._namespace, self._name, Lease)
        except NotFound:
            lease = None
        self._look_at(lease)
        return lease

    def _look_at(self, lease: Lease | None) -> None:
        before = self._seen
        if lease is None or before is None or lease.metadata.resource_version != before.metadata.resource_version:
            self._seen, self._seen_at = lease, asyncio.get_running_loop().time()

    async def _write(self, lease: Lease | None, spec: LeaseSpec) -> Lease:
        metadata: dict[str, Any] = {"name": self._name, "namespace": self._namespace}
        body = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata, "spec": spec}
        if lease is None:
            return await self._api.create(LEASES, self._namespace, body, Lease)
        metadata["resourceVersion"] = lease.metadata.resource_version
        return await self._api.replace(LEASES, self._namespace, self._name, body, Lease)

    async def _give_up(self) -> None:
        """Leave the Lease without a holder, if it is this process's still."""
        lease = self._seen
        if lease is not None and lease.spec.holder_identity == self._identity:
            with contextlib.suppress(KubernetesFailed):
                self._look_at(await self._write(lease, LeaseSpec("", 1, lease.spec.acquire_time, lease.spec.renew_time, lease.spec.lease_transitions)))
