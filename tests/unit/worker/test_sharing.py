"""Whose share a request uses: the gateway's headers and the body's priority reach the engine."""

from __future__ import annotations

from typing import Any

import pytest

PATHS = {
    "/v1/chat/completions": {"model": "echo", "messages": [{"role": "user", "content": "hi"}]},
    "/v1/completions": {"model": "echo", "prompt": "hi"},
    "/internal/v1/generate": {"prompt": "hi"},
}


@pytest.mark.parametrize("path", PATHS)
async def test_tenant_weight_and_priority_reach_the_engine(bench: Any, path: str) -> None:
    headers = {"x-cloudlm-tenant": "ab12", "x-cloudlm-weight": "2.5"}
    body = {**PATHS[path], "priority": -3}  # vLLM's: lower goes first
    answer = await bench.client.post(path, json=body, headers=headers)
    assert answer.status_code == 200
    (request,) = bench.engine.requests
    assert (request.tenant, request.weight, request.priority) == ("ab12", 2.5, 3)


@pytest.mark.parametrize("path", PATHS)
async def test_without_them_all_are_equal(bench: Any, path: str) -> None:
    await bench.post(path, PATHS[path])
    (request,) = bench.engine.requests
    assert (request.tenant, request.weight, request.priority) == ("", 1.0, 0)


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
async def test_headers_that_make_no_sense_are_refused(bench: Any, name: str, value: str) -> None:
    body = PATHS["/v1/completions"]
    answer = await bench.client.post("/v1/completions", json=body, headers={name: value})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == name
