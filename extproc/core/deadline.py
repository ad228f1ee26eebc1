"""How long a request may be held: what its client allows, within what the operator allows."""

import re

from ..errors import InvalidRequest

_FORM = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(ms|s|m|S|M|H)?")  # seconds, Go's and gRPC's units
_UNIT_S = {None: 1.0, "s": 1.0, "S": 1.0, "ms": 0.001, "m": 60.0, "M": 60.0, "H": 3600.0}


def wait_s(asked: str | None, default_s: float, maximum_s: float) -> float:
    """Seconds to wait. `asked` is a header's value: `30`, `1.5`, `30s`, `500ms`, `2m`. Raises InvalidRequest for anything else."""
    if asked is None:
        return min(default_s, maximum_s)
    match = _FORM.fullmatch(asked.strip())
    if match is None:
        raise InvalidRequest(f"request timeout: {asked[:40]!r} is no time; 30, 30s, 500ms and 2m are")
    return min(float(match[1]) * _UNIT_S[match[2]], maximum_s)
