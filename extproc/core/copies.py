"""Which node has which adapter, on disk or in its engine's memory: everybody's copies, as the stagers tell them.

Only a lease says that a copy stays; this index says where one is worth asking for. It is kept small: a copy is one shared integer in a tuple. A node
that is forgotten costs nothing at that moment: its number is retired, which every look respects, and each later change moves a few adapters from
the table that knows the number into one that does not. When all have moved, the number is free.
"""

_MOVED_PER_CHANGE = 8  # adapters; a table is clean after an eighth as many changes as it has adapters


class Copies:
    """By adapter: the nodes that have it. A node is named by its stager's address."""

    def __init__(self) -> None:
        self._of: dict[str, tuple[int, ...]] = {}  # adapter -> codes: a node's number times two, plus one where it is in the engine's memory
        self._unmoved: dict[str, tuple[int, ...]] = {}  # adapters that may name retired numbers, and are in no other table
        self._number: dict[str, int] = {}  # by node
        self._node: list[str | None] = []  # by number; None: retired
        self._codes: list[int] = []  # the integers themselves: a million copies share them
        self._retired: list[int] = []  # since the move began
        self._leaving: list[int] = []  # retired before it: free when it ends
        self._free: list[int] = []

    def __len__(self) -> int:
        return len(self._of) + len(self._unmoved)

    def of(self, adapter: str) -> list[tuple[str, bool]]:
        """The nodes that have it, and whether in memory."""
        return [(node, bool(code & 1)) for code in self._codes_of(adapter) if (node := self._node[code >> 1]) is not None]

    def warm(self, adapter: str) -> list[str]:
        """The nodes that have it in memory."""
        return [node for code in self._codes_of(adapter) if code & 1 and (node := self._node[code >> 1]) is not None]

    def _codes_of(self, adapter: str) -> tuple[int, ...]:
        return self._of.get(adapter) or self._unmoved.get(adapter, ())

    def put(self, node: str, adapter: str, *, warm: bool) -> None:
        """It is there now: in the engine's memory if `warm`, else on disk alone."""
        number = self._number_of(node)
        self._of[adapter] = (*self._others(adapter, number), self._codes[2 * number + warm])
        self._move()

    def drop(self, node: str, adapter: str) -> None:
        """It is there no longer."""
        number = self._number.get(node)
        if number is not None and (codes := self._others(adapter, number)):
            self._of[adapter] = codes
        self._move()

    def forget(self, node: str) -> None:
        """Nothing is known of this node any more."""
        number = self._number.pop(node, None)
        if number is not None:
            self._node[number] = None
            self._retired.append(number)

    def _others(self, adapter: str, number: int) -> tuple[int, ...]:
        """Take the adapter out of both tables; its copies that count, but for those with `number`."""
        codes = self._of.pop(adapter, None) or self._unmoved.pop(adapter, ())
        return tuple(code for code in codes if code >> 1 != number and self._node[code >> 1] is not None)

    def _number_of(self, node: str) -> int:
        number = self._number.get(node)
        if number is None:
            if self._free:
                number = self._free.pop()
                self._node[number] = node
            else:
                number = len(self._node)
                self._node.append(node)
                self._codes += (2 * number, 2 * number + 1)
            self._number[node] = number
        return number

    def _move(self) -> None:
        if not self._unmoved:
            self._free += self._leaving
            self._leaving = []
            if not self._retired:
                return
            self._unmoved, self._of = self._of, {}
            self._leaving, self._retired = self._retired, []
        for _ in range(min(_MOVED_PER_CHANGE, len(self._unmoved))):
            adapter, codes = self._unmoved.popitem()
            if any(self._node[code >> 1] is None for code in codes):
                codes = tuple(code for code in codes if self._node[code >> 1] is not None)
            if codes:
                self._of[adapter] = codes
