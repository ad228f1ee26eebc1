"""Of what an origin has: which files an engine reads, and what is an archive."""

import pytest

from extproc.stager.adapter.files import ARCHIVE_SUFFIXES, PICKLE_FILES, archive_suffix, wanted
from tests.fakes.adapters import CONFIG, PICKLE, WEIGHTS


@pytest.mark.parametrize(
    ("there", "chosen"),
    [
        ([CONFIG, WEIGHTS, PICKLE, "README.md"], [CONFIG, WEIGHTS]),
        ([PICKLE, CONFIG], [CONFIG, PICKLE]),
        ([*reversed(PICKLE_FILES), CONFIG], [CONFIG, PICKLE_FILES[0]]),
        ([PICKLE_FILES[1], CONFIG], [CONFIG, PICKLE_FILES[1]]),
        ([CONFIG], [CONFIG]),
        ([WEIGHTS], [WEIGHTS]),
        (["sub/" + CONFIG], []),
        ([], []),
    ],
)
def test_only_what_an_engine_reads_is_wanted(there: list[str], chosen: list[str]) -> None:
    """The configuration and one file of weights, safetensors before pickle."""
    assert wanted(there) == chosen


@pytest.mark.parametrize(
    ("path", "suffix"),
    [
        *((f"acme/sql{suffix}", suffix) for suffix in ARCHIVE_SUFFIXES),
        ("sql.v1.tar.gz", ".tar.gz"),
        (".zip", ".zip"),
        ("sql.gz", ""),
        ("sql.tar.bz2", ""),
        ("sql.TAR", ""),
        ("tar", ""),
        (WEIGHTS, ""),
        ("", ""),
    ],
)
def test_an_archive_is_known_by_its_suffix(path: str, suffix: str) -> None:
    """The longest that fits, in the spelling that origins are asked with."""
    assert archive_suffix(path) == suffix
