"""A LoRA adapter is a version like any other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from peft_folder import write_adapter

from cloudlm.core.errors import BrokenModel, UnsafeModel, UnsupportedModel
from cloudlm.core.model import parse_ref
from cloudlm.core.settings import RegistrySettings
from cloudlm.registry.inspect import inspect_folder
from cloudlm.registry.registry import open_registry


def test_it_is_imported_and_tells_its_base(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "polite", base="models:/bank-helper/1")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    (folder / "optimizer.pt").write_bytes(b"pickled")
    registry = open_registry("", home=tmp_path / "home", settings=RegistrySettings())
    manifest = registry.import_folder(folder, "polite")
    assert (manifest.task, manifest.architecture, manifest.licence) == ("adapter", "LoRA", "mit")
    assert manifest.lineage["base"] == "models:/bank-helper/1"
    assert manifest.parameters == 4 * (768 + 256)
    assert {file.path for file in manifest.files} == {
        *("README.md", "adapter_config.json", "adapter_model.safetensors"),
    }
    assert "optimizer.pt was left behind" in manifest.notes[0]
    fetched = registry.fetch(parse_ref(manifest.ref))
    assert (fetched / "adapter_model.safetensors").is_file()
    registry.close()


@pytest.mark.parametrize("kind", ["IA3", None, 7])
def test_another_kind_of_adapter_is_named(tmp_path: Path, kind: object) -> None:
    folder = write_adapter(tmp_path / "a")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
    with pytest.raises(UnsupportedModel, match="only LORA"):
        inspect_folder(folder)


def test_what_is_broken_or_unsafe_is_refused(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a")
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(BrokenModel, match="adapter_model"):
        inspect_folder(folder)
    weights.rename(folder / "model.safetensors")
    with pytest.raises(BrokenModel, match=r"adapter_model\.safetensors is missing"):
        inspect_folder(folder)
    (folder / "model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"pickled")
    with pytest.raises(UnsafeModel, match=r"adapter_model\.bin"):
        inspect_folder(folder)
