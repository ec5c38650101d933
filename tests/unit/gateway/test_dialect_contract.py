"""What holds in every dialect: the same keys, errors in its own shape, and a row in the ledger."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cloudlm.core.tenant import Outcome

MESSAGES = [{"role": "user", "content": "hello"}]
TENSOR = {"name": "text", "shape": [1], "datatype": "BYTES", "data": ["hello"]}

# path, body, whether the body names the model, how to reach the message of an error
DIALECTS: dict[str, tuple[str, dict[str, Any], bool, tuple[str, ...]]] = {
    "openai": ("/v1/chat/completions", {"messages": MESSAGES}, True, ("error", "message")),
    "responses": ("/v1/responses", {"input": "hello"}, True, ("error", "message")),
    "anthropic": (
        "/v1/messages",
        {"messages": MESSAGES, "max_tokens": 9},
        True,
        ("error", "message"),
    ),
    "ollama": ("/api/chat", {"messages": MESSAGES, "stream": False}, True, ("error",)),
    "ollama generate": ("/api/generate", {"prompt": "hi", "stream": False}, True, ("error",)),
    "tgi": ("/generate", {"inputs": "hello"}, True, ("error",)),
    "sagemaker": ("/invocations", {"prompt": "hello"}, True, ("error", "message")),
    "predict": ("/v1/models/{model}:predict", {"instances": ["hello"]}, False, ("error",)),
    "infer": ("/v2/models/{model}/infer", {"inputs": [TENSOR]}, False, ("error",)),
    "torchserve": ("/predictions/{model}", {"prompt": "hello"}, False, ("message",)),
}
STREAMED = {
    "openai": ("/v1/chat/completions", {"stream": True}),
    "responses": ("/v1/responses", {"stream": True}),
    "anthropic": ("/v1/messages", {"stream": True}),
    "ollama": ("/api/chat", {"stream": True}),
    "tgi": ("/generate_stream", {}),
}


def ask_of(dialect: str, model: str) -> tuple[str, dict[str, Any]]:
    path, body, names_model, _ = DIALECTS[dialect]
    return path.format(model=model), {**body, **({"model": model} if names_model else {})}


def message_of(dialect: str, body: Any) -> str:
    for name in DIALECTS[dialect][3]:
        body = body[name]
    assert isinstance(body, str)
    return body


@pytest.mark.promise(3)
@pytest.mark.parametrize("dialect", DIALECTS)
async def test_an_answer_and_its_row(rig: Any, kit: Any, dialect: str) -> None:
    path, body = ask_of(dialect, kit.MODEL)
    result = await rig.ask(body, path=path)
    assert result.status == 200, result.body
    assert "t0 t1 t2 t3 t4" in result.body.decode()
    assert result.headers["x-cloudlm-model"] == kit.MODEL
    (row,) = await rig.rows()
    assert (row.outcome, row.prompt_tokens, row.completion_tokens) == (Outcome.FINISHED, 7, 5)
    rig.assert_nothing_open()


@pytest.mark.promise(3)
@pytest.mark.parametrize("dialect", STREAMED)
async def test_a_stream_and_its_row(rig: Any, kit: Any, dialect: str) -> None:
    _, body = ask_of(dialect, kit.MODEL)
    path, more = STREAMED[dialect]
    result = await rig.ask({**body, **more}, path=path)
    kind = "application/x-ndjson" if dialect == "ollama" else "text/event-stream; charset=utf-8"
    assert result.headers["content-type"] == kind
    for word in ("t0 ", "t4 "):
        assert word in result.body.decode()
    (row,) = await rig.rows()
    assert (row.outcome, row.completion_tokens) == (Outcome.FINISHED, 5)
    rig.assert_nothing_open()


@pytest.mark.promise(4)
@pytest.mark.parametrize("dialect", STREAMED)
async def test_a_stream_that_breaks_says_so(rig: Any, kit: Any, dialect: str) -> None:
    _, body = ask_of(dialect, kit.MODEL)
    path, more = STREAMED[dialect]
    rig.replicas[0].plans.append(kit.Plan(garbage_at=3))
    result = await rig.ask({**body, **more}, path=path)
    last = result.body.decode().strip().splitlines()[-1].removeprefix("data: ")
    said = json.loads(last)
    assert "not JSON" in json.dumps(said["response"] if dialect == "responses" else said)
    assert "error" in json.dumps(said)
    (row,) = await rig.rows()
    assert row.outcome is Outcome.FAILED


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_errors_have_its_shape(rig: Any, kit: Any, dialect: str) -> None:
    path, body = ask_of(dialect, kit.MODEL)
    stranger = await rig.ask(body, path=path, headers={"content-type": "application/json"})
    assert stranger.status == 401
    assert "invalid API key" in message_of(dialect, stranger.json)
    lost_path, lost = ask_of(dialect, "nobody")
    unknown = await rig.ask(lost, path=lost_path)
    assert unknown.status == 404
    assert kit.MODEL in message_of(dialect, unknown.json)
    broken = await rig.ask(path=path, raw=b"{")
    assert broken.status == 400
    assert "JSON" in message_of(dialect, broken.json)
    wrong = await rig.ask(path=path, method="DELETE", body=body)
    assert wrong.status == 405
    rig.replicas[0].default = kit.Plan(kind="status", status=400, error={"error": {"message": "m"}})
    refused = await rig.ask(body, path=path)
    assert (refused.status, message_of(dialect, refused.json)) == (400, "m")


async def test_what_is_told_of_models(rig: Any, kit: Any) -> None:
    async def read(path: str, **headers: str) -> Any:
        result = await rig.ask(method="GET", path=path, headers={**rig.headers, **headers})
        assert result.status == 200, result.body
        return result.json

    assert (await read("/api/tags"))["models"][0]["name"] == kit.MODEL
    assert (await read("/info"))["model_id"] == kit.MODEL
    assert (await read("/v2"))["name"] == "cloudlm"
    assert (await read(f"/v2/models/{kit.MODEL}"))["versions"] == ["1"]
    assert (await read(f"/v2/models/{kit.MODEL}/ready"))["ready"] is True
    one = await read(f"/v1/models/{kit.MODEL}")
    assert (one["ready"], one["model_version_status"][0]["state"]) == (True, "AVAILABLE")
    version = {"anthropic-version": "2023-06-01"}
    assert (await read("/v1/models", **version))["data"][0]["type"] == "model"
    assert (await read(f"/v1/models/{kit.MODEL}", **version))["display_name"] == kit.MODEL
    shown = await rig.ask({"model": kit.MODEL}, path="/api/show")
    assert shown.json["capabilities"] == ["completion"]


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/api/pull", 501),
        ("/api/made-up", 404),
        ("/api/v1/deployments", 404),
        ("/v1/messages/batches", 501),
        ("/v1/responses/resp_1", 501),
        ("/v1/models/tiny:explain", 501),
        ("/v1/models/tiny/versions/2:predict", 501),
        ("/v2/models/tiny/versions/2/infer", 501),
        ("/v2/made-up", 404),
    ],
)
async def test_the_rest_is_refused(rig: Any, path: str, status: int) -> None:
    result = await rig.ask({}, path=path)
    assert result.status == status
    assert result.json["error"]


async def test_no_path_answers_in_the_form_of_another(rig: Any) -> None:
    """Both ask the same of a replica, with the same body, so that a cache could mix them up."""
    asked = {"inputs": "hello"}
    assert isinstance((await rig.ask(asked, path="/generate")).json, dict)
    assert isinstance((await rig.ask(asked, path="/")).json, list)
