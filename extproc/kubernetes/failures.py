"""What can go wrong with the Kubernetes API:

KubernetesFailed          it cannot be asked, or its answer cannot be used
├── NotAllowed            401 or 403: who we are is not known, or may not do this
├── NotFound              404: no such object, or no such kind
├── Conflict              409: the object has changed since it was read, or is there already
└── Gone                  410: the version that was asked for is no longer known; the objects have to be listed anew
"""


class KubernetesFailed(Exception):
    """The message says what was asked, and why it failed."""

    def __init__(self, message: str, retry_after_s: float = 0.0) -> None:
        """`retry_after_s`: for how long the API server wants to be left alone."""
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NotAllowed(KubernetesFailed):
    """401 or 403."""


class NotFound(KubernetesFailed):
    """404."""


class Conflict(KubernetesFailed):
    """409."""


class Gone(KubernetesFailed):
    """410, as an answer or within a watch."""


BY_STATUS = {401: NotAllowed, 403: NotAllowed, 404: NotFound, 409: Conflict, 410: Gone}
