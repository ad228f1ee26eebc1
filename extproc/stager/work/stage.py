"""One flight: which source has it, room for it, its files, their verdict, the rename that shows it to everybody."""

import asyncio
import contextlib
import io
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ParamSpec, TypeVar

from ...core.artifact import AdapterName, File, Manifest, Stamp
from ...core.blocks import artifact_bytes
from ...errors import AdapterDamaged, AdapterTooLarge, InvalidAdapter, OriginChanged, OriginFailed, OriginRefused
from ...flight import SingleFlight, to_the_end
from ..adapter import archive
from ..adapter.check import check_ahead, check_header, check_weights
from ..adapter.config import MAX_CONFIG_BYTES, AdapterConfig, check_config, read_limited, with_base
from ..adapter.files import CONFIG_FILE, PICKLE_FILES, WEIGHTS_FILE, foreign, other_digest, weights_of
from ..adapter.finite import Scan
from ..adapter.rules import Rules
from ..adapter.safetensors import PREFIX_BYTES, header_length
from ..books.holdings import Named
from ..books.refusals import Version
from ..node import Node
from ..supply.download import Download, Judge
from ..supply.follower import Follower
from ..supply.job import Job
from ..supply.listing import Listing, RemoteFile
from ..supply.origins.base import Fetches
from ..supply.origins.file import FileOrigin
from ..supply.peers import LABEL, PeerCopy, Peers
from ..supply.precedence import Precedence, Unanswered, agree
from ..supply.source import Source, Supplier
from ..syscalls import disk_errors, hash_file, stamp_of
from ..threads import Steps, Threads
from .evict import Remover

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

MAX_CHECKS = 2  # at once: they compute, and each may keep the event loop from the interpreter for 5 ms (sys.getswitchinterval)
FIRST_HEAD_BYTES = 2**16  # of an archive, which is looked at again each time it has twice as many, up to archive.MAX_HEAD_BYTES
MAX_PEERS_TRIED = 3  # for one adapter; whoever waits for it waits for each of them
RESOLVES = 3  # an adapter that is being written anew changes under us; after that many times it is the origin's fault


@dataclass(frozen=True, slots=True)
class Plan:
    """What to bring, and from where."""

    source: Supplier[Fetches]
    listing: Listing
    origin: str  # what the manifest says; for a copy from a peer, where that had it from
    stated: tuple[str, ...] = ()  # every SHA-256 that the weights must have
    copy: PeerCopy | None = None  # what a peer has of it, if that is what is brought


@dataclass(frozen=True, slots=True)
class Brought:
    """What lies in the staging directory."""

    config: AdapterConfig
    files: list[File]
    scan: Scan | None = None  # how far the weights were looked through while they came


class Fetcher:
    """Brings adapters to this node's disk. Whose turn it is, who waits and for how long is not its business."""

    def __init__(self, node: Node, sources: Sequence[Source], peers: Peers, remover: Remover) -> None:
        self._node = node
        self._origins = Precedence(sources)
        self._peers = peers
        self._remover = remover
        self._checks = Threads(MAX_CHECKS, "check")
        self._checks_in_place = Threads(MAX_CHECKS, "check in place")  # of files that lie elsewhere, perhaps on a file server that hangs
        self._publications: SingleFlight[str, None] = SingleFlight()  # by digest

    async def open(self) -> None:
        for source in self._origins.sources:
            await source.open()

    async def close(self) -> None:
        for source in self._origins.sources:
            await source.close()
        await self._peers.close()
        self._checks.close()
        self._checks_in_place.close()

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
        """Which origin would give `name`, without bringing it. Raises what `bring` would, as far as the listing and earlier verdicts tell."""
        try:
            source, listing = await self._origins.resolve(name)
        except Unanswered as unanswered:
            raise unanswered.failure from None
        plan = Plan(source, listing, source.label, self._stated(name, ""))
        if (refusal := self._node.refusals.verdict(name, self._version(plan), self._node.clock())) is not None:
            raise refusal
        if not listing.archive:
            self._check_listing(listing)
        return source.label

    async def let_go(self, named: Named) -> None:
        """The flight is over. Content that no name leads to has come for nothing."""
        self._node.holdings.index.let_go(named.id)
        await self._remover.drop_unnamed(named.id)

    async def _from_origins(self, name: AdapterName, job: Job, known: Named | None, expected: str, tried: set[str]) -> Named | None:
        """What the origin whose `name` is says, brought from a peer where one has the same. Raises ModelNotFound, or that origin's failure."""
        try:
            async with self._phase(job, "resolve"):
                source, listing = await self._origins.resolve(name, known.origin if known is not None else "")
        except Unanswered as unanswered:
            if known is None and (named := await self._from_peers(name, job, expected, tried, origins=unanswered.labels)) is not None:
                log.warning("%s: its origin fails; a peer had it", name)
                return named
            raise unanswered.failure from None
        plan = Plan(source, listing, source.label, self._stated(name, expected))
        if known is not None and _is_same(known, plan):
            return None
        if (refusal := self._node.refusals.verdict(name, self._version(plan), self._node.clock())) is not None:
            raise refusal
        if listing.revision.strip() and _in_place(plan) is None and (named := await self._from_peers(name, job, expected, tried, plan)) is not None:
            return named
        try:
            return await self._carry_out(plan, job)
        except OriginChanged:
            raise
        except OriginFailed as failure:
            if known is not None or (mirrored := await self._origins.mirror(source, listing)) is None:
                raise
            mirror, found = mirrored
            log.warning("%s: %s; its mirror %s has the same", name, failure.message, mirror.label)
            return await self._carry_out(replace(plan, source=mirror, listing=found, origin=mirror.label), job)

    async def _from_peers(
        self, name: AdapterName, job: Job, expected: str, tried: set[str], plan: Plan | None = None, origins: Collection[str] = ()
    ) -> Named | None:
        """A peer's copy: of what `plan` would bring, or of whatever it has (from one of `origins`, if given). What is wrong with one is nobody's error: the
        next is taken. None if none helps.

        Each copy wholly or not at all: the files of two are never mixed.
        """
        stated = self._stated(name, expected)

        def plan_of(copy: PeerCopy) -> Plan:
            listing = replace(copy.listing, final=plan.listing.final) if plan is not None else copy.listing
            return Plan(copy.source, listing, copy.origin, stated, copy)

        def suits(copy: PeerCopy) -> bool:
            if (origins and copy.origin not in origins) or (plan is not None and not (copy.origin == plan.origin and agree(copy.listing, plan.listing))):
                return False
            return not self._node.refusals.is_condemned(self._version(plan_of(copy)), self._node.clock())

        while len(tried) < MAX_PEERS_TRIED:
            async with self._phase(job, "resolve"):
                copy = await self._peers.find(name, plan.listing.revision if plan is not None else "", tried, suits)
            if copy is None:
                break
            tried.add(copy.address)
            try:
                named = await self._carry_out(plan_of(copy), job)
                self._peers.was_of_use(copy)
                return named
            except (OriginFailed, InvalidAdapter) as error:
                log.info("%s: the copy of a peer is of no use: %s", name, error.message)
                self._peers.was_of_no_use(copy, error)
                job.done_bytes = 0
        return None

    def _stated(self, name: AdapterName, expected: str) -> tuple[str, ...]:
        return tuple(sorted({*self._node.stated(name), *filter(None, (expected,))}))

    def _version(self, plan: Plan) -> Version:
        """What a verdict counts for: an engine that takes other adapters, or another digest asked for, is another question."""
        bases = tuple(base.root for base in self._node.engine.bases)
        origin, revision = plan.origin, plan.listing.revision.strip()
        if plan.copy is not None:
            origin, revision = f"{LABEL} {plan.copy.address}", plan.copy.digest
        return Version(origin, revision, plan.stated, (self._rules(), bases))

    async def _carry_out(self, plan: Plan, job: Job) -> Named:
        """Bring, verify, publish. Whatever goes wrong, nothing of it stays."""
        name, listing = plan.listing.name, plan.listing
        job.origin = plan.source.label
        token = f"{name} ({id(job):x})"
        index = self._node.holdings.index
        async with self._staging(name) as directory:
            try:
                stamps = await self._node.disk.run(_original_stamps, plan)
                if listing.archive:
                    brought = await self._bring_archive(plan, directory, job, token)
                else:
                    brought = await self._bring_files(plan, directory, job, token)
                async with self._phase(job, "verify"):
                    _check_digest(brought.files, plan.stated)
                    rules = self._rules(await self._node.disk.run(self._node.width))
                    with disk_errors("read"):
                        checked = await self._checks_of(plan).walk(check_weights(directory, brought.config, rules, brought.scan))
                    files = await self._name_base(directory, brought.config, brought.files)
                async with self._phase(job, "publish"):
                    in_place = _in_place(plan)
                    flags = in_place is not None, listing.final
                    manifest = Manifest(tuple(sorted(files)), name, plan.origin, listing.revision, *flags, checked.options, stamps)
                    named = Named(manifest.digest, plan.origin, listing.revision, self._node.clock(), final=listing.final)
                    try:
                        await to_the_end(self._publish(directory, manifest, token))
                    except asyncio.CancelledError:  # it is published all the same
                        await self.let_go(named)
                        raise
            except InvalidAdapter as error:
                if plan.copy is None:
                    self._node.refusals.condemn(name, self._version(plan), error, self._node.clock())
                else:  # its origin is not to blame for what a peer sends
                    self._node.refusals.condemn_copy(self._version(plan), error, self._node.clock())
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

    async def _bring_files(self, plan: Plan, directory: Path, job: Job, token: str) -> Brought:
        """The configuration first, then the header of the weights: what they rule out needs no room, and nothing is evicted for it."""
        listing = plan.listing
        size = self._check_listing(listing)
        weights = listing.weights
        _check_digest([weights], plan.stated)
        job.total_bytes = sum(file.size or 0 for file in listing.files)
        config_file = next(file for file in listing.files if file.path == CONFIG_FILE)
        bring = self._link if _in_place(plan) is not None else self._fetch
        async with self._phase(job, "check"):
            files = [await bring(plan, config_file, directory, job)]
            config = await self._check_config(plan, directory)
        if _in_place(plan) is not None:
            async with self._phase(job, "fetch"):
                return Brought(config, [*files, await self._link(plan, weights, directory, job)])
        following = Follower(directory / weights.path, self._checks)
        async with self._phase(job, "fetch"), following as follower, self._fetching(plan, weights, directory, job) as download:
            if weights.size is not None and weights.path == WEIGHTS_FILE:
                download.follow(follower)
                judge = self._judge(plan, weights.size, config, job, follower, lambda: self._reserve(token, size, job))
                download.hold_for(judge, min(PREFIX_BYTES, weights.size))
            else:
                async with self._phase(job, "reserve", inside="fetch"):
                    await self._reserve(token, size, job)
            await plan.source.go_on(listing, download, job)
            files.append(await self._finish(plan, download))
            return Brought(config, files, await follower.end())

    async def _reserve(self, token: str, size: int, job: Job) -> None:
        """Room for `size` bytes more; for a prefetch that nobody waits for, such as nobody misses."""
        await (self._remover.take_free(token, size) if job.priority == Job.PREFETCH else self._remover.reserve(token, size))

    def _judge(self, plan: Plan, size: int, config: AdapterConfig, job: Job, follower: Follower, reserve: Callable[[], Awaitable[None]]) -> Judge:
        """Judges the header of the weights when it has arrived, makes room for the rest, and lets `follower` look through that."""

        async def judge(head: bytes) -> int:
            async with self._phase(job, "check", inside="fetch"):
                _check_page(plan, head)
                if needed := await self._check_header(head, size, config, follower):
                    return needed
            async with self._phase(job, "reserve", inside="fetch"):
                await reserve()
            return 0

        return judge

    async def _check_header(self, head: bytes, size: int, config: AdapterConfig, follower: Follower | None = None) -> int:
        """Judge the header of weights that have `size` bytes and begin with `head`, and let `follower` look through the rest; 0, or how many bytes it takes.

        Raises InvalidAdapter.
        """
        if len(head) < (least := min(PREFIX_BYTES, size)):
            return least
        header_bytes = PREFIX_BYTES + header_length(head[:PREFIX_BYTES], size)
        if len(head) < header_bytes:
            return header_bytes
        rules = self._rules(await self._node.disk.run(self._node.width))
        ahead = await self._checks.walk(check_ahead(io.BytesIO(head[:header_bytes]), size, config, rules))
        if follower is not None:
            follower.begin(ahead)
        return 0

    async def _bring_archive(self, plan: Plan, directory: Path, job: Job, token: str) -> Brought:
        """Room for the archive, then for what it holds; the archive goes before anything is published.

        What the configuration and the header of the weights rule out is refused before there is room for the archive, if a tar begins with them; else, as
        with a zip, before there is room for what it holds.
        """
        (file,) = plan.listing.files
        size = self._limited(file)
        job.total_bytes = file.size or 0
        async with self._phase(job, "fetch"), self._fetching(plan, file, directory, job) as download:
            if file.size is not None:
                download.hold_for(self._judge_archive(plan, file.size, job, lambda: self._reserve(token, size, job)), min(FIRST_HEAD_BYTES, file.size))
            else:
                async with self._phase(job, "reserve", inside="fetch"):
                    await self._reserve(token, size, job)
            await plan.source.go_on(plan.listing, download, job)
            await self._finish(plan, download)
        async with self._phase(job, "unpack"):
            packed = directory / file.path
            _check_page(plan, await self._on_disk(archive.first_bytes, packed))
            chosen = await self._on_disk(archive.members, packed, max_bytes=self._node.settings.max_adapter_bytes)
            inside = Listing(plan.listing.name, "", tuple(RemoteFile(member.path, member.size) for member in chosen))
            if not any(member.path == CONFIG_FILE for member in chosen):
                raise InvalidAdapter(f"{file.path} holds no {CONFIG_FILE}", "archive")
            unpacked = self._check_listing(inside)
            await self._check_packed(packed, chosen)
            await self._reserve(token, unpacked, job)
            await self._on_disk(archive.unpack, packed, chosen, directory)
            await self._on_disk(packed.unlink)
            files = [await self._on_disk(hash_file, directory / member.path, member.path) for member in chosen]
        async with self._phase(job, "check"):
            return Brought(await self._check_config(plan, directory), files)

    def _judge_archive(self, plan: Plan, size: int, job: Job, reserve: Callable[[], Awaitable[None]]) -> Judge:
        """Judges what an archive begins with, as far as that tells, and makes room for the whole."""

        async def judge(head: bytes) -> int:
            async with self._phase(job, "check", inside="fetch"):
                _check_page(plan, head)
                found = await self._checks.run(archive.beginning, head)
                is_judged = found is not None and await self._check_beginning(found)
                if not is_judged and len(head) < (most := min(size, archive.MAX_HEAD_BYTES)):
                    return min(most, 2 * len(head))
            async with self._phase(job, "reserve", inside="fetch"):
                await reserve()
            return 0

        return judge

    async def _check_beginning(self, found: archive.Beginning) -> bool:
        """Raises InvalidAdapter; False where not all of the header has arrived."""
        config = await self._checks.run(check_config, found.config, self._rules())
        self._limited(RemoteFile(WEIGHTS_FILE, found.weights_size))
        return not await self._check_header(found.weights, found.weights_size, config)

    async def _check_packed(self, packed: Path, chosen: Sequence[archive.Member]) -> None:
        """The same of a whole archive, whatever comes first in it. Raises InvalidAdapter."""
        members = {member.path: member for member in chosen}
        rules = self._rules(await self._node.disk.run(self._node.width))

        def check() -> Steps[None]:
            with archive.opened_member(packed, members[CONFIG_FILE]) as file:
                config = check_config(read_limited(file), rules)
            yield
            if (weights := members.get(WEIGHTS_FILE)) is not None:
                with archive.opened_member(packed, weights) as file:
                    (yield from check_header(file, weights.size, config, rules)).clear()

        with disk_errors("read"):
            await self._checks.walk(check())

    def _check_listing(self, listing: Listing) -> int:
        """Bytes to reserve. Raises InvalidAdapter for what need not be fetched to be refused."""
        paths = [file.path for file in listing.files]
        if len(paths) < 2:
            raise InvalidAdapter(f"{listing.name} has no weights file", "weights")
        if WEIGHTS_FILE not in paths and not self._node.settings.allow_pickle:
            pickled = next(path for path in paths if path in PICKLE_FILES)
            raise InvalidAdapter(f"{listing.name} has only pickled weights ({pickled}), which can run code; safetensors are needed", "pickle")
        sizes = [self._limited(file) for file in listing.files]
        size = sum(sizes)
        if size > self._node.settings.max_adapter_bytes:
            raise AdapterTooLarge(f"{listing.name} has {size} bytes; stager.max_adapter_bytes is {self._node.settings.max_adapter_bytes}")
        return artifact_bytes(sizes)

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

    async def _check_config(self, plan: Plan, directory: Path) -> AdapterConfig:
        def read() -> AdapterConfig:
            with (directory / CONFIG_FILE).open("rb") as file:  # perhaps a link to where an origin on another disk has it
                text = read_limited(file)
            _check_page(plan, text)
            return check_config(text, self._rules())

        with disk_errors("read"):
            return await self._checks_of(plan).run(read)

    def _checks_of(self, plan: Plan) -> Threads:
        return self._checks if _in_place(plan) is None else self._checks_in_place

    def _rules(self, width: int = 0) -> Rules:
        engine = self._node.engine
        return Rules.of(self._node.settings, max_rank=engine.limits.max_lora_rank, width=width, version=engine.version)

    async def _name_base(self, directory: Path, config: AdapterConfig, files: list[File]) -> list[File]:
        """For vLLM's resolver: a base model that the adapter calls by another name is named as the engine does, in our copy."""
        engine = self._node.settings.engine
        if engine.mode != "resolver" or not engine.base_model or config.base_model == engine.base_model:
            return files

        def rewrite() -> File:
            path = directory / CONFIG_FILE
            text = with_base(path.read_bytes(), engine.base_model)
            path.unlink()  # it may be a link to where the origin has it
            path.write_bytes(text)
            return hash_file(path, CONFIG_FILE)

        changed = await self._on_disk(rewrite)
        return [changed if file.path == CONFIG_FILE else file for file in files]

    async def _fetch(self, plan: Plan, file: RemoteFile, directory: Path, job: Job) -> File:
        """One file, hashed, and compared with what the origin states of it."""
        async with self._fetching(plan, file, directory, job) as download:
            await plan.source.go_on(plan.listing, download, job)
            return await self._finish(plan, download)

    @contextlib.asynccontextmanager
    async def _fetching(self, plan: Plan, file: RemoteFile, directory: Path, job: Job) -> AsyncIterator[Download]:
        """The transfer of one file, counted however it ends."""
        if file.size is None:
            file = replace(file, limit=self._limited(file))
        began, had, held_s = self._node.clock(), job.done_bytes, _held_s(job)
        label, result = plan.source.label, "failed"
        try:
            async with plan.source.download(file, directory / file.path, job, self._node.disk) as download:
                yield download
            result = "fetched"
        finally:
            self._node.metrics.fetched_bytes.labels(label, result).inc(max(0, job.done_bytes - had))
            self._node.metrics.fetch_seconds.labels(label, result).observe(self._node.clock() - began - (_held_s(job) - held_s))

    async def _finish(self, plan: Plan, download: Download) -> File:
        """Raises AdapterDamaged where what has arrived is not what the origin states."""
        file, got, label = download.file, await download.finish(), plan.source.label
        if file.size is not None and got.size != file.size:
            raise AdapterDamaged(f"{file.path} has {got.size} bytes; the {label} origin states {file.size}", "size")
        if file.sha256 is not None and got.sha256 != file.sha256:
            raise AdapterDamaged(f"{file.path} has SHA-256 {got.sha256}; the {label} origin states {file.sha256}", "digest")
        return got

    async def _link(self, plan: Plan, file: RemoteFile, directory: Path, job: Job) -> File:
        """One file of an origin on this machine, read where it is, in the origin's threads: a file server that hangs must not take those of the disk."""
        origin = _in_place(plan)
        assert origin is not None
        got = await origin.hash(file)  # which the engine reads next anyway
        await self._on_disk((directory / file.path).symlink_to, origin.path(file))
        job.done_bytes += got.size
        if got.size != file.size:
            raise OriginChanged(f"{origin.label} origin: {file.path} changed after it was listed")
        return got

    async def _on_disk(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Do it in a thread; what the node's disk has against it is our error."""
        with disk_errors():
            return await self._node.disk.run(work, *args, **kwargs)

    @contextlib.asynccontextmanager
    async def _phase(self, job: Job, phase: str, inside: str = "") -> AsyncIterator[None]:
        """What the flight does now. `inside` another phase, whose time stands still meanwhile, and which goes on afterwards."""
        began = self._node.clock()
        job.phase = phase
        try:
            yield
        finally:
            took_s = self._node.clock() - began
            job.phases[phase] = job.phases.get(phase, 0.0) + took_s
            if inside:
                job.phase = inside
                job.phases[inside] = job.phases.get(inside, 0.0) - took_s


def _held_s(job: Job) -> float:
    """Seconds in which transfers were held back."""
    return job.phases.get("check", 0.0) + job.phases.get("reserve", 0.0)


def _is_same(known: Named, plan: Plan) -> bool:
    """Whether the plan would bring what is here. A revision that is not known says nothing."""
    return bool(plan.listing.revision.strip()) and (known.origin, known.revision) == (plan.origin, plan.listing.revision)


def _check_digest(files: Sequence[File | RemoteFile], stated: Sequence[str]) -> None:
    """Before anything is fetched, where the origin states a digest; else, and for an archive, after it."""
    weights = weights_of(files)
    if wanted := other_digest(weights, stated):
        raise InvalidAdapter(f"{weights.path} has SHA-256 {weights.sha256}; {wanted} is pinned", "digest")


def _check_page(plan: Plan, head: bytes) -> None:
    """A web page where a file should be is a log-in or an error page: the origin's fault, not the adapter's."""
    if "web page" in (what := foreign(head)):
        raise OriginRefused(f"{plan.source.label} origin: a file of {plan.listing.name} {what}")


def _original_stamps(plan: Plan) -> dict[str, Stamp]:
    """Of files that are linked to, before they are read: whoever writes to one from then on is noticed. Blocks."""
    origin = _in_place(plan)
    if origin is None:
        return {}
    try:
        return {file.path: stamp_of(origin.path(file).stat()) for file in plan.listing.files}
    except OSError as error:
        raise OriginChanged(f"{origin.label} origin: {plan.listing.name} changed after it was listed: {error.strerror}") from error


def _in_place(plan: Plan) -> FileOrigin | None:
    """The origin whose files are linked to instead of copied; what comes out of an archive lies nowhere but here."""
    origin = plan.source.origin
    return origin if isinstance(origin, FileOrigin) and origin.in_place and not plan.listing.archive else None
