"""What a manifest says about a model: architecture, precision, parameters, context, task, licence.

Derived from config.json, the safetensors headers and the model card. Must not read weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cloudlm.core.architectures import USUAL_CONTEXTS
from cloudlm.core.errors import BrokenModel, UnsupportedModel
from cloudlm.core.model import ADAPTER
from cloudlm.registry.quantisation import Storage, read_storage
from cloudlm.registry.safetensors_header import TensorFacts
from cloudlm.registry.stores.failures import storage_failures

_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
_TASKS = (
    ("ForCausalLM", "generate"),
    ("LMHeadModel", "generate"),
    ("ForConditionalGeneration", "generate"),
    ("ForSequenceClassification", "classify"),
    ("ForTokenClassification", "tag"),
    ("ForMaskedLM", "fill"),
    ("Model", "embed"),
)
_LICENCE_TITLES = (
    (r"apache license\s*,?\s*version 2", "apache-2.0"),
    (r"\bmit license\b", "mit"),
    (r"gnu affero general public license\s*version 3", "agpl-3.0"),
    (r"gnu lesser general public license\s*version 3", "lgpl-3.0"),
    (r"gnu general public license\s*version 3", "gpl-3.0"),
    (r"bsd 3-clause", "bsd-3-clause"),
    (r"creative commons attribution 4\.0", "cc-by-4.0"),
)
_CARD_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """``context_length`` in tokens, 0 if the configuration gives none (never for ``generate``)."""

    architecture: str
    storage: Storage
    context_length: int
    task: str
    licence: str | None


def read_facts(
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorFacts],
    texts: Mapping[str, Path],
    weights_format: str = "safetensors",
) -> ModelFacts:
    """Facts from config.json, the tensors and the text files. Raises BrokenModel."""
    architecture = _architecture(config)
    task = next((task for end, task in _TASKS if architecture.endswith(end)), "unknown")
    context = _context_length(config) or USUAL_CONTEXTS.get(architecture, 0)
    if task == "generate" and not context:
        raise BrokenModel(
            "config.json: gives no context length; expected max_position_embeddings or n_positions"
        )
    return ModelFacts(
        architecture=architecture,
        storage=read_storage(config, tensors, weights_format),
        context_length=context,
        task=task,
        licence=_licence(texts),
    )


def read_adapter_facts(
    config: Mapping[str, Any], tensors: Mapping[str, TensorFacts], texts: Mapping[str, Path]
) -> tuple[ModelFacts, str]:
    """Facts of a LoRA adapter, and the model that it was made for. Raises BrokenModel and
    UnsupportedModel (PEFT knows other kinds)."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UnsupportedModel(
            f"adapter_config.json: peft_type is {str(kind)[:40]!r}; only LORA adapters are served"
        )
    base = config.get("base_model_name_or_path")
    facts = ModelFacts(
        architecture="LoRA",
        storage=read_storage({}, tensors, "safetensors"),
        context_length=0,
        task=ADAPTER,
        licence=_licence(texts),
    )
    return facts, base[:256] if isinstance(base, str) else ""


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    good = (
        isinstance(names, list)
        and bool(names)
        and all(isinstance(name, str) and re.fullmatch(r"\w{1,100}", name) for name in names)
    )
    if not good:
        raise BrokenModel(
            "config.json: 'architectures' is missing or not a list of names; expected such as "
            '["LlamaForCausalLM"]'
        )
    return str(config["architectures"][0])


def _context_length(config: Mapping[str, Any]) -> int:
    inner = config.get("text_config")
    for source in (config, inner if isinstance(inner, dict) else {}):
        for key in _CONTEXT_KEYS:
            if key not in source or source[key] is None:
                continue
            value = source[key]
            if type(value) is not int or not 0 < value <= 1 << 31:
                raise BrokenModel(f"config.json: {key} = {str(value)[:40]} is not a length")
            return value
    return 0


def _licence(texts: Mapping[str, Path]) -> str | None:
    """The model card's word, or what the licence file looks like."""
    card = next((path for name, path in texts.items() if name.lower() == "readme.md"), None)
    named = _licence_in_card(_beginning(card)) if card is not None else None
    if named:
        return named
    for name, path in sorted(texts.items()):
        if "/" not in name and name.lower().startswith(("license", "licence", "copying")):
            text = " ".join(_beginning(path).lower().split())[:2000]
            known = [word for title, word in _LICENCE_TITLES if re.search(title, text)]
            return known[0] if known else f"see {name}"
    return None


def _licence_in_card(text: str) -> str | None:
    """``license:`` in the front matter, which is YAML between two lines of dashes."""
    front = re.match(r"\ufeff?---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    if front is None:
        return None
    lines = re.findall(r"(?m)^(license|license_name):[ \t]*(\S.*?)[ \t\r]*$", front[1])
    fields = {key: value.strip("\"'")[:100] for key, value in lines}
    name = fields.get("license")
    return fields.get("license_name", name) if name in ("other", "unknown") else name


def _beginning(path: Path) -> str:
    with storage_failures(path, "read"), path.open("rb") as stream:
        return stream.read(_CARD_BYTES).decode(errors="replace")
