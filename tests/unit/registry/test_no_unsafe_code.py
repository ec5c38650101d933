"""No module of the package reads pickles or runs text as code."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import cloudlm

_FORBIDDEN_MODULES = {
    "pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "pty",
    "commands",
}  # fmt: skip
_FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
_FORBIDDEN_METHODS = {
    ("torch", "load"), ("os", "system"), ("os", "popen"), ("numpy", "load"), ("np", "load"),
    ("pd", "read_pickle"), ("yaml", "load"), ("yaml", "load_all"), ("yaml", "unsafe_load"),
    ("yaml", "full_load"), ("subprocess", "getoutput"), ("subprocess", "getstatusoutput"),
}  # fmt: skip
_SAFE_LOADERS = {"SafeLoader", "CSafeLoader"}


def faults(source: str) -> Iterator[str]:
    """What is forbidden in ``source``, each with its line."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            names = []
        for name in names:
            module, _, attribute = name.rpartition(".")
            if (
                name.split(".")[0] in _FORBIDDEN_MODULES
                or (module, attribute) in _FORBIDDEN_METHODS
            ):
                yield f"line {node.lineno}: imports {name}"
        if isinstance(node, ast.Call):
            yield from _call_faults(node)


def _call_faults(node: ast.Call) -> Iterator[str]:
    function = node.func
    if isinstance(function, ast.Name) and function.id in _FORBIDDEN_CALLS:
        yield f"line {node.lineno}: calls {function.id}"
    if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
        called = (function.value.id, function.attr)
        loaders = [
            ast.unparse(k.value).rpartition(".")[2] for k in node.keywords if k.arg == "Loader"
        ]
        safe = called[0] == "yaml" and bool(loaders) and set(loaders) <= _SAFE_LOADERS
        if called in _FORBIDDEN_METHODS and not safe:
            yield f"line {node.lineno}: calls {'.'.join(called)}"
    for keyword in node.keywords:
        if keyword.arg == "shell" and not (
            isinstance(keyword.value, ast.Constant) and keyword.value.value is False
        ):
            yield f"line {node.lineno}: shell="
        if keyword.arg in ("allow_pickle", "trust_remote_code") and not (
            isinstance(keyword.value, ast.Constant) and keyword.value.value is False
        ):
            yield f"line {node.lineno}: {keyword.arg}="


@pytest.mark.promise(13)
@pytest.mark.known_failure("CVE-2024-50050", "CVE-2025-27520", "CVE-2025-62164", "CVE-2026-40217")
@pytest.mark.known_failure("CVE-2024-2912", "CVE-2025-32444")
def test_the_package_is_free_of_unsafe_code() -> None:
    root = Path(cloudlm.__file__).parent
    modules = sorted(root.rglob("*.py"))
    assert len(modules) > 30
    found = {str(path.relative_to(root)): list(faults(path.read_text())) for path in modules}
    assert {path: bad for path, bad in found.items() if bad} == {}


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from pickle import loads", "import torch\ntorch.load('x')",
     "from torch import load", "eval('1')", "exec('1')", "run(x, shell=True)", "yaml.load(x)",
     "yaml.load(x, Loader=yaml.Loader)", "import os\nos.system('x')", "f(x, allow_pickle=True)",
     "compile('1', '', 'exec')"],
)  # fmt: skip
def test_the_check_sees_what_is_forbidden(source: str) -> None:
    assert list(faults(source))


@pytest.mark.parametrize(
    "source",
    ["yaml.safe_load(x)", "yaml.load(x, Loader=yaml.SafeLoader)", "run(x, shell=False)",
     "re.compile('x')", "json.load(x)", "model.eval()"],
)  # fmt: skip
def test_the_check_lets_good_code_pass(source: str) -> None:
    assert not list(faults(source))
