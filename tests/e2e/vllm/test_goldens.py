"""The verdicts that are kept beside the adapters that PEFT wrote, asked of a real vLLM again."""

import asyncio
from pathlib import Path

from tests.golden.peft.judge import ask_all, kept, write_bases


async def test_a_real_engine_judges_every_golden_as_it_did(vllm_python: Path, tmp_path: Path) -> None:
    """Status, words, and whether the adapter changes the answer: what tests/golden compares the simulated engine and the stager's check with."""
    await asyncio.to_thread(write_bases, vllm_python, tmp_path)
    said, wanted = await ask_all(vllm_python, tmp_path), kept()
    assert said.keys() == wanted.keys()
    for engine, verdicts in wanted.items():
        assert {name: (verdict, said[engine].get(name)) for name, verdict in verdicts.items() if said[engine].get(name) != verdict} == {}
