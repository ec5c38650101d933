"""Fills a network with the tensors of a checkpoint, whatever format that is in."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cloudlm.core.errors import BrokenModel
from cloudlm.engine.architectures.base import Decoder
from cloudlm.engine.formats.base import Checkpoint, Entry, StoredLinear

if TYPE_CHECKING:
    from cloudlm.engine.parallel.split import Split


def match_tensors(
    model: Decoder, checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]] | None = None
) -> dict[str, Entry]:
    """For every parameter of ``model`` the entry that fills it; of the network that ``model`` is a
    part of, if that one's parameters have ``shapes``.

    Raises BrokenModel for a tensor that is missing, unknown, doubled or of the wrong shape, and
    UnsupportedModel for number types that are not run.
    """
    wanted = shapes or {name: tuple(one.shape) for name, one in model.named_parameters()}
    found: dict[str, Entry] = {}
    for entry in checkpoint.entries:
        name = model.parameter_name(entry.name)
        if name is None or (name not in wanted and entry.idle and _is_zero(entry)):
            continue
        if name not in wanted:
            raise BrokenModel(f"{entry.where} is not a part of {type(model).__name__}")
        if name in found:
            raise BrokenModel(f"{entry.where} is also in {found[name].file.name}")
        entry.check(wanted[name])
        found[name] = entry
    missing = [name for name in wanted if name not in found]
    if missing:
        files = checkpoint.files
        names = ", ".join(file.name for file in files[:3]) + (" …" if len(files) > 3 else "")
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise BrokenModel(f"{names}: tensor {missing[0]!r}{more} missing")
    return found


def _is_zero(entry: Entry) -> bool:
    return not entry.fault and not bool(entry.floats(torch.float32, False).any())


def load_weights(
    model: Decoder,
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[float], None] | None = None,
    copy: bool = True,
    keep_codes: bool = False,
    split: Split | None = None,
) -> int:
    """Fill ``model``, which was built on the meta device; the answer is how many matrices stay
    quantised as they are stored.

    One tensor at a time is read, converted and put in its place, so the memory needed is that of
    the loaded model. ``progress`` is told the share that is done, 0 to 1. Without ``copy`` a tensor
    that has the right type already stays in the file's memory: for who copies it anyway, at once.
    With ``keep_codes`` quantised projections stay in their files until somebody asks for them
    (``StoredLinear``). With ``split`` the ``model`` is a part of a network, and only that part is
    kept. Raises as ``match_tensors``.
    """
    found = match_tensors(model, checkpoint, None if split is None else split.shapes)
    if split is not None:
        found = {name: found[name] for name, _ in model.named_parameters()}
    total = sum(math.prod(entry.shape) for entry in found.values()) or 1
    loaded: dict[str, Tensor] = {}
    done = kept = 0
    # In the order of the files, which are read from front to back.
    for name, entry in sorted(found.items(), key=lambda item: checkpoint.files.index(item[1].file)):
        if keep_codes and entry.codes is not None and _leave(model, name, entry):
            loaded[name] = torch.empty(entry.shape, dtype=dtype, device="meta")
            kept += 1
        else:
            # The copy is ours: a file that changes on disk cannot change a served model.
            loaded[name] = _numbers(name, entry, dtype, copy, split).to(device)
        done += math.prod(entry.shape)
        if progress is not None:
            progress(done / total)
    model.load_state_dict(loaded, strict=True, assign=True)
    model.requires_grad_(False)
    return kept


def _numbers(
    name: str, entry: Entry, dtype: torch.dtype, copy: bool, split: Split | None
) -> Tensor:
    """The entry as numbers, or what a part of the network needs of it."""
    if split is not None and name in split.zeroed:
        return torch.zeros(entry.shape, dtype=dtype)
    cut = None if split is None else split.cuts.get(name)
    if cut is None:
        return entry.floats(dtype, copy)
    # Plain numbers stay in the file's memory, of which only the part is touched.
    whole = entry.floats(dtype, False) if entry.stored is None else entry.stored()
    return cut.of(whole).to(dtype, copy=True).contiguous()


def _leave(model: Decoder, name: str, entry: Entry) -> bool:
    """Put a projection that is left in its file in the place of a usual one."""
    path, _, last = name.rpartition(".")
    linear = model.get_submodule(path)
    if last != "weight" or type(linear) is not nn.Linear:
        return False
    above, _, own = path.rpartition(".")
    setattr(model.get_submodule(above), own, StoredLinear(linear, entry))
    return True
