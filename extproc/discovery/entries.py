"""Endpoints as people and programs write them down, read one by one. Pure.

An entry is `ip:port`, or a mapping with `address` and, where known, `stager`, `node`, `instance`, `zone` and `leaving`. An entry that cannot be an endpoint is left
out and told of, since one bad line must not take the others down. A set of which no entry can be read is refused: then it is the form that has changed.
"""

from collections.abc import Iterable
from ipaddress import IPv6Address, ip_address

from ..config.values import host_port
from ..core.endpoint import Endpoint, spelled
from ..core.fleet import Found
from ..errors import shortened
from .source import Failed, Seen, Shown

MAX_ENTRIES = 100_000  # of one set: a hundred times the largest fleet that this is built for; more is a wrong file or prefix
MAX_TEXT_CHARACTERS = 253  # of a name, as DNS and Kubernetes limit theirs
MAX_COMPLAINTS = 5  # told of one set; the others are counted
KEYS = frozenset({"address", "stager", "node", "instance", "zone", "leaving"})


class BadEntry(ValueError):
    """The entry cannot be an endpoint. The message says why."""


def canonical(address: str) -> str:
    """`ip:port` in the one spelling by which an address is compared, which is Envoy's, too. Raises BadEntry."""
    host, _, port = address.rpartition(":")
    if not (port.isascii() and port.isdigit() and 1 <= len(port) <= 5 and 1 <= int(port) <= 65535):
        raise BadEntry(f"{_shown(address)} has no port from 1 to 65535")
    in_brackets = host.startswith("[") and host.endswith("]")
    try:
        ip = ip_address(host[1:-1] if in_brackets else host)
    except ValueError:
        raise BadEntry(f"{_shown(address)} is not ip:port; Envoy takes endpoints by IP address, and a source of type dns resolves names") from None
    if isinstance(ip, IPv6Address):
        if not in_brackets:
            raise BadEntry(f"{_shown(address)} needs brackets around its IPv6 address: [{_shown(host)}]:{port}")
        if ip.scope_id is not None:
            raise BadEntry(f"{_shown(address)} names an interface of one machine")
        ip = ip.ipv4_mapped or ip
    elif in_brackets:
        raise BadEntry(f"{_shown(address)} has brackets around an IPv4 address")
    if ip.is_unspecified or ip.is_multicast:
        raise BadEntry(f"{_shown(address)} is no machine's address")
    return spelled(address)


def read_entry(raw: object) -> Found:
    """One entry. Raises BadEntry."""
    if isinstance(raw, str):
        address = canonical(raw)
        return Found(Endpoint(address))
    if not isinstance(raw, dict):
        raise BadEntry("is neither ip:port nor a mapping")
    if unknown := raw.keys() - KEYS:
        raise BadEntry(f"has {_shown(min(map(str, unknown)))}, which is none of {', '.join(sorted(KEYS))}")
    leaving = raw.get("leaving", False)
    if not isinstance(leaving, bool):
        raise BadEntry("leaving is neither true nor false")
    stager = _text(raw, "stager")
    if stager:
        try:
            host_port(stager)
        except ValueError:
            raise BadEntry(f"stager {_shown(stager)} is not host:port") from None
    if not _text(raw, "address"):
        raise BadEntry("has no address")
    texts = {key: _text(raw, key) for key in ("node", "instance", "zone")}
    return Found(Endpoint(canonical(raw["address"]), stager=stager, **texts), leaving)


def collect(entries: Iterable[tuple[str, Found | BadEntry]], note: str = "") -> Seen:
    """A set of entries that were read, each with the words by which a complaint names it. Of two with one address the later one counts."""
    endpoints: dict[str, tuple[str, Found]] = {}
    complaints: list[str] = []
    left_out = read = 0
    for where, entry in entries:
        read += 1
        if read > MAX_ENTRIES:
            return Failed(f"has more than {MAX_ENTRIES} entries")
        if isinstance(entry, BadEntry):
            complaint = f"{where} {entry}"
        else:
            known = endpoints.get(entry.endpoint.address)
            endpoints[entry.endpoint.address] = (where, entry)
            if known is None or row(known[1]) == row(entry):
                continue
            complaint = f"{known[0]} has the address {entry.endpoint.address} of {where}, which counts, as the later one"
        left_out += 1
        if len(complaints) < MAX_COMPLAINTS:
            complaints.append(shortened(complaint))
    if left_out and not endpoints:
        return Failed(f"none of its {read} entries can be read: {complaints[0]}")
    return Shown(tuple(found for _, found in endpoints.values()), tuple(complaints), left_out, note)


def row(found: Found) -> tuple[str, str, str, str, str, bool]:
    """All that a source says of an endpoint, to compare and to keep: `Endpoint` itself is equal by its identity alone."""
    endpoint = found.endpoint
    return endpoint.address, endpoint.node, endpoint.stager, endpoint.instance, endpoint.zone, found.is_leaving


def _text(raw: dict[str, object], key: str) -> str:
    value = raw.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadEntry(f"{key} is no text")
    if len(value) > MAX_TEXT_CHARACTERS:
        raise BadEntry(f"{key} has {len(value)} characters; {MAX_TEXT_CHARACTERS} is the limit")
    if not value.isprintable():
        raise BadEntry(f"{key} holds control characters")
    return value


def _shown(text: str) -> str:
    return ascii(text[:80])
