"""Both kinds of operations: PyTorch's, and Triton's in its interpreter, which runs on CPU tensors.

Triton decides when its kernels are imported whether they are interpreted, so the environment is
set here, before any test of this folder imports them.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest

from cloudlm.engine.gpu.torch_ops import TorchOperations

os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def triton_operations() -> Any:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed: pip install 'cloudlm[gpu]'")
    from cloudlm.engine.gpu.triton_ops import TritonOperations

    return TritonOperations(multiprocessors=4)


@pytest.fixture(params=["torch", "triton"])
def operations(request: pytest.FixtureRequest) -> Any:
    if request.param == "torch":
        return TorchOperations()
    return request.getfixturevalue("triton_operations")
