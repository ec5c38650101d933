"""Whose share a request uses: the gateway's headers and the body's priority reach the engine."""

from __future__ import annotations

from typing import Any

import pytest

PATHS = {
    "/v1/chat/completions": {"model": "echo", "messages": [{"role": "user", "content": "hi"}]},
    "/v1/completions": {"model": "echo", "prompt": "hi"},
    "/internal/v1/generate": {"prompt": "hi"},
    "/v1/embeddings": {"model": "echo", "input": "hi"},
}


def submitted(bench: Any) -> Any:
    """The one request that reached the engine."""
    (request,) = (*bench.engine.requests, *bench.engine.embedded)
    return request


@pytest.mark.parametrize("path", PATHS)
async def test_tenant_weight_and_priority_reach_the_engine(bench: Any, path: str) -> None:
    headers = {"x-cloudlm-tenant": "ab12", "x-cloudlm-weight": "2.5"}
    body = {**PATHS[path], "priority": -3}  # vLLM's: lower goes first
    answer = await bench.client.post(path, json=body, headers=headers)
    assert answer.status_code == 200
    request = submitted(bench)
    assert (request.tenant, request.weight, request.priority) == ("ab12", 2.5, 3)


@pytest.mark.parametrize("path", PATHS)
async def test_without_them_all_are_equal(bench: Any, path: str) -> None:
    await bench.post(path, PATHS[path])
    request = submitted(bench)
    assert (request.tenant, request.weight, request.priority) == ("", 1.0, 0)


async def test_every_input_of_one_request_uses_its_senders_share(bench: Any) -> None:
    body = {"model": "echo", "input": ["hi", "hey"], "priority": 2}
    await bench.client.post("/v1/embeddings", json=body, headers={"x-cloudlm-tenant": "ab12"})
    assert [(one.tenant, one.priority) for one in bench.engine.embedded] == [("ab12", -2)] * 2


@pytest.mark.parametrize(("asked", "meant"), [(10**12, -100), (-(10**12), 100), (None, 0)])
async def test_priority_is_capped(bench: Any, asked: int | None, meant: int) -> None:
    await bench.chat(priority=asked)
    assert bench.engine.requests[0].priority == meant


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x-cloudlm-weight", "0"),
        ("x-cloudlm-weight", "nan"),
        ("x-cloudlm-weight", "much"),
        ("x-cloudlm-tenant", "x" * 200),
    ],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/embeddings"])
async def test_headers_that_make_no_sense_are_refused(
    bench: Any, path: str, name: str, value: str
) -> None:
    answer = await bench.client.post(path, json=PATHS[path], headers={name: value})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == name
