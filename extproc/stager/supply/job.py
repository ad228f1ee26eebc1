"""What others see of a flight: how urgent it is, and how far."""


class Job:
    """One flight as others see it: how urgent it is, what it does now, how far it is. All its files share it."""

    REQUEST, REFRESH, PREFETCH = range(3)  # the lower goes first

    def __init__(self, priority: int = REQUEST) -> None:
        self.priority = priority
        self.phase = ""
        self.origin = ""
        self.outcome = ""  # what came of it, where that is not what is expected of such a flight
        self.phases: dict[str, float] = {}  # seconds spent in each
        self.total_bytes = 0
        self.done_bytes = 0

    def hurry(self, priority: int) -> None:
        """Somebody more urgent waits for it, too."""
        self.priority = min(self.priority, priority)
