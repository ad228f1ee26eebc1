"""`DIR/.staging`: what is on its way in or out, under random names that nobody looks for. What a failing disk keeps there is remembered, and tried again."""

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path


class Staging:
    """All methods block: call them in a thread."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._busy: set[Path] = set()  # which a flight fills now; as many as there are flights
        self._left: set[Path] = set()  # what the disk would not let go; as much as failed to be removed since the start

    def fresh(self) -> Path:
        """A path that is not there."""
        return self.directory / secrets.token_hex(8)

    @contextlib.contextmanager
    def filling(self) -> Iterator[Path]:
        """A new directory, gone at the end unless it was renamed."""
        path = self.fresh()
        path.mkdir()
        self._busy.add(path)
        try:
            yield path
        finally:
            self._busy.discard(path)
            self.clear(path)

    def probe(self) -> None:
        """Write one file and take it back."""
        path = self.directory / f"probe-{os.getpid()}"
        try:
            with path.open("wb") as file:
                file.write(b"probe")
                os.fsync(file.fileno())
        finally:
            self.clear(path)

    def discard(self, path: Path) -> None:
        """Remove a path of the node's directory: whole or gone at any instant."""
        gone = self.fresh()
        with contextlib.suppress(FileNotFoundError):
            path.rename(gone)
        self.clear(gone)

    def clear(self, path: Path) -> None:
        """Remove what nobody may find."""
        shutil.rmtree(path, ignore_errors=True)
        try:
            with contextlib.suppress(IsADirectoryError):
                path.unlink(missing_ok=True)
            path.lstat()
        except FileNotFoundError:
            self._left.discard(path)
        except OSError:
            self._left.add(path)
        else:
            self._left.add(path)

    def empty(self) -> list[str]:
        """Remove what an earlier process left half done; the names of that."""
        left = [path for path in self.directory.iterdir() if path not in self._busy]
        for path in left:
            self.clear(path)
        return [path.name for path in left]

    @property
    def has_leftovers(self) -> bool:
        """Whether something could not be removed when it should have been."""
        return bool(self._left)

    def clear_leftovers(self) -> None:
        """Try again."""
        for path in list(self._left):
            self.clear(path)
