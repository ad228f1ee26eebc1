"""What the Gateway API Inference Extension's conformance suite wants of its Endpoint Picker: its tests say who is to serve, and are told who did.

Written from the suite of v1.6 and its reference picker (LWEPP). The suite tests a gateway, before echo servers that know no model: any path is asked for, and
no body is looked at. A client that may say who serves aims its requests past everything that the router knows, so none of this happens unless whoever
starts the router asks for it (`router.conformance`), and never beside models.
"""

from collections.abc import Mapping

from .paths import Kind, Path, Paths

SELECTION_HEADER = "test-epp-endpoint-selection"  # `ip` or `ip:port`, several with commas; counts before the gateway's own hint
ECHO_HEADER = "x-echo-set-header"  # the echo server answers with the header that this one spells
SERVED_HEADER = "x-conformance-test-served-endpoint"
NOT_TOLD = "fail: the gateway does not tell who served"


class AnyPath(Paths):
    """Every path is asked for, and none has a body that is to be read."""

    def path(self, raw: str) -> Path:
        """What `raw` is: an echo server's."""
        return Path(Kind.ECHO, raw.partition("?")[0])


def selected(headers: Mapping[str, str], subset: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """Who may serve: whom the test names, else whom the gateway's hint names, else (None) everybody."""
    named = tuple(part.strip() for part in headers.get(SELECTION_HEADER, "").split(",") if part.strip())
    return named or subset
