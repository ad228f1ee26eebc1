"""Cross-origin headers (the Fetch standard) on what the router answers itself, so that a page which may use the engines can read its errors, too."""

from collections.abc import Mapping, Sequence

ANY = "*"


def answer_headers(origin: str | None, allowed: Sequence[str]) -> Mapping[str, str]:
    """What to add to an answer to a request with that `origin` header; nothing where it has none, or may not read the answer."""
    if not origin or not allowed:
        return {}
    if ANY in allowed:
        return {"access-control-allow-origin": ANY}
    return {"access-control-allow-origin": origin, "vary": "Origin"} if origin in allowed else {"vary": "Origin"}
