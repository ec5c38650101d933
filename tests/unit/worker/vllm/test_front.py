"""What passes through, what the front answers itself, and what is said when vLLM is in trouble."""

from __future__ import annotations

import asyncio
import json

import httpx2
import pytest
from vllm_bench import VllmBench

CHAT = {"messages": [{"role": "user", "content": "where is my card"}]}


def events(answer: httpx2.Response) -> list[str]:
    return [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]


async def test_an_answer_passes_as_it_is(bench: VllmBench) -> None:
    answer = await bench.post("/v1/chat/completions", **CHAT, temperature=0, cache_salt="s")
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["message"]["content"]
    assert bench.mock.bodies == [{"model": "mock", **CHAT, "temperature": 0, "cache_salt": "s"}]
    assert answer.headers["x-request-id"]


async def test_a_stream_passes_event_by_event(bench: VllmBench) -> None:
    whole = await bench.post("/v1/completions", prompt="a b c", max_tokens=9)
    answer = await bench.post("/v1/completions", prompt="a b c", max_tokens=9, stream=True)
    found = events(answer)
    assert found[-1] == "[DONE]"
    text = "".join(json.loads(one)["choices"][0]["text"] for one in found[:-1])
    assert text == whole.json()["choices"][0]["text"]


async def test_the_token_is_asked_for(bench: VllmBench) -> None:
    answer = await bench.client.post(
        "/v1/chat/completions", json=CHAT, headers={"authorization": "Bearer wrong"}
    )
    assert answer.status_code == 401
    assert bench.mock.bodies == []


async def test_a_refusal_of_vllm_has_our_shape(bench: VllmBench) -> None:
    answer = await bench.post("/v1/completions", prompt="refuse")
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["message"] == "vLLM does not like it"
    assert isinstance(error["code"], str)


async def test_probes_tell_of_progress(bench: VllmBench) -> None:
    assert (await bench.client.get("/readyz")).status_code == 200
    before = (await bench.client.get("/health?verbose=1")).json()
    await bench.post("/v1/completions", prompt="a b", max_tokens=5)
    await bench.looked()
    after = (await bench.client.get("/health?verbose=1")).json()
    assert after["steps"] > before["steps"]
    assert after["ready"] and after["alive"] and after["phase"] == "ready"


async def test_work_without_progress_is_a_stall(bench: VllmBench) -> None:
    bench.mock.running = 1
    for _ in range(30):
        await bench.looked()
        report = await bench.client.get("/health?verbose=1")
    assert report.status_code == 503
    assert "no step" in report.json()["fault"]


async def test_a_dead_engine_and_a_dead_process_are_dead(bench: VllmBench) -> None:
    bench.mock.engine_dead = True
    await bench.looked()
    assert (await bench.client.get("/health?verbose=1")).json()["alive"] is False
    bench.mock.engine_dead = False
    await bench.looked()
    assert (await bench.client.get("/health?verbose=1")).json()["alive"] is True
    bench.child.alive = False
    assert (await bench.client.get("/health")).status_code == 503


async def test_metrics_are_vllms_and_ours(bench: VllmBench) -> None:
    await bench.post("/v1/completions", prompt="a b", max_tokens=5)
    text = (await bench.client.get("/metrics")).text
    assert text.count("vllm:num_requests_running{") == 1
    assert 'cloudlm_http_requests_total{route="/v1/completions",status="200"} 1.0' in text
    assert "vllm:generation_tokens_total" in text


async def test_models_and_adapters(bench: VllmBench, tmp_path_factory: object) -> None:
    folder = bench.replica.config.home / "adapter"
    folder.mkdir()
    asked = {"lora_name": "polite", "lora_path": str(folder)}
    missing = await bench.client.post("/v1/load_lora_adapter", json=asked)
    assert missing.status_code == 422
    (folder / "adapter_config.json").write_text("{}")
    assert (await bench.client.post("/v1/load_lora_adapter", json=asked)).status_code == 200
    listed = (await bench.client.get("/v1/models")).json()["data"]
    assert [(one["id"], one["parent"]) for one in listed] == [("mock", None), ("polite", "mock")]
    assert listed[0]["max_model_len"] == 512
    twice = await bench.client.post("/v1/load_lora_adapter", json=asked)
    assert twice.status_code == 400
    gone = await bench.client.post("/v1/unload_lora_adapter", json={"lora_name": "polite"})
    assert gone.status_code == 200
    assert (await bench.client.get("/v1/models/polite")).status_code == 404


async def test_sleep_refuses_waits_and_wakes(bench: VllmBench) -> None:
    assert (await bench.client.post("/sleep?level=2")).status_code == 200
    assert bench.mock.asleep == 2
    refused = await bench.post("/v1/completions", prompt="a")
    assert refused.status_code == 503
    assert "asleep" in refused.json()["error"]["message"]
    assert (await bench.client.get("/health?verbose=1")).json()["phase"] == "sleeping"
    assert (await bench.client.post("/wake_up")).status_code == 200
    assert bench.mock.asleep == 0
    assert (await bench.post("/v1/completions", prompt="a")).status_code == 200


@pytest.mark.parametrize("options", [{}])
async def test_without_the_options_both_are_refused_clearly(bench: VllmBench) -> None:
    answer = await bench.client.post("/sleep")
    assert answer.status_code == 501
    assert "enable_sleep_mode" in answer.json()["error"]["message"]
    folder = {"lora_name": "a", "lora_path": str(bench.replica.config.home)}
    answer = await bench.client.post("/v1/load_lora_adapter", json=folder)
    assert "enable_lora" in answer.json()["error"]["message"]
    assert (await bench.client.get("/readyz")).status_code == 200


async def test_too_many_are_refused_at_once(bench: VllmBench) -> None:
    bodies = [bench.post("/v1/completions", prompt="hang a", stream=True) for _ in range(4)]
    running = [asyncio.create_task(one) for one in bodies]
    while len(bench.mock.bodies) < 4:
        await asyncio.sleep(0.001)
    refused = await bench.post("/v1/completions", prompt="a")
    assert refused.status_code == 503
    assert "max_waiting_requests" in refused.json()["error"]["message"]
    bench.mock.frozen.set()
    assert [one.status_code for one in await asyncio.gather(*running)] == [200] * 4


async def test_stopping_ends_a_stream_with_an_error(bench: VllmBench) -> None:
    body = {"prompt": "hang a b", "max_tokens": 9, "ignore_eos": True, "stream": True}
    running = asyncio.create_task(bench.post("/v1/completions", **body))
    while bench.mock.steps < 2:
        await asyncio.sleep(0.001)
    assert bench.replica.end_running() == 1
    found = events(await running)
    assert "stopping" in json.loads(found[-1])["error"]["message"]
    assert len(found) in (2, 3)


async def test_stopping_ends_a_whole_answer_that_has_not_begun(bench: VllmBench) -> None:
    running = asyncio.create_task(bench.post("/v1/completions", prompt="hang a b"))
    while not bench.mock.bodies:
        await asyncio.sleep(0.001)
    assert bench.replica.end_running() == 1
    answer = await asyncio.wait_for(running, 60)
    assert answer.status_code == 503
    assert "stopping" in answer.json()["error"]["message"]


async def test_a_client_that_leaves_ends_the_work(bench: VllmBench) -> None:
    for stream in (True, False):
        aborted = bench.mock.aborted
        body = {"prompt": "hang a b", "max_tokens": 9, "ignore_eos": True, "stream": True}
        body["stream"] = stream
        await _leave(bench, json.dumps({"model": "mock", **body}).encode(), stream)
        assert bench.engine._open == {}
        if stream:
            async with asyncio.timeout(60):
                while bench.mock.aborted == aborted:
                    await asyncio.sleep(0.001)


async def _leave(bench: VllmBench, body: bytes, stream: bool) -> None:
    """Ask over ASGI and disconnect as soon as the answer begins (or at once)."""
    begun = asyncio.Event()
    sent = False

    async def receive() -> dict[str, object]:
        nonlocal sent
        if not sent:
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}
        if stream:
            await begun.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, object]) -> None:
        begun.set()

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/completions",
        "root_path": "",
        "query_string": b"",
        "headers": [(b"authorization", b"Bearer t")],
    }
    await bench.app(scope, receive, send)
