"""What counts as a right answer, an old one, and a reason."""

import json

import pytest

from extproc.up.demo import BASE_MODEL

from .load import Kind, Request, judge, until_each_answered
from .origin import BASE_WEIGHTS, Origin
from .scripts.origins import old_after_new_s


def answered(origin: Origin, model: str, weights: str) -> Request:
    request = Request(Kind.WARM, model, 0.0)
    judge(request, 200, {}, json.dumps({"system_fingerprint": weights}).encode(), origin)
    return request


async def test_an_answer_is_right_if_its_weights_ever_lay_under_its_name() -> None:
    """Old ones too, but never another name's."""
    origin = Origin("127.0.0.1")
    first, second, other = await origin.put("a"), await origin.put("a"), await origin.put("b")
    assert [answered(origin, "a", weights).version for weights in (first, second, other)] == [0, 1, None]
    assert [answered(origin, "a", weights).wrong for weights in (first, second, other)] == [False, False, True]
    assert not answered(origin, BASE_MODEL, BASE_WEIGHTS).wrong
    assert answered(origin, "a", BASE_WEIGHTS).wrong


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"system_fingerprint": null}'])
def test_a_200_that_does_not_say_whose_weights_is_wrong(body: bytes) -> None:
    """It is no answer of an engine, whole."""
    request = Request(Kind.WARM, "a", 0.0)
    judge(request, 200, {}, body, Origin("127.0.0.1"))
    assert request.wrong


@pytest.mark.parametrize(
    ("headers", "body", "reason"),
    [
        ({"x-lora-extproc-reason": "no_space"}, b"{}", "no_space"),
        ({}, b'{"error": {"code": "gateway"}}', "gateway"),
        ({}, b'{"error": "text"}', "no reason"),
        ({}, b"upstream reset", "no reason"),
    ],
)
def test_the_reason_of_a_failure_is_the_header_else_the_code(headers: dict[str, str], body: bytes, reason: str) -> None:
    """As the product states it in both."""
    request = Request(Kind.WARM, "a", 0.0)
    judge(request, 503, headers, body, Origin("127.0.0.1"))
    assert (request.failed, request.reason) == (True, reason)


def test_an_older_version_is_late_only_after_a_newer_one_had_answered() -> None:
    """Two that overlap may be answered by either; of other names nothing follows."""

    def seen(began: float, ended: float, version: int, model: str = "a") -> Request:
        return Request(Kind.WARM, model, began, ended, 200, version=version)

    assert old_after_new_s([seen(0, 3, 1), seen(2, 4, 0), seen(5, 6, 0, "b")]) == 0
    assert old_after_new_s([seen(0, 3, 1), seen(4, 5, 0), seen(6, 7, 0), seen(8, 9, 1)]) == 3


class Routers:
    """They are asked in this order, and count a request at the second look after it."""

    def __init__(self, *order: int) -> None:
        self.asked: list[int] = []
        self._order = iter(order)
        self._counts = [7.0, 3.0]
        self._looks = 0

    async def ask(self) -> None:
        self.asked.append(next(self._order))
        self._looks = 0

    async def answered(self) -> list[float]:
        self._looks += 1
        if self.asked and self._looks == 2:
            self._counts[self.asked[-1]] += 1
        return list(self._counts)


async def test_a_name_is_warm_when_each_router_has_answered_for_it() -> None:
    """However often one of them is asked before the other, and however late they count."""
    routers = Routers(0, 0, 1, 0)
    await until_each_answered(routers.ask, routers.answered)
    assert routers.asked == [0, 0, 1]
