"""What files take of a disk, which gives room away in whole blocks."""

from collections.abc import Iterable
from functools import lru_cache

BLOCK_BYTES = 4096  # what ext4 and xfs allot at least
OWN_BLOCKS = 2  # an artifact's directory, and its manifest of some hundred bytes


def on_disk(size: int) -> int:
    """`size` bytes as the disk counts them."""
    return _bytes(-(-size // BLOCK_BYTES))


def artifact_bytes(sizes: Iterable[int]) -> int:
    """What an artifact takes whose own files have these sizes: each in blocks of its own, with the manifest and the directory beside them."""
    return _bytes(OWN_BLOCKS + sum(-(-size // BLOCK_BYTES) for size in sizes))


@lru_cache(4096)
def _bytes(blocks: int) -> int:
    """Adapters of one rank have one size: one number in memory for all of them."""
    return blocks * BLOCK_BYTES
