"""The tree of failures: what its docstring draws is what the classes are."""

import importlib
import json
import pkgutil
import re

import pytest

import extproc
from extproc import errors
from extproc.errors import BY_NAME, LoraExtprocError

CLASSES = {name: value for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, LoraExtprocError)}
_LINE = re.compile(r"^ {4}(?P<bars>(?:[│├└─ ]{4})*)(?P<name>[A-Z]\w+)(?: +(?P<rest>.*))?$")


def drawn() -> dict[str, tuple[str, str]]:
    """The tree in the docstring: name -> the name above it, and what stands beside it."""
    path: list[str] = []
    tree = {}
    for line in (errors.__doc__ or "").splitlines():
        found = _LINE.match(line)
        if found:
            depth = len(found["bars"]) // 4
            path[depth:] = [found["name"]]
            tree[found["name"]] = (path[depth - 1] if depth else "Exception", found["rest"] or "")
    return tree


TREE = drawn()


def test_the_tree_names_every_class() -> None:
    """No more and no fewer."""
    assert set(TREE) == set(CLASSES)


def test_the_tree_draws_the_classes_as_they_descend() -> None:
    """Catching a class catches what stands below it."""
    assert {name: above for name, (above, _) in TREE.items()} == {name: cls.__bases__[0].__name__ for name, cls in CLASSES.items()}


@pytest.mark.parametrize("name", [name for name, (_, rest) in TREE.items() if re.match(r"\d{3} ", rest)])
def test_the_tree_states_status_reason_and_whether_to_try_again(name: str) -> None:
    """The numbers beside each name are its class's."""
    rest = TREE[name][1]
    status, reason = rest.split()[:2]
    cls = CLASSES[name]
    assert (cls.status, cls.reason, cls.retryable) == (int(status), reason, "retryable" in rest.split())


@pytest.mark.parametrize("cls", CLASSES.values())
def test_every_class_says_what_it_is(cls: type[LoraExtprocError]) -> None:
    """In a sentence; its reason is one word for a label."""
    assert cls.__doc__
    assert cls.__doc__ != (cls.__bases__[0].__doc__ or "")
    assert re.fullmatch(r"[a-z_]+", cls.reason)
    assert 400 <= cls.status <= 599


@pytest.mark.parametrize("cls", [cls for cls in CLASSES.values() if cls.retry_after_s is not None])
def test_only_what_is_worth_repeating_says_when(cls: type[LoraExtprocError]) -> None:
    """In whole seconds, as the header has them."""
    assert cls.retryable
    assert isinstance(cls.retry_after_s, int)
    assert cls.retry_after_s > 0


@pytest.mark.parametrize("cls", [cls for cls in CLASSES.values() if cls.retryable and cls.status in (429, 503)])
def test_overload_and_unavailability_say_when_to_come_back(cls: type[LoraExtprocError]) -> None:
    """RFC 9110 has Retry-After for these."""
    assert cls.retry_after_s is not None


def test_every_class_crosses_a_process_boundary() -> None:
    """By its name."""
    assert BY_NAME == CLASSES


def test_no_failure_is_named_outside_the_tree() -> None:
    """One that is not in BY_NAME reaches the router as a stager that does not answer."""
    for module in pkgutil.walk_packages(extproc.__path__, "extproc."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    found = {cls.__name__ for cls in _below(LoraExtprocError) if cls.__module__.startswith("extproc.")}
    assert found == set(CLASSES)


def _below(cls: type[LoraExtprocError]) -> list[type[LoraExtprocError]]:
    return [cls, *(below for sub in cls.__subclasses__() for below in _below(sub))]


@pytest.mark.parametrize("cls", CLASSES.values())
def test_the_body_is_what_openai_clients_read(cls: type[LoraExtprocError]) -> None:
    """An `error` with message, type, param and code; nothing else."""
    body = json.loads(cls('adapter "a" — 名\n\ud800').openai_body())
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"] == 'adapter "a" — 名\n\ud800'
    assert body["error"]["code"] == cls.reason


@pytest.mark.parametrize(
    ("cls", "kind", "param"),
    [
        (errors.InvalidRequest, "invalid_request_error", None),
        (errors.Forbidden, "invalid_request_error", None),
        (errors.UnknownPath, "invalid_request_error", None),
        (errors.BodyTimeout, "invalid_request_error", None),
        (errors.ModelNotFound, "invalid_request_error", "model"),
        (errors.BodyTooLarge, "invalid_request_error", None),
        (errors.InvalidAdapter, "invalid_request_error", "model"),
        (errors.Overloaded, "rate_limit_error", None),
        (errors.GatewayProtocolError, "server_error", None),
        (errors.OriginFailed, "server_error", None),
        (errors.NoEndpoint, "server_error", None),
    ],
)
def test_the_type_tells_whose_fault_it_is(cls: type[LoraExtprocError], kind: str, param: str | None) -> None:
    """As the OpenAI API words it."""
    error = json.loads(cls("x").openai_body())["error"]
    assert (error["type"], error["param"]) == (kind, param)


def test_an_error_without_words_says_its_reason() -> None:
    """A message is never empty."""
    assert errors.NoSpace().message == "no_space"
    assert errors.NoSpace("full").message == "full"


def test_a_long_message_loses_its_middle() -> None:
    """Engines say last what is wrong."""
    message = errors.InvalidAdapter("the engine refuses the adapter: " + "x" * 1000 + " zz_proj").message
    assert len(message) == errors.MAX_MESSAGE_CHARACTERS
    assert message.startswith("the engine refuses")
    assert message.endswith(" zz_proj")


def test_only_a_nodes_own_trouble_is_worth_another_node() -> None:
    """What lies in the request, the adapter or its origin is the same everywhere."""
    assert {name for name, cls in CLASSES.items() if not cls.shared} == {
        "NoSpace",
        "PrefetchGivenUp",
        "NodeDraining",
        "DiskFailed",
        "StagerUnavailable",
        "CredentialsRefused",
        "EngineUnreachable",
        "OriginDown",
    }
