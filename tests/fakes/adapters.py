"""Small adapters: the demonstration's writer with sizes of a few kilobytes."""

import hashlib
import json
import os
import struct
import tempfile
from pathlib import Path

from extproc.core.blocks import artifact_bytes
from extproc.up.demo import BASE_MODEL, write_adapter

HIDDEN, LAYERS, RANK = 64, 2, 4
CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
Files = dict[str, bytes]


def write_small(directory: Path, *, seed: int = 0, rank: int = RANK, modules: tuple[str, ...] = ("q_proj", "v_proj"), base_model: str = BASE_MODEL) -> Path:
    """One adapter of about six kilobytes; its directory."""
    write_adapter(directory, seed=seed, rank=rank, modules=modules, hidden=HIDDEN, layers=LAYERS, base_model=base_model)
    return directory


def small_files(*, seed: int = 0, rank: int = RANK, modules: tuple[str, ...] = ("q_proj", "v_proj"), base_model: str = BASE_MODEL) -> Files:
    """The same as bytes by file name."""
    with tempfile.TemporaryDirectory() as directory:
        return read_files(write_small(Path(directory), seed=seed, rank=rank, modules=modules, base_model=base_model))


def read_files(directory: Path) -> Files:
    """Every file of a directory, but for our own manifest."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file() and not path.name.startswith(".")}


def overwrite(path: Path, data: bytes) -> None:
    """Write into a file as who wants to hide it: the time of modification is put back. The kernel's own time of change is another, once its clock has ticked."""
    before = path.stat()
    while path.stat().st_ctime_ns == before.st_ctime_ns:
        path.write_bytes(data)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def size_of(files: Files) -> int:
    """What an artifact of these files takes on disk."""
    return artifact_bytes(map(len, files.values()))


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def safetensors(header: object, data: bytes = b"") -> bytes:
    """A safetensors file with this header, given as a value or as its very bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def split(weights: bytes) -> tuple[dict[str, dict[str, object]], bytes]:
    """A safetensors file's header and data."""
    (length,) = struct.unpack("<Q", weights[:8])
    return json.loads(weights[8 : 8 + length]), weights[8 + length :]
