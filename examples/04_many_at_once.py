"""Sixteen questions at once: the engine computes them in the same steps."""

import asyncio
import time

from cloudlm import AsyncClient

QUESTIONS = [
    "Where is my card?",
    "My transfer is pending",
    "Which currencies can I hold?",
    "I lost my phone",
]


async def main() -> None:
    async with AsyncClient() as cloud, cloud.openai() as inference:

        async def ask(question: str) -> int:
            answer = await inference.chat.completions.create(
                model="bank-helper", messages=[{"role": "user", "content": question}]
            )
            return answer.usage.completion_tokens

        began = time.perf_counter()
        tokens = sum(await asyncio.gather(*(ask(question) for question in QUESTIONS * 4)))
        print(f"{tokens} tokens in {time.perf_counter() - began:.2f} s")


asyncio.run(main())
