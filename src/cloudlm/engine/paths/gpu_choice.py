"""Which operations compute a model on a GPU: decided before its weights are read."""

from __future__ import annotations

import importlib.util
import os
import shutil

import torch

from cloudlm.core.errors import BadSetting
from cloudlm.core.settings import EngineSettings
from cloudlm.engine.architectures.base import Decoder
from cloudlm.engine.gpu.accelerator import Accelerator
from cloudlm.engine.gpu.contract import Operations
from cloudlm.engine.gpu.torch_ops import TorchOperations
from cloudlm.engine.paths.gpu_path import why_not

_COMPILERS = ("cc", "gcc", "clang")


def cuda_obstacle() -> str | None:
    """Why there is no CUDA here; None if there is."""
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return (
            f"version {torch.__version__} was built without it; install a CUDA build of PyTorch "
            "(https://pytorch.org/get-started), or set device to cpu"
        )
    return (
        f"it was built for CUDA {torch.version.cuda} and finds no device; check the driver with "
        "nvidia-smi and CUDA_VISIBLE_DEVICES, or set device to cpu"
    )


def triton_obstacle() -> str | None:
    """Why Triton's kernels cannot be had here; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install 'cloudlm[gpu]'"
    if "CC" not in os.environ and not any(map(shutil.which, _COMPILERS)):
        return "Triton needs a C compiler, and none is on PATH; install gcc"
    return None


def choose_operations(model: Decoder, settings: EngineSettings, obstacle: str | None) -> str:
    """``triton``, ``torch`` (quantised weights without Triton), or an empty text for PyTorch's
    modules as they are. ``obstacle`` is what stands against Triton. Raises BadSetting for what was
    asked for and cannot be."""
    quantised = settings.precision.startswith("int")
    lacking = why_not(model, settings.precision) if quantised else None
    if lacking is not None:
        raise BadSetting(
            f"precision = {settings.precision} cannot be had on a GPU: {lacking}",
            param="precision",
        )
    if settings.kernels == "native" and obstacle is not None:
        raise BadSetting(
            f"kernels = native cannot be had on this GPU: {obstacle}, or set kernels to auto",
            param="kernels",
        )
    if settings.kernels != "torch" and obstacle is None:
        return "triton"
    return "torch" if quantised else ""


def make_operations(name: str, accelerator: Accelerator) -> Operations:
    """The operations that ``choose_operations`` named."""
    if name == "torch":
        return TorchOperations()
    from cloudlm.engine.gpu.triton_ops import TritonOperations

    return TritonOperations(accelerator.multiprocessors)
