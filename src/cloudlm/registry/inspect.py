"""Looks at a model folder before anything is read from it, and says what it holds.

First every name is judged (``policy``) and every link and special file refused; then the JSON
files are read within limits and searched for code; then the headers of the weights' files are
checked against their sizes. Tensor data is never read. Each fault is an error that names the file
and what is wrong with it.

Must not write, and must not follow a link out of the folder.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from cloudlm.core.errors import BrokenModel, NotFound, UnsafeModel
from cloudlm.core.model import check_file_path
from cloudlm.registry.facts import ModelFacts, read_adapter_facts, read_facts
from cloudlm.registry.gguf.header import read_gguf
from cloudlm.registry.model_json import (
    brings_own_network,
    read_json,
    read_object,
    refuse_code,
    size_limit,
)
from cloudlm.registry.nested import lies_below, models_below
from cloudlm.registry.policy import Verdict, judge
from cloudlm.registry.safetensors_header import TensorFacts, read_header
from cloudlm.registry.stores.failures import storage_failure, storage_failures

MAX_FILES = 10_000
_MAX_DEPTH = 8
_INDEX = "model.safetensors.index.json"
_WEIGHTS = "model.safetensors"
_ADAPTER = "adapter_config.json"
_ADAPTER_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True, slots=True)
class FolderFile:
    """A file that will be part of the version: relative path, where it lies, size in bytes."""

    path: str
    source: Path
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a folder holds. ``notes`` are sentences about files that were left behind, ``base`` the
    model that an adapter was made for, in its own words."""

    files: tuple[FolderFile, ...]
    facts: ModelFacts
    notes: tuple[str, ...]
    base: str = ""


def inspect_folder(folder: Path) -> Inspection:
    """Check the model or LoRA adapter in ``folder``. Shapes no tensor, reads no weights.

    Raises NotFound (no such folder), UnsafeModel (pickled data or code), BrokenModel (anything
    else that is wrong) and StorageFailed (unreadable).
    """
    files = judged_files(folder)
    taken = {file.path: file for file in files[Verdict.TAKE]}
    weights = {file.path: file for file in files[Verdict.WEIGHTS]}
    if not taken.keys() & {"config.json", _ADAPTER}:
        below = models_below(file.path for found in files.values() for file in found)
        if below:
            raise lies_below(folder, below)
    _refuse_unsafe(files, weights)
    if _ADAPTER in taken and "config.json" not in taken:
        return _inspect_adapter(taken, weights, files)
    if "config.json" not in taken:
        raise BrokenModel(
            f"config.json is missing in {folder}: expected a Hugging Face model folder "
            "(config.json, tokenizer.json, model.safetensors); of GGUF files import one: its path, "
            "or hf://org/name/file.gguf"
        )
    bodies = _read_configurations(taken)
    if "tokenizer.json" not in taken:
        raise BrokenModel(
            f"tokenizer.json is missing in {folder}: the engine needs the tokenizer in that form "
            "(transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...) writes it)"
        )
    used, notes = _used_weights(weights, bodies.get(_INDEX))
    if _WEIGHTS in used:  # an index beside it belongs to shards that are left behind
        taken.pop(_INDEX, None)
        bodies.pop(_INDEX, None)
    tensors = _read_tensors(used, bodies.get(_INDEX))
    texts = {path: file.source for path, file in taken.items()}
    form = "gguf" if _is_gguf(used) else "safetensors"
    facts = read_facts(bodies["config.json"], tensors, texts, form)
    kept = sorted([*taken.values(), *used.values()], key=lambda file: file.path)
    if brings_own_network(bodies["config.json"]):
        notes.append(f"code that config.json names was left out: {facts.architecture} is built in")
    return Inspection(tuple(kept), facts, (*_notes_on_unsafe(files), *notes))


def _inspect_adapter(
    taken: dict[str, FolderFile],
    weights: dict[str, FolderFile],
    files: dict[Verdict, list[FolderFile]],
) -> Inspection:
    """A folder as PEFT writes it. Which projections it may change is the engine's to judge."""
    bodies = _read_configurations(taken)
    if _ADAPTER_WEIGHTS not in weights:
        raise BrokenModel(
            f"{_ADAPTER_WEIGHTS} is missing: the folder has an {_ADAPTER}, but no weights of an "
            "adapter in safetensors form"
        )
    used = {_ADAPTER_WEIGHTS: weights[_ADAPTER_WEIGHTS]}
    tensors = _read_tensors(used, None)
    texts = {path: file.source for path, file in taken.items()}
    facts, base = read_adapter_facts(bodies[_ADAPTER], tensors, texts)
    kept = sorted([*taken.values(), *used.values()], key=lambda file: file.path)
    return Inspection(tuple(kept), facts, tuple(_notes_on_unsafe(files)), base)


# -- names


def judged_files(folder: Path) -> dict[Verdict, list[FolderFile]]:
    """Every file of ``folder`` by its verdict; links are followed inside it only. Raises as
    ``inspect_folder``; nothing is opened."""
    if not folder.is_dir():
        found = "is not a folder" if folder.exists() else "does not exist"
        raise NotFound(f"{folder} {found}: expected a model folder (config.json, safetensors, …)")
    root = folder.resolve()
    allowed = [root]
    if root.parent.name == "snapshots" and (root.parent.parent / "blobs").is_dir():
        allowed.append(root.parent.parent / "blobs")  # the hub's own cache links its blobs
    found_files: dict[Verdict, list[FolderFile]] = {verdict: [] for verdict in Verdict}
    for count, (path, source) in enumerate(_walk(root, "", 0)):
        if count >= MAX_FILES:
            raise BrokenModel(f"{folder} holds more than {MAX_FILES} files: is it a model folder?")
        verdict = judge(path)
        if verdict is Verdict.CODE:
            raise UnsafeModel(
                f"{path}: is code; a model that brings its own is refused before it is read. "
                "Remove the file if the model does not need it"
            )
        found_files[verdict].append(_regular_file(path, source, allowed, verdict))
    return found_files


def _walk(folder: Path, above: str, depth: int) -> Iterator[tuple[str, Path]]:
    if depth > _MAX_DEPTH:
        raise BrokenModel(f"{above}: folders are nested deeper than {_MAX_DEPTH}")
    with storage_failures(folder, "list"), os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        path = above + entry.name
        if entry.is_dir(follow_symlinks=False):
            if not entry.name.startswith("."):
                yield from _walk(Path(entry.path), f"{path}/", depth + 1)
        else:
            yield path, Path(entry.path)


def _regular_file(path: str, source: Path, allowed: list[Path], verdict: Verdict) -> FolderFile:
    """Refuse what is not a plain file inside the folder. Nothing is opened."""
    try:
        facts = source.lstat()
        if stat.S_ISLNK(facts.st_mode):
            target = source.resolve()
            if not any(target.is_relative_to(root) for root in allowed):
                raise UnsafeModel(f"{path}: is a symbolic link that leaves the model's folder")
            if judge(target.name) in (Verdict.CODE, Verdict.UNSAFE) or target.is_dir():
                raise UnsafeModel(f"{path}: is a symbolic link to {target.name}; refused")
            source, facts = target, target.lstat()
    except (FileNotFoundError, RuntimeError):
        raise BrokenModel(f"{path}: is a symbolic link that leads nowhere") from None
    except OSError as error:
        raise storage_failure(error, source, "read") from error
    if not stat.S_ISREG(facts.st_mode):
        raise UnsafeModel(f"{path}: is not a plain file (device, pipe or socket); refused")
    if verdict is Verdict.TAKE:
        check_file_path(path)
        if facts.st_size > size_limit(path.rpartition("/")[2]):
            raise BrokenModel(f"{path}: {facts.st_size} bytes are too many for such a file")
    return FolderFile(path, source, facts.st_size)


def _refuse_unsafe(files: dict[Verdict, list[FolderFile]], weights: dict[str, FolderFile]) -> None:
    if weights:
        return
    if files[Verdict.UNSAFE]:
        raise UnsafeModel(
            f"{files[Verdict.UNSAFE][0].path}: may run code when it is read, so it was refused "
            "before it was read; convert the weights to safetensors"
        )
    raise BrokenModel(f"{_WEIGHTS} is missing: the folder holds no weights in safetensors form")


def _notes_on_unsafe(files: dict[Verdict, list[FolderFile]]) -> list[str]:
    return [
        f"{file.path} was left behind: it may run code when it is read"
        for file in files[Verdict.UNSAFE]
    ]


# -- JSON


def _read_configurations(taken: dict[str, FolderFile]) -> dict[str, dict[str, Any]]:
    """Parse every JSON file of the folder; return those that configure something."""
    bodies: dict[str, dict[str, Any]] = {}
    for path, file in taken.items():
        if path.endswith("config.json") or path in (_INDEX, "tokenizer.json"):
            bodies[path] = read_object(file.source, path)
        elif path.endswith(".json"):
            read_json(file.source, path)
        if path.endswith("config.json"):
            refuse_code(bodies[path], path)
    if "tokenizer.json" in bodies and not isinstance(bodies["tokenizer.json"].get("model"), dict):
        raise BrokenModel("tokenizer.json: has no 'model': expected the Tokenizers library's form")
    return bodies


# -- weights


def _used_weights(
    weights: dict[str, FolderFile], index: dict[str, Any] | None
) -> tuple[dict[str, FolderFile], list[str]]:
    """The files that make up the model, as the usual loaders choose them."""
    ggufs = sorted(path for path in weights if path.lower().endswith(".gguf"))
    if len(ggufs) == len(weights) == 1:
        wanted = set(ggufs)
    elif _WEIGHTS in weights:
        wanted = {_WEIGHTS}
    elif index is not None:
        wanted = set(_shards(index).values())
        missing = sorted(wanted - set(weights))
        if missing:
            raise BrokenModel(
                f"{missing[0]} is missing: {_INDEX} names it ({len(missing)} of {len(wanted)} "
                "shards are missing)"
            )
    else:
        some = sorted(weights)[0]
        raise BrokenModel(
            f"{_INDEX} is missing: found {some}, but neither {_WEIGHTS} nor an index of shards "
            "nor a single GGUF file"
        )
    notes = [
        f"{path} was left behind: the model is made of other files"
        for path in sorted(set(weights) - wanted)
    ]
    return {path: file for path, file in weights.items() if path in wanted}, notes


def _is_gguf(used: dict[str, FolderFile]) -> bool:
    return all(path.lower().endswith(".gguf") for path in used)


def _shards(index: dict[str, Any]) -> dict[str, str]:
    table = index.get("weight_map")
    if not isinstance(table, dict) or not table:
        raise BrokenModel(f"{_INDEX}: weight_map is missing or empty")
    for tensor, shard in table.items():
        if not isinstance(shard, str) or judge(shard) is not Verdict.WEIGHTS or "\\" in shard:
            raise BrokenModel(
                f"{_INDEX}: tensor {tensor[:80]!r} is said to be in {str(shard)[:80]!r}, which is "
                "not a safetensors file of this folder"
            )
    return table


def _read_tensors(
    used: dict[str, FolderFile], index: dict[str, Any] | None
) -> dict[str, TensorFacts]:
    if _is_gguf(used):
        path, file = next(iter(used.items()))
        return {
            tensor.name: TensorFacts(tensor.kind.name, tensor.elements)
            for tensor in read_gguf(file.source, path).tensors.values()
        } or _no_tensors(path)
    tensors: dict[str, TensorFacts] = {}
    homes: dict[str, str] = {}
    for path, file in sorted(used.items()):
        with storage_failures(file.source, "read"), file.source.open("rb") as stream:
            found = read_header(stream, file.size_bytes, path)
        for tensor in found:
            if tensor in homes:
                raise BrokenModel(f"{path}: tensor {tensor[:80]!r} is also in {homes[tensor]}")
            homes[tensor] = path
        tensors |= found
    if not tensors:
        _no_tensors(sorted(used)[0])
    if index is not None:
        for tensor, shard in _shards(index).items():
            if homes.get(tensor) != shard:
                raise BrokenModel(f"{shard}: tensor {tensor[:80]!r} is missing; {_INDEX} names it")
    return tensors


def _no_tensors(path: str) -> NoReturn:
    raise BrokenModel(f"{path}: holds no tensors")
