"""How much of a machine's memory a replica takes there, and how much a budget gives. Pure.

An upper estimate: weights as they are computed with, the whole cache for keys and values, what a
step allocates, and the process itself. Must not read a file or the machine.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from cloudlm.control.needs import Batch, need_of
from cloudlm.core.deployment import DeploymentSpec, GroupSpec
from cloudlm.core.errors import BadSetting, BrokenModel
from cloudlm.core.figures import figures_of
from cloudlm.core.model import Manifest
from cloudlm.core.placement import Placement, Traffic
from cloudlm.core.settings import EngineSettings
from cloudlm.core.spec import VLLM

MIB = 2**20
PROCESS_BYTES = 400 * MIB
"""A worker without a model (Python, PyTorch): 260 MiB as measured of one asleep on a CPU, and some
room."""
# What the engine does on a CPU where its settings leave it open (engine/load.py): so much cache,
# and small models in float32.
_CACHE_MB = 512
_SMALL_PARAMETERS = 50_000_000
_NO_TRAFFIC = Traffic(0.0, 1, 1)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_AMOUNT = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?i?)b?", re.ASCII | re.IGNORECASE)
_SHARE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*%", re.ASCII)


def budget_of(text: str, machine_bytes: int) -> int:
    """The bytes that ``control.memory_budget`` gives: an amount (``24GiB``, ``16 GB``) or a share
    of the machine's memory (``75%``). 0 for an empty text or ``off``: no budget.
    Raises BadSetting."""
    text = text.strip()
    if text.lower() in ("", "off"):
        return 0
    share, amount = _SHARE.fullmatch(text), _AMOUNT.fullmatch(text)
    found = 0.0
    if share is not None and float(share[1]) <= 100:
        found = machine_bytes * float(share[1]) / 100
    elif amount is not None:
        found = float(amount[1]) * _UNITS.get(amount[2].lower(), 0)
    if found < MIB or not math.isfinite(found):
        raise BadSetting(
            f"control.memory_budget = {text[:40]!r} must be an amount of at least 1 MiB such as "
            "24GiB, or a share of the machine's memory up to 100 % such as 75%",
            param="control.memory_budget",
        )
    return int(found)


def replica_bytes(
    running: DeploymentSpec | GroupSpec,
    manifest: Manifest,
    config: Mapping[str, Any],
    defaults: EngineSettings,
) -> int:
    """The estimate for one replica of what runs, with this version and its ``config.json``.
    ``defaults`` are the engine's settings, of which ``options`` hold first."""
    ranks = _whole(running, "tensor_parallel", defaults.tensor_parallel)
    ranks *= _whole(running, "pipeline_parallel", defaults.pipeline_parallel)
    cache_mb = _whole(running, "kv_cache_mb", defaults.kv_cache_mb) or _CACHE_MB
    around = ranks * (PROCESS_BYTES + cache_mb * MIB)
    try:
        figures = figures_of(manifest, config, _precision(running, manifest, defaults))
    except BrokenModel:  # what has no such shape: its files, and no step that could be reckoned
        return around + manifest.size_bytes
    batch = Batch(
        _whole(running, "max_batch_tokens", defaults.max_batch_tokens),
        _whole(running, "max_batch_sequences", defaults.max_batch_sequences),
    )
    need = need_of(figures, Placement(), _NO_TRAFFIC, batch)
    return around + int(need.weights_bytes) + ranks * need.cpu_working_bytes


def amount_text(size_bytes: float) -> str:
    """For people: ``3.1 GiB``, or MiB below one GiB."""
    if size_bytes >= 2**30:
        return f"{size_bytes / 2**30:.1f} GiB"
    return f"{size_bytes / MIB:.0f} MiB"


def _precision(
    running: DeploymentSpec | GroupSpec, manifest: Manifest, defaults: EngineSettings
) -> str | None:
    """What the weights are held in; None: as the files have them."""
    for name, usual in (("precision", defaults.precision), ("dtype", defaults.dtype)):
        asked = str(running.options.get(name, usual))
        if asked != "auto":
            return asked
    small = manifest.parameters < _SMALL_PARAMETERS and running.engine != VLLM
    return "float32" if small and not manifest.quantisation else None


def _whole(running: DeploymentSpec | GroupSpec, option: str, default: int) -> int:
    """An option that is a whole number; what is none fails when the replica starts."""
    value = running.options.get(option, default)
    return value if type(value) is int and value > 0 else default
