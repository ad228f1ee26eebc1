"""One flight: which source has it, room for it, its files, their verdict, the rename that shows it to everybody."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ParamSpec, TypeVar

from ...core.artifact import AdapterName, File, Manifest
from ...errors import AdapterTooLarge, InvalidAdapter, ModelNotFound, OriginChanged, OriginFailed
from ...flight import SingleFlight, to_the_end
from ..adapter import archive
from ..adapter.check import MAX_CONFIG_BYTES, AdapterConfig, check_config, check_files, hidden_size, with_base
from ..adapter.files import CONFIG_FILE, PICKLE_FILES, WEIGHTS_FILE
from ..books.holdings import Named
from ..node import Node
from ..supply.job import Job
from ..supply.listing import Listing, RemoteFile
from ..supply.origins.file import FileOrigin
from ..supply.peers import Peers
from ..supply.source import Source
from ..syscalls import disk_errors, hash_file
from .evict import Remover

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

MAX_PEERS_TRIED = 3  # for one adapter; whoever waits for it waits for each of them
RESOLVES = 3  # an adapter that is being written anew changes under us; after that many times it is the origin's fault


@dataclass(frozen=True, slots=True)
class Plan:
    """What to bring, and from where."""

    source: Source
    listing: Listing
    origin: str  # what the manifest says; for a copy from a peer, where that had it from


class Fetcher:
    """Brings adapters to this node's disk. Whose turn it is, who waits and for how long is not its business."""

    def __init__(self, node: Node, sources: Sequence[Source], peers: Peers, remover: Remover) -> None:
        self._node = node
        self._sources = sources
        self._peers = peers
        self._remover = remover
        self._widths: dict[str, int] = {}  # of base models, by the path of their configuration
        self._publications: SingleFlight[str, None] = SingleFlight()  # by digest

    async def open(self) -> None:
        for source in self._sources:
            await source.open()

    async def close(self) -> None:
        for source in self._sources:
            await source.close()
        await self._peers.close()

    async def bring(self, name: AdapterName, job: Job, *, known: Named | None = None, expected: str = "") -> Named | None:
        """Resolve `name` and publish what its origin has; not linked yet, and held in the index until `let_go`. None if that is what `known` says.

        The weights must have the SHA-256 `expected`, if given. Raises a StageError.
        """
        tried: set[str] = set()  # peers whose copy was of no use
        if known is None and self._peers.are_preferred and (named := await self._from_peers(name, job, expected, tried)) is not None:
            return named
        for again in reversed(range(RESOLVES)):
            try:
                return await self._from_origins(name, job, known, expected, tried)
            except OriginChanged:
                if not again:
                    raise
        raise AssertionError("the last attempt returns or raises")

    async def locate(self, name: AdapterName) -> str:
        """Which origin would give `name`, without bringing it. Raises what `bring` would, as far as the listing tells."""
        source, listing = await self._resolve(name)
        if not listing.archive:
            self._check_listing(listing)
        return source.label

    async def let_go(self, named: Named) -> None:
        """The flight is over. Content that no name leads to has come for nothing."""
        self._node.holdings.index.let_go(named.id)
        await self._remover.drop_unnamed(named.id)

    async def _from_origins(self, name: AdapterName, job: Job, known: Named | None, expected: str, tried: set[str]) -> Named | None:
        """What the first origin that has `name` says, brought from a peer where one has the same. Raises ModelNotFound, or the first origin's failure."""
        try:
            async with self._phase(job, "resolve"):
                source, listing = await self._resolve(name)
        except OriginFailed:
            if known is None and (named := await self._from_peers(name, job, expected, tried)) is not None:
                log.warning("%s: every origin fails; a peer had it", name)
                return named
            raise
        plan = Plan(source, listing, source.label)
        if known is not None and _is_same(known, plan):
            return None
        if listing.revision.strip() and _in_place(plan) is None:
            named = await self._from_peers(name, job, expected, tried, plan)
            if named is not None:
                return named
        return await self._carry_out(plan, job, expected)

    async def _from_peers(self, name: AdapterName, job: Job, expected: str, tried: set[str], plan: Plan | None = None) -> Named | None:
        """A peer's copy: of what `plan` would bring, or of whatever it has. What is wrong with one is nobody's error: the next is taken. None if none helps.

        Each copy wholly or not at all: the files of two are never mixed.
        """
        while len(tried) < MAX_PEERS_TRIED:
            async with self._phase(job, "resolve"):
                copy = await self._peers.find(name, plan.listing.revision if plan is not None else "", tried)
            if copy is None:
                break
            tried.add(copy.address)
            listing = copy.listing
            if plan is not None:
                if copy.origin != plan.origin or not _agree(listing, plan.listing):
                    continue
                listing = replace(listing, final=plan.listing.final)
            try:
                named = await self._carry_out(Plan(copy.source, listing, copy.origin), job, expected)
                self._peers.was_of_use(copy)
                return named
            except (OriginFailed, InvalidAdapter) as error:
                log.info("%s: the copy of a peer is of no use: %s", name, error.message)
                self._peers.was_of_no_use(copy, error)
                job.done_bytes = 0
        return None

    async def _resolve(self, name: AdapterName) -> tuple[Source, Listing]:
        """The first origin, in order, that has `name`. One that fails is passed over; if none of the others has it, the failure is the answer."""
        failure: OriginFailed | None = None
        for source in self._sources:
            try:
                listing = await source.resolve(name)
            except OriginFailed as error:
                log.warning("%s: %s", name, error.message)
                if failure is None or (failure.shared and not error.shared):  # one that another node may reach sends the request there
                    failure = error
                continue
            if listing is not None:
                return source, listing
        if failure is not None:
            raise failure
        raise ModelNotFound(f"The model `{name}` does not exist: no origin has it")

    async def _carry_out(self, plan: Plan, job: Job, expected: str) -> Named:
        """Bring, verify, publish. Whatever goes wrong, nothing of it stays."""
        name, listing = plan.listing.name, plan.listing
        job.origin = plan.source.label
        token = f"{name} ({id(job):x})"
        index = self._node.holdings.index
        async with self._staging(name) as directory:
            try:
                if listing.archive:
                    config, files = await self._bring_archive(plan, directory, job, token)
                else:
                    config, files = await self._bring_files(plan, directory, job, token)
                async with self._phase(job, "verify"):
                    self._check_digest(name, files, expected)
                    width = await self._width()
                    await self._on_disk(check_files, directory, config, allow_pickle=self._node.settings.allow_pickle, width=width)
                    files, base_was = await self._name_base(directory, config, files)
                async with self._phase(job, "publish"):
                    in_place = _in_place(plan)
                    manifest = Manifest(tuple(sorted(files)), name, plan.origin, listing.revision, in_place is not None, listing.final, base_was)
                    named = Named(manifest.digest, plan.origin, listing.revision, self._node.clock(), final=listing.final)
                    try:
                        await to_the_end(self._publish(directory, manifest, token))
                    except asyncio.CancelledError:  # it is published all the same
                        await self.let_go(named)
                        raise
            finally:
                index.abort(token)
        return named

    @contextlib.asynccontextmanager
    async def _staging(self, name: AdapterName) -> AsyncIterator[Path]:
        """A place for its files, if it can be linked. In threads: while a disk writes back, making and removing a directory waits for its journal."""
        stack = contextlib.ExitStack()

        def enter() -> Path:
            self._node.store.check_name(name)
            return stack.enter_context(self._node.store.staging())

        try:
            yield await to_the_end(self._node.disk.run(enter))
        finally:
            await to_the_end(self._node.disk.run(stack.close))

    async def _publish(self, directory: Path, manifest: Manifest, token: str) -> None:
        """Content that is here stays here, and what comes is held from the moment it counts.

        Order of events that this guards against: published, not linked yet; another flight needs room, and nobody has leased this one; it goes.
        Or: of two flights with equal content, one finds it there, and before it says so the other's is removed.
        """
        index, digest = self._node.holdings.index, manifest.digest
        held = False

        async def publish() -> None:
            nonlocal held
            await self._node.disk.run(self._node.store.publish, directory, manifest)
            index.commit(token, digest, manifest.disk_bytes, self._node.clock())
            held = index.hold(digest)

        while not held:
            await self._remover.settle(digest)
            held = index.hold(digest)
            if not held:
                await self._publications.join(digest, publish)

    async def _bring_files(self, plan: Plan, directory: Path, job: Job, token: str) -> tuple[AdapterConfig, list[File]]:
        """The configuration first: what it rules out need not be downloaded."""
        listing = plan.listing
        size = self._check_listing(listing)
        job.total_bytes = sum(file.size or 0 for file in listing.files)
        config_file = next(file for file in listing.files if file.path == CONFIG_FILE)
        in_place = _in_place(plan)
        bring = self._link if in_place is not None else self._fetch
        async with self._phase(job, "check"):
            files = [await bring(plan, config_file, directory, job)]
            config = await self._check_config(directory)
        if in_place is None:
            async with self._phase(job, "reserve"):
                await self._remover.reserve(token, size)
        async with self._phase(job, "fetch"):
            files += [await bring(plan, file, directory, job) for file in listing.files if file.path != CONFIG_FILE]
        return config, files

    async def _bring_archive(self, plan: Plan, directory: Path, job: Job, token: str) -> tuple[AdapterConfig, list[File]]:
        """Room for the archive, then for what it holds; the archive goes before anything is published."""
        (file,) = plan.listing.files
        size = self._limited(file)
        job.total_bytes = file.size or 0
        async with self._phase(job, "reserve"):
            await self._remover.reserve(token, size)
        async with self._phase(job, "fetch"):
            await self._fetch(plan, file, directory, job)
        async with self._phase(job, "unpack"):
            packed = directory / file.path
            chosen = await self._on_disk(archive.members, packed, max_bytes=self._node.settings.max_adapter_bytes)
            inside = Listing(plan.listing.name, "", tuple(RemoteFile(member.path, member.size) for member in chosen))
            if not any(member.path == CONFIG_FILE for member in chosen):
                raise InvalidAdapter(f"{file.path} holds no {CONFIG_FILE}", "archive")
            await self._remover.reserve(token, self._check_listing(inside))
            await self._on_disk(archive.unpack, packed, chosen, directory)
            await self._on_disk(packed.unlink)
            files = [await self._on_disk(hash_file, directory / member.path, member.path) for member in chosen]
        async with self._phase(job, "check"):
            return await self._check_config(directory), files

    def _check_listing(self, listing: Listing) -> int:
        """Bytes to reserve. Raises InvalidAdapter for what need not be fetched to be refused."""
        paths = [file.path for file in listing.files]
        if len(paths) < 2:
            raise InvalidAdapter(f"{listing.name} has no weights file", "weights")
        if WEIGHTS_FILE not in paths and not self._node.settings.allow_pickle:
            pickled = next(path for path in paths if path in PICKLE_FILES)
            raise InvalidAdapter(f"{listing.name} has only pickled weights ({pickled}), which can run code; safetensors are needed", "pickle")
        size = sum(self._limited(file) for file in listing.files)
        if size > self._node.settings.max_adapter_bytes:
            raise AdapterTooLarge(f"{listing.name} has {size} bytes; stager.max_adapter_bytes is {self._node.settings.max_adapter_bytes}")
        return size

    def _limited(self, file: RemoteFile) -> int:
        """What `file` has at most, in bytes. Raises AdapterTooLarge, or OriginFailed for what no file can have: room would be won by it."""
        limit = MAX_CONFIG_BYTES if file.path == CONFIG_FILE else self._node.settings.max_file_bytes
        if file.size is None:
            return min(self._node.settings.unknown_size_bytes, limit)
        if file.size < 0:
            raise OriginFailed(f"{file.path}: its origin states a length of {file.size} bytes")
        if file.size > limit:
            setting = "the limit is" if file.path == CONFIG_FILE else "stager.max_file_bytes is"
            raise AdapterTooLarge(f"{file.path} has {file.size} bytes; {setting} {limit}")
        return file.size

    async def _check_config(self, directory: Path) -> AdapterConfig:
        with disk_errors("read"):
            text = (directory / CONFIG_FILE).read_bytes()  # some kilobytes, written just now
        engine = self._node.settings.engine
        return check_config(text, base_model=engine.base_model, base_names=engine.base_names, max_rank=self._node.engine.limits.max_lora_rank)

    async def _name_base(self, directory: Path, config: AdapterConfig, files: list[File]) -> tuple[list[File], str]:
        """For vLLM's resolver: a base model that the adapter calls by another name is named as the engine does, in our copy; what it was called before."""
        engine = self._node.settings.engine
        if engine.mode != "resolver" or not engine.base_model or config.base_model == engine.base_model:
            return files, ""

        def rewrite() -> File:
            path = directory / CONFIG_FILE
            text = with_base(path.read_bytes(), engine.base_model)
            path.unlink()  # it may be a link to where the origin has it
            path.write_bytes(text)
            return hash_file(path, CONFIG_FILE)

        changed = await self._on_disk(rewrite)
        return [changed if file.path == CONFIG_FILE else file for file in files], config.base_model

    async def _width(self) -> int:
        """The base model's hidden size, from its own configuration; 0 where that cannot be read."""
        roots = [base.root for base in self._node.engine.bases if base.root.startswith("/")]
        path = self._node.settings.engine.base_config or (f"{roots[0]}/config.json" if roots else "")
        if path and not self._widths.get(path):
            self._widths[path] = await self._node.disk.run(hidden_size, Path(path))
        return self._widths.get(path, 0)

    async def _fetch(self, plan: Plan, file: RemoteFile, directory: Path, job: Job) -> File:
        """One file, hashed, and compared with what the origin states of it."""
        if file.size is None:
            file = replace(file, limit=self._limited(file))
        began, had = self._node.clock(), job.done_bytes
        label, result = plan.source.label, "failed"
        try:
            got = await plan.source.fetch(plan.listing, file, directory / file.path, job)
            if file.size is not None and got.size != file.size:
                raise InvalidAdapter(f"{file.path} has {got.size} bytes; the {label} origin states {file.size}", "size")
            if file.sha256 is not None and got.sha256 != file.sha256:
                raise InvalidAdapter(f"{file.path} has SHA-256 {got.sha256}; the {label} origin states {file.sha256}", "digest")
            result = "fetched"
            return got
        finally:
            self._node.metrics.fetched_bytes.labels(label, result).inc(max(0, job.done_bytes - had))
            self._node.metrics.fetch_seconds.labels(label, result).observe(self._node.clock() - began)

    async def _link(self, plan: Plan, file: RemoteFile, directory: Path, job: Job) -> File:
        """One file of an origin on this machine, read where it is."""
        origin = _in_place(plan)
        assert origin is not None
        original = origin.path(file)

        def link() -> File:
            try:
                hashed = hash_file(original, file.path)  # its engine reads it next anyway
                (directory / file.path).symlink_to(original)
                return hashed
            except OSError as error:
                raise OriginFailed(f"{origin.label} origin: {file.path}: {error.strerror}") from error

        got = await self._node.disk.run(link)
        job.done_bytes += got.size
        if got.size != file.size:
            raise OriginChanged(f"{origin.label} origin: {file.path} changed after it was listed")
        return got

    def _check_digest(self, name: AdapterName, files: Sequence[File], expected: str) -> None:
        weights = next(file for file in files if file.path != CONFIG_FILE)
        for wanted in (expected, self._node.settings.digests.get(name, ""), self._node.holdings.pins.get(name, "")):
            if wanted and weights.sha256 != wanted:
                raise InvalidAdapter(f"{weights.path} has SHA-256 {weights.sha256}; {wanted} is pinned", "digest")

    async def _on_disk(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Do it in a thread; what the node's disk has against it is our error."""
        with disk_errors():
            return await self._node.disk.run(work, *args, **kwargs)

    @contextlib.asynccontextmanager
    async def _phase(self, job: Job, phase: str) -> AsyncIterator[None]:
        began = self._node.clock()
        job.phase = phase
        try:
            yield
        finally:
            job.phases[phase] = job.phases.get(phase, 0.0) + self._node.clock() - began


def _is_same(known: Named, plan: Plan) -> bool:
    """Whether the plan would bring what is here. A revision that is not known says nothing."""
    return bool(plan.listing.revision.strip()) and (known.origin, known.revision) == (plan.origin, plan.listing.revision)


def _agree(copy: Listing, listing: Listing) -> bool:
    """Whether a peer's files can be what the origin lists."""
    if listing.archive:
        return True  # nothing can be compared before it is unpacked; the revision is the archive's
    stated = {file.path: file for file in listing.files}
    return all(
        (known := stated.get(file.path)) is not None and known.size in (None, file.size) and known.sha256 in (None, file.sha256) for file in copy.files
    ) and len(copy.files) == len(stated)


def _in_place(plan: Plan) -> FileOrigin | None:
    """The origin whose files are linked to instead of copied; what comes out of an archive lies nowhere but here."""
    origin = plan.source.origin
    return origin if isinstance(origin, FileOrigin) and origin.in_place and not plan.listing.archive else None
