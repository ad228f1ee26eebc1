"""Block hashes of prompts, and which endpoint was sent the beginning of one."""

import itertools
import subprocess
import sys
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.core import prefix
from extproc.core.endpoint import Endpoint
from extproc.core.prefix import (
    BLOCK_BYTES,
    BLOCKS_OF_ONE_SIZE,
    GENERATION_BLOCKS,
    MAX_BLOCKS,
    MIN_BLOCKS,
    SHORT_BLOCKS,
    Prefixes,
    block_hashes,
    of_session,
)

A, B, C = (Endpoint(f"10.0.0.{i}:8000") for i in (1, 2, 3))
TEXT = Random(1).randbytes(40 * BLOCK_BYTES)


def prompt(number: int, count: int) -> tuple[int, ...]:
    """The hashes of a prompt of `count` blocks that shares none with another number's."""
    return tuple(range(number * 1000, number * 1000 + count))


# ---- blocks


def test_two_turns_of_a_conversation_share_the_blocks_before_the_new_turn() -> None:
    """What closes the list in the one and goes on in the other spoils no block before it."""
    first = b"[" + TEXT[: 3 * BLOCK_BYTES + 100] + b"]"
    second = b"[" + TEXT[: 3 * BLOCK_BYTES + 100] + b"," + TEXT[:BLOCK_BYTES] + b"]"
    assert block_hashes([first], b"m") == block_hashes([second], b"m")[:3]
    assert len(block_hashes([second], b"m")) == 4


def test_a_block_stands_for_all_before_it() -> None:
    """The same bytes behind another beginning are other blocks."""
    changed = b"x" + TEXT[1:]
    assert set(block_hashes([TEXT], b"m")).isdisjoint(block_hashes([changed], b"m"))


def test_what_the_engine_keeps_apart_has_blocks_of_its_own() -> None:
    """An adapter's KV blocks are of no use to another."""
    assert set(block_hashes([TEXT], b"demo/sql")).isdisjoint(block_hashes([TEXT], b"demo/haiku"))


def test_the_tools_before_a_prompt_are_blocks_whatever_their_length() -> None:
    """Two requests with the same tools and other messages share the tools' blocks, the last of which is a short one."""
    tools = TEXT[: 2 * BLOCK_BYTES + 7]
    first, second = block_hashes([tools, b"a" * BLOCK_BYTES], b"m"), block_hashes([tools, b"b" * BLOCK_BYTES], b"m")
    assert first[:3] == second[:3]
    assert first[3] != second[3]
    assert block_hashes([b"", TEXT], b"m") == block_hashes([TEXT], b"m")


def test_blocks_grow_with_what_precedes_them_and_end_at_the_limit() -> None:
    """None is larger than a 32nd of the text before it, and 480 KB are all that is read of a prompt."""
    ends = list(itertools.accumulate(BLOCK_BYTES << (i // BLOCKS_OF_ONE_SIZE) for i in range(MAX_BLOCKS)))
    assert ends[-1] == 480 * 1024
    text = bytes(ends[-1])
    for count in (1, 63, 64, 65, 128, 129, 255, 256):
        assert len(block_hashes([text[: ends[count - 1]]], b"m")) == count
        assert len(block_hashes([text[: ends[count - 1] - 1]], b"m")) == count - 1
    assert len(block_hashes([text + text], b"m")) == MAX_BLOCKS
    assert len(block_hashes([text, TEXT], b"m")) == MAX_BLOCKS


@given(st.binary(max_size=3000), st.binary(max_size=3000), st.binary(max_size=600))
def test_common_blocks_are_those_of_the_common_beginning(common: bytes, rest: bytes, other: bytes) -> None:
    """Whatever follows it, and from any kind of buffer."""
    first, second = common + rest, common + other
    ours, theirs = block_hashes([first], b"m"), block_hashes([memoryview(second)], b"m")
    shared = sum(mine == their for mine, their in zip(ours, theirs, strict=False))
    equal = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))
    assert shared == equal // BLOCK_BYTES


def test_every_process_hashes_alike() -> None:
    """Unlike by Python's own hash, which each process seeds anew."""
    code = "from extproc.core.prefix import block_hashes as b, of_session as s; from extproc.core.endpoint import Endpoint as E; "
    code += "print(b([b'ab' * 600], b'm'), s('me', [E('a:1'), E('b:1'), E('c:1')]).address)"
    outputs = {subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout for _ in range(2)}
    assert len(outputs) == 1


# ---- what was sent where


def test_the_longest_prefix_is_what_was_sent_of_the_prompt() -> None:
    """Any number of blocks of it, and none of another prompt."""
    for count in range(12):
        prefixes = Prefixes(10_000)
        assert prefixes.record(A, prompt(1, count)) == 0
        assert prefixes.longest(A, prompt(1, 11)) == count == prefixes.record(A, prompt(1, count))
        assert prefixes.longest(A, prompt(2, 11)) == 0
        assert prefixes.longest(B, prompt(1, 11)) == 0


def test_the_endpoint_that_was_sent_the_longest_prefix_is_preferred() -> None:
    """Whatever the order of the candidates, and among those that are candidates."""
    prefixes = Prefixes(10_000)
    prefixes.record(A, prompt(1, 3))
    prefixes.record(B, prompt(1, 9))
    for candidates in itertools.permutations((A, B, C)):
        assert prefixes.preferred(candidates, prompt(1, 20)) == B
    assert prefixes.preferred((A, C), prompt(1, 20)) == A
    prefixes.record(C, prompt(1, 10))
    assert prefixes.preferred((A, B, C), prompt(1, 20)) == C


def conversation(number: int, shared: int, count: int) -> tuple[int, ...]:
    """A prompt whose first blocks are a system prompt that all conversations have."""
    random = Random(number)
    return prompt(1, shared) + tuple(random.getrandbits(60) for _ in range(count - shared))


@pytest.mark.parametrize("shared", [0, 1, 5, 12])
def test_routers_that_do_not_know_a_conversation_choose_one_place_for_it(shared: int) -> None:
    """Each turn may come to another router, and each of these knows no more than the system prompt, if there is one; conversations spread over all places."""
    candidates = [Endpoint(f"10.0.3.{i}:8000") for i in range(6)]
    first, second = Prefixes(10_000), Prefixes(10_000)
    for prefixes, endpoint in itertools.product((first, second), candidates):
        prefixes.record(endpoint, prompt(1, shared))
    chosen = []
    for number in range(300):
        chosen.append(first.preferred(candidates, conversation(number, shared, shared + 2)))
        assert second.preferred(candidates[::-1], conversation(number, shared, 30)) == chosen[-1]
    assert min(chosen.count(endpoint) for endpoint in candidates) > 30


def test_a_prompt_that_was_sent_whole_to_several_has_one_place_too() -> None:
    """As a retry, or a prompt that many send."""
    prefixes = Prefixes(10_000)
    for endpoint in (A, B):
        prefixes.record(endpoint, prompt(1, 12))
    assert prefixes.preferred((A, B, C), prompt(1, 12)) == prefixes.preferred((C, B, A), prompt(1, 12)) in (A, B)


@pytest.mark.parametrize(("shared", "places"), [(SHORT_BLOCKS, {A, B, C}), (SHORT_BLOCKS + 1, {A, B})])
def test_a_long_system_prompt_keeps_its_conversations_where_it_is(shared: int, places: set[Endpoint]) -> None:
    """A short one is soon everywhere."""
    prefixes = Prefixes(10_000)
    for endpoint in (A, B):
        prefixes.record(endpoint, prompt(1, shared))
    assert {prefixes.preferred((A, B, C), conversation(number, shared, shared + 3)) for number in range(50)} == places


@pytest.mark.parametrize("count", [0, 1])
def test_for_a_short_prompt_nobody_is_preferred(count: int) -> None:
    """What decides otherwise decides."""
    prefixes = Prefixes(10_000)
    prefixes.record(B, prompt(1, 8))
    assert prefixes.preferred((A, B, C), prompt(1, count)) is None


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 6), st.integers(1, 40)), max_size=60), st.integers(1, 6), st.integers(2, 40))
def test_the_preferred_one_is_what_a_look_at_each_alone_finds(records: list[tuple[int, int, int]], number: int, count: int) -> None:
    """The short way over all candidates gives what the long way gives, also while memory runs out."""
    prefixes, candidates = Prefixes(150), (A, B, C)
    for which, recorded, length in records:
        prefixes.record(candidates[which], prompt(recorded, length))
    blocks = prompt(number, count)
    lengths = {endpoint: prefixes.longest(endpoint, blocks) for endpoint in candidates}
    chosen = prefixes.preferred(candidates, blocks)
    assert chosen is not None
    best = [endpoint for endpoint, length in lengths.items() if length == max(lengths.values())]
    assert chosen in best or lengths[best[0]] < MIN_BLOCKS or (len(best) > 1 and lengths[best[0]] <= SHORT_BLOCKS)


# ---- what is forgotten


def test_another_instance_at_an_address_has_nothing() -> None:
    """A pod that was replaced comes with an empty cache; what its predecessor was sent is forgotten with the first prompt that it is sent."""
    old, new = Endpoint("10.0.0.1:8000", instance="uid-1"), Endpoint("10.0.0.1:8000", instance="uid-2")
    prefixes = Prefixes(10_000)
    prefixes.record(old, prompt(1, 8))
    assert prefixes.longest(new, prompt(1, 8)) == 0
    assert prefixes.preferred((new, B), prompt(1, 8)) == Prefixes(0).preferred((new, B), prompt(1, 8))
    prefixes.record(new, prompt(2, 5))
    assert (prefixes.longest(new, prompt(2, 8)), prefixes.longest(old, prompt(1, 8)), len(prefixes)) == (5, 0, 5)


def test_what_an_engine_that_was_started_anew_had_is_forgotten() -> None:
    """And nobody else's."""
    prefixes = Prefixes(10_000)
    prefixes.record(A, prompt(1, 8))
    prefixes.record(B, prompt(1, 8))
    prefixes.forget(A)
    prefixes.forget(C)
    assert (prefixes.longest(A, prompt(1, 8)), prefixes.longest(B, prompt(1, 8)), len(prefixes)) == (0, 8, 8)


def test_an_endpoint_keeps_the_latest_blocks_within_its_bound() -> None:
    """At least one generation of them, and at most two."""
    prefixes = Prefixes(10**6)
    for number in range(1, 200):
        prefixes.record(A, prompt(number, 100))
        known = [n for n in range(1, number + 1) if prefixes.longest(A, prompt(n, 100)) == 100]
        assert known == list(range(number - len(known) + 1, number + 1))
        assert len(prefixes) == 100 * len(known) <= 2 * GENERATION_BLOCKS
    assert len(prefixes) >= GENERATION_BLOCKS


def test_a_prompt_that_is_sent_again_is_not_forgotten() -> None:
    """Use renews it, as it does in the engine's cache."""
    prefixes = Prefixes(10**6)
    for number in range(2, 500):
        prefixes.record(A, prompt(1, 50))
        prefixes.record(A, prompt(number, 100))
    assert prefixes.longest(A, prompt(1, 50)) == 50


def test_all_endpoints_together_stay_within_the_bound() -> None:
    """Each in turn forgets what it was sent longest ago; the latest stays."""
    prefixes = Prefixes(1000)
    endpoints = [Endpoint(f"10.0.1.{i}:8000") for i in range(50)]
    for number in range(1, 400):
        endpoint = endpoints[number % 50]
        prefixes.record(endpoint, prompt(number, 30))
        assert len(prefixes) <= 1000
        assert len(prefixes) == sum(len(sent.young) + len(sent.old) for sent in prefixes._sent.values())
    assert sum(prefixes.longest(endpoints[n % 50], prompt(n, 30)) == 30 for n in range(350, 400)) >= 15


def test_a_prompt_without_blocks_takes_no_memory() -> None:
    """It is shorter than one block, or comes in a form."""
    prefixes = Prefixes(1000)
    prefixes.record(A, ())
    assert not prefixes._sent


# ---- sessions


def test_a_session_stays_where_it_is_while_others_come_and_go() -> None:
    """A candidate more takes only the sessions that it gains, and one less moves only its own."""
    candidates = [Endpoint(f"10.0.2.{i}:8000") for i in range(9)]
    eight = candidates[:8]
    sessions = [f"session-{i}" for i in range(2000)]
    before = {session: of_session(session, eight) for session in sessions}
    after = {session: of_session(session, candidates[::-1]) for session in sessions}
    assert all(after[session] in (before[session], candidates[8]) for session in sessions)
    counts = [list(before.values()).count(endpoint) for endpoint in eight]
    assert max(counts) < 1.3 * len(sessions) / len(eight)


def test_the_number_of_blocks_never_exceeds_a_generation() -> None:
    """A prompt's blocks are added together, so a generation holds at least one whole prompt."""
    assert MAX_BLOCKS < prefix.GENERATION_BLOCKS
