"""Numbers on their way to a device, without waiting for it."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def to_device(values: NDArray[np.generic], device: torch.device) -> Tensor:
    """``values`` as a tensor on ``device``. On a GPU the copy begins from pinned memory and is not
    waited for; PyTorch's allocator keeps that memory until the copy is done."""
    plain = torch.from_numpy(np.ascontiguousarray(values))
    if device.type != "cuda":
        return plain.to(device)
    return plain.pin_memory().to(device, non_blocking=True)
