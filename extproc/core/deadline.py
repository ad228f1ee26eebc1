"""How long a request may be held: what its client allows, within what the operator allows."""

import re
from collections.abc import Mapping

from ..errors import InvalidRequest

_FORM = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(ms|[smhSMH])?")  # seconds; Go's units, and gRPC's
_UNIT_S = {None: 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


def wait_s(name: str, headers: Mapping[str, str], default_s: float, maximum_s: float) -> float:
    """Seconds to wait, as the header `name` says: `30`, `1.5`, `30s`, `500ms`, `2m`, `1h`. An empty one says nothing. Raises InvalidRequest for others."""
    asked = headers.get(name)
    if asked is None or not (asked := asked.strip()):
        return min(default_s, maximum_s)
    match = _FORM.fullmatch(asked)
    if match is None:
        raise InvalidRequest(f"{name}: {asked[:40]!r} is no time; 30, 30s, 500ms, 2m and 1h are")
    unit = match[2]
    return min(float(match[1]) * _UNIT_S[unit and unit.lower()], maximum_s)
