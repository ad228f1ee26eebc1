"""Which of several endpoints was sent the beginning of this prompt before, and so may still have it in its KV cache. Pure: no clock, no text is kept.

A prompt is cut into blocks, and each block's hash covers all that stands before it, since an engine can use a cached block only behind all
blocks before it. The hashes begin from what separates one cache from another: the model's name, since KV blocks of one adapter are
of no use to another, and the request's `cache_salt`.

The blocks are bytes of the body as the client wrote it, not tokens, so that nothing is parsed twice and no tokenizer is needed. What that leaves out:
the same text written in another way (keys of a message in another order, other escapes, spaces) is another prompt here, while the engine would have
it in its cache. Such a request is sent as if nothing were known of it. One client writes one conversation in one way.

Known is what this router has sent, not what the engine has kept of it. vLLM publishes the blocks that it has, but by hashes of tokens: to look a prompt up
among them takes the model's tokenizer and chat template, and to follow them 50 to 140 us for every 2,000 tokens that any engine of the fleet computes, in
every router, which is as much as a whole warm request costs.
"""

from collections.abc import Sequence

import mmh3

from .endpoint import Endpoint
from .pieces import Buffer

BLOCK_BYTES = 512  # about 128 tokens, which are eight blocks of vLLM
BLOCKS_OF_ONE_SIZE = 64  # then they are twice as large, a 32nd of what precedes them at most: so a long prompt takes few
MAX_BLOCKS = 256  # the first 480 KB, about 120,000 tokens; what differs only behind them is the same prompt here
SHORT_BLOCKS = 8  # of a beginning that several have: 4 KB, computed in 40 ms, so a place that all routers agree on is worth more
MIN_BLOCKS = 2  # a prefix of 256 tokens is computed in about 10 ms on one GPU: below that, load counts for more

# One to two generations are remembered: 2.4 to 4.9 MB of text and more, at four bytes a token over 600,000 tokens; llm-d takes 500,000 for the KV cache of
# a server. A set of up to 4,915 integers has 8,192 slots of 16 bytes, a larger one four times as many.
GENERATION_BLOCKS = 4800

_PROMPT_SEED, _SESSION_SEED = 0x7072, 0x7365
_NOTHING: frozenset[int] = frozenset()


def block_hashes(parts: Sequence[Buffer], cache: bytes) -> tuple[int, ...]:
    """The hashes of the blocks of a prompt that is `parts` in this order, at most MAX_BLOCKS; of 60 bits, above which an integer takes half as much again.

    The last part's rest that fills no block is left out: there the next turn of a conversation goes on. Any other part ends in a shorter block.
    `cache` names what the engine keeps apart. Two prompts that collide in mmh3's seed of 32 bits and go on with the same block count as one, which costs
    a cache miss and nothing else.
    """
    seed = mmh3.mmh3_x64_128_utupledigest(cache, _PROMPT_SEED)[0] & 0xFFFFFFFF
    hashes: list[int] = []
    count, width = 0, BLOCK_BYTES
    last = len(parts) - 1
    for index, part in enumerate(parts):
        view = memoryview(part)
        size = len(view)
        begin, end = 0, width
        while count < MAX_BLOCKS and (end <= size or (begin < size and index < last)):
            hashed = mmh3.mmh3_x64_128_utupledigest(view[begin:end], seed)[0]
            hashes.append(hashed >> 4)
            seed = hashed & 0xFFFFFFFF
            count += 1
            if not count % BLOCKS_OF_ONE_SIZE:
                width *= 2
            begin = end
            end += width
    return tuple(hashes)


class _Sent:
    """What one instance was sent, in two generations: the younger is filled, then takes the place of the older.

    Each holds of every prompt a whole beginning, because all of a prompt's blocks are added together. So the blocks of a prompt that are known
    precede those that are not, and the border is found by halving.
    """

    __slots__ = ("instance", "old", "young")

    def __init__(self, instance: str) -> None:
        self.instance = instance
        self.young: set[int] = set()
        self.old: set[int] | frozenset[int] = _NOTHING

    def age(self) -> int:
        """How many blocks were forgotten by it."""
        forgotten = len(self.old)
        self.young, self.old = set(), self.young
        return forgotten


class Prefixes:
    """The blocks that each endpoint was sent lately: a generation to two of them, of GENERATION_BLOCKS, or of fewer where there are many endpoints.

    `max_blocks` is the bound of all together. Where generations of endpoints that get no requests any more exceed it, the endpoints forget in turn.
    """

    def __init__(self, max_blocks: int) -> None:
        self._max_blocks = max_blocks
        self._sent: dict[str, _Sent] = {}  # by address, whose hash is known; the next to forget is the first
        self._size = 0

    def __len__(self) -> int:
        """Blocks that take memory."""
        return self._size

    def record(self, endpoint: Endpoint, blocks: Sequence[int]) -> int:
        """A prompt of these blocks is sent to `endpoint`. How many of them it had been sent before."""
        if not blocks:
            return 0
        sent = self._of(endpoint)
        if sent is None:
            self.forget(endpoint)
            sent = self._sent[endpoint.address] = _Sent(endpoint.instance)
        known = _border(sent, blocks, 0)
        share = self._max_blocks // (2 * len(self._sent))
        if len(sent.young) + len(blocks) > max(MAX_BLOCKS, min(share, GENERATION_BLOCKS)):
            self._size -= sent.age()
        before = len(sent.young)
        sent.young.update(blocks)
        self._size += len(sent.young) - before
        while self._size > self._max_blocks:
            first = next(iter(self._sent))
            sent = self._sent.pop(first)
            self._size -= sent.age()
            if sent.old:
                self._sent[first] = sent
        return known

    def forget(self, endpoint: Endpoint) -> None:
        """The KV cache at this address is empty: another instance, or an engine that was started anew."""
        sent = self._sent.pop(endpoint.address, None)
        if sent is not None:
            self._size -= len(sent.young) + len(sent.old)

    def longest(self, endpoint: Endpoint, blocks: Sequence[int]) -> int:
        """How many of a prompt's blocks, from the first on, `endpoint` was sent before."""
        sent = self._of(endpoint)
        return 0 if sent is None else _border(sent, blocks, 0)

    def preferred(self, candidates: Sequence[Endpoint], blocks: Sequence[int], session: str = "") -> Endpoint | None:
        """The one of `candidates`, which are at least one, for a prompt: its session's place, or the one that was sent the longest beginning of it.

        None without a session for a prompt of fewer than MIN_BLOCKS.

        Several may have been sent as much: the system prompt, which many conversations share. Among these the block behind what is known chooses by its hash:
        it is the conversation's own, so every router chooses the same one for all of its turns. Up to SHORT_BLOCKS it chooses among all candidates, since
        routers differ in whom they have sent the system prompt to.
        """
        if session:
            return of_session(session, candidates)
        if len(blocks) < MIN_BLOCKS:
            return None
        known = MIN_BLOCKS
        found: list[Endpoint] = []
        for endpoint in candidates:
            sent = self._of(endpoint)
            if sent is None or (blocks[known - 1] not in sent.young and blocks[known - 1] not in sent.old):
                continue
            longer = _border(sent, blocks, known)
            if longer > known:
                known, found = longer, [endpoint]
            else:
                found.append(endpoint)
        if len(found) == 1:
            return found[0]
        behind = blocks[min(known if found else known - 1, len(blocks) - 1)]
        return _of_weight(behind & 0xFFFFFFFF, found if found and known > SHORT_BLOCKS else candidates)

    def _of(self, endpoint: Endpoint) -> _Sent | None:
        sent = self._sent.get(endpoint.address)
        return sent if sent is not None and sent.instance == endpoint.instance else None


def _border(sent: _Sent, blocks: Sequence[int], known: int) -> int:
    """How many blocks from the first on are known, of which `known` are."""
    young, old = sent.young, sent.old
    unknown = len(blocks) + 1  # so many are not
    while unknown - known > 1:
        middle = (known + unknown) // 2
        block = blocks[middle - 1]
        if block in young or block in old:
            known = middle
        else:
            unknown = middle
    return known


def of_session(session: str, candidates: Sequence[Endpoint]) -> Endpoint:
    """Where the requests of one session go. Every router chooses the same candidate and keeps no table."""
    return _of_weight(mmh3.hash(session.encode("utf-8", "surrogatepass"), _SESSION_SEED, False), candidates)


def _of_weight(seed: int, candidates: Sequence[Endpoint]) -> Endpoint:
    """The candidate of highest random weight (Thaler & Ravishankar 1998): one that joins or leaves moves only what it gains or had."""
    return max(candidates, key=lambda endpoint: (mmh3.hash(endpoint.host, seed, False), endpoint.address))
