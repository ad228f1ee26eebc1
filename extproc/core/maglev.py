"""The lookup table of Maglev (Eisenbud et al., NSDI 2016, section 3.4): every endpoint gets an almost equal share of a prime number of
slots, and a change of membership moves few keys that it need not move."""

from collections.abc import Iterable, Sequence

import mmh3

from .endpoint import Endpoint

DEFAULT_TABLE_SIZE = 65_537  # the paper's small table and Envoy's default; at 100x the endpoints shares differ by about 1 %
MAX_TABLE_SIZE = 5_000_011  # Envoy refuses larger ones
MAX_KEY_CHARS = 512  # of a key that is remembered: an adapter's name has 256 bytes; a header that is hashed may have 60 KB, and a client invents them
FIRST = 4  # places of a key that are looked at for a request: the two where its copy belongs, and two for when those are away or too busy
_STEPS_PER_PLACE = 8  # looks for another endpoint; with two of equal shares, eight find the second in 255 of 256 keys
_OFFSET_SEED, _SKIP_SEED, _KEY_SEED = 0x6F66, 0x736B, 0x6B65  # three independent hash functions


def is_prime(n: int) -> bool:
    """Whether `n` is prime. With a composite size some skips would not visit every slot and filling would never end."""
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


def key_hash(key: str) -> int:
    """64 bits of MurmurHash3 over the key's UTF-8: equal in every process, unlike Python's `hash()`."""
    return mmh3.hash64(key.encode("utf-8", "surrogatepass"), _KEY_SEED, signed=False)[0]


class LookupTable:
    """Immutable once filled. `endpoints` may come in any order and repeated; they are sorted, so every router replica fills the same table."""

    __slots__ = ("_slots", "endpoints", "size")

    def __init__(self, endpoints: Iterable[Endpoint], size: int = DEFAULT_TABLE_SIZE) -> None:
        if size > MAX_TABLE_SIZE or not is_prime(size):
            raise ValueError(f"table size {size} is not a prime up to {MAX_TABLE_SIZE}")
        self.endpoints: tuple[Endpoint, ...] = tuple(sorted(set(endpoints)))
        if len(self.endpoints) > size:
            raise ValueError(f"{len(self.endpoints)} endpoints do not fit into {size} slots")
        self.size = size
        self._slots: Sequence[int] = _fill(self.endpoints, size)

    def owner(self, key: str) -> Endpoint | None:
        """The endpoint that owns `key`; None only if there are no endpoints."""
        return self.endpoints[self._slots[key_hash(key) % self.size]] if self.endpoints else None

    def first(self, key: str, count: int) -> tuple[Endpoint, ...]:
        """The first `count` endpoints in the key's order, or all: its owner, then the owners that further hashes of it give.

        So keys of one owner spread over all others when it is skipped, in the shares that all have, and a change of membership moves no more of the later
        places than of the first. It costs a few steps, however many endpoints there are.
        """
        if not self.endpoints:
            return ()
        hashed, step = mmh3.hash64(key.encode("utf-8", "surrogatepass"), _KEY_SEED, signed=False)
        step = step % (self.size - 1) + 1
        found: dict[int, None] = {}  # indexes, in order
        wanted = min(count, len(self.endpoints))
        for _ in range(_STEPS_PER_PLACE * wanted):
            found[self._slots[hashed % self.size]] = None
            if len(found) == wanted:
                return tuple([self.endpoints[index] for index in found])
            hashed += step
        first = [self.endpoints[index] for index in found]
        return (*first, *self._by_weight(key, [e for e in self.endpoints if e not in first]))[:wanted]

    def order(self, key: str) -> tuple[Endpoint, ...]:
        """Every endpoint: `first`, then the rest by highest random weight (Thaler & Ravishankar 1998), in which an endpoint that joins or leaves changes
        nobody else's place."""
        first = self.first(key, FIRST)
        return (*first, *self._by_weight(key, [e for e in self.endpoints if e not in first]))

    def by_weight(self, key: str) -> tuple[Endpoint, ...]:
        """Every endpoint, by highest random weight alone."""
        return tuple(self._by_weight(key, self.endpoints))

    def _by_weight(self, key: str, endpoints: Sequence[Endpoint]) -> list[Endpoint]:
        seed = key_hash(key) >> 32
        return sorted(endpoints, key=lambda e: (mmh3.hash(e.host, seed, False), e.address), reverse=True)

    def slots_per_endpoint(self) -> dict[str, int]:
        """How many of the `size` slots each address holds: the share of keys it owns."""
        counts = [0] * len(self.endpoints)
        for index in self._slots:
            counts[index] += 1
        return {endpoint.address: count for endpoint, count in zip(self.endpoints, counts, strict=True)}


def _fill(endpoints: Sequence[Endpoint], size: int) -> Sequence[int]:
    """Each endpoint in turn takes the next free slot of its own permutation (offset + j * skip) mod size, until all are taken."""
    if not endpoints:
        return []
    position = [mmh3.hash64(e.host, _OFFSET_SEED, signed=False)[0] % size for e in endpoints]
    skip = [mmh3.hash64(e.host, _SKIP_SEED, signed=False)[0] % (size - 1) + 1 for e in endpoints]
    slots = [-1] * size
    free = size
    while True:
        for index in range(len(endpoints)):
            slot, step = position[index], skip[index]
            while slots[slot] >= 0:
                slot = (slot + step) % size
            slots[slot] = index
            position[index] = (slot + step) % size
            free -= 1
            if not free:
                return slots
