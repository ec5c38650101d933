"""First engine benchmark: tokens per second at 1 and at 16 concurrent requests.

    python bench/engine/run.py [--rounds 3] [--threads 2] [--output 128] [--no-peer]

One JSON line per measurement on standard output: the starter model and a Qwen3-shaped model of
0.1 billion random parameters, each with our engine and beside it `transformers` generate on the
same prompts (greedy, exact token counts, the same dtype and threads), in turn in every round, so
that a machine whose speed drifts does so for both. Bounded by the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

PROMPT_TOKENS = 128

Run = Callable[[list[list[int]]], float]  # prompts to the seconds that their answers took


def main() -> int:
    options = _options()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    from cloudlm.registry.bundled import bundled_folder

    with tempfile.TemporaryDirectory() as scratch:
        models = {"bank-helper": bundled_folder(), "qwen3-0.1b": _make_qwen3(Path(scratch))}
        for name, folder in models.items():
            with ExitStack() as stack:
                for line in _measure(name, folder, options, stack):
                    print(json.dumps(line), flush=True)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Engine benchmark")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--output", type=int, default=128, help="tokens generated per request")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--no-peer", action="store_true", help="leave transformers out")
    return parser.parse_args()


def _make_qwen3(folder: Path) -> Path:
    """A model folder with random weights; its shape is Qwen3's, its size 0.1 billion."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=768,
        intermediate_size=2304,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        head_dim=64,
        vocab_size=16_000,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=1,
    )
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer = Tokenizer(BPE(vocab={f"t{i}": i for i in range(16_000)}, merges=[]))
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def _measure(
    name: str, folder: Path, options: argparse.Namespace, stack: ExitStack
) -> list[dict[str, Any]]:
    runners = {"cloudlm": _ours(folder, options, stack)}
    if not options.no_peer:
        runners["transformers"] = _transformers(folder, options)
    vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
    lines = []
    for concurrent in (1, 16):
        seconds: dict[str, list[float]] = {engine: [] for engine in runners}
        for round_number in range(options.rounds + 1):
            prompts = _prompts(concurrent, vocab_size, seed=round_number)
            for engine, run in runners.items():
                elapsed = run(prompts)
                if round_number:  # the first round warms up
                    seconds[engine].append(elapsed)
        for engine, taken in seconds.items():
            rates = [concurrent * options.output / one for one in taken]
            lines.append(
                {
                    "bench": "engine",
                    "model": name,
                    "engine": engine,
                    "dtype": options.dtype,
                    "threads": options.threads,
                    "concurrent": concurrent,
                    "prompt_tokens": PROMPT_TOKENS,
                    "output_tokens": options.output,
                    "tokens_per_s": round(statistics.median(rates), 1),
                    "tokens_per_s_min": round(min(rates), 1),
                    "tokens_per_s_max": round(max(rates), 1),
                    "rounds": options.rounds,
                }
            )
    return lines


def _prompts(count: int, vocab_size: int, seed: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(10, vocab_size) for _ in range(PROMPT_TOKENS)] for _ in range(count)]


def _ours(folder: Path, options: argparse.Namespace, stack: ExitStack) -> Run:
    from cloudlm.core.chat import Sampling
    from cloudlm.core.settings import EngineSettings
    from cloudlm.engine.api import GenerateRequest
    from cloudlm.engine.load import load_engine

    settings = EngineSettings(dtype=options.dtype, threads=options.threads, kv_cache_mb=512)
    engine = load_engine(folder, settings, max_waiting=64)
    stack.callback(lambda: asyncio.run(engine.close()))
    sampling = Sampling(temperature=0.0, max_tokens=options.output, ignore_eos=True)

    async def one(number: int, prompt: list[int]) -> int:
        request = GenerateRequest(f"r{number}", tuple(prompt), sampling)
        return sum([len(event.token_ids) async for event in engine.submit(request)])

    async def everyone(prompts: list[list[int]]) -> list[int]:
        return await asyncio.gather(*(one(n, prompt) for n, prompt in enumerate(prompts)))

    def run(prompts: list[list[int]]) -> float:
        began = time.perf_counter()
        counts = asyncio.run(everyone(prompts))
        elapsed = time.perf_counter() - began
        if counts != [options.output] * len(prompts):
            raise SystemExit(f"wrong token counts: {counts}")
        return elapsed

    return run


def _transformers(folder: Path, options: argparse.Namespace) -> Run:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(options.threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, options.dtype))
    model.eval()

    def run(prompts: list[list[int]]) -> float:
        ids = torch.tensor(prompts)
        began = time.perf_counter()
        with torch.inference_mode():
            answer = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=options.output,
                min_new_tokens=options.output,
                pad_token_id=0,
            )
        elapsed = time.perf_counter() - began
        if answer.shape[1] != PROMPT_TOKENS + options.output:
            raise SystemExit(f"wrong token count: {tuple(answer.shape)}")
        return elapsed

    return run


if __name__ == "__main__":
    sys.exit(main())
