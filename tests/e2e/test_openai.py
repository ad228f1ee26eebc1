"""The real `openai` client, as users have it: it sends `messages` before `model`, and raises its own errors."""

import hashlib
from pathlib import Path

import openai
import pytest

from .client import weights_of
from .conftest import StackFactory


async def test_the_openai_client_is_served(start: StackFactory, origin: Path) -> None:
    """Chat and completions, streamed and not, the model list, and a typed error."""
    async with start(nodes=1) as stack, openai.AsyncOpenAI(base_url=f"http://{stack.address}/v1", api_key="none", max_retries=0) as client:
        weights = weights_of(origin, "team/a")
        assert len(weights) == hashlib.sha256().digest_size * 2
        chat = await client.chat.completions.create(model="team/a", messages=[{"role": "user", "content": "hi"}])
        assert chat.system_fingerprint == weights
        stream = await client.chat.completions.create(model="team/a", messages=[{"role": "user", "content": "hi"}], stream=True)
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        assert weights in text
        completion = await client.completions.create(model="team/a", prompt="hi")
        assert weights in completion.choices[0].text
        assert "team/a" in [model.id for model in (await client.models.list()).data]
        with pytest.raises(openai.NotFoundError) as caught:
            await client.chat.completions.create(model="team/none", messages=[{"role": "user", "content": "hi"}])
        assert caught.value.code == "model_not_found"
