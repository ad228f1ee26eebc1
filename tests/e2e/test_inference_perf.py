"""Kubernetes' load generator, as its users run it: four adapters by `lora_traffic_split`, streamed, against what `up` starts.

It wants an environment of its own: `pip install inference-perf==0.7.0`, and its path in `LORA_EXTPROC_INFERENCE_PERF`; without that the test skips.
"""

import asyncio
import json
import os
from pathlib import Path

import aiohttp
import pytest
import yaml

from .conftest import NAMES, StackFactory

RATE, SECONDS = 60, 20  # requests a second, and for how long
ADAPTERS = NAMES[:4]
PATIENCE_S = 300.0  # it imports transformers, and waits a while at its end


def settings(address: str, directory: Path) -> dict[str, object]:
    """What is measured, and where it is written."""
    lengths = {"type": "fixed", "min": 16, "max": 16, "mean": 16, "total_count": RATE * SECONDS}
    return {
        "api": {"type": "completion", "streaming": True},
        "data": {"type": "random", "input_distribution": lengths, "output_distribution": lengths},
        "load": {
            "type": "constant",
            "stages": [{"rate": RATE, "duration": SECONDS}],
            "num_workers": 1,
            "lora_traffic_split": [{"name": name, "split": 1 / len(ADAPTERS)} for name in ADAPTERS],
        },
        "server": {"type": "vllm", "model_name": "base", "base_url": f"http://{address}"},
        "tokenizer": {"pretrained_model_name_or_path": str(directory / "tokenizer")},
        "storage": {"local_storage": {"path": str(directory / "reports")}},
    }


def write_tokenizer(directory: Path) -> None:
    """Three hundred words with a space between: it draws random ones, and gives up a request whose text does not come back as the same tokens."""
    words = {"[UNK]": 0, **{f"word{number}": number for number in range(1, 300)}}
    directory.mkdir()
    model = {"type": "WordLevel", "vocab": words, "unk_token": "[UNK]"}
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder"))
    tokenizer: dict[str, object] = {"version": "1.0", "added_tokens": [], **empty, "pre_tokenizer": {"type": "WhitespaceSplit"}, "model": model}
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]"}))


async def perform(program: str, address: str, directory: Path) -> str:
    """Run it; what it printed."""
    write_tokenizer(directory / "tokenizer")
    (directory / "settings.yaml").write_text(yaml.safe_dump(settings(address, directory)))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    command = (program, "--config_file", str(directory / "settings.yaml"))
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, env=environment)
    try:
        async with asyncio.timeout(PATIENCE_S):
            printed, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, printed.decode()[-4000:]
    return printed.decode()


@pytest.mark.parametrize("staged", [True, False], ids=["staged", "nothing_staged"])
async def test_every_request_of_inference_perf_succeeds(staged: bool, start: StackFactory, tmp_path: Path) -> None:
    """It looks the adapters up in the list of models first, and takes the numbers of tokens from the engine's `usage`."""
    program = os.environ.get("LORA_EXTPROC_INFERENCE_PERF")
    if not program:
        pytest.skip("LORA_EXTPROC_INFERENCE_PERF does not name an inference-perf")
    async with start() as stack, aiohttp.ClientSession() as session:
        for name in ADAPTERS if staged else ():
            async with session.post(f"http://{stack.address}/v1/completions", json={"model": name, "prompt": "hi"}) as response:
                assert response.status == 200
        printed = await perform(program, stack.address, tmp_path)
    assert "fell back to client tokenization" not in printed
    summary = json.loads(next((tmp_path / "reports").rglob("summary_lifecycle_metrics.json")).read_text())
    assert (summary["successes"]["count"], summary["failures"]["count"]) == (RATE * SECONDS, 0), printed[-4000:]
