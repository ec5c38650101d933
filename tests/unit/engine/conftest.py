"""For the tensors: small random models, saved as folders, and a driver that feeds a runner step by
step. (The deciders' fake runner is tests/support/paged_fake_runner.py.)

Heavy imports happen inside the fixtures: tests of the deciders must stay quick.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from cloudlm.core.chat import Sampling
from cloudlm.engine.step import Chunk, Sampled, Step

GREEDY = Sampling(temperature=0.0)
SIZES = {
    "vocab_size": 307,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
GPT2_SIZES = {
    "vocab_size": 307,
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# name -> (transformers' configuration, what differs from SIZES)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama-tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama-wide-heads": ("LlamaConfig", {"head_dim": 32, "num_key_value_heads": 4}),
    "llama-biased": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama3-rope": ("LlamaConfig", {"rope_parameters": LLAMA3_ROPE}),
    "linear-rope": (
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}},
    ),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "mistral-window": ("MistralConfig", {"sliding_window": 9}),
    "qwen2": ("Qwen2Config", {}),
    "qwen2-window": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", {"head_dim": 32, "tie_word_embeddings": True}),
    "gpt2": ("GPT2Config", {}),
    "gpt2-by-layer": (
        "GPT2Config",
        {"scale_attn_by_inverse_layer_idx": True, "tie_word_embeddings": False},
    ),
}


@dataclass(frozen=True)
class SavedModel:
    """A transformers model and the folder that it was saved into."""

    folder: Path
    reference: Any

    def logits(self, token_ids: list[int]) -> Any:
        """transformers' logits [tokens, vocabulary] of a whole sequence."""
        import torch

        with torch.inference_mode():
            return self.reference(torch.tensor([token_ids])).logits[0].float()

    def greedy(self, token_ids: list[int], count: int) -> list[int]:
        """transformers' own greedy answer."""
        import torch

        prompt = torch.tensor([token_ids])
        with torch.inference_mode():
            answer = self.reference.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=False,
                max_new_tokens=count,
            )
        return [int(one) for one in answer[0, len(token_ids) :]]


def build_reference(config_name: str, changes: dict[str, Any]) -> Any:
    """A model with weights large enough that its answers are not all the same token."""
    import torch
    import transformers

    sizes = GPT2_SIZES if config_name == "GPT2Config" else SIZES
    config = getattr(transformers, config_name)(**{**sizes, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = "norm" in name or ".ln_" in name
            if parameter.ndim > 1:
                parameter.copy_(0.2 * noise)
            else:
                parameter.copy_(0.1 * noise + float(is_norm and name.endswith("weight")))
    return model


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], SavedModel]:
    """The model of that name in MODELS, made once per test run."""
    made: dict[str, SavedModel] = {}

    def make(name: str) -> SavedModel:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            reference = build_reference(*MODELS[name])
            reference.save_pretrained(folder)
            made[name] = SavedModel(folder, reference)
        return made[name]

    return make


@pytest.fixture(scope="session")
def make_runner() -> Callable[..., Any]:
    """Load a folder into a Runner: ``make_runner(folder, block_size=4, dtype="float32")``."""
    from cloudlm.core.settings import EngineSettings
    from cloudlm.engine.load import load_runner

    def make(folder: Path, **settings: Any) -> Any:
        values = {"block_size": 4, "kv_cache_mb": 2, "dtype": "float32", "device": "cpu"}
        return load_runner(
            folder, EngineSettings(**{**values, **settings}), (), lambda share, what: None
        )

    return make


@dataclass
class Driven:
    """One sequence that a Driver takes through a runner."""

    sequence_id: int
    prompt: list[int]
    sampling: Sampling = GREEDY
    index: int = 0
    prompt_logprobs: bool = False
    output: list[int] = field(default_factory=list)
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    sampled: list[Sampled] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.output


class Driver:
    """The least scheduler: chunks of prompts and single tokens in one batch, blocks handed out in
    a scrambled order so that no sequence lies in one piece."""

    def __init__(self, runner: Any, budget: int = 1000, seed: int = 0) -> None:
        self.runner = runner
        self.budget = budget
        self.sequences: list[Driven] = []
        self.free = list(range(runner.num_blocks))
        random.Random(seed).shuffle(self.free)

    def add(self, prompt: list[int], sampling: Sampling = GREEDY, **fields: Any) -> Driven:
        one = Driven(len(self.sequences), list(prompt), sampling, **fields)
        self.sequences.append(one)
        return one

    def chunk(self, one: Driven, count: int) -> Chunk:
        end = one.computed + count
        while len(one.blocks) * self.runner.block_size < end:
            one.blocks.append(self.free.pop())
        return Chunk(
            sequence_id=one.sequence_id,
            token_ids=tuple(one.tokens[one.computed : end]),
            start=one.computed,
            block_table=tuple(one.blocks),
            samples=end == len(one.tokens),
            sampling=one.sampling,
            prompt_token_ids=tuple(one.prompt),
            output_token_ids=tuple(one.output),
            index=one.index,
            prompt_logprobs=one.prompt_logprobs and one.computed < len(one.prompt),
        )

    def next_chunks(self, limit: int) -> Iterator[Chunk]:
        """One step's chunks for the sequences that have less than ``limit`` output tokens."""
        budget = self.budget
        unfinished = [one for one in self.sequences if len(one.output) < limit]
        for one in sorted(unfinished, key=lambda one: len(one.tokens) - one.computed):
            count = min(len(one.tokens) - one.computed, budget)
            if count > 0:
                budget -= count
                yield self.chunk(one, count)

    def step(self, limit: int) -> bool:
        """Run one step; False when all sequences have ``limit`` output tokens."""
        chunks = tuple(self.next_chunks(limit))
        if not chunks:
            return False
        by_id = {sampled.sequence_id: sampled for sampled in self.runner.run(Step(chunks))}
        for chunk in chunks:
            one = self.sequences[chunk.sequence_id]
            one.computed += len(chunk.token_ids)
            if chunk.sequence_id in by_id:
                sampled = by_id[chunk.sequence_id]
                one.sampled.append(sampled)
                if sampled.token_id is not None:
                    one.output.append(sampled.token_id)
        return True

    def run(self, count: int) -> None:
        """Generate until every sequence has ``count`` output tokens."""
        while self.step(count):
            pass

    def all_logits(self) -> list[Any]:
        """Feed all known tokens, nothing sampled; per sequence the logits of all positions."""
        import torch

        parts: list[list[Any]] = [[] for _ in self.sequences]
        while any(len(one.tokens) > one.computed for one in self.sequences):
            chunks = tuple(self.next_chunks(10**9))
            with torch.inference_mode():
                hidden = self.runner.hidden(chunks)
                logits = self.runner.model.logits(hidden)
            for chunk, rows in zip(
                chunks, logits.split([len(c.token_ids) for c in chunks]), strict=True
            ):
                self.sequences[chunk.sequence_id].computed += len(chunk.token_ids)
                parts[chunk.sequence_id].append(rows)
        return [torch.cat(rows) for rows in parts]


@pytest.fixture
def driver() -> type[Driver]:
    """The class Driver: ``driver(runner, budget=32)``."""
    return Driver
