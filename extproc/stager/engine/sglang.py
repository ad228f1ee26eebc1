"""SGLang's HTTP API as an Engine (read in the source of 0.5.6 and 0.5.23; nothing here was run against a real one).

It differs from vLLM's: names and paths of the LoRA calls; a request names `base:adapter`; `unload` waits until no request uses the adapter, and
what is loaded stays in memory, so files are read once. An adapter that it was told to unload is loaded again from its old directory when a
request still names it; if that is gone by then, the request fails and the server lives.
"""

import logging
import re
from collections.abc import Mapping
from pathlib import Path

from ...errors import EngineUnreachable
from .api import MAX_VERSION_CHARACTERS, Engine, Limits, Requests, Work, mean, total

log = logging.getLogger(__name__)

RUNNING, QUEUED, TOKEN_USAGE = "sglang:num_running_reqs", "sglang:num_queue_reqs", "sglang:token_usage"
_RANK = re.compile(r'dp_rank="(\d+)"')
SEPARATOR = ":"  # the first one in a request's model ends the base model's name


class SglangEngine(Engine):
    """An SGLang server started with `--enable-lora`."""

    unload_waits = True
    unload_frees = True

    def request_model(self, name: str) -> str:
        base = self.bases[0].id if self.bases else self._settings.base_model
        return f"{base}{SEPARATOR}{name}"

    async def load(self, name: str, directory: Path, options: Mapping[str, bool] | None = None) -> None:  # noqa: ARG002  # its call knows none
        async with self._loading:
            status, success, said = await self._lora("/load_lora_adapter", {"lora_name": name, "lora_path": str(directory)}, self._settings.load_timeout_s)
            if success:
                return
            if "already loaded" in said:
                await self._check_loaded(name, directory)
                return
            await self._refused(status, said, directory)

    async def unload(self, name: str) -> None:
        """Returns when the last request that uses it has ended."""
        status, success, said = await self._lora("/unload_lora_adapter", {"lora_name": name}, self._settings.load_timeout_s)
        if not success and "does not exist" not in said:
            raise EngineUnreachable(f"the engine answers {status} to unload")

    async def requests(self) -> Requests:
        """It does not tell whose requests they are; `unload` waits for them."""
        return Requests(frozenset(), 0.0)

    async def work(self, *, adapters: bool = False) -> Work:  # noqa: ARG002  # it tells no names
        """As its metrics say, which it has with `--enable-metrics`."""
        return await self._read(_work, RUNNING, QUEUED, TOKEN_USAGE)

    async def learn_limits(self) -> None:
        """What it was started with."""
        status, body = await self._call("GET", "/server_info")
        if status != 200 or not isinstance(body, dict):
            raise EngineUnreachable(f"the engine answers {status} to /server_info")
        told = [body.get(name) or 0 for name in ("max_loras_per_batch", "max_loaded_loras", "max_lora_rank")]
        ours = (self._settings.max_loras, self._settings.max_cpu_loras, self._settings.max_lora_rank)
        self.version = str(body.get("version", ""))[:MAX_VERSION_CHARACTERS]
        self.limits = Limits(*(own or (value if isinstance(value, int) else 0) for own, value in zip(ours, told, strict=True)))

    async def reset_prefix_cache(self) -> None:
        """Nothing to do: what it has cached is keyed by the loading, not by name or path."""

    async def _is_sleeping(self) -> bool:
        return False

    async def _may_load(self) -> bool:
        return True  # it says so when it is asked to

    async def _lora(self, path: str, body: dict[str, str], timeout_s: float) -> tuple[int, bool, str]:
        status, answer = await self._call("POST", path, body, timeout_s)
        if not isinstance(answer, dict):
            raise EngineUnreachable(f"the engine answers {status} to {path}")
        return status, answer.get("success") is True, str(answer.get("error_message") or answer.get("message") or "")


def _work(metrics: str) -> Work:
    """Each data parallel rank has a queue of its own. Those that compute one batch together (tp_rank, pp_rank) may all show it: the greatest counts.

    Raises ValueError.
    """
    running, waiting, usage = (_by_rank(metrics, name) for name in (RUNNING, QUEUED, TOKEN_USAGE))
    if not running:
        raise ValueError("no series says how many requests run")
    return Work(total(running.values()), total(waiting.values()), mean(usage.values()))


def _by_rank(metrics: str, name: str) -> dict[str, float]:
    """The greatest value that each data parallel rank shows under that name. Raises ValueError."""
    by_rank: dict[str, float] = {}
    for labels, value in re.findall(rf"^{name}(?:\{{(.*)\}})? (\S+)$", metrics, re.MULTILINE):
        rank = found[1] if (found := _RANK.search(labels)) else ""
        by_rank[rank] = max(by_rank.get(rank, 0.0), float(value))
    return by_rank
