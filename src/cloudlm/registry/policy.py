"""Which files of a model folder are taken, which are left behind, and which make it be refused.

A version holds safetensors or a GGUF file, JSON and plain text. Pickled data can run code when it
is read, and Python files are code: neither is ever copied. Decides by names alone; must not open a
file.
"""

from __future__ import annotations

from enum import StrEnum


class Verdict(StrEnum):
    """What is done with a file."""

    TAKE = "take"
    WEIGHTS = "weights"  # safetensors, GGUF: taken if the model is made of it
    SKIP = "skip"  # of no use to us, harmless
    UNSAFE = "unsafe"  # never copied; if there is nothing safe besides, the folder is refused
    CODE = "code"  # the folder is refused


_UNSAFE = {
    ".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".dill", ".h5", ".hdf5",
    ".keras", ".msgpack", ".npy", ".npz", ".mat", ".nemo", ".mar", ".pdparams", ".params", ".pb",
    ".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".lz4", ".7z", ".rar", ".whl", ".egg",
}  # fmt: skip
_CODE = {".py", ".pyc", ".pyd", ".pyx", ".pyw", ".so", ".dll", ".dylib", ".exe"}
_WEIGHTS = {".safetensors", ".gguf"}
_TEXT = {".json", ".jinja", ".txt", ".md"}
_TEXT_NAMES = {"license", "licence", "notice", "copying", "model_card", "use_policy"}

SAFE_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.md", "LICENSE*", "NOTICE*")
"""What may be downloaded from a hub, in glob form; the verdicts are given on what arrived."""


def judge(path: str) -> Verdict:
    """The verdict on a file by its relative POSIX path."""
    *folders, name = path.lower().split("/")
    stem, dot, extension = name.rpartition(".")
    suffix = dot + extension if stem else ""
    if any(folder.startswith(".") for folder in folders) or name.startswith("."):
        return Verdict.SKIP
    if suffix in _CODE or "__pycache__" in folders:
        return Verdict.CODE
    if suffix in _UNSAFE or ".so." in name:
        return Verdict.UNSAFE
    if suffix in _WEIGHTS:
        return Verdict.SKIP if folders else Verdict.WEIGHTS
    if suffix in _TEXT or name in _TEXT_NAMES or name.startswith(("license", "licence", "notice")):
        return Verdict.TAKE
    return Verdict.SKIP


def may_be_in_a_version(path: str) -> bool:
    """Whether a manifest may name this path at all."""
    return judge(path) in (Verdict.TAKE, Verdict.WEIGHTS)
