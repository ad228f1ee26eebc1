"""What is checked before anybody can see an adapter: one entry for what was fetched, what others put here and what is kept.

`check` is for a whole directory. A flight that fetches asks in parts, each before the next is paid for: `check_config` before the weights,
`check_ahead` before there is room for them, `check_weights` when they are here. Every refusal is an InvalidAdapter that names the file and why.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ...core import features
from ...errors import AdapterTooLarge, InvalidAdapter
from ..threads import Steps
from .config import AdapterConfig, check_config, read_limited
from .files import CONFIG_FILE, PICKLE_FILES, WEIGHTS_FILE, refuse, wanted
from .finite import Scan, check_finite, scan_ahead
from .rules import Rules
from .safetensors import Header, read_header
from .width import check_width


@dataclass(frozen=True, slots=True)
class Checked:
    """What came out of it beside that all is well."""

    tensors: int  # 0: pickled weights, which nobody looked into
    options: dict[str, bool]  # that an engine's load call needs for this adapter


def check(directory: Path, rules: Rules) -> Steps[Checked]:
    """A whole adapter. Raises InvalidAdapter; FileNotFoundError where it has no configuration."""
    with (directory / CONFIG_FILE).open("rb") as file:
        config = check_config(read_limited(file), rules)
    _check_sizes(directory, rules)
    return (yield from check_weights(directory, config, rules))


def _check_sizes(directory: Path, rules: Rules) -> None:
    """Of what a flight brings, the listing tells before it is fetched."""
    sizes = {path: (directory / path).stat().st_size for path in wanted(os.listdir(directory))}  # noqa: PTH208  # only the names are wanted
    for path, size in sizes.items():
        if 0 < rules.max_file_bytes < size:
            raise AdapterTooLarge(f"{path} has {size} bytes; stager.max_file_bytes is {rules.max_file_bytes}")
    if 0 < rules.max_bytes < (total := sum(sizes.values())):
        raise AdapterTooLarge(f"it has {total} bytes; stager.max_adapter_bytes is {rules.max_bytes}")


def check_weights(directory: Path, config: AdapterConfig, rules: Rules, begun: Scan | None = None) -> Steps[Checked]:
    """What is in an adapter's directory beside its configuration. `begun`: what `check_ahead` gave, and came further since. Raises InvalidAdapter."""
    path = directory / WEIGHTS_FILE
    if not os.path.lexists(path):
        pickled = next((name for name in PICKLE_FILES if (directory / name).exists()), "")
        if not pickled:
            refuse(WEIGHTS_FILE, "is missing")
        if not rules.allow_pickle:
            refuse(pickled, "holds pickled weights, which can run code; safetensors are needed", "pickle")
        return Checked(0, {})
    with path.open("rb") as file:
        header = yield from check_header(file, os.fstat(file.fileno()).st_size, config, rules)
        try:
            if rules.finite:
                yield from check_finite(file, header, begun)
            return Checked(len(header.shapes), features.load_options(header.shapes))
        finally:
            header.clear()


def check_ahead(file: IO[bytes], file_size: int, config: AdapterConfig, rules: Rules) -> Steps[Scan | None]:
    """What the header tells of weights that still arrive, as `check_header`; how to look through the rest, if that is to be done."""
    header = yield from check_header(file, file_size, config, rules)
    try:
        return scan_ahead(header) if rules.finite else None
    finally:
        header.clear()


def options(directory: Path) -> Steps[dict[str, bool]]:
    """What an engine's load call needs for an adapter that was checked before. Raises InvalidAdapter where the weights were broken since."""
    path = directory / WEIGHTS_FILE
    if not path.exists():
        return {}
    with path.open("rb") as file:
        header = yield from read_header(file, os.fstat(file.fileno()).st_size)
    return features.load_options(header.shapes)


def check_header(file: IO[bytes], file_size: int, config: AdapterConfig, rules: Rules) -> Steps[Header]:
    """The header of weights that have `file_size` bytes together; `file` need not go on behind it. Raises InvalidAdapter."""
    header = yield from read_header(file, file_size)
    try:
        for found in features.of_tensors(config.fields, header.shapes):
            if what := found.refusal(rules.engine, rules.version):
                refuse(WEIGHTS_FILE, what)
        yield
        if rules.width:
            check_width(header, rules.width)
    except InvalidAdapter:
        header.clear()
        raise
    return header
