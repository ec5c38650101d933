"""Reads LoRA adapters: what is added to which projection of a network. Applies nothing.

An adapter adds ``scale * B(A(x))`` to what some projections answer (Hu et al., "LoRA", 2021). Files
are those of PEFT: ``adapter_config.json`` and ``adapter_model.safetensors``, which cannot run code.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from cloudlm.core.errors import BrokenModel, UnsafeModel, UnsupportedModel
from cloudlm.engine.architectures.base import Decoder
from cloudlm.engine.architectures.config import ModelConfig, read_json
from cloudlm.engine.architectures.gpt2 import Projection
from cloudlm.engine.formats.safetensors_files import StoredTensor, read_header

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
MAX_RANK = 512
_MAX_CONFIG_BYTES = 2**20
_FLOATS = ("F32", "F16", "BF16")
_TENSOR = re.compile(r"base_model\.model\.(.{1,400})\.lora_([AB])(?:\.default)?\.weight")
# Fields that say nothing about the sum, or that are read below.
_KNOWN = frozenset(
    (
        *("peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode"),
        *("r", "lora_alpha", "use_rslora", "target_modules", "exclude_modules", "lora_dropout"),
        *("bias", "init_lora_weights", "fan_in_fan_out", "auto_mapping", "peft_version"),
        *("layers_to_transform", "layers_pattern", "qalora_group_size", "ensure_weight_tying"),
    )
)
# Other ways to begin change the base's weights as well, which are not in the adapter's files.
_PLAIN_BEGINNINGS = (None, True, False, "gaussian", "eva")


@dataclass(frozen=True, slots=True)
class Pair:
    """What is added to one projection: ``down`` [rank, inputs] and ``up`` [outputs, rank], which
    has the scale in it."""

    down: Tensor
    up: Tensor


@dataclass(frozen=True, slots=True)
class Adapter:
    """Pairs by the path of their projection in the network."""

    pairs: Mapping[str, Pair]


@dataclass(frozen=True, slots=True)
class Site:
    """A projection that can be adapted."""

    inputs: int
    outputs: int


def sites(model: Decoder) -> dict[str, Site]:
    """The projections of ``model`` by path. Not the output projection, and no experts, whose rows
    are not those of the batch."""
    found: dict[str, Site] = {}
    for path, module in model.named_modules():
        if path == "lm_head" or ".experts." in path:
            continue
        if isinstance(module, nn.Linear):
            found[path] = Site(module.in_features, module.out_features)
        elif isinstance(module, Projection):
            found[path] = Site(module.weight.shape[0], module.weight.shape[1])
    return found


def read_adapter(
    folder: Path,
    known: Mapping[str, Site],
    parameter_name: Callable[[str], str | None],
    dtype: torch.dtype,
    device: torch.device,
) -> Adapter:
    """The adapter of ``folder``, checked against the projections ``known``.

    ``parameter_name`` is the network's (``Decoder``). Raises BrokenModel, UnsafeModel and
    UnsupportedModel naming file and fault.
    """
    weights = _weights_file(folder)
    scale, rank, targets = _read_config(folder)
    found: dict[str, dict[str, StoredTensor]] = {}
    for tensor in read_header(weights).values():
        path, side = _place(tensor, known, parameter_name, targets)
        found.setdefault(path, {})[side] = tensor
    if not found:
        raise BrokenModel(f"{WEIGHTS} holds no tensors")
    for path, sides in found.items():
        _check_shapes(path, sides, known[path], rank)
    pairs: dict[str, Pair] = {}
    try:
        with safe_open(weights, framework="pt") as opened:
            for path, sides in found.items():
                down, up = (opened.get_tensor(sides[side].name).float() for side in "AB")
                if not bool(down.isfinite().all() and up.isfinite().all()):
                    raise BrokenModel(f"{WEIGHTS}: the tensors of {path} are not finite numbers")
                pairs[path] = Pair(
                    down.to(device, dtype, copy=True), (up * scale).to(device, dtype, copy=True)
                )
    except (SafetensorError, OSError) as error:
        raise BrokenModel(f"{WEIGHTS} cannot be read: {error}") from error
    return Adapter(pairs)


def _weights_file(folder: Path) -> Path:
    """The two files must be plain ones that lie in the folder (or in the hub's cache)."""
    if not folder.is_dir():
        raise BrokenModel(f"{folder} is not a folder: expected {CONFIG} and {WEIGHTS} in it")
    root = folder.resolve()
    homes = [root]
    if root.parent.name == "snapshots":
        homes.append(root.parent.parent / "blobs")
    for name in (CONFIG, WEIGHTS):
        file = folder / name
        if not file.is_file():
            pickled = sorted(one.name for one in folder.glob("adapter_model.*") if one.is_file())
            if name == WEIGHTS and pickled:
                raise UnsafeModel(
                    f"{pickled[0]} may hold pickled data, which could run code, and is not read; "
                    "save the adapter as safetensors"
                )
            raise BrokenModel(f"{name} is missing in {folder}")
        if not any(file.resolve().is_relative_to(home) for home in homes):
            raise UnsafeModel(f"{name}: is a symbolic link that leaves the adapter's folder")
    return folder / WEIGHTS


def _read_config(folder: Path) -> tuple[float, int, tuple[str, ...] | None]:
    """Scale, rank, and the last parts of the names that are adapted (None: any)."""
    values = read_json(folder / CONFIG, max_bytes=_MAX_CONFIG_BYTES)
    config = ModelConfig(values, CONFIG)
    if config.raw("peft_type") != "LORA":
        raise UnsupportedModel(f"{CONFIG}: peft_type is {_shown(values, 'peft_type')}, not LORA")
    for name in sorted(values):
        if name not in _KNOWN and values[name]:
            raise UnsupportedModel(f"{CONFIG}: {name[:80]} = {_shown(values, name)} is not run")
    if config.raw("bias") not in (None, "none"):
        raise UnsupportedModel(f"{CONFIG}: bias = {_shown(values, 'bias')} is not run, only none")
    if config.raw("init_lora_weights") not in _PLAIN_BEGINNINGS:
        raise UnsupportedModel(
            f"{CONFIG}: init_lora_weights = {_shown(values, 'init_lora_weights')} changes the "
            "base's weights, too; convert the adapter to a plain LoRA"
        )
    rank = config.integer("r", high=MAX_RANK)
    scale = config.number("lora_alpha") / (
        math.sqrt(rank) if config.flag("use_rslora", False) else rank
    )
    targets = config.raw("target_modules")
    if isinstance(targets, list) and all(isinstance(one, str) for one in targets):
        return scale, rank, tuple(targets)
    if targets is not None and not isinstance(targets, str):
        raise config.fault("target_modules", "a list of names or a pattern")
    return scale, rank, None


def _shown(values: Mapping[str, Any], name: str) -> str:
    return repr(values.get(name))[:80]


def _place(
    tensor: StoredTensor,
    known: Mapping[str, Site],
    parameter_name: Callable[[str], str | None],
    targets: tuple[str, ...] | None,
) -> tuple[str, str]:
    """The projection that a tensor belongs to, and which side of it the tensor is."""
    where = f"{WEIGHTS}: tensor {tensor.name[:120]!r}"
    match = _TENSOR.fullmatch(tensor.name)
    if match is None:
        raise UnsupportedModel(f"{where} is not a projection's lora_A or lora_B")
    stored, side = match[1], match[2]
    name = parameter_name(f"{stored}.weight") or ""
    path = name.removesuffix(".weight")
    if path not in known:
        raise UnsupportedModel(
            f"{where}: {stored[-80:]} is not a projection of this model that can be adapted"
        )
    if targets is not None and not any(
        stored == target or stored.endswith(f".{target}") for target in targets
    ):
        raise BrokenModel(f"{where} is not among the target_modules of {CONFIG}")
    if tensor.dtype not in _FLOATS:
        raise UnsupportedModel(
            f"{where} is of type {tensor.dtype[:20]}; supported: {', '.join(_FLOATS)}"
        )
    return path, side


def _check_shapes(path: str, sides: Mapping[str, StoredTensor], site: Site, rank: int) -> None:
    for side, wanted in (("A", (rank, site.inputs)), ("B", (site.outputs, rank))):
        if side not in sides:
            raise BrokenModel(f"{WEIGHTS}: {path} has no lora_{side}")
        if sides[side].shape != wanted:
            raise BrokenModel(
                f"{WEIGHTS}: lora_{side} of {path} has shape {list(sides[side].shape)}, this "
                f"model and {CONFIG} ask for {list(wanted)}"
            )
