"""Which adapters an origin has, told from the paths of all its files: what `resolve` would find, without what is refused whatever the files hold."""

from heapq import merge
from itertools import islice

from ....core.artifact import AdapterName, adapter_name
from ....errors import InvalidRequest
from ...adapter.files import CONFIG_FILE, PICKLE_FILES, WEIGHTS_FILE, archive_suffix

MAX_NAMES = 100_000  # of one origin, ten megabytes; a list of models with more helps nobody
RUN = 5_000  # names that are sorted at once, in about two milliseconds
MAX_PATHS = 2_000_000  # that are looked at for them: twenty files per adapter, two thousand pages of an S3 listing


class Names:
    """Fed with paths relative to the origin, in any order. An adapter is a folder with a configuration and weights, or an archive.

    A folder without weights is left out, and so is one with pickled weights unless `pickle` permits them.
    """

    def __init__(self, *, archives: bool = True, pickle: bool = False) -> None:
        self._archives = archives
        self._weights = frozenset((WEIGHTS_FILE, *PICKLE_FILES) if pickle else (WEIGHTS_FILE,))
        self._configured: set[str] = set()  # folders with a configuration
        self._weighted: set[str] = set()  # folders with weights
        self._packed: set[str] = set()  # archives without their suffixes
        self._looked_at = 0
        self._is_stopped = False

    def is_full(self) -> bool:
        """Whether nothing further need be told: there is more than is listed, or nobody waits for it any longer."""
        longest = max(len(self._configured), len(self._weighted), len(self._packed))
        return self._is_stopped or self._looked_at > MAX_PATHS or longest > MAX_NAMES

    def stop(self) -> None:
        """Nobody waits for it any longer. May be called from another thread."""
        self._is_stopped = True

    def add(self, path: str) -> None:
        """One file, or a folder that was looked into, which counts for the limit alone."""
        self._looked_at += 1
        folder, _, file = path.rpartition("/")
        if file == CONFIG_FILE:
            self._configured.add(folder)
        elif file in self._weights:
            self._weighted.add(folder)
        elif self._archives and (suffix := archive_suffix(path)):
            self._packed.add(path.removesuffix(suffix))

    def sorted(self) -> list[AdapterName]:
        """The names, by code points, at most MAX_NAMES. An archive beside a folder with a configuration is never read. Blocks for a second.

        Made in steps of milliseconds: one step in C, as of sorting a hundred thousand names at once, would stop all threads.
        """
        found = [name for name in self._configured if name in self._weighted and _is_name(name)]
        found += [name for name in self._packed if name not in self._configured and _is_name(name)]
        runs = [sorted(found[first : first + RUN]) for first in range(0, len(found), RUN)]
        return [AdapterName(name) for name in islice(merge(*runs), MAX_NAMES)]


def _is_name(text: str) -> bool:
    try:
        adapter_name(text)
    except InvalidRequest:
        return False
    return True
