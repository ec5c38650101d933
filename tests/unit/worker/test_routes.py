"""The other routes, the probes, the metrics, and who may ask what."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Any

import pytest
from starlette.routing import Route

from cloudlm.core.clock import ManualClock
from cloudlm.engine.api import EngineStats
from cloudlm.worker.app import ROUTES

MakeBench = Callable[..., Any]
OPEN = {"/health", "/livez", "/readyz", "/metrics"}


async def test_models(bench: Any) -> None:
    listed = (await bench.client.get("/v1/models")).json()
    (model,) = listed["data"]
    assert listed["object"] == "list"
    assert model == {
        "id": "echo",
        "object": "model",
        "created": 1_700_000_000,
        "owned_by": "cloudlm",
        "root": "models:/echo/1",
        "parent": None,
        "max_model_len": 256,
    }
    assert (await bench.client.get("/v1/models/echo")).json() == model
    missing = await bench.client.get("/v1/models/org/other")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"
    assert "'echo'" in missing.json()["error"]["message"]


async def test_tokenize_and_detokenize(bench: Any) -> None:
    answer = await bench.post("/tokenize", {"prompt": "hé", "return_token_strs": True})
    assert answer.json() == {
        "count": 3,
        "max_model_len": 256,
        "tokens": [104, 195, 169],
        "token_strs": ["h", "\N{REPLACEMENT CHARACTER}", "\N{REPLACEMENT CHARACTER}"],
    }
    messages = [{"role": "user", "content": "hi"}]
    full = (await bench.post("/tokenize", {"messages": messages})).json()
    bare = await bench.post("/tokenize", {"messages": messages, "add_generation_prompt": False})
    assert full["count"] == 20
    assert full["tokens"][: bare.json()["count"]] == bare.json()["tokens"]
    back = await bench.post("/detokenize", {"tokens": full["tokens"], "model": "echo"})
    assert back.json() == {"prompt": "<|start|>user:hi<|end|><|start|>assistant:"}


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/tokenize", {}, 400),
        ("/tokenize", {"prompt": 3}, 400),
        ("/tokenize", {"prompt": "a", "return_token_strs": 1}, 400),
        ("/tokenize", {"messages": []}, 400),
        ("/tokenize", {"prompt": "a", "model": "other"}, 404),
        ("/tokenize", {"prompt": "a", "model": 3}, 400),
        ("/detokenize", {}, 400),
        ("/detokenize", {"tokens": [258]}, 400),
        ("/detokenize", {"tokens": [-1]}, 400),
        ("/detokenize", {"tokens": [True]}, 400),
    ],
)
async def test_bad_token_requests(bench: Any, path: str, body: Any, status: int) -> None:
    answer = await bench.post(path, body)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


async def test_probes_while_loading(make_bench: MakeBench) -> None:
    bench = make_bench(ready=False)
    assert (await bench.client.get("/livez")).status_code == 200
    assert (await bench.client.get("/health")).status_code == 200
    ready = await bench.client.get("/readyz")
    assert ready.status_code == 503
    assert "still loading" in ready.json()["error"]["message"]
    assert ready.headers["retry-after"] == "1"
    report = (await bench.client.get("/health?verbose=1")).json()
    assert report["ready"] is False
    assert report["alive"] is True
    assert report["phase"] == "loading"
    assert (await bench.chat()).status_code == 503
    assert (await bench.client.get("/v1/models")).status_code == 503
    assert "cloudlm_worker_ready 0.0" in (await bench.client.get("/metrics")).text


async def test_readiness_can_be_waited_for(make_bench: MakeBench) -> None:
    bench = make_bench(ready=False)
    assert (await bench.client.get("/readyz?wait_s=0")).status_code == 503
    asking = asyncio.create_task(bench.client.get("/readyz?wait_s=60"))
    await bench.client.get("/livez")
    assert not asking.done()
    bench.replica.become_ready(bench.serving)
    assert (await asking).status_code == 200
    assert (await bench.client.get("/readyz?wait_s=60")).status_code == 200


async def test_who_waits_for_readiness_is_told_of_a_stop(make_bench: MakeBench) -> None:
    bench = make_bench(ready=False)
    asking = asyncio.create_task(bench.client.get("/readyz?wait_s=60"))
    await bench.client.get("/livez")
    bench.replica.stop_accepting()
    answer = await asking
    assert answer.status_code == 503
    assert "stopping" in answer.json()["error"]["message"]


@pytest.mark.parametrize("given", ["-1", "61", "nan", "soon", ""])
async def test_how_long_to_wait_must_be_said_in_seconds(bench: Any, given: str) -> None:
    answer = await bench.client.get(f"/readyz?wait_s={given}")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "wait_s"


async def test_health_is_progress(make_bench: MakeBench) -> None:
    clock = ManualClock()
    bench = make_bench(clock=clock)
    answer = await bench.client.get("/health")
    assert (answer.status_code, answer.content) == (200, b"")
    report = (await bench.client.get("/health?verbose=1")).json()
    assert {name: report[name] for name in ("steps", "running", "waiting", "alive", "ready")} == {
        "steps": 7,
        "running": 0,
        "waiting": 0,
        "alive": True,
        "ready": True,
    }
    assert report["model"] == "echo"
    bench.engine.now = EngineStats(steps=7, waiting=2)
    for _ in range(30):
        await bench.client.get("/health")
        await clock.advance(1.0)
    stalled = await bench.client.get("/health")
    assert stalled.status_code == 503
    assert "no step for" in stalled.json()["error"]["message"]
    assert (await bench.client.get("/readyz")).status_code == 503
    verbose = await bench.client.get("/health?verbose=1")
    assert verbose.status_code == 503
    assert verbose.json()["healthy"] is False
    bench.engine.now = EngineStats(steps=8, waiting=2)
    assert (await bench.client.get("/health")).status_code == 200
    bench.engine.now = EngineStats(steps=8, alive=False)
    assert (await bench.client.get("/health")).status_code == 503


async def test_the_watch_ends_when_the_engine_is_dead(make_bench: MakeBench) -> None:
    import asyncio

    clock = ManualClock()
    bench = make_bench(clock=clock)
    watch = asyncio.create_task(bench.replica.watch())
    await clock.advance(3.0)
    assert not watch.done()
    bench.engine.now = EngineStats(alive=False)
    await clock.advance(1.0)
    assert "stopped" in await watch


async def test_while_stopping_nothing_new_is_taken(bench: Any) -> None:
    bench.replica.stop_accepting()
    assert (await bench.chat()).status_code == 503
    assert (await bench.client.get("/readyz")).status_code == 503
    assert (await bench.client.get("/livez")).status_code == 200


async def test_metrics(bench: Any) -> None:
    await bench.chat(max_tokens=3)
    await bench.chat()
    await bench.client.get("/nowhere/at/all")
    answer = await bench.client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    text = answer.text
    label = '{model_name="echo"}'
    for line in (
        f"vllm:num_requests_running{label} 0.0",
        f"vllm:num_requests_waiting{label} 0.0",
        f"vllm:kv_cache_usage_perc{label} 0.0",
        f"vllm:prefix_cache_queries_total{label} 10.0",
        f"vllm:prefix_cache_hits_total{label} 4.0",
        f"vllm:num_preemptions_total{label} 0.0",
        f"vllm:spec_decode_num_drafts_total{label} 0.0",
        f"vllm:spec_decode_num_draft_tokens_total{label} 0.0",
        f"vllm:spec_decode_num_accepted_tokens_total{label} 0.0",
        f"vllm:prompt_tokens_total{label} 40.0",
        f"vllm:generation_tokens_total{label} 16.0",
        f"vllm:time_to_first_token_seconds_count{label} 2.0",
        f"vllm:inter_token_latency_seconds_count{label} 14.0",
        f"vllm:e2e_request_latency_seconds_count{label} 2.0",
        f"vllm:request_queue_time_seconds_count{label} 2.0",
        'vllm:request_success_total{finished_reason="stop",model_name="echo"} 1.0',
        'vllm:request_success_total{finished_reason="length",model_name="echo"} 1.0',
        'vllm:request_success_total{finished_reason="abort",model_name="echo"} 0.0',
        'cloudlm_http_requests_total{route="/v1/chat/completions",status="200"} 2.0',
        'cloudlm_http_requests_total{route="unknown",status="404"} 1.0',
        f"cloudlm_engine_steps_total{label} 7.0",
        "cloudlm_worker_ready 1.0",
    ):
        assert line in text, line
    assert re.search(
        r"vllm:cache_config_info\{block_size=\"16\".*num_gpu_blocks=\"64\"\} 1.0", text
    )


async def test_unknown_routes_and_methods(bench: Any) -> None:
    missing = await bench.client.get("/v2/nope")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "not_found"
    for path in ("/v1/chat/completions", "/tokenize", "/internal/v1/generate"):
        wrong = await bench.client.get(path)
        assert wrong.status_code == 405
        assert wrong.headers["allow"] == "POST"
        assert wrong.json()["error"]["code"] == "method_not_allowed"
    assert (await bench.client.delete("/v1/models/echo")).status_code == 405
    assert (await bench.client.get("/v1/models/")).status_code == 404


async def test_request_ids(bench: Any) -> None:
    answer = await bench.client.get("/version", headers={"x-request-id": "abc-1"})
    assert answer.headers["x-request-id"] == "abc-1"
    for bad in ("", "a b", "x" * 200):
        answer = await bench.client.get("/version", headers={"x-request-id": bad})
        assert answer.headers["x-request-id"].startswith("req-")
    failed = await bench.client.get("/nope", headers={"x-request-id": "abc-2"})
    assert failed.headers["x-request-id"] == "abc-2"


def _route_cases() -> list[tuple[str, str]]:
    return [(entry.method, entry.path.replace("{model_id:path}", "echo")) for entry in ROUTES]


async def test_the_table_is_the_router(bench: Any) -> None:
    routes = [route for route in bench.app.routes if isinstance(route, Route)]
    assert len(routes) == len(bench.app.routes) == len(ROUTES)
    assert {entry.path for entry in ROUTES if entry.is_open} == OPEN


@pytest.mark.promise(34)
@pytest.mark.known_failure("vllm-api-key-paths")
@pytest.mark.parametrize(("method", "path"), [*_route_cases(), ("GET", "/no/such/route")])
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": "Bearer "},
        {"authorization": "Basic c2VjcmV0"},
        {"authorization": "secret"},
        {"x-api-key": "Secret"},
        {"authorization": b"Bearer \xff\xfe"},
    ],
)
async def test_every_route_but_the_probes_wants_the_token(
    make_bench: MakeBench, method: str, path: str, headers: dict[str, Any]
) -> None:
    bench = make_bench(token="secret")
    bench.client.headers.pop("authorization")
    answer = await bench.client.request(method, path, headers=headers)
    if path in OPEN:
        assert answer.status_code == 200
        return
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert "secret" not in answer.text.lower()
    right = await bench.client.request(method, path, headers={"authorization": "Bearer secret"})
    assert right.status_code != 401
    assert (
        await bench.client.request(method, path, headers={"x-api-key": "secret"})
    ).status_code == (right.status_code)
