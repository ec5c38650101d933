"""What every format offers to the loader: a model's tensors, as numbers and, where the kernels can
take them as they are, as codes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from cloudlm.core.errors import BrokenModel, UnsupportedModel
from cloudlm.engine.native.packing import Int4Weight, Int8Weight

Codes = Int4Weight | Int8Weight


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a checkpoint under its Hugging Face name.

    ``where`` names file and tensor for errors. ``floats`` reads it, rounded to a type, as a
    copy of its own or, if it is of that type and no copy is asked for, in the file's memory.
    ``codes``, for quantised matrices
    that lose nothing by it, reads them for the kernels. ``fault`` is why it cannot be read, for
    tensors that nobody may want. ``idle``: it may be there for nothing if all of it is zero.
    ``stored``, for numbers that are not quantised, is the tensor in the file's memory, unread.
    """

    file: Path
    name: str
    where: str
    shape: tuple[int, ...]
    floats: Callable[[torch.dtype, bool], Tensor]
    codes: Callable[[], Codes] | None = None
    fault: str = ""
    idle: bool = False
    stored: Callable[[], Tensor] | None = None

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise UnsupportedModel or BrokenModel unless it fills a parameter of ``shape``."""
        if self.fault:
            raise UnsupportedModel(f"{self.where} {self.fault}")
        if self.shape != shape:
            raise BrokenModel(
                f"{self.where} has shape {list(self.shape)}, config.json asks for {list(shape)}"
            )


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """All tensors of a model folder. ``quantisation`` says how they are quantised, for people;
    ``precision`` is the one of ``EngineSettings`` that keeps the codes as they are, empty if the
    kernels cannot take them."""

    files: tuple[Path, ...]
    entries: tuple[Entry, ...] = field(repr=False)
    quantisation: str = ""
    precision: str = ""


class StoredLinear(nn.Linear):
    """A projection whose matrix is left in its file, quantised, until the kernels take it. Its
    ``weight`` has a shape but no memory."""

    def __init__(self, linear: nn.Linear, entry: Entry) -> None:
        super().__init__(
            linear.in_features, linear.out_features, linear.bias is not None, device="meta"
        )
        assert entry.codes is not None
        self.floats = entry.floats
        self.codes = entry.codes
