"""Why this node should be sent nothing now: one sentence per cause, none if it should."""

import logging

from .changes import Changes

log = logging.getLogger(__name__)


class Readiness:
    """Causes come and go by themselves: the engine's health, the disk's, the end of the process. Only a change is logged and told."""

    def __init__(self, changes: Changes) -> None:
        self._changes = changes
        self._causes = {"start": "starting"}

    @property
    def not_ready(self) -> str | None:
        """The first cause's sentence; None when ready."""
        return next(iter(self._causes.values()), None)

    def __contains__(self, cause: str) -> bool:
        return cause in self._causes

    def set(self, cause: str, why: str | None) -> None:
        """Name a cause, or take it back."""
        before = self.not_ready
        if why is None:
            self._causes.pop(cause, None)
        else:
            self._causes[cause] = why
        now = self.not_ready
        if now != before:
            log.log(logging.INFO if now is None else logging.WARNING, "node is %s", "ready" if now is None else f"not ready: {now}")
            self._changes.tell("node")
