"""A look through a directory for all adapters that a name can lead to."""

import contextlib
import os
from pathlib import Path

from ....core.artifact import MAX_NAME_BYTES
from ...adapter.files import CONFIG_FILE, PICKLE_FILES, WEIGHTS_FILE
from .names import Names

MAX_PATH_CHARS = MAX_NAME_BYTES + 1 + max(map(len, (CONFIG_FILE, WEIGHTS_FILE, *PICKLE_FILES)))  # of a file in a folder that a name can lead to


def walk(top: Path, found: Names, *, links_outside: bool) -> None:
    """Tell `found` of every file below `top`, until it is full. Blocks. Raises OSError if `top` itself cannot be read.

    Hidden folders are not looked into, nor a link that leads to a folder above itself, which would have no end, nor without `links_outside` one that
    leads out of `top`. A folder that went meanwhile, or that may not be read, has nothing that could be fetched.
    """
    root = os.path.realpath(top)
    pending = [""]
    while pending and not found.is_full():
        folder = pending.pop()
        found.add(f"{folder}/")
        with contextlib.nullcontext() if not folder else contextlib.suppress(OSError), os.scandir(top / folder) as entries:
            for entry in entries:
                path = f"{folder}/{entry.name}" if folder else entry.name
                if found.is_full():
                    return
                if entry.name.startswith(".") or len(path) > MAX_PATH_CHARS:
                    continue
                with contextlib.suppress(OSError):  # a link to itself, say: `resolve` finds nothing there either
                    if entry.is_symlink() and not _may_be_followed(root, entry.path, links_outside=links_outside):
                        continue
                    if entry.is_dir():
                        pending.append(path)
                    elif entry.is_file():
                        found.add(path)


def _may_be_followed(root: str, link: str, *, links_outside: bool) -> bool:
    target, here = os.path.realpath(link), os.path.realpath(Path(link).parent)
    return (links_outside or target.startswith(f"{root}/")) and not f"{here}/".startswith(f"{target}/")
