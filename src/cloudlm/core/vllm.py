"""Which of vLLM's settings a deployment may set, and how they are written on its command line.

An allow-list: what names a file, a plugin or code is not on it. Pure; control asks it before it
accepts a deployment, the worker when it starts vLLM.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from typing import Any

from cloudlm.core.errors import InvalidRequest

_WORD = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}", re.ASCII)
_Reader = Callable[[str], str | None]


def _whole(low: int, high: int = 1 << 31) -> _Reader:
    def read(text: str) -> str | None:
        fits = re.fullmatch(r"[0-9]{1,12}", text, re.ASCII) is not None
        return None if fits and low <= int(text) <= high else f"a whole number from {low} to {high}"

    return read


def _number(low: float, high: float) -> _Reader:
    def read(text: str) -> str | None:
        try:
            fits = low <= float(text) <= high
        except ValueError:
            fits = False
        return None if fits else f"a number from {low:g} to {high:g}"

    return read


def _one_of(*choices: str) -> _Reader:
    return lambda text: None if text in choices else f"one of {', '.join(choices)}"


def _word(text: str) -> str | None:
    return None if _WORD.fullmatch(text) else "a word of vLLM's, such as fp8"


_switch = _one_of("true", "false")

_OPTIONS: dict[str, _Reader] = {
    "block_size": _whole(1, 4096),
    "cpu_offload_gb": _number(0, 65536),
    "disable_custom_all_reduce": _switch,
    "dtype": _one_of("auto", "float32", "bfloat16", "float16"),
    "enable_chunked_prefill": _switch,
    "enable_expert_parallel": _switch,
    "enable_lora": _switch,
    "enable_prefix_caching": _switch,
    "enable_sleep_mode": _switch,
    "enforce_eager": _switch,
    "gpu_memory_utilization": _number(0.01, 1),
    "kv_cache_dtype": _word,
    "max_cpu_loras": _whole(1, 4096),
    "max_lora_rank": _one_of("1", "8", "16", "32", "64", "128", "256", "320", "512"),
    "max_loras": _whole(1, 4096),
    "max_model_len": _whole(1),
    "max_num_batched_tokens": _whole(1),
    "max_num_seqs": _whole(1, 65536),
    "pipeline_parallel_size": _whole(1, 1024),
    "quantization": _word,
    "reasoning_parser": _word,
    "runner": _one_of("auto", "generate", "pooling"),
    "seed": _whole(0),
    "tensor_parallel_size": _whole(1, 1024),
    "tool_call_parser": _word,
}
VLLM_OPTIONS = tuple(_OPTIONS)


def read_vllm_options(options: Mapping[str, Any]) -> dict[str, str]:
    """The options as text. Raises InvalidRequest for one that is not known, with the list of those
    that are, and for a value that does not fit."""
    read: dict[str, str] = {}
    for name, value in options.items():
        text = str(value).lower() if isinstance(value, bool) else str(value)
        reader = _OPTIONS.get(name)
        if reader is None:
            near = difflib.get_close_matches(name, VLLM_OPTIONS, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise InvalidRequest(
                f"the engine vllm has no option {name!r}{hint}; it takes: "
                f"{', '.join(VLLM_OPTIONS)}",
                param=f"options.{name}",
            )
        expected = reader(text)
        if expected is not None:
            raise InvalidRequest(
                f"options.{name} = {text[:80]!r} is not {expected}", param=f"options.{name}"
            )
        read[name] = text
    return read


def vllm_flags(options: Mapping[str, str]) -> list[str]:
    """Options that ``read_vllm_options`` gave as arguments of vLLM's server."""
    flags: list[str] = []
    for name, text in sorted(options.items()):
        flag = name.replace("_", "-")
        if _OPTIONS[name] is not _switch:
            flags += [f"--{flag}", text]
        elif text == "true" or not flag.startswith("disable-"):
            flags.append(f"--{flag}" if text == "true" else f"--no-{flag}")
    if "tool_call_parser" in options:
        flags.append("--enable-auto-tool-choice")
    return flags
