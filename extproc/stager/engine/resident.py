"""Which names the engine has in memory, as far as can be told from outside: those that were loaded or used last, as many as it has slots for.

A vLLM lists every name that it was ever told, and keeps only `max_cpu_loras` of the adapters in memory, the least recently used of them falls out first
and is read from the disk again when a request needs it. No figure of its metrics tells which those are (`lora_requests_info` names what works, not what is
there), so its memory is followed here: a load, an Ensure and a request that its metrics show count as use. What it does between two looks is not seen, so
this is an estimate, which decides between copies and deletes nothing. Pure.
"""

MAX_NAMES = 16_384  # where the number of slots is not known: a few megabytes


class Resident:
    """Names, least recently used first. A vLLM that is told to forget a name keeps the adapter's place until that is needed, and so does this."""

    def __init__(self, max_names: int = MAX_NAMES) -> None:
        self._max_names = max_names
        self._names: dict[str, None] = {}

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def used(self, name: str, slots: int) -> list[str]:
        """`name` is in memory now, in one of `slots` (0: not known how many). Names whose place changed by it: itself if it is new, and what fell out."""
        is_new = name not in self._names
        self._names.pop(name, None)
        self._names[name] = None
        return [*([name] if is_new else []), *self.trim(slots)]

    def trim(self, slots: int) -> list[str]:
        """Keep at most `slots` names; those that fell out."""
        over = len(self._names) - min(slots or self._max_names, self._max_names)
        gone = [name for name, _ in zip(self._names, range(over), strict=False)]
        for name in gone:
            del self._names[name]
        return gone

    def next_out(self, slots: int) -> str | None:
        """The name that falls out when one more comes; None where there is room for it."""
        return next(iter(self._names), None) if len(self._names) >= min(slots or self._max_names, self._max_names) else None

    def drop(self, name: str) -> None:
        """It is not in memory any more, and its place is free."""
        self._names.pop(name, None)
