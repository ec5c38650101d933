"""Packed weights on disk: the same numbers after a restart, and no damage, crash or full disk that
does more than have them packed again."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from cloudlm.core.cache_folder import native_folder
from cloudlm.core.settings import EngineSettings
from cloudlm.engine.native import build

pytestmark = pytest.mark.skipif(
    build.find_compiler() is None or not build.instruction_sets(),
    reason="no C++ compiler on PATH, or a CPU without AVX2",
)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from cloudlm.engine.native.library import NativeKernels

    name = build.instruction_sets()[0]
    path = build.library(name, tmp_path_factory.mktemp("native"))
    assert path is not None, "the build failed: see the log"
    return NativeKernels(path, name, threads=1)


@pytest.fixture
def matrices(kernels: Any) -> list[Any]:
    from cloudlm.engine.native.packing import quantize_int4, quantize_int8

    torch.manual_seed(1)
    weight = torch.randn(96, 200).bfloat16()
    return [
        kernels.pack(weight, bias=torch.randn(96)),
        kernels.pack(quantize_int8(weight), planes=1),
        kernels.pack(quantize_int4(weight, 64), gated=True),
        kernels.pack(quantize_int4(weight, 64, symmetric=False)),
    ]


@pytest.fixture
def keep(tmp_path: Path) -> Callable[..., Any]:
    """``keep(matrices, "a")`` writes them as a file of that key and waits."""
    from cloudlm.engine.native.packed_files import PackedFile

    def write(matrices: list[Any], key: str = "key", limit_bytes: int = 1 << 30) -> Any:
        file = PackedFile(tmp_path / "packed", key, limit_bytes, least_bytes=0)
        thread = file.write(matrices)
        if thread is not None:
            thread.join()
        return file

    return write


def test_what_is_read_computes_the_same(
    kernels: Any, matrices: list[Any], keep: Callable[..., Any]
) -> None:
    found = keep(matrices).read()
    x = torch.randn(7, 200)
    for matrix, again in zip(matrices, found, strict=True):
        assert (matrix.outputs, matrix.inputs, matrix.gated, matrix.size_bytes) == (
            again.outputs,
            again.inputs,
            again.gated,
            again.size_bytes,
        )
        first, second = (
            kernels.linear(one, x, torch.empty(7, one.outputs)) for one in (matrix, again)
        )
        assert torch.equal(first, second)


def test_the_file_and_its_folder_are_the_owners_alone(
    matrices: list[Any], keep: Callable[..., Any]
) -> None:
    file = keep(matrices)
    assert file.path.stat().st_mode & 0o777 == 0o600
    assert file.path.parent.stat().st_mode & 0o777 == 0o700
    assert [path.name for path in file.path.parent.iterdir()] == [file.path.name]


def damaged(name: str, data: bytes) -> bytes:
    """``data`` of a good file, spoilt in one way."""
    length = int.from_bytes(data[16:24], "little")
    header = json.loads(data[56 : 56 + length])
    if name == "cut":
        return data[:-1]
    if name == "another magic":
        return b"X" + data[1:]
    if name == "another header":
        return data[:60] + bytes([data[60] ^ 1]) + data[61:]
    if name == "a tensor outside":
        header["matrices"][0]["tensors"][0][0] = 1 << 40
    elif name == "more columns than memory":
        header["matrices"][0]["numbers"][4] *= 1000
    elif name == "a scale too many":
        header["matrices"][0]["tensors"][1] = header["matrices"][1]["tensors"][1]
    text = json.dumps(header).encode().ljust(length)[:length]
    return data[:24] + hashlib.sha256(text).digest() + text + data[56 + length :]


@pytest.mark.parametrize(
    "name",
    [
        "cut",
        "another magic",
        "another header",
        "a tensor outside",
        "more columns than memory",
        "a scale too many",
    ],
)
def test_damage_means_packing_again(
    name: str, matrices: list[Any], keep: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    file = keep(matrices)
    assert file.read()
    data = file.path.read_bytes()
    file.path.write_bytes(damaged(name, data))
    assert file.read() == ()
    assert "packed_file_refused" in caplog.text


def test_somebody_elses_file_is_not_taken(
    matrices: list[Any], keep: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = keep(matrices)
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    assert file.read() == ()


def test_the_longest_unused_go_first(matrices: list[Any], keep: Callable[..., Any]) -> None:
    old, newer = keep(matrices, "old"), keep(matrices, "newer")
    size = old.path.stat().st_size
    long_ago = time.time() - 1000
    os.utime(newer.path, (long_ago, long_ago))
    os.utime(old.path, (long_ago - 1, long_ago - 1))
    assert old.read()  # used now
    third = keep(matrices, "third", limit_bytes=2 * size)
    assert third.read()
    assert old.read()
    assert not newer.path.exists()


def test_what_does_not_fit_is_not_kept(matrices: list[Any], keep: Callable[..., Any]) -> None:
    assert keep(matrices, limit_bytes=100).read() == ()


def test_parts_of_the_dead_are_cleared_away(matrices: list[Any], keep: Callable[..., Any]) -> None:
    folder = keep(matrices).path.parent
    dead, alive = folder / "other.1.part", folder / "other.2.part"
    for part in (dead, alive):
        part.write_bytes(b"half")
    os.utime(dead, (0, 0))
    keep(matrices, "another")
    assert (dead.exists(), alive.exists()) == (False, True)


def test_a_disk_that_fails_costs_nothing_but_the_file(
    matrices: list[Any],
    keep: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    file = keep(matrices)
    assert file.read() == ()
    assert list(file.path.parent.iterdir()) == []
    assert "packed_file_not_written" in caplog.text


def test_small_models_are_not_kept(tmp_path: Path, matrices: list[Any]) -> None:
    from cloudlm.engine.native.packed_files import PackedFile

    assert PackedFile(tmp_path, "key", 1 << 30).write(matrices) is None


def test_another_file_or_precision_is_another_key(tmp_path: Path) -> None:
    from cloudlm.engine.native.packed_files import packed_key

    file = tmp_path / "model.safetensors"
    file.write_bytes(b"weights")
    first = packed_key([file], "bfloat16")
    assert packed_key([file], "bfloat16") == first
    assert packed_key([file], "int8") != first
    times = file.stat()
    file.write_bytes(b"WEIGHTS")  # as large, and made to look as old
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert packed_key([file], "bfloat16") != first


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("formats/gptq.py", True),
        ("formats/gguf_blocks.py", True),
        ("native/library.py", True),
        ("native/structures.py", True),
        ("native/packing.py", True),
        ("paths/native_path.py", True),
        ("architectures/llama.py", True),
        ("weights.py", True),
        ("loop.py", False),
    ],
)
def test_what_other_code_packed_is_packed_again(tmp_path: Path, name: str, counts: bool) -> None:
    from cloudlm.engine import kept_weights

    engine = tmp_path / "engine"
    shutil.copytree(Path(kept_weights.__file__).parent, engine)
    before = kept_weights.code_digest(engine)
    with (engine / name).open("a", encoding="utf-8") as file:
        file.write("# changed\n")
    assert (kept_weights.code_digest(engine) != before) == counts


def test_without_sources_nothing_is_kept(tmp_path: Path) -> None:
    from cloudlm.engine import kept_weights

    with pytest.raises(FileNotFoundError, match="no sources"):
        kept_weights.code_digest(tmp_path)


@pytest.mark.parametrize("changed", ["version", "code", "precision", "kernels"])
def test_the_file_is_named_by_all_that_makes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    import cloudlm
    from cloudlm.engine import kept_weights
    from cloudlm.engine.formats.base import Checkpoint
    from cloudlm.engine.native.library import NativeKernels
    from cloudlm.engine.paths.choice import Choice

    monkeypatch.setenv("CLOUDLM_HOME", str(tmp_path))
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text("{}")
    kernels = object.__new__(NativeKernels)  # of which nothing but its build is asked
    kernels.build = "cloudlm-avx2-1"
    choice = Choice(torch.bfloat16, "bfloat16", kernels)

    def path() -> Path:
        checkpoint = Checkpoint((tmp_path / "model.safetensors",), ())
        found = kept_weights.packed_file(tmp_path, checkpoint, choice, 1)
        assert found is not None
        return found.path

    before = path()
    assert path() == before
    if changed == "version":
        monkeypatch.setattr(cloudlm, "__version__", "0.0.0")
    elif changed == "code":
        monkeypatch.setattr(kept_weights, "code_digest", lambda engine: "other")
    elif changed == "kernels":
        kernels.build = "cloudlm-avx2-2"
    else:
        choice = replace(choice, precision="int8")
    assert path() != before


def in_a_home_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed weights go there; kernels that are compiled already stay where they are."""
    monkeypatch.setenv("CLOUDLM_NATIVE_CACHE", str(native_folder()))
    monkeypatch.setenv("CLOUDLM_HOME", str(tmp_path))


@pytest.mark.parametrize("precision", ["bfloat16", "int4"])
def test_a_restart_maps_what_the_first_start_packed(
    saved_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    from cloudlm.core.chat import Sampling
    from cloudlm.engine import kept_weights, load
    from cloudlm.engine.native import library
    from cloudlm.engine.native.packed_files import PackedFile
    from cloudlm.engine.step import Chunk

    in_a_home_of_its_own(tmp_path, monkeypatch)
    monkeypatch.setattr(kept_weights, "PackedFile", partial(PackedFile, least_bytes=0))
    settings = EngineSettings(kernels="native", precision=precision, kv_cache_mb=1)
    folder = saved_model("qwen3").folder
    packs = []
    pack = library.NativeKernels.pack

    def counted(self: Any, *given: Any, **named: Any) -> Any:
        packs.append(given)
        return pack(self, *given, **named)

    monkeypatch.setattr(library.NativeKernels, "pack", counted)
    chunk = Chunk(0, (5, 6, 7), 0, (0,), samples=True, sampling=Sampling())

    def logits(options: EngineSettings = settings) -> torch.Tensor:
        runner = load.load_runner(folder, options, (), lambda share, what: None)
        for thread in [t for t in threading.enumerate() if t.name == "packed-weights"]:
            thread.join()
        with torch.inference_mode():
            return runner.logits(runner.hidden((chunk,)))

    first, made = logits(), len(packs)
    assert made
    assert torch.equal(logits(), first)
    assert len(packs) == made  # nothing was packed again
    logits(replace(settings, packed_cache_mb=0))
    assert len(packs) == 2 * made


@pytest.mark.parametrize("family", ["qwen3", "llama-heads-32-plain"])
def test_the_files_pages_of_every_matrix_are_given_back(
    saved_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    from safetensors import safe_open

    from cloudlm.engine import load
    from cloudlm.engine.paths import native_path

    in_a_home_of_its_own(tmp_path, monkeypatch)
    given: list[torch.Size] = []
    monkeypatch.setattr(
        native_path, "forget_mapped", lambda tensors: given.extend(one.shape for one in tensors)
    )
    folder = saved_model(family).folder
    settings = EngineSettings(kernels="native", precision="bfloat16", kv_cache_mb=1)
    load.load_runner(folder, settings, (), lambda share, what: None)
    with safe_open(folder / "model.safetensors", "pt") as file:
        stored = {tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    matrices = {shape for shape in stored if len(shape) == 2}
    assert matrices <= {tuple(shape) for shape in given}


@pytest.mark.parametrize(
    ("family", "precision", "once"),
    [
        ("qwen3", "bfloat16", True),
        ("qwen3", "int8", False),
        ("llama-heads-32-plain", "bfloat16", False),
    ],
)
def test_tied_embeddings_are_in_memory_once_where_that_changes_nothing(
    saved_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, precision: str,
    once: bool,
) -> None:  # fmt: skip
    from cloudlm.engine import load

    in_a_home_of_its_own(tmp_path, monkeypatch)
    found = saved_model(family)
    settings = EngineSettings(kernels="native", precision=precision, kv_cache_mb=1)
    path: Any = load.load_runner(found.folder, settings, (), lambda share, what: None)._path
    assert (path._embeddings is None) is once
    ids = torch.tensor([3, 0, 95, 3])
    stored = found.reference.get_input_embeddings().weight.detach()
    assert torch.equal(path._embedded(ids), stored[ids].bfloat16())


def test_a_network_is_built_without_drawing_first_values(
    saved_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drawing them on the meta device imports PyTorch's compiler: two seconds."""
    from cloudlm.engine import load

    def drawn(*given: Any, **named: Any) -> None:
        raise AssertionError("values were drawn")

    for name in ("normal_", "uniform_"):
        monkeypatch.setattr(torch.Tensor, name, drawn)
    _, _, model = load.build_network(saved_model("qwen3").folder)
    assert all(parameter.is_meta for parameter in model.parameters())
