"""What is on the disk already, held to the settings of today: what others put there, and what was published under other settings.

A start does not check a hundred thousand adapters again: a small file says by which rules all of them were checked. Only where the rules differ are
they checked, before the node counts as ready. Digests are stated for names, and there are few of them: those are compared at every start.
"""

import contextlib
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import astuple, replace
from pathlib import Path

from ...core.artifact import AdapterName, ArtifactId, File
from ...errors import AdapterInUse, DiskFailed, InvalidAdapter, LoraExtprocError, NoSpace
from ..adapter.check import Checked, check
from ..adapter.files import other_digest, weights_of
from ..adapter.rules import Rules
from ..disk.recover import Scan
from ..disk.store import read_memory
from ..node import Node
from ..syscalls import disk_errors
from ..threads import through
from .evict import Remover

log = logging.getLogger(__name__)

RULES_FILE = ".rules.json"
CHECK_VERSION = 1  # raised when `check` learns to refuse something that it let pass
AT_ONCE = 64  # checks per turn of a thread: a few milliseconds, so that others have their turn


def as_kept(rules: Rules) -> dict[str, str]:
    """What the file says where `check` was made by these rules."""
    values = [CHECK_VERSION, *astuple(rules)]
    return {"rules": hashlib.sha256(json.dumps(values).encode()).hexdigest()}


class Kept:
    """`check` and `check_digest` block: they are called in the disk's threads."""

    def __init__(self, node: Node, remover: Remover) -> None:
        self._node = node
        self._remover = remover
        self._refused_names: set[AdapterName] = set()  # that the start found, and the engine has not let go yet

    def check(self, directory: Path) -> Checked:
        """Whether the adapter in `directory` may be served by this node. Raises InvalidAdapter, OSError where it cannot be read."""
        return through(check(directory, self._rules()))

    def check_digest(self, name: AdapterName, files: Sequence[File]) -> None:
        """Whether the weights are those that the settings or a pin state for the name. Raises InvalidAdapter."""
        weights = weights_of(files)
        if wanted := other_digest(weights, self._node.stated(name)):
            raise InvalidAdapter(f"{name}: {weights.path} has SHA-256 {weights.sha256}; {wanted} is stated for it", "digest")

    def _rules(self) -> Rules:
        node = self._node
        return Rules.of(node.settings, max_rank=node.engine.limits.max_lora_rank, width=node.width(), version=node.engine.version, adopted=True)

    def _checked_again(self) -> Rules:
        """Without a look at all weights, which would take an hour per terabyte: `lora-extproc verify` reads them."""
        return replace(self._rules(), finite=False)

    async def look_at(self, scan: Scan) -> dict[AdapterName, str]:
        """Of the names that a start found, those that today's settings refuse, and why. A disk that cannot be read refuses none."""
        refused = await self._look_at(scan)
        for name, why in refused.items():
            log.warning("%s: it is not served any more: %s", name, why)
        self._refused_names.update(refused)
        return refused

    async def remove_refused(self) -> None:
        """Remove what the start found to be refused, as far as it is held by nobody and the engine lets it go."""
        for name in list(self._refused_names):
            named = self._node.holdings.get(name)
            if named is None or not named.refused:
                self._refused_names.discard(name)
                continue
            with contextlib.suppress(AdapterInUse, DiskFailed):
                await self._remover.take_away(name, "refused", force=False)

    async def _look_at(self, scan: Scan) -> dict[AdapterName, str]:
        refused: dict[AdapterName, str] = {}
        stated = {*self._node.settings.digests, *self._node.holdings.pins}
        for name, id_ in [(name, id_) for name, id_ in scan.named() if name in stated]:
            if why := await self._node.disk.run(self._differs, name, id_):
                refused[name] = why
        rules = as_kept(await self._node.disk.run(self._checked_again))
        if await self._node.disk.run(read_memory, self._node.store, RULES_FILE) == rules:
            return refused
        named = dict(scan.named())
        if named:
            log.info("%d adapters are checked again: the settings that they were checked by are not known, or others", len(named))
        names, broken = list(named), dict[AdapterName, str]()
        for first in range(0, len(names), AT_ONCE):
            broken |= await self._node.disk.run(self._refused, {name: named[name] for name in names[first : first + AT_ONCE]})
        if broken:  # they are still there at the next start, if the engine does not let them go until then
            return refused | broken
        try:
            await self._node.disk.run(self._node.store.write_json, RULES_FILE, rules)
        except (NoSpace, DiskFailed) as error:  # then they are checked again at the next start
            log.debug("%s: %s", RULES_FILE, error.message)
        return refused

    def _refused(self, named: Mapping[AdapterName, ArtifactId]) -> dict[AdapterName, str]:
        refused: dict[AdapterName, str] = {}
        for name, id_ in named.items():
            try:
                through(check(self._node.store.path(id_), self._checked_again()))
            except InvalidAdapter as error:
                refused[name] = error.message
            except OSError as error:
                log.warning("%s: its check cannot be repeated: %s", name, error.strerror)
        return refused

    def _differs(self, name: AdapterName, id_: ArtifactId) -> str:
        try:
            with disk_errors("read"):
                self.check_digest(name, self._node.store.manifest(id_).files)
        except InvalidAdapter as error:
            return error.message
        except LoraExtprocError as error:
            log.warning("%s: its digest cannot be compared: %s", name, error.message)
        return ""
