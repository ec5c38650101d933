"""Which path computes a model: decided from settings and facts before its weights are read."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from cloudlm.core.errors import BadSetting
from cloudlm.core.settings import FLOATS, EngineSettings
from cloudlm.engine.architectures.base import Decoder
from cloudlm.engine.native import load_kernels
from cloudlm.engine.native.contract import Kernels
from cloudlm.engine.paths.gpu_choice import choose_operations, triton_obstacle
from cloudlm.engine.paths.native_path import why_not

_logger = logging.getLogger(__name__)

# Below this size a step is so short that PyTorch in float32 is as quick.
SMALL_PARAMETERS = 20_000_000


@dataclass(frozen=True, slots=True)
class Choice:
    """``kernels`` is None for PyTorch's modules; then ``dtype`` is the type that they are loaded
    in, and it is bfloat16 otherwise. ``precision`` names what the kernels hold weights in, and
    ``stored`` that of those which stay as they are stored, empty if none do. On a GPU
    ``operations`` names what computes there: see ``gpu_choice.choose_operations``."""

    dtype: torch.dtype
    precision: str
    kernels: Kernels | None = None
    operations: str = ""
    stored: str = ""


def choose_path(
    model: Decoder,
    settings: EngineSettings,
    *,
    parameters: int,
    device: torch.device,
    pick_dtype: Callable[[str], torch.dtype],
    threads: int,
    stored: str = "",
) -> Choice:
    """``kernels = auto`` takes the native ones where they can run the model and are quicker.

    ``pick_dtype`` turns a setting ``dtype`` into a type. ``stored`` is the precision in which the
    checkpoint's matrices are quantised, empty for plain ones and those that the kernels cannot
    take. Building the library, if it is not there yet, takes some seconds. Raises BadSetting for
    what was asked for and cannot be.
    """
    quantised = settings.precision.startswith("int")
    asked = _asked_dtype(settings)
    if device.type == "cuda":
        return _choose_on_gpu(model, _alike_on_gpu(settings), pick_dtype(asked))
    wanted = settings.kernels == "native" or quantised
    obstacle = _obstacle(model, device, asked)
    if wanted and obstacle is not None:
        raise BadSetting(
            f"{_reason(settings, quantised)} cannot be had: {obstacle}",
            param="precision" if quantised else "kernels",
        )
    kept = _kept(settings.precision, stored)
    # Quantised files name the type of what they were made from, which no longer matters.
    free = wanted or (kept != "" and asked == "auto" and device.type == "cpu")
    dtype = torch.bfloat16 if free else pick_dtype(asked)
    small = parameters <= SMALL_PARAMETERS
    if not wanted and (settings.kernels == "torch" or obstacle or dtype != torch.bfloat16 or small):
        _logger.info("native_not_used", extra={"fields": {"obstacle": obstacle, "small": small}})
        dtype = pick_dtype(asked)
        return Choice(dtype, str(dtype).removeprefix("torch."))
    precision = settings.precision if quantised else "bfloat16"
    kernels = load_kernels(threads, instructions="torch" if settings.kernels == "torch" else None)
    if kernels.name == "torch":
        if settings.kernels == "native":
            raise BadSetting(
                "kernels is native, but the library can be neither found nor built here (the log "
                "says why); install a C++ compiler or set kernels to auto",
                param="kernels",
            )
        if not quantised:
            return Choice(dtype, precision)
        if settings.deterministic:
            raise BadSetting(
                f"deterministic = true with precision = {settings.precision} needs the native "
                "library, which is refused or cannot be had here (the log says why); install a C++ "
                "compiler, or set one of them to its default",
                param="deterministic",
            )
        _logger.warning("quantised_without_library", extra={"fields": {"precision": precision}})
    fields = {"name": kernels.name, "precision": precision, "stored": kept}
    _logger.info("kernels", extra={"fields": fields})
    return Choice(dtype, precision, kernels, stored=kept)


def _kept(asked: str, stored: str) -> str:
    """The precision of matrices that stay as they are stored: those of as many bits as asked for,
    with the asked precision of inputs."""
    if asked == "auto":
        return stored
    return asked if stored.partition("-")[0] == asked.partition("-")[0] else ""


def _choose_on_gpu(model: Decoder, settings: EngineSettings, dtype: torch.dtype) -> Choice:
    obstacle = triton_obstacle()
    operations = choose_operations(model, settings, obstacle)
    quantised = settings.precision.startswith("int")
    precision = settings.precision if quantised else str(dtype).removeprefix("torch.")
    if operations != "triton":
        _logger.warning("triton_not_used", extra={"fields": {"obstacle": obstacle}})
    return Choice(dtype, precision, operations=operations)


def _alike_on_gpu(settings: EngineSettings) -> EngineSettings:
    """On GPUs batches of one shape exist on PyTorch's modules alone. Raises BadSetting."""
    if not settings.deterministic:
        return settings
    if settings.kernels == "native" or settings.precision.startswith("int"):
        raise BadSetting(
            "deterministic = true is not possible on a GPU with kernels = native or a quantised "
            "precision; leave both at auto",
            param="deterministic",
        )
    return replace(settings, kernels="torch")


def _asked_dtype(settings: EngineSettings) -> str:
    if settings.precision == "auto":
        return settings.dtype
    numbers = settings.precision if settings.precision in FLOATS else "bfloat16"
    if settings.dtype not in ("auto", numbers):
        raise BadSetting(
            f"precision is {settings.precision} and dtype is {settings.dtype}: set one of them",
            param="precision",
        )
    return numbers


def _obstacle(model: Decoder, device: torch.device, dtype: str) -> str | None:
    """Why the kernels cannot run this model here; None if they can."""
    if device.type != "cpu":
        return f"the kernels run on CPUs, and device is {device.type}"
    if dtype not in ("auto", "bfloat16"):
        return f"the kernels compute in bfloat16, and dtype is {dtype}"
    return why_not(model)


def _reason(settings: EngineSettings, quantised: bool) -> str:
    return f"precision = {settings.precision}" if quantised else "kernels = native"
