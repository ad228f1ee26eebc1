"""What a case is laid out for."""

from extproc.core.blocks import artifact_bytes
from tests.fakes.adapters import small_files

from .cases import BY_NAME, FEW_BYTES, SHORT_LEASES


def test_where_room_is_scarce_what_is_leased_has_it() -> None:
    """Cold ones for as long as their leases run, and two copies of each warm one, on the nodes together; not what else comes meanwhile."""
    case = BY_NAME["disk_full_evictable"]
    room = case.layout.nodes * (FEW_BYTES // artifact_bytes(len(data) for data in small_files().values()))
    leased = case.rates.cold * SHORT_LEASES["lease_s"] + 2 * case.rates.warm_names
    assert leased < room < 2 * leased
