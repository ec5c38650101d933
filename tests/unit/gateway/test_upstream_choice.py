"""Where a request goes is the operator's to say: nothing in it, and nothing in an answer, makes the
gateway ask somebody else."""

from __future__ import annotations

from typing import Any

import pytest
from served_gateway import served, talk, wire

from cloudlm.gateway.dialects.orders import ADDRESSES, NAMES, PROGRAMS, TEMPLATE_ARGUMENTS, TENSORS

ELSEWHERE = "http://169.254.169.254/latest/meta-data/"
PATHS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/completions": {"prompt": "hi"},
    "/v1/embeddings": {"input": "hi"},
    "/invocations": {"prompt": "hi"},
    "/tokenize": {"prompt": "hi"},
}


@pytest.mark.promise(15)
@pytest.mark.known_failure("CVE-2024-6587", "CVE-2023-43654")
@pytest.mark.parametrize("field", ADDRESSES)
@pytest.mark.parametrize("path", PATHS)
async def test_no_field_chooses_the_address(rig: Any, kit: Any, path: str, field: str) -> None:
    body = {"model": kit.MODEL, **PATHS[path]}
    refused = await rig.ask({**body, field: ELSEWHERE}, path=path)
    assert (refused.status, refused.json["error"]["param"]) == (400, field)
    assert not rig.replicas[0].requests
    await rig.ask({**body, field: None}, path=path)  # clients that send every field they know
    assert len(rig.replicas[0].requests) == 1


@pytest.mark.promise(18)
@pytest.mark.known_failure("CVE-2025-62164")
@pytest.mark.parametrize("field", TENSORS)
async def test_no_field_brings_bytes_to_unpack(rig: Any, kit: Any, field: str) -> None:
    for path, body in PATHS.items():
        refused = await rig.ask({"model": kit.MODEL, **body, field: "gASVAAAA"}, path=path)
        assert (refused.status, refused.json["error"]["param"]) == (400, field)
    assert not rig.replicas[0].requests


@pytest.mark.promise(7, 18)
@pytest.mark.known_failure("PYSEC-2026-4198", "CVE-2026-105754")
@pytest.mark.parametrize("field", NAMES)
async def test_no_field_names_what_tenants_share(rig: Any, kit: Any, field: str) -> None:
    for path, body in PATHS.items():
        for value in ("another-tenants", {"id": "another-tenants"}, ["another-tenants"]):
            refused = await rig.ask({"model": kit.MODEL, **body, field: value}, path=path)
            assert (refused.status, refused.json["error"]["param"]) == (400, field)
    assert not rig.replicas[0].requests


@pytest.mark.promise(18)
@pytest.mark.known_failure("CVE-2024-9056")
async def test_no_body_of_parts_is_read(kit: Any) -> None:
    """However long its boundary: a body is JSON, or refused."""
    async with served(kit) as rig:
        for boundary in ("x", "-" * 60, "-" * 60_000):
            parts = f"--{boundary}\r\n".encode() + b"-" * 200_000
            kind = f"multipart/form-data; boundary={boundary[:1000]}"
            head = wire(rig, {}, **{"content-type": kind}).split(b"\r\n\r\n")[0]
            head = head.replace(b"content-length: 2", b"content-length: %d" % len(parts))
            assert b"%d" % len(parts) in head
            assert (await talk(rig, head + b"\r\n\r\n" + parts))[0] == 400
        assert not rig.replicas[0].requests


@pytest.mark.promise(36)
@pytest.mark.known_failure("CVE-2025-61620")
@pytest.mark.parametrize("field", PROGRAMS)
async def test_no_field_brings_a_program(rig: Any, kit: Any, field: str) -> None:
    payload = "{% for a in range(10**9) %}{{ a }}{% endfor %}"
    refused = await rig.ask(kit.chat_body(**{field: payload}))
    assert (refused.status, refused.json["error"]["param"]) == (400, field)
    assert not rig.replicas[0].requests


@pytest.mark.promise(18, 36)
@pytest.mark.known_failure("CVE-2025-62426")
async def test_arguments_for_a_template_are_no_arguments_of_what_calls_it(
    rig: Any, kit: Any
) -> None:
    for name in TEMPLATE_ARGUMENTS:
        refused = await rig.ask(kit.chat_body(chat_template_kwargs={name: True}))
        assert (refused.status, refused.json["error"]["param"]) == (400, "chat_template_kwargs")
    assert (await rig.ask(kit.chat_body(chat_template_kwargs=[1]))).status == 400
    assert not rig.replicas[0].requests
    good = {"enable_thinking": False}
    assert (await rig.ask(kit.chat_body(chat_template_kwargs=good))).status == 200
    assert rig.replicas[0].requests[0]["chat_template_kwargs"] == good


@pytest.mark.promise(15)
@pytest.mark.known_failure("CVE-2026-33626", "CVE-2024-4325", "CVE-2026-22773", "PYSEC-2025-43")
@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": ELSEWHERE}},
        {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
        {"type": "image_url", "image_url": {"url": "http://[::1]:22/"}},
        {"type": "image_url", "image_url": {"url": "http://0x7f.1/"}},
        {"type": "video_url", "video_url": {"url": ELSEWHERE}},
        {"type": "audio_url", "audio_url": {"url": ELSEWHERE}},
        {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}},
        {"type": "file", "file": {"file_id": ELSEWHERE}},
    ],
)
async def test_no_media_is_fetched(rig: Any, kit: Any, part: dict[str, Any]) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "hi"}, part]}]
    refused = await rig.ask(kit.chat_body(messages=messages))
    assert refused.status == 501
    assert refused.json["error"]["param"] == "messages[0].content"
    assert not rig.replicas[0].requests


@pytest.mark.promise(15)
@pytest.mark.parametrize("status", [300, 301, 302, 303, 307, 308])
@pytest.mark.parametrize("stream", [True, False])
async def test_no_redirect_is_followed(kit: Any, status: int, stream: bool) -> None:
    """A replica that was taken over cannot send the prompt and our token to somebody else."""
    trap = kit.MockReplica("trap")
    await trap.start()
    try:
        async with kit.open_rig() as rig:
            moved = {"Location": f"{trap.url}/v1/chat/completions"}
            rig.replicas[0].default = kit.Plan("status", status=status, headers=moved)
            result = await rig.ask(kit.chat_body(stream=stream))
            assert (result.status, result.json["error"]["code"]) == (502, "upstream_failed")
            assert "location" not in result.headers
            assert trap.url not in result.body.decode()
            assert not trap.requests
    finally:
        await trap.stop()


@pytest.mark.promise(15)
async def test_each_credential_goes_to_its_own_side_alone(rig: Any, kit: Any) -> None:
    result = await rig.ask(kit.chat_body(), headers={**rig.headers, "x-api-key": rig.key})
    assert result.status == 200
    (head,) = rig.replicas[0].heads
    assert "Bearer worker-token-for-tests" in head
    assert rig.key not in head
    assert rig.key not in str(rig.replicas[0].requests)
    assert "worker-token-for-tests" not in str(result.headers) + result.body.decode()


@pytest.mark.promise(15)
async def test_no_target_and_no_header_chooses_the_address(kit: Any) -> None:
    async with served(kit) as rig:
        good = wire(rig, kit.chat_body())
        path = b"/v1/chat/completions"
        for target in (b"http://169.254.169.254" + path, b"http://evil.example" + path):
            assert (await talk(rig, good.replace(path, target, 1)))[0] in (400, 403)
        assert not rig.replicas[0].requests
        others = {
            "x_forwarded_host": "evil.example",
            "forwarded": "host=evil.example",
            "x_original_url": ELSEWHERE,
            "x_rewrite_url": ELSEWHERE,
            "x_cloudlm_replica": "evil",
            "x_cloudlm_upstream": ELSEWHERE,
            "api_base": ELSEWHERE,
        }
        status, headers, _ = await talk(rig, wire(rig, kit.chat_body(), **others))
        assert status == 200
        assert headers["x-cloudlm-replica"] == rig.replicas[0].name
        (head,) = rig.replicas[0].heads
        assert "evil" not in head
        assert "169.254" not in head
