"""Adapters as vLLM keeps them: a registry of names that only grows, a CPU cache smaller than it, and slots for what runs at once.

The sharp edge that is copied faithfully: a registered adapter that fell out of the cache is read from its path again when it is next used,
and if the files are gone then, the engine dies. Everything else a client can see is what vLLM 0.32 answered.
"""

import asyncio
import hashlib
import json
import os
import struct
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

MODULES = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"})  # a Llama's


class SimError(Exception):
    """An answer with vLLM's status, type and text."""

    def __init__(self, status: int, kind: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.kind, self.param = status, kind, param


class EngineDeadError(Exception):
    """The engine core met what it cannot survive."""


class LoadError(Exception):
    """The worker could not load an adapter's files."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """An adapter in memory: `sha256` of its weights file, in hex, is all that its answers depend on."""

    name: str
    path: str
    sha256: str


def read_adapter(name: str, path: str, max_lora_rank: int) -> Loaded:
    """Read an adapter's files as a worker does. Raises FileNotFoundError or LoadError."""
    config_path, weights_path = os.path.join(path, "adapter_config.json"), os.path.join(path, "adapter_model.safetensors")
    with open(config_path, "rb") as file:
        config = json.load(file)
    rank = config.get("r")
    if not isinstance(rank, int):
        raise LoadError("LoRA config has no r")
    if rank > max_lora_rank:
        raise LoadError(f"LoRA rank {rank} is greater than max_lora_rank {max_lora_rank}.")
    if not os.path.exists(weights_path):
        raise LoadError("<path> doesn't contain tensors")
    try:
        return _read_weights(name, path, weights_path, config)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise LoadError(f"Error while deserializing header: {error}") from error


def _read_weights(name: str, path: str, weights_path: str, config: dict[str, Any]) -> Loaded:
    with open(weights_path, "rb") as file:
        prefix = file.read(8)
        size = os.fstat(file.fileno()).st_size
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if length > size - 8:
            raise LoadError("Error while deserializing header: header too large")
        tensors = json.loads(file.read(length))
        tensors.pop("__metadata__", None)
        if max((t["data_offsets"][1] for t in tensors.values()), default=0) != size - 8 - length:
            raise LoadError("Error while deserializing header: incomplete metadata, file not fully covered")
        modules = {m for t in tensors for m in [t.rpartition(".lora_")[0].rpartition(".")[2]]}
        targets = config.get("target_modules") or []
        if not modules <= MODULES or (isinstance(targets, list) and not modules <= set(targets)):
            raise LoadError(f"While loading <path>, expected target modules in {sorted(MODULES)} but received {sorted(modules)}")
        file.seek(0)
        return Loaded(name, path, hashlib.file_digest(file, "sha256").hexdigest())


class Adapters:
    """What the engine knows by name, what it holds in memory, and what runs."""

    def __init__(self, *, base_model: str, root: str, cache_dir: str, max_loras: int, max_cpu_loras: int, max_lora_rank: int) -> None:
        self.base_model = base_model  # the served name
        self.root = root  # the --model string; "" takes adapters of any base, which a vLLM does not
        self.cache_dir = cache_dir
        self.max_loras = max_loras
        self._max_cpu_loras = max(max_cpu_loras, max_loras)
        self._max_lora_rank = max_lora_rank
        self.registry: dict[str, str] = {}  # name -> path
        self._cache: OrderedDict[str, Loaded] = OrderedDict()  # least recently used first
        self._locks: dict[str, asyncio.Lock] = {}
        self.running: Counter[str] = Counter()
        self._slots = asyncio.Condition()
        self.loads = 0
        self.waiting = 0

    async def resolve(self, name: str) -> None:
        """Make `name` known, as the filesystem resolver does. Raises SimError."""
        async with self._locks.setdefault(name, asyncio.Lock()):
            if name in self.registry:
                return
            path = os.path.join(self.cache_dir, name)
            try:
                with open(os.path.join(path, "adapter_config.json"), "rb") as file:
                    config = json.load(file)
            except (FileNotFoundError, NotADirectoryError):
                raise self._unknown(name) from None
            except ValueError as error:
                raise SimError(400, "BadRequestError", str(error)) from None
            for key in ("peft_type", "base_model_name_or_path"):
                if key not in config:
                    raise SimError(500, "InternalServerError", repr(key))
            if config["peft_type"] != "LORA" or (self.root and config["base_model_name_or_path"] != self.root):
                raise self._unknown(name)
            try:
                await self._read(name, path)
            except (LoadError, FileNotFoundError):
                raise SimError(400, "BadRequestError", f"LoRA adapter '{name}' was found but could not be loaded.") from None
            self.registry[name] = path

    async def load(self, name: str, path: str, *, in_place: bool) -> None:
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
            await self._read(name, path)
        except FileNotFoundError:
            raise SimError(404, "NotFoundError", f"Loading lora {name} failed: No adapter found for <path>") from None
        except (LoadError, ValueError) as error:
            raise SimError(500, "InternalServerError", f"Call to add_lora method failed: {error}") from None
        self.registry[name] = path

    def unload(self, name: str) -> None:
        """`/v1/unload_lora_adapter`: forgets the name, keeps the memory until it is needed. Raises SimError."""
        if name not in self.registry:
            raise SimError(404, "NotFoundError", f"The lora adapter '{name}' cannot be found.")
        del self.registry[name]

    @asynccontextmanager
    async def use(self, name: str) -> AsyncIterator[Loaded]:
        """Run a request: wait for a slot, read the adapter again if it fell out of memory. Raises EngineDeadError if its files are gone."""
        path = self.registry[name]
        async with self._slots:
            self.waiting += 1
            try:
                await self._slots.wait_for(lambda: name in self.running or len(self.running) < self.max_loras)
            finally:
                self.waiting -= 1
            self.running[name] += 1
        try:
            loaded = self._cache.get(name)
            if loaded is None or loaded.path != path:
                try:
                    loaded = await self._read(name, path)
                except (OSError, LoadError, ValueError) as error:
                    raise EngineDeadError(str(error)) from error
            self._cache.move_to_end(name)
            yield loaded
        finally:
            async with self._slots:
                self.running[name] -= 1
                if not self.running[name]:
                    del self.running[name]
                self._slots.notify_all()

    async def _read(self, name: str, path: str) -> Loaded:
        loaded = await asyncio.to_thread(read_adapter, name, path, self._max_lora_rank)
        self.loads += 1
        self._cache[name] = loaded
        self._cache.move_to_end(name)
        while len(self._cache) > self._max_cpu_loras:
            victim = next((n for n in self._cache if n not in self.running and n != name), None)
            if victim is None:
                break
            del self._cache[victim]
        return loaded

    def _unknown(self, name: str) -> SimError:
        return SimError(404, "NotFoundError", f"The model `{name}` does not exist. Valid aliases: {self.base_model}.", "model")
