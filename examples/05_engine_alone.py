"""The engine without any server: token ids in, token events out."""

import asyncio

from cloudlm.core.chat import Sampling
from cloudlm.core.settings import EngineSettings
from cloudlm.engine.api import GenerateRequest
from cloudlm.engine.load import load_engine
from cloudlm.registry.bundled import bundled_folder


async def main() -> None:
    engine = load_engine(bundled_folder(), EngineSettings(), max_waiting=8, progress=None)
    prompt = engine.tokenizer.encode("<|user|>How do I get a new card?<|end|><|assistant|>")
    request = GenerateRequest("example", tuple(prompt), Sampling(temperature=0, max_tokens=60))
    async for event in engine.submit(request):
        print(event.text, end="", flush=True)
        if event.finish_reason:
            print(f"\n(ended: {event.finish_reason})")
    await engine.close()


asyncio.run(main())
