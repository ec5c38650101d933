"""LoRA adapters as PEFT saves them, for the starter model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file


def write_adapter(folder: Path, *, seed: int = 1, base: str = "bank-helper") -> Path:
    """An adapter that changes what the starter model says: rank 4 on one projection."""
    folder.mkdir()
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": 4,
        "lora_alpha": 64,
        "target_modules": ["down_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    random = np.random.default_rng(seed)
    place = "base_model.model.model.layers.1.mlp.down_proj"
    tensors = {
        f"{place}.lora_A.weight": random.normal(size=(4, 768)).astype(np.float32),
        f"{place}.lora_B.weight": random.normal(size=(256, 4)).astype(np.float32),
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder
