"""Which format a model folder is in, and its tensors."""

from __future__ import annotations

from pathlib import Path

from cloudlm.core.errors import BrokenModel, UnsupportedModel
from cloudlm.engine.architectures.config import ModelConfig, read_json
from cloudlm.engine.formats.base import Checkpoint
from cloudlm.engine.formats.compressed import read_compressed
from cloudlm.engine.formats.gguf_files import read_gguf_checkpoint
from cloudlm.engine.formats.gptq import read_gptq
from cloudlm.engine.formats.safetensors_files import INDEX, SINGLE, Tensors, safetensors_files

_READERS = {
    "gptq": read_gptq,
    "awq": read_gptq,
    "compressed-tensors": read_compressed,
}


def open_checkpoint(folder: Path) -> Checkpoint:
    """The tensors of ``folder``: headers are checked, weights not read yet.

    Raises UnsafeModel, BrokenModel, UnsupportedModel naming file and fault.
    """
    if not (folder / INDEX).is_file() and not (folder / SINGLE).is_file():
        found = sorted(folder.glob("*.gguf"))
        if len(found) > 1:
            raise BrokenModel(f"{folder.name} holds {len(found)} GGUF files, expected one")
        if found:
            return read_gguf_checkpoint(found[0])
    files = safetensors_files(folder)
    tensors = Tensors(files)
    config = ModelConfig(read_json(folder / "config.json"))
    name = "quantization_config" if "quantization_config" in config else "compression_config"
    if name not in config:
        entries = tuple(tensors.plain(tensor) for tensor in tensors.stored.values())
        return Checkpoint(tuple(files), entries)
    section = config.section(name)
    method = str(section.raw("quant_method") or "none")
    if method not in _READERS:
        raise UnsupportedModel(
            f"config.json: {name}: quant_method is {method[:40]!r}, which is not supported; "
            f"supported: {', '.join(_READERS)}"
        )
    found_entries, quantisation, precision = _READERS[method](tensors, section)
    return Checkpoint(tuple(files), tuple(found_entries), quantisation, precision)
