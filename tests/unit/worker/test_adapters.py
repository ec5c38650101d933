"""The routes around LoRA adapters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cloudlm.core.errors import BadSetting, BrokenModel
from cloudlm.registry.bundled import bundled_folder
from cloudlm.worker.config import WorkerConfig, check
from cloudlm.worker.loading import load_model

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


async def test_load_use_list_unload(bench: Any, tmp_path: Path) -> None:
    body = {"lora_name": "polite", "lora_path": str(tmp_path)}
    answer = await bench.post(LOAD, body)
    assert (answer.status_code, answer.text) == (
        200,
        "Success: LoRA adapter 'polite' added successfully.",
    )
    listed = (await bench.client.get("/v1/models")).json()["data"]
    assert [(one["id"], one["parent"]) for one in listed] == [("echo", None), ("polite", "echo")]
    one = (await bench.client.get("/v1/models/polite")).json()
    assert (one["root"], one["max_model_len"]) == (str(tmp_path), 256)
    assert (await bench.chat(model="polite")).json()["model"] == "polite"
    assert (await bench.complete(model="polite")).json()["model"] == "polite"
    assert (await bench.complete()).json()["model"] == "echo"
    embedded = await bench.post("/v1/embeddings", {"model": "polite", "input": "x"})
    assert embedded.json()["model"] == "polite"
    assert [request.adapter for request in bench.engine.requests] == ["polite", "polite", ""]
    assert bench.engine.embedded[0].adapter == "polite"
    answer = await bench.post(UNLOAD, {"lora_name": "polite"})
    assert answer.text == "Success: LoRA adapter 'polite' removed successfully."
    assert (await bench.chat(model="polite")).status_code == 404
    assert (await bench.post(UNLOAD, {"lora_name": "polite"})).status_code == 404


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({}, 400, "lora_name"),
        ({"lora_name": "x"}, 400, "lora_path"),
        ({"lora_name": "", "lora_path": "/x"}, 400, "lora_name"),
        ({"lora_name": "x", "lora_path": 3}, 400, "lora_path"),
        ({"lora_name": "x", "lora_path": "/a\0b"}, 400, "lora_path"),
        ({"lora_name": "echo", "lora_path": "."}, 400, "lora_name"),
        ({"lora_name": "x", "lora_path": "org/name"}, 400, "lora_path"),
        ({"lora_name": "x", "lora_path": "https://host/x"}, 400, "lora_path"),
        ({"lora_name": "x", "lora_path": "/nowhere/at/all"}, 422, "lora_path"),
        ({"lora_name": "x", "lora_path": "models:/none/1"}, 404, "model"),
        ({"lora_name": "x", "lora_path": ".", "load_inplace": True}, 501, "load_inplace"),
    ],
)
async def test_bad_bodies(bench: Any, body: dict[str, Any], status: int, param: str | None) -> None:
    answer = await bench.post(LOAD, body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)
    assert bench.engine.loaded == {}


async def test_only_who_has_the_token(make_bench: Any) -> None:
    bench = make_bench(token="secret")
    for path in (LOAD, UNLOAD):
        answer = await bench.client.post(path, json={}, headers={"authorization": "Bearer no"})
        assert answer.status_code == 401


async def test_adapters_at_the_start(config: WorkerConfig, tmp_path: Path) -> None:
    given = replace(config, model=str(bundled_folder()))
    for bad in ("x", "x=", "=y"):
        with pytest.raises(BadSetting, match="name=address"):
            check(replace(given, options={"adapters": bad}))
    options = {"kv_cache_mb": 16, "adapters": f"one={tmp_path}"}
    with pytest.raises(BrokenModel, match=r"adapter_config\.json|adapter_model"):
        await load_model(check(replace(given, options=options)), lambda share, what: None)
