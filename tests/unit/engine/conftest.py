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
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}


def long_rope(original: int, frequencies: int, **fields: Any) -> dict[str, Any]:
    """A Phi-3's fields for LongRoPE beyond ``original`` tokens."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0 + 0.1 * i for i in range(frequencies)],
        "long_factor": [1.5 + 2.0 * i for i in range(frequencies)],
        **fields,
    }
    return {"rope_parameters": rope, "original_max_position_embeddings": original}


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
    # Heads that the native kernels can run.
    "llama-heads-32": (
        "LlamaConfig",
        {"head_dim": 32, "attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3_ROPE},
    ),
    "llama-heads-32-plain": ("LlamaConfig", {"head_dim": 32}),
    "mistral-heads-32": ("MistralConfig", {"head_dim": 32, "sliding_window": 40}),
    "qwen2-heads-32": (
        "Qwen2Config",
        {
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "use_sliding_window": True,
            "sliding_window": 33,
            "max_window_layers": 1,
        },
    ),
    "phi3-heads-32": ("Phi3Config", {"num_attention_heads": 2, "num_key_value_heads": 1}),
    "gpt2": ("GPT2Config", {}),
    "gpt2-by-layer": (
        "GPT2Config",
        {"scale_attn_by_inverse_layer_idx": True, "tie_word_embeddings": False},
    ),
    "yarn-rope": ("LlamaConfig", {"rope_parameters": YARN_ROPE}),
    "dynamic-rope": (
        "LlamaConfig",
        {
            "max_position_embeddings": 64,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
        },
    ),
    "gemma2": (
        "Gemma2Config",
        {
            "head_dim": 32,
            "sliding_window": 9,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 10.0,
            "tie_word_embeddings": False,
        },
    ),
    "gemma2-tied": (
        "Gemma2Config",
        {"num_hidden_layers": 1, "head_dim": 16, "sliding_window": 150},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {
            "head_dim": 32,
            "sliding_window": 9,
            "query_pre_attn_scalar": 48,
            "tie_word_embeddings": False,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
            },
        },
    ),
    # What llama.cpp takes for granted, GGUF does not say.
    "gemma2-usual": (
        "Gemma2Config",
        {"head_dim": 32, "sliding_window": 9, "query_pre_attn_scalar": 32},
    ),
    "gemma3-usual": (
        "Gemma3TextConfig",
        {
            "head_dim": 32,
            "num_hidden_layers": 7,
            "sliding_window": 9,
            "query_pre_attn_scalar": 32,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
    "olmo2": ("Olmo2Config", {}),
    "phi3": ("Phi3Config", {"sliding_window": 19}),
    "phi4-mini": (
        "Phi3Config",
        {**long_rope(160, 4, partial_rotary_factor=0.5), "tie_word_embeddings": True},
    ),
    "phi4-mini-long": ("Phi3Config", long_rope(16, 4, partial_rotary_factor=0.5)),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "sliding_window": 9}),
    "qwen2-moe": (
        "Qwen2MoeConfig",
        {
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 48,
            "mlp_only_layers": [1],
            "use_sliding_window": True,
            "sliding_window": 9,
            "max_window_layers": 2,
        },
    ),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        {
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
            "decoder_sparse_step": 2,
            "head_dim": 32,
        },
    ),
    "gpt-neox": ("GPTNeoXConfig", {"intermediate_size": 256}),
    "gpt-neox-sequential": (
        "GPTNeoXConfig",
        {
            "use_parallel_residual": False,
            "attention_bias": False,
            "hidden_act": "gelu_fast",
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5000.0,
                "partial_rotary_factor": 0.5,
            },
        },
    ),
    "falcon-7b": ("FalconConfig", {}),
    "falcon-40b": ("FalconConfig", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-11b": (
        "FalconConfig",
        {
            "new_decoder_architecture": True,
            "num_kv_heads": 2,
            "num_ln_in_parallel_attn": 1,
            "tie_word_embeddings": False,
        },
    ),
    "falcon-sequential": (
        "FalconConfig",
        {"multi_query": False, "parallel_attn": False, "bias": True},
    ),
}
# Where the rotation goes by the longest sequence, transformers' by the sequence at hand: with these
# limits, tokens, both mean the same.
LONGEST = {"phi4-mini": 160, "dynamic-rope": 64}


@dataclass(frozen=True)
class SavedModel:
    """A transformers model and the folder that it was saved into."""

    folder: Path
    reference: Any
    max_model_len: int = 0

    def logits(self, token_ids: list[int]) -> Any:
        """transformers' logits [tokens, vocabulary] of a whole sequence."""
        import torch

        with torch.inference_mode():
            return self.reference(torch.tensor([token_ids])).logits[0].float()

    def greedy_along(self, token_ids: list[int], answer: list[int]) -> list[int]:
        """What transformers answers greedily at each position of ``answer``, given the tokens
        before it: equal to ``answer`` if and only if that is its own greedy answer."""
        logits = self.logits(token_ids + answer)
        return [int(one) for one in logits[len(token_ids) - 1 : -1].argmax(-1)]

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
            made[name] = SavedModel(folder, reference, LONGEST.get(name, 0))
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


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The native kernels of this machine on two threads, built once per test run."""
    from cloudlm.engine.native import build

    if build.find_compiler() is None or not build.instruction_sets():
        pytest.skip("no C++ compiler on PATH, or a CPU without AVX2")
    from cloudlm.engine.native.library import NativeKernels

    name = build.instruction_sets()[0]
    path = build.library(name, tmp_path_factory.mktemp("native"))
    assert path is not None, "the build failed: see the log"
    return NativeKernels(path, name, threads=2)


@dataclass
class Driven:
    """One sequence that a Driver takes through a runner."""

    sequence_id: int
    prompt: list[int]
    sampling: Sampling = GREEDY
    index: int = 0
    prompt_logprobs: bool = False
    adapter: str = ""
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
            adapter=one.adapter,
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
                logits = self.runner.logits(hidden)
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
