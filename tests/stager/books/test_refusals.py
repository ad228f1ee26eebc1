"""What is remembered of refusals, for how long, and how much of it."""

import pytest

from extproc.core.artifact import adapter_name
from extproc.errors import AdapterDamaged, InvalidAdapter, LoraExtprocError, ModelNotFound, OriginFailed, OriginRefused
from extproc.stager.books import refusals as refusals_module
from extproc.stager.books.refusals import MAX_VERDICTS, Refusals, Version

NAME = adapter_name("acme/a")
SHORT_S, LONG_S = 10.0, 3600.0
VERSION = Version("hub", "1")


@pytest.fixture
def refusals() -> Refusals:
    return Refusals(SHORT_S, LONG_S)


@pytest.mark.parametrize("error", [ModelNotFound("none has it"), OriginRefused("forbidden")])
def test_what_no_origin_gives_is_answered_for_a_while(refusals: Refusals, error: LoraExtprocError) -> None:
    """With an error of its own each time: one that is raised twice would keep the frames of both."""
    refusals.learn(NAME, error, 0.0)
    answers = [refusals.answer(NAME, now) for now in (0.0, SHORT_S - 0.1)]
    assert [type(answer) for answer in answers] == [type(error)] * 2
    assert answers[0] is not answers[1]
    assert refusals.answer(NAME, SHORT_S) is None


def test_a_failure_is_not_remembered(refusals: Refusals) -> None:
    """The next request may find the origin well."""
    refusals.learn(NAME, OriginFailed("down"), 0.0)
    assert refusals.answer(NAME, 0.0) is None


def test_a_verdict_counts_for_its_version_alone(refusals: Refusals) -> None:
    """Another revision, origin, digest or rule is another question."""
    refusals.condemn(NAME, VERSION, InvalidAdapter("is bad", "weights"), 0.0)
    assert isinstance(refusals.answer(NAME, 1.0), InvalidAdapter)
    found = refusals.verdict(NAME, VERSION, LONG_S - 1)
    assert found is not None
    assert (found.message, found.what) == ("is bad", "weights")
    assert refusals.verdict(NAME, VERSION, LONG_S) is None
    for other in (Version("hub", "2"), Version("s3", "1"), Version("hub", "1", ("ab" * 32,)), Version("hub", "1", (), 8)):
        assert refusals.verdict(NAME, other, 0.0) is None


def test_without_a_revision_a_verdict_lasts_as_long_as_a_miss(refusals: Refusals) -> None:
    """Nothing would tell that the adapter has been put right."""
    unknown = Version("web", "")
    refusals.condemn(NAME, unknown, InvalidAdapter("is bad"), 0.0)
    assert refusals.verdict(NAME, unknown, SHORT_S - 0.1) is not None
    assert refusals.verdict(NAME, unknown, SHORT_S) is None


def test_damage_is_looked_at_again_after_longer_and_longer(refusals: Refusals) -> None:
    """A transfer that was damaged once is repeated soon; an origin that states a wrong digest does not cost a download each time."""
    now, waits = 0.0, []
    for _ in range(10):
        refusals.condemn(NAME, VERSION, AdapterDamaged("has another digest", "digest"), now)
        began = now
        while refusals.verdict(NAME, VERSION, now) is not None:
            now += SHORT_S
        waits.append(now - began)
    assert waits[:4] == [10.0, 20.0, 40.0, 80.0]
    assert waits[-1] == LONG_S


def test_a_digest_that_one_caller_stated_is_no_answer_to_the_next(refusals: Refusals) -> None:
    """That version is not fetched again for whoever states the same."""
    stated = Version("hub", "1", ("ab" * 32,))
    refusals.condemn(NAME, stated, InvalidAdapter("has another digest", "digest"), 0.0)
    assert refusals.answer(NAME, 0.0) is None
    assert refusals.verdict(NAME, stated, 1.0) is not None


def test_what_is_here_ends_the_answer_and_keeps_the_verdict(refusals: Refusals) -> None:
    """An older version may be served while a newer one is refused; a purge forgets both."""
    refusals.condemn(NAME, VERSION, InvalidAdapter("is bad"), 0.0)
    refusals.found(NAME)
    assert refusals.answer(NAME, 0.0) is None
    assert refusals.verdict(NAME, VERSION, 0.0) is not None
    assert refusals.forbids(NAME, 0.0) is not None
    refusals.forget(NAME)
    assert refusals.verdict(NAME, VERSION, 0.0) is refusals.forbids(NAME, 0.0) is None


def test_a_peer_s_copy_is_refused_without_a_word_of_the_name(refusals: Refusals) -> None:
    """Nor of what another peer has, or that peer of other content."""
    copy = Version("peer 10.0.0.7:9102", "a" * 64)
    refusals.condemn_copy(copy, InvalidAdapter("is bad"), 0.0)
    assert refusals.is_condemned(copy, LONG_S - 1)
    assert not refusals.is_condemned(copy, LONG_S)
    assert not refusals.is_condemned(Version("peer 10.0.0.8:9102", "a" * 64), 0.0)
    assert not refusals.is_condemned(Version("peer 10.0.0.7:9102", "b" * 64), 0.0)
    assert refusals.answer(NAME, 0.0) is refusals.verdict(NAME, copy, 0.0) is refusals.forbids(NAME, 0.0) is None


def test_a_peer_s_damaged_copy_is_looked_at_again(refusals: Refusals) -> None:
    """It may have been damaged on the way, or is mended there; after longer and longer."""
    copy, damaged = Version("peer", "a"), AdapterDamaged("has other bytes", "digest")
    refusals.condemn_copy(copy, damaged, 0.0)
    assert [refusals.is_condemned(copy, now) for now in (SHORT_S - 1, SHORT_S)] == [True, False]
    refusals.condemn_copy(copy, damaged, SHORT_S)
    assert [refusals.is_condemned(copy, SHORT_S + now) for now in (2 * SHORT_S - 1, 2 * SHORT_S)] == [True, False]


def test_as_many_copies_are_kept_in_mind(refusals: Refusals, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest is forgotten first."""
    monkeypatch.setattr(refusals_module, "MAX_COPIES", 3)
    copies = [Version("peer", str(number)) for number in range(5)]
    for copy in copies:
        refusals.condemn_copy(copy, InvalidAdapter("is bad"), 0.0)
    assert [refusals.is_condemned(copy, 0.0) for copy in copies] == [False, False, True, True, True]


def test_the_memory_is_bounded() -> None:
    """By names, the oldest forgotten first, and by verdicts for each."""
    refusals = Refusals(SHORT_S, LONG_S, max_names=3)
    for number in range(10):
        refusals.learn(adapter_name(f"a{number}"), ModelNotFound("none"), 0.0)
    assert len(refusals) == 3
    assert refusals.answer(adapter_name("a9"), 0.0) is not None
    versions = [Version("hub", str(number)) for number in range(10)]
    for version in versions:
        refusals.condemn(NAME, version, InvalidAdapter("is bad"), 0.0)
    assert sum(refusals.verdict(NAME, version, 0.0) is not None for version in versions) == MAX_VERDICTS
    assert refusals.verdict(NAME, versions[-1], 0.0) is not None


def test_both_times_may_be_zero() -> None:
    """Then everything is looked at each time."""
    refusals = Refusals(0.0, 0.0)
    refusals.learn(NAME, ModelNotFound("none"), 0.0)
    refusals.condemn(NAME, VERSION, InvalidAdapter("is bad"), 0.0)
    assert refusals.answer(NAME, 0.0) is refusals.verdict(NAME, VERSION, 0.0) is None
