"""cloudlm's own engine, through LocalEngine: scheduler, cache, sampling and streams included.

    python bench_cloudlm.py --precision bf16
    python bench_cloudlm.py --model model-copy --workloads W5,W5h --mode ngram
--precision int8-a8 and int4-a8 take the inputs of products in 8 bits too; --mode torch leaves the
native kernels out; --mode ngram guesses ahead (speculative=ngram). The prefix cache is always on.
Needs: cloudlm.
"""

import asyncio
import time
from pathlib import Path

import common

PRECISIONS = {
    "bf16": "bfloat16",
    "int8": "int8",
    "int8-a8": "int8-a8",
    "int4": "int4",
    "int4-a8": "int4-a8",
}


def main():
    a = common.args("bf16", list(PRECISIONS))
    rss = common.PeakRSS()
    began = time.perf_counter()
    from cloudlm.engine.importing import unsearched

    with unsearched("cloudlm.engine.load"):  # as the worker does
        import torch

        from cloudlm import __version__
        from cloudlm.core.chat import Sampling
        from cloudlm.core.settings import EngineSettings
        from cloudlm.engine.api import GenerateRequest
        from cloudlm.engine.load import load_engine

    settings = {
        "precision": PRECISIONS[a.precision],
        "kernels": "torch" if a.mode == "torch" else "native",
        "device": "cpu",
        "threads": a.threads,
        "kv_cache_mb": 2048,
        "max_batch_tokens": 2304,
        "max_batch_sequences": 16,
    }
    # Random weights soon run in circles, which are guessed at once: only where it is asked for.
    settings["speculative"] = "ngram" if a.mode == "ngram" else "off"
    engine = load_engine(Path(a.model), EngineSettings(**settings), max_waiting=64)
    load_s = time.perf_counter() - began  # from the start of the imports

    async def one(number, prompt, n_new, began):
        sampling = Sampling(temperature=0.0, max_tokens=n_new, ignore_eos=True)
        tokens, first = [], None
        async for event in engine.submit(GenerateRequest(f"r{number}", tuple(prompt), sampling)):
            tokens += event.token_ids
            if first is None and tokens:
                first = time.perf_counter() - began
        return tokens, first

    async def everyone(prompts, n_new):
        began = time.perf_counter()
        return await asyncio.gather(
            *(one(n, prompt, n_new, began) for n, prompt in enumerate(prompts))
        )

    def generate(prompts, n_new):
        answers = asyncio.run(everyone(prompts, n_new))
        stats = engine.stats()
        settings["drafted_accepted"] = [stats.drafted_tokens, stats.accepted_tokens]
        settings["kv_cache_resident_mb"] = _resident_mb(settings["kv_cache_mb"])
        return [tokens for tokens, _ in answers], answers[0][1] if len(prompts) == 1 else None

    settings |= {"torch": torch.__version__, "block_size": engine.info.block_size}
    common.run_all(a, "cloudlm", __version__, load_s, generate, rss, settings)
    asyncio.run(engine.close())


def _resident_mb(cache_mb):
    """How much of the cache's memory was touched until now: it is the one mapping of its size."""
    found, size_kb = 0, 0
    with Path("/proc/self/smaps").open() as file:
        for line in file:
            if line.startswith("Size:"):
                size_kb = int(line.split()[1])
            elif line.startswith("Rss:") and abs(size_kb / 1024 - cache_mb) < 0.05 * cache_mb:
                found += int(line.split()[1])
    return round(found / 1024)


if __name__ == "__main__":
    main()
