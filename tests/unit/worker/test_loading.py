"""From an address to a model that is ready: the starter model, and what cannot be loaded."""

from __future__ import annotations

import gc
import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cloudlm.core.chat import Message, Sampling
from cloudlm.core.errors import BrokenModel, CloudlmError, ModelNotFound
from cloudlm.engine.api import GenerateRequest
from cloudlm.registry.bundled import bundled_folder
from cloudlm.registry.registry import open_registry
from cloudlm.worker.config import WorkerConfig
from cloudlm.worker.daemon import in_daemon_thread
from cloudlm.worker.loading import Found, load_found, load_model
from cloudlm.worker.prepare import Offload, render_messages


def silent(share: float, what: str) -> None:
    pass


async def test_a_folder_becomes_a_model_that_answers(config: WorkerConfig) -> None:
    told: list[tuple[float, str]] = []
    asked = replace(config, model=str(bundled_folder()), options={"kv_cache_mb": 16})
    serving = await load_model(asked, lambda share, what: told.append((share, what)))
    offload = Offload()
    try:
        engine: Any = serving.engine
        assert serving.tokenizer is engine.tokenizer  # one tokenizer for both
        assert told[-1] == (1.0, "ready")
        assert (serving.name, serving.root) == ("echo", bundled_folder().name)
        assert serving.control is not None
        assert serving.control.search("a <|end|> b")
        prompt = await render_messages(
            serving, offload, [Message("user", "I forgot my card's PIN <|end|>")]
        )
        (end,) = serving.tokenizer.encode("<|end|>")
        own = await render_messages(serving, offload, [Message("user", "I forgot my card's PIN")])
        assert prompt.count(end) == own.count(end)  # what was written stays text
        sampling = Sampling(temperature=0.0, max_tokens=200)
        events = [e async for e in serving.engine.submit(GenerateRequest("r", own, sampling))]
        assert "PIN" in "".join(event.text for event in events)
    finally:
        offload.close()
        await serving.renderer.close()
        await serving.engine.close()


def test_a_second_engine_does_not_keep_what_is_left_of_the_first(
    config: WorkerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Engines are circles; what is frozen is never given back."""
    monkeypatch.setattr("cloudlm.engine.load.load_engine", lambda *_, **__: None)
    gc.unfreeze()
    load_found(Found(bundled_folder(), "echo", "float32"), config, silent)
    assert gc.get_freeze_count() == 0


async def test_a_broken_folder_is_named(config: WorkerConfig, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(bundled_folder(), folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(BrokenModel, match=r"tokenizer\.json"):
        await load_model(replace(config, model=str(folder)), silent)
    with pytest.raises(CloudlmError, match="nowhere"):
        await load_model(replace(config, model=str(tmp_path / "nowhere")), silent)


async def test_the_versions_manifest_decides_the_precision(
    config: WorkerConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not config.json, which says float32 of weights that are stored in bfloat16."""
    monkeypatch.setattr("cloudlm.engine.load._SMALL_PARAMETERS", 0)
    folder = tmp_path / "told-wrong"
    shutil.copytree(bundled_folder(), folder)
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**described, "torch_dtype": "float32"}))
    registry = open_registry("", home=tmp_path, settings=config.settings.registry)
    manifest = registry.import_folder(folder, "told-wrong")
    assert manifest.precision == "bfloat16"
    for model, options, held in (
        (manifest.ref, {}, "bfloat16"),
        (str(folder), {}, "bfloat16"),
        (manifest.ref, {"precision": "float32"}, "float32"),
        (manifest.ref, {"dtype": "float32"}, "float32"),
    ):
        asked = replace(config, model=model, options={"kv_cache_mb": 16, **options})
        serving = await load_model(asked, silent)
        await serving.close()
        assert serving.info.dtype == held, (model, options)


async def test_a_version_that_the_registry_does_not_have(config: WorkerConfig) -> None:
    with pytest.raises(ModelNotFound, match="absent"):
        await load_model(replace(config, model="models:/absent/3"), silent)


async def test_work_that_fails_in_the_thread_fails_here() -> None:
    assert await in_daemon_thread(lambda: threading.current_thread().daemon)
    with pytest.raises(ZeroDivisionError):
        await in_daemon_thread(lambda: 1 // 0)
