"""What is on the disk already, held to the settings of today: what others put there, and what was published under other settings.

A start does not check a hundred thousand adapters again: a small file says by which rules all of them were checked. Only where the rules differ are
they checked, before the node counts as ready. Digests are stated for names, and there are few of them: those are compared at every start.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import astuple, replace
from pathlib import Path

from ...core.artifact import AdapterName, ArtifactId, File, adapter_name
from ...errors import DiskFailed, InvalidAdapter, LoraExtprocError, NoSpace
from ..adapter.check import Checked, check
from ..adapter.files import CONFIG_FILE
from ..adapter.rules import Rules
from ..disk.store import read_memory
from ..node import Node
from ..syscalls import disk_errors
from ..threads import through

log = logging.getLogger(__name__)

RULES_FILE = ".rules.json"
CHECK_VERSION = 1  # raised when `check` learns to refuse something that it let pass
AT_ONCE = 64  # checks per turn of a thread: a few milliseconds, so that others have their turn


class Kept:
    """Blocks where it reads: its methods are called in the disk's threads, but for `look_at`."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def check(self, directory: Path) -> Checked:
        """Whether the adapter in `directory` may be served by this node. Raises InvalidAdapter, OSError where it cannot be read."""
        return through(check(directory, self._rules()))

    def check_digest(self, name: AdapterName, files: Sequence[File]) -> None:
        """Whether the weights are those that the settings or a pin state for the name. Raises InvalidAdapter."""
        weights = next(file for file in files if file.path != CONFIG_FILE)
        for wanted in (self._node.settings.digests.get(name, ""), self._node.holdings.pins.get(name, "")):
            if wanted and weights.sha256 != wanted:
                raise InvalidAdapter(f"{name}: {weights.path} has SHA-256 {weights.sha256}; {wanted} is stated for it", "digest")

    def rules(self) -> str:
        """What `check` depends on, as a digest."""
        values = [CHECK_VERSION, *astuple(self._checked_again())]
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()

    def _rules(self) -> Rules:
        return Rules.of(self._node.settings, max_rank=self._node.engine.limits.max_lora_rank, adopted=True)

    def _checked_again(self) -> Rules:
        """Without a look at all weights, which would take an hour per terabyte: `lora-extproc verify` reads them."""
        return replace(self._rules(), finite=False)

    async def look_at(self, named: Mapping[AdapterName, ArtifactId]) -> dict[AdapterName, str]:
        """Of the names that a start found, those that today's settings refuse, and why. A disk that cannot be read refuses none."""
        refused: dict[AdapterName, str] = {}
        stated = [name for name in {*self._node.settings.digests, *self._node.holdings.pins} if name in named]
        for name in stated:
            if why := await self._node.disk.run(self._differs, adapter_name(name), named[adapter_name(name)]):
                refused[adapter_name(name)] = why
        rules = self.rules()
        if await self._node.disk.run(read_memory, self._node.store, RULES_FILE) == {"rules": rules}:
            return refused
        if named:
            log.info("%d adapters are checked again: the settings that they were checked by are not known, or others", len(named))
        names, before = list(named), len(refused)
        for first in range(0, len(names), AT_ONCE):
            refused |= await self._node.disk.run(self._refused, {name: named[name] for name in names[first : first + AT_ONCE]})
        if len(refused) > before:  # they are still there at the next start, if the engine does not let them go until then
            return refused
        try:
            await self._node.disk.run(self._node.store.write_json, RULES_FILE, {"rules": rules})
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
