"""Makes a model folder out of a GGUF file: the file itself, and beside it the configuration and the
tokenizer that it holds, in the form that everything else reads."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cloudlm.core.errors import UnsupportedModel
from cloudlm.registry.gguf.config import config_of
from cloudlm.registry.gguf.header import GgufHeader, read_gguf
from cloudlm.registry.gguf.settings import Settings
from cloudlm.registry.gguf.vocabulary import tokenizer_of
from cloudlm.registry.stores.failures import storage_failures

MODEL = "model.gguf"
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def write_model_folder(
    gguf: Path, folder: Path, beside: Mapping[str, Path], name: str | None = None
) -> str | None:
    """Fill the empty ``folder``; the answer is the licence that the file names, if any.

    ``beside`` are text files that come with it, by name; they count more than what the file holds.
    ``name`` is the file's in errors. Raises BrokenModel, UnsupportedModel, StorageFailed.
    """
    header = read_gguf(gguf, name)
    split = Settings(header, "split.").integer("count", 1, low=0, high=1 << 16)
    if split > 1:
        raise UnsupportedModel(
            f"{header.name}: is one of {split} parts; join them first: "
            "llama-gguf-split --merge FIRST-PART.gguf WHOLE.gguf"
        )
    config = config_of(header, gguf)
    found: dict[str, dict[str, Any]] = {}
    if "tokenizer.json" not in beside:
        found = tokenizer_of(header, config["vocab_size"])
    with storage_failures(folder, "write"):
        for file, body in {**found, "config.json": config}.items():
            if file == "config.json" or file not in beside:
                (folder / file).write_text(json.dumps(body, ensure_ascii=False), encoding="utf-8")
        for file, source in beside.items():
            shutil.copyfile(source, folder / file)
        _place(gguf, folder / MODEL)
    return _licence(header)


def _place(source: Path, target: Path) -> None:
    """Without a second copy where the file system can."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def _licence(header: GgufHeader) -> str | None:
    licence = header.settings.get("general.license")
    return licence[:100] if isinstance(licence, str) and licence else None


def companions(names: Sequence[str]) -> list[str]:
    """Of the text files in a GGUF file's folder those that belong to the model."""
    known = (*_TOKENIZER, "special_tokens_map.json", "chat_template.jinja", "README.md")
    return [
        name
        for name in names
        if name in known or ("/" not in name and name.lower().startswith(("license", "licence")))
    ]
