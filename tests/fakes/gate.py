"""Stop a thread at a call until something else has happened."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from .wait import PATIENCE_S


class Gate:
    """The next call of `thing.method` waits until the gate is opened, then fails with `fails` if that is given; later calls do not wait."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, thing: object, method: str, *, fails: Exception | None = None) -> None:
        self._reached = threading.Event()
        self._go_on = threading.Event()
        self._fails = fails
        self._inner: Callable[..., Any] = getattr(thing, method)
        monkeypatch.setattr(thing, method, self._call)

    async def reached(self) -> None:
        """Return when a call waits."""
        assert await asyncio.to_thread(self._reached.wait, PATIENCE_S)

    def open(self) -> None:
        self._go_on.set()

    def _call(self, *arguments: Any, **named: Any) -> Any:
        if self._reached.is_set():
            return self._inner(*arguments, **named)
        self._reached.set()
        self._go_on.wait(PATIENCE_S)  # a test that failed opens no gate
        if self._fails is not None:
            raise self._fails
        return self._inner(*arguments, **named)
