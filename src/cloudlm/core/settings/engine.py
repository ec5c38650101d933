"""Settings of what computes in a replica: our engine, or vLLM.

Declarations, and the words for precisions; ``reading`` parses, the engine acts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cloudlm.core.errors import BadSetting
from cloudlm.core.settings.declare import setting

FLOATS = ("float32", "bfloat16", "float16")
PRECISIONS = ("auto", *FLOATS, "int8", "int8-a8", "int4", "int4-a8")


@dataclass(frozen=True)
class EngineSettings:
    """Defaults of the engine; a deployment's ``options`` override them."""

    dtype: str = setting(
        "auto",
        "Precision of the weights in memory.",
        choices=("auto", *FLOATS),
    )
    precision: str = setting(
        "auto",
        "Numbers that the weights are held in; auto is dtype's, and if that is auto too the "
        "version's own. a8, on CPUs: inputs in 8 bits too.",
        choices=PRECISIONS,
    )
    kernels: str = setting(
        "auto",
        "What computes; auto is our own kernels (C++ on a CPU, Triton on a GPU) where they are "
        "quicker and can be had.",
        choices=("auto", "native", "torch"),
    )
    device: str = setting("auto", "Where the model runs.", choices=("auto", "cpu", "cuda"))
    max_model_len: int = setting(
        0, "Longest prompt plus answer, tokens; 0 takes the model's own context.", low=0
    )
    kv_cache_mb: int = setting(
        0,
        "Memory for keys and values in each process, MiB; 0 takes 512 on a CPU, and on a GPU what "
        "gpu_memory_utilization leaves.",
        low=0,
    )
    gpu_memory_utilization: float = setting(
        0.9, "Share of a GPU's memory for weights, cache and work.", low=0.05, high=1.0
    )
    cuda_graphs: bool = setting(
        True, "Record decoding steps as CUDA graphs at the start; they begin quicker afterwards."
    )
    block_size: int = setting(16, "Tokens in one cache block.", low=1, high=256)
    max_batch_tokens: int = setting(
        1024, "Tokens computed in one step, prefill chunks included.", low=16
    )
    max_batch_sequences: int = setting(64, "Sequences in one step.", low=1, high=4096)
    deterministic: bool = setting(
        False,
        "Make a request's tokens independent of what else is in the batch, at some cost in speed.",
    )
    speculative: str = setting(
        "off",
        "Guess tokens that repeat what stands before and check several in one step; the answer "
        "is the same.",
        choices=("off", "ngram"),
    )
    num_speculative_tokens: int = setting(8, "Tokens guessed at a time, at most.", low=1, high=64)
    prompt_lookup_max: int = setting(
        5, "Last tokens, at most, by which the place to copy from is chosen.", low=1, high=64
    )
    prompt_lookup_min: int = setting(
        2, "Last tokens that must stand before for a guess to be made.", low=1, high=64
    )
    tool_parser: str = setting(
        "auto",
        "Form in which the model writes tool calls; auto reads it off the chat template.",
        choices=("auto", "none", "hermes", "llama3", "mistral"),
    )
    reasoning_parser: str = setting(
        "auto",
        "Whether the reasoning between think tags is split off; auto reads it off the chat "
        "template.",
        choices=("auto", "none", "think"),
    )
    tensor_parallel: int = setting(
        1,
        "Processes that share every layer of the model, each with a part of its heads and columns.",
        low=1,
        high=64,
    )
    pipeline_parallel: int = setting(
        1, "Stages of layers, in processes of their own, that follow each other.", low=1, high=64
    )
    threads: int = setting(
        0,
        "CPU threads of the engine, all its processes together; 0 takes all cores, one for a very "
        "small model.",
        low=0,
        high=1024,
    )
    packed_cache_mb: int = setting(
        16384,
        "Disk for weights in the CPU kernels' order, MiB, in cache/packed of home: the next start "
        "maps them, and replicas share their memory; 0 keeps none.",
        low=0,
    )
    pooling: str = setting(
        "last",
        "What becomes of a text's hidden states in /v1/embeddings: the last one, or their mean.",
        choices=("last", "mean"),
    )
    adapters: str = setting(
        "", "LoRA adapters to load at start: name=address, several separated by commas."
    )


@dataclass(frozen=True)
class VllmSettings:
    """vLLM as the engine of a replica (``engine: vllm`` in a deployment)."""

    python: str = setting(
        "", "The Python of an environment in which vLLM is installed, such as /opt/vllm/bin/python."
    )
    start_timeout_s: float = setting(
        900.0, "Longest wait for vLLM to load a model, seconds.", low=1.0
    )


def check_precision(value: Any, source: str) -> None:
    """Raise BadSetting, naming the known ones, unless ``value`` is an engine's ``precision``."""
    if value not in PRECISIONS:
        shown = repr(value)[:80]
        raise BadSetting(
            f"{source} = {shown} is not known; there is: {', '.join(PRECISIONS)}", param="precision"
        )
