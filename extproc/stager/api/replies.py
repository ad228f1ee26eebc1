"""Answers that gRPC and the control API share."""

import asyncio
from collections.abc import AsyncIterator, Iterator

from ...client import Drained
from ...core.artifact import ArtifactId, is_adopted
from ...pb import stager_pb2 as pb
from ..stager import Ensured, Stager

LIST_SLICE = 100  # artifacts between two turns of the event loop: about a millisecond
MODELS_SLICE = 250  # adapters between two turns of the event loop: about a millisecond
CATALOGUE_PAGE = 5_000  # names at most in one reply, which is made in one turn: about a millisecond


def ensure_reply(held: Ensured) -> pb.EnsureReply:
    """What Ensure answers."""
    return pb.EnsureReply(
        digest=held.digest,
        staged=held.staged,
        origin=held.origin,
        lease_seconds=held.lease_s,
        waited_seconds=held.waited_s,
        bytes=held.size,
        model=held.model,
        loaded=held.loaded,
    )


def drain_reply(state: Drained) -> pb.DrainReply:
    """What Drain answers."""
    return pb.DrainReply(draining=state.draining, empty=state.empty, leased=state.leased, requests=state.requests)


async def list_parts(stager: Stager) -> AsyncIterator[pb.ListReply]:
    """What is on disk, least recently used first, in slices; the disk's budget comes with the last. What comes or goes between two slices is listed, or not:
    a hundred thousand adapters in one piece would stop the event loop for a second.
    """
    index = stager.node.holdings.index
    entries = index.entries()
    for first in range(0, len(entries), LIST_SLICE):
        yield pb.ListReply(adapters=[adapter for entry in entries[first : first + LIST_SLICE] for adapter in _listed(stager, entry.id, entry.size)])
        await asyncio.sleep(0)
    yield pb.ListReply(used_bytes=index.used_bytes, reserved_bytes=index.reserved_bytes, max_bytes=index.max_bytes)


async def list_reply(stager: Stager) -> bytes:
    """An encoded ListReply, of all parts: those of an encoded message that follow each other are one message."""
    return b"".join([part.SerializeToString() async for part in list_parts(stager)])


def _listed(stager: Stager, id_: ArtifactId, size: int) -> Iterator[pb.Adapter]:
    """One artifact under each of its names."""
    holdings = stager.node.holdings
    for name in sorted(holdings.names_of(id_)):
        if (named := holdings.get(name)) is not None:
            yield pb.Adapter(
                name=name,
                digest=named.digest,
                bytes=size,
                origin=named.origin,
                revision=named.revision,
                idle_seconds=stager.idle_s(id_),
                leased_seconds=stager.leased_s(id_),
                pinned=name in holdings.pins,
                checked_seconds=stager.checked_s(named),
                refresh_error=named.refresh_error,
                adopted=is_adopted(named.id),
                loaded=stager.is_loaded(name, named.id),
            )


async def models_reply(stager: Stager, after: str = "", limit: int = 0) -> bytes:
    """An encoded ModelsReply: base models and adapters as vLLM would list them, without those that the engine or the settings refuse: their names follow apart.

    It is made of slices, since parts of an encoded message that follow each other are one message, and a hundred thousand adapters would stop the
    event loop for a tenth of a second. What comes or goes between two slices is listed, or not.
    """
    holdings, path, refuses = stager.node.holdings, stager.node.store.path, stager.node.loads.refuses
    bases = [] if after else [pb.Model(id=base.id, root=base.root, max_model_len=base.max_model_len) for base in stager.node.engine.bases]
    invalid = [] if after else sorted(stager.node.refusals.forbidden(stager.node.clock()))
    parts, left = [pb.ModelsReply(bases=bases, refused=invalid).SerializeToString()], limit or len(holdings)
    while left > 0 and (names := holdings.after(after, min(left, MODELS_SLICE))):
        here = [(name, named) for name in names if (named := holdings.get(name)) is not None]
        refused = {name for name, named in here if named.refused or refuses(name, named.id)}
        adapters = [pb.Model(id=name, root=str(path(named.id))) for name, named in here if name not in refused]
        parts.append(pb.ModelsReply(adapters=adapters, refused=sorted(refused)).SerializeToString())
        after, left = names[-1], left - len(adapters)  # a page without any adapter would look like the last
        await asyncio.sleep(0)
    parts.append(pb.ModelsReply(more=bool(holdings.after(after, 1))).SerializeToString())
    return b"".join(parts)


async def catalogue_reply(stager: Stager, version: str, after: str, limit: int) -> pb.CatalogueReply:
    """What the origins could give; no names for a caller that has that very version."""
    listed = await stager.catalogue.current() if not after else stager.catalogue.listed
    if listed.version == version and not after:
        return pb.CatalogueReply(version=version)
    names = listed.after(after, min(limit or CATALOGUE_PAGE, CATALOGUE_PAGE))
    return pb.CatalogueReply(version=listed.version, names=names, more=bool(names) and names[-1] != listed.names[-1])
