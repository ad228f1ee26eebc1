"""Adapters as vLLM keeps them: a registry of names that only grows, a CPU cache smaller than it, and slots for what runs at once.

The sharp edge that is copied faithfully: a registered adapter that fell out of the cache is read from its path again when it is next used,
and if the files are gone then, the engine dies. Everything else a client can see is what vLLM 0.32 answered.
"""

import asyncio
import json
import os
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from .base import Base
from .checkpoint import Abilities, Loaded, LoadError, read_adapter
from .scheduler import Scheduler

MAX_NUM_SEQS = 256  # vLLM's own default on most GPUs


class SimError(Exception):
    """An answer with vLLM's status, type and text."""

    def __init__(self, status: int, kind: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.kind, self.param = status, kind, param


class EngineDeadError(Exception):
    """The engine core met what it cannot survive."""


class Adapters:
    """What the engine knows by name, what it holds in memory, and what runs."""

    def __init__(
        self,
        *,
        base_model: str,
        root: str,
        cache_dir: str,
        max_loras: int,
        max_cpu_loras: int,
        max_lora_rank: int,
        max_num_seqs: int = MAX_NUM_SEQS,
        mixed_moe_format: bool = False,
        load_s: float = 0.0,
    ) -> None:
        self.base_model = base_model  # the served name
        self.root = root  # the --model string; "" takes adapters of any base, which a vLLM does not
        self._base = Base.of(root)
        self.cache_dir = cache_dir
        self.scheduler = Scheduler(max_loras, max_num_seqs)
        self._max_cpu_loras = max(max_cpu_loras, max_loras)
        self._max_lora_rank = max_lora_rank
        self._mixed_moe_format = mixed_moe_format
        self._load_s = load_s  # what reading an adapter takes beside the reading itself
        self.registry: dict[str, str] = {}  # name -> path
        self._fused: set[str] = set()  # of these names, whose load call said that experts are in one tensor
        self._cache: OrderedDict[str, Loaded] = OrderedDict()  # least recently used first
        self._locks: dict[str, asyncio.Lock] = {}
        self.loads = 0

    async def resolve(self, name: str) -> None:
        """Make `name` known, as the filesystem resolver does. Raises SimError."""
        async with self._locks.setdefault(name, asyncio.Lock()):
            if name in self.registry:
                return
            path = os.path.join(self.cache_dir, name)
            try:
                with open(os.path.join(path, "adapter_config.json"), encoding="utf-8") as file:
                    config = json.load(file)
            except (FileNotFoundError, NotADirectoryError):
                raise self._unknown(name) from None
            except ValueError as error:
                raise SimError(400, "BadRequestError", str(error)) from None
            try:
                is_ours = config["peft_type"] == "LORA" and (config["base_model_name_or_path"] == self.root or not self.root)
            except (KeyError, TypeError) as error:
                raise SimError(500, "InternalServerError", str(error)) from None
            if not is_ours:
                raise self._unknown(name)
            try:
                await self._read(name, path)  # the resolver never says that experts are in one tensor
            except (LoadError, FileNotFoundError):
                raise SimError(400, "BadRequestError", f"LoRA adapter '{name}' was found but could not be loaded.") from None
            self.registry[name] = path

    async def load(self, name: str, path: str, *, in_place: bool, is_3d: bool = False) -> None:
        """`/v1/load_lora_adapter`. Raises SimError."""
        if not name or not path:
            raise SimError(400, "InvalidUserInput", "Both 'lora_name' and 'lora_path' must be provided.")
        if name == self.base_model:
            raise SimError(400, "InvalidUserInput", f"The lora adapter '{name}' conflicts with a served base model.")
        if name in self.registry and not in_place:
            raise SimError(
                400,
                "InvalidUserInput",
                f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, set 'load_inplace' to True.",
            )
        try:
            await self._read(name, path, is_3d=is_3d)
        except FileNotFoundError:
            raise SimError(404, "NotFoundError", f"Loading lora {name} failed: No adapter found for {path}") from None
        except LoadError as error:
            raise SimError(500, "InternalServerError", f"Call to add_lora method failed: {error}".rstrip()) from None
        self.registry[name] = path
        (self._fused.add if is_3d else self._fused.discard)(name)

    def unload(self, name: str) -> None:
        """`/v1/unload_lora_adapter`: forgets the name, keeps the memory until it is needed. Raises SimError."""
        if name not in self.registry:
            raise SimError(404, "NotFoundError", f"The lora adapter '{name}' cannot be found.")
        del self.registry[name]
        self._fused.discard(name)

    @asynccontextmanager
    async def use(self, name: str, tokens: int = 1) -> AsyncIterator[Loaded]:
        """Run a request: wait for its turn, read the adapter again if it fell out of memory. Raises EngineDeadError if its files are gone."""
        path = self.registry[name]
        async with self.scheduler.turn(name, tokens):
            loaded = self._cache.get(name)
            if loaded is None or loaded.path != path:
                try:
                    loaded = await self._read(name, path, is_3d=name in self._fused)
                except (OSError, LoadError) as error:
                    raise EngineDeadError(str(error)) from error
            self._cache.move_to_end(name)
            yield loaded

    async def _read(self, name: str, path: str, *, is_3d: bool = False) -> Loaded:
        abilities = Abilities(self._max_lora_rank, self._mixed_moe_format)
        loaded = await asyncio.to_thread(read_adapter, name, path, abilities, self._base, is_3d=is_3d)
        if self._load_s:
            await asyncio.sleep(self._load_s)
        self.loads += 1
        self._cache[name] = loaded
        self._cache.move_to_end(name)
        while len(self._cache) > self._max_cpu_loras:
            victim = next((n for n in self._cache if n not in self.scheduler.running and n != name), None)
            if victim is None:
                break
            del self._cache[victim]
        return loaded

    def _unknown(self, name: str) -> SimError:
        return SimError(404, "NotFoundError", f"The model `{name}` does not exist. Valid aliases: {self.base_model}.", "model")
