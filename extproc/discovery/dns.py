"""Endpoints from a name: A, AAAA or SRV records, looked up again when their TTL is over.

| the name server says | which means |
| --- | --- |
| records | the set |
| the name exists and has no such records; it does not exist (NXDOMAIN); SRV with the target `.` | there are none: what a headless service without pods answers |
| SERVFAIL, REFUSED, nothing within `timeout_s`, what is no DNS | nothing is known: the source fails |

So a name server that has lost a zone and denies its names counts as a set that is suddenly empty, which is not believed at once either.

dnspython reads the answers, since it shows what a resolver must tell apart: the response code, the TTL of a whole chain of CNAMEs, the time that a denial
holds, the additional section; and it asks again over TCP what was cut off. It runs in a thread: reading a thousand records takes it 15 ms.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Iterable, Iterator

import dns.exception
import dns.message
import dns.name
import dns.nameserver
import dns.rdatatype
import dns.resolver
import dns.rrset

from ..config.discovery import DnsSourceSettings
from ..core.endpoint import Endpoint
from ..core.fleet import Found
from ..errors import shortened
from .entries import BadEntry, canonical, collect
from .looks import Looks
from .merge import is_same_set
from .source import Failed, Seen, Shown

RETRY_S = 5.0  # after a failure, within the settings' bounds of a TTL
TRY_S = 2.0  # at most, for which one name server is waited for before the next is asked: the resolver of the C library waits for 5 s

_Answers = list[tuple[str, Found | BadEntry]]


class DnsSource:
    """One name, one type of record."""

    is_final = False

    def __init__(self, settings: DnsSourceSettings) -> None:
        self.name = settings.label
        self._settings = settings
        self._resolver: dns.resolver.Resolver | None = None
        self._shown: Shown | None = None

    async def sets(self) -> AsyncGenerator[Seen, None]:
        """What each look-up brings; the same object where that is the same."""
        looks = Looks(self._look_up, self.name)
        while True:
            seen, wait_s = await looks.next()
            yield seen
            await asyncio.sleep(min(max(wait_s, self._settings.min_ttl_s), self._settings.max_ttl_s))

    def _look_up(self) -> tuple[Seen, float]:
        """What the name has now, and for how many seconds that holds. Blocks for `timeout_s` at most."""
        try:
            self._resolver = self._resolver or _build_resolver(self._settings)
            lookup = _LookUp(self._resolver, self._settings)
            seen = collect(lookup.endpoints(), lookup.note)
        except (dns.exception.DNSException, OSError) as error:
            self._resolver = None  # /etc/resolv.conf may name other servers by now
            return Failed(shortened(_why(error, self._settings))), RETRY_S
        match seen, self._shown:
            case Shown(), Shown() as before if is_same_set(seen.endpoints, before.endpoints) and seen.left_out == before.left_out:
                seen = before
            case Shown(), _:
                self._shown = seen
        return seen, lookup.ttl_s


class _LookUp:
    """One look-up, with all that it takes: of SRV also the targets' addresses. Blocks. Raises DNSException, OSError."""

    def __init__(self, resolver: dns.resolver.Resolver, settings: DnsSourceSettings) -> None:
        self.note = ""  # why there is none, where a name server says so
        self.ttl_s = settings.max_ttl_s
        self._resolver = resolver
        self._settings = settings
        self._deadline = time.monotonic() + settings.timeout_s

    def endpoints(self) -> _Answers:
        s = self._settings
        if s.record == "SRV":
            return self._services()
        answer = self._ask(s.name, s.record)
        return [] if answer is None else list(self._found(sorted(map(str, answer)), s.port, node=""))

    def _services(self) -> _Answers:
        answer = self._ask(self._settings.name, "SRV")
        if answer is None:
            return []
        offered = [record for record in answer if record.target != dns.name.root]
        if not offered:
            self.note = "its SRV record says that there is no such service"
            return []
        preferred = min(record.priority for record in offered)  # RFC 2782: the others are for when these cannot be reached
        entries: _Answers = []
        for target, port in sorted({(record.target, record.port) for record in offered if record.priority == preferred}):
            node = target.to_text(omit_final_dot=True)
            addresses = sorted(self._addresses(target, answer.response.additional))
            entries += self._found(addresses, port, node)
            if not addresses:
                entries.append((f"target {node}", BadEntry("has no address")))
        self.note = ""
        return entries

    def _addresses(self, target: dns.name.Name, additional: Iterable[dns.rrset.RRset]) -> list[str]:
        """Of one SRV target: its A records, else its AAAA records, so that an engine with both is one endpoint. What came with the answer is not asked for."""
        for kind in (dns.rdatatype.A, dns.rdatatype.AAAA):
            came = [rrset for rrset in additional if rrset.name == target and rrset.rdtype == kind]
            if came:
                self.ttl_s = min(self.ttl_s, *(rrset.ttl for rrset in came))
                return [str(record) for rrset in came for record in rrset]
            answer = self._ask(target, kind.name)
            if answer is not None:
                return list(map(str, answer))
        return []

    def _ask(self, name: dns.name.Name | str, record: str) -> dns.resolver.Answer | None:
        """The records; None where there are none, and `note` says why."""
        try:
            left_s = max(self._deadline - time.monotonic(), 0.001)
            answer = self._resolver.resolve(name, record, search=True, raise_on_no_answer=False, lifetime=left_s)
        except dns.resolver.NXDOMAIN as denied:
            self._holds(*denied.responses().values())  # type: ignore[no-untyped-call]
            self.note = "the name does not exist (NXDOMAIN)"
            return None
        self._holds(answer.response)
        if answer.rrset is None:
            self.note = f"the name has no {record} records"
            return None
        return answer

    def _holds(self, *responses: dns.message.Message) -> None:
        """The shortest TTL of all that was said counts: of a chain of CNAMEs, and of a denial by its SOA (RFC 2308)."""
        for response in responses:
            if isinstance(response, dns.message.QueryMessage):
                self.ttl_s = min(self.ttl_s, response.resolve_chaining().minimum_ttl)

    def _found(self, addresses: Iterable[str], port: int, node: str) -> Iterator[tuple[str, Found | BadEntry]]:
        for ip in addresses:
            host = f"[{ip}]" if ":" in ip else ip
            entry: Found | BadEntry
            try:
                stager = f"{host}:{self._settings.stager_port}" if self._settings.stager_port else ""
                entry = Found(Endpoint(canonical(f"{host}:{port}"), node=node, stager=stager))
            except BadEntry as error:
                entry = error
            yield node or "record", entry


def _build_resolver(settings: DnsSourceSettings) -> dns.resolver.Resolver:
    resolver = dns.resolver.Resolver(configure=not settings.servers)
    if settings.servers:
        split = [server.rpartition(":") for server in settings.servers]
        resolver.nameservers = [dns.nameserver.Do53Nameserver(host.strip("[]"), int(port)) for host, _, port in split]
    resolver.timeout = min(TRY_S, settings.timeout_s / max(1, len(resolver.nameservers)))  # so that each is asked within the time of all
    return resolver


def _why(error: Exception, settings: DnsSourceSettings) -> str:
    match error:
        case dns.exception.Timeout():
            return f"no name server answered within {settings.timeout_s:g} s"
        case dns.resolver.NoNameservers():
            return f"no name server gave an answer: {error}"
        case _:
            return f"it cannot be looked up: {error}"
