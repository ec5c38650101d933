"""Random LoRA adapters as PEFT saves them, and the same merged into the weights."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any


def write(folder: Path, tensors: dict[str, Any], **config: Any) -> Path:
    """An adapter of these tensors in ``folder``."""
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    values = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "bias": "none", **config}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def adapt(reference: Any, targets: list[str], folder: Path, seed: int, **config: Any) -> Any:
    """Write a random adapter into ``folder``; the reference with its weights merged."""
    import torch

    rank, alpha = config.setdefault("r", 4), config.setdefault("lora_alpha", 6)
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    generator = torch.Generator().manual_seed(seed)
    merged, tensors = copy.deepcopy(reference), {}
    for path, module in merged.named_modules():
        if path.split(".")[-1] not in targets:
            continue
        conv = type(module).__name__ == "Conv1D"
        outputs, inputs = module.weight.T.shape if conv else module.weight.shape
        down = 0.2 * torch.randn((rank, inputs), generator=generator)
        up = 0.2 * torch.randn((outputs, rank), generator=generator)
        tensors[f"base_model.model.{path}.lora_A.weight"] = down
        tensors[f"base_model.model.{path}.lora_B.weight"] = up
        with torch.no_grad():
            module.weight += scale * ((up @ down).T if conv else up @ down)
    assert tensors
    write(folder, tensors, target_modules=targets, **config)
    return merged
