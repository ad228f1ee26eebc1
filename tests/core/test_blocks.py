"""What files take of a disk."""

from extproc.core.blocks import BLOCK_BYTES, artifact_bytes


def test_each_file_takes_whole_blocks_beside_the_manifest_and_the_directory() -> None:
    """Two files of one byte take two blocks, not one."""
    assert artifact_bytes(()) == 2 * BLOCK_BYTES
    assert artifact_bytes((1, 1)) == 4 * BLOCK_BYTES
    assert artifact_bytes((0, BLOCK_BYTES, BLOCK_BYTES + 1)) == 5 * BLOCK_BYTES
