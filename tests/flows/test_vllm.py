"""``engine: vllm`` in a deployment: with a mock of vLLM's server, and with vLLM itself.

The second runs where CLOUDLM_VLLM_PYTHON names the Python of an environment with vLLM.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
from installations import QUESTION, Installation, processes_of, wait_for
from mock_vllm import mock_python

from cloudlm.core.resuming import NOTE, RESUMABLE_HEADER, RESUME_PATH
from cloudlm.gateway.progress import Progress

pytestmark = pytest.mark.flow
REAL = os.environ.get("CLOUDLM_VLLM_PYTHON", "")
ASKED = {"model": "big", "messages": [{"role": "user", "content": QUESTION}], "temperature": 0}


STREAMS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("/v1/chat/completions", {**ASKED, "max_tokens": 24}),
    ("/v1/chat/completions", {**ASKED, "max_tokens": 24, "stop": ["a word that is nowhere", "e"]}),
    ("/v1/completions", {"prompt": "\N{EURO SIGN} \N{SNOWMAN}", "temperature": 0}),
)


def vllm_processes(home: Path, program: str) -> list[int]:
    """vLLM's processes know nothing of the home but the guard's mark and their parents."""
    workers = [pid for pid, line in processes_of(home).items() if "--engine vllm" in line]
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            command = (stat.parent / "cmdline").read_bytes()
        except OSError:
            continue
        if parent in workers and program.encode() in command:
            found.append(int(stat.parent.name))
    return found


def test_a_replica_of_vllm_from_deployment_to_restart(
    own_installation: Callable[..., Installation], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLOUDLM_VLLM_PYTHON", str(mock_python(tmp_path)))
    running = own_installation()
    model = running.cli("models", "show", "bank-helper", "--json")
    assert json.loads(model.stdout)["name"] == "bank-helper"
    refused = running.cli(
        *("deploy", "models:/bank-helper/1", "--name", "big", "--engine", "vllm"),
        *("--option", "trust_remote_code=true"),
        check=False,
    )
    assert refused.returncode == 1
    assert "max_model_len" in refused.stderr
    deploy = ("deploy", "models:/bank-helper/1", "--name", "big", "--engine", "vllm")
    running.cli(*deploy, "--option", "max_model_len=256")
    with running.http() as client:
        answer = client.post("/v1/chat/completions", json=ASKED)
        assert answer.status_code == 200, answer.text
        assert answer.json()["model"] == "big"
        streamed = client.post("/v1/chat/completions", json={**ASKED, "stream": True})
        assert streamed.text.rstrip().endswith("data: [DONE]")

        (before,) = vllm_processes(running.home, "mock_vllm.py")
        os.kill(before, signal.SIGKILL)

        def answers_again() -> bool:
            return client.post("/v1/chat/completions", json=ASKED).status_code == 200

        wait_for(
            "another vLLM",
            lambda: vllm_processes(running.home, "mock_vllm.py") not in ([], [before]),
            60,
        )
        wait_for("an answer of it", answers_again, 150)
    last = vllm_processes(running.home, "mock_vllm.py")
    running.cli("delete", "big")
    wait_for("its end", lambda: not any(Path(f"/proc/{pid}").exists() for pid in last))


def test_without_an_environment_the_deployment_says_what_to_do(
    own_installation: Callable[..., Installation], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CLOUDLM_VLLM_PYTHON", raising=False)
    running = own_installation()
    deploy = ("deploy", "models:/bank-helper/1", "--name", "big", "--engine", "vllm", "--no-wait")
    running.cli(*deploy)

    def reason() -> str:
        shown = json.loads(running.cli("status", "big", "--json").stdout)
        status = shown[0]["status"] or {}
        return str(status.get("message", "")) if status.get("phase") == "failed" else ""

    assert "CLOUDLM_VLLM_PYTHON" in wait_for("a reason", reason, 150)


@pytest.mark.timeout(600)
@pytest.mark.skipif(not REAL, reason="CLOUDLM_VLLM_PYTHON names no environment with vLLM")
def test_vllm_itself_answers_through_the_gateway(
    own_installation: Callable[..., Installation], tmp_path: Path
) -> None:
    running = own_installation()
    spec = tmp_path / "big.yaml"
    spec.write_text(
        "name: big\nmodel: models:/bank-helper/1\nengine: vllm\n"
        "options: {max_model_len: 512, enforce_eager: true, max_num_seqs: 8, dtype: float32}\n"
        "env: {VLLM_CPU_KVCACHE_SPACE: '1', VLLM_CPU_OMP_THREADS_BIND: 0-1,"
        " VLLM_CPU_NUM_OF_RESERVED_CPU: '0'}\n"
    )
    running.cli("apply", "-f", str(spec), "--no-wait")

    def is_ready() -> bool:
        (replica,) = running.replicas("big") or [{"state": ""}]
        assert replica.get("restarts", 0) == 0, replica
        return bool(replica["state"] == "ready")

    wait_for("a vLLM that is ready", is_ready, 540)
    (replica,) = running.replicas("big")
    with running.http() as client:
        whole = client.post("/v1/chat/completions", json={**ASKED, "max_tokens": 24}).json()
        own = {**ASKED, "model": "bank-helper", "max_tokens": 24}
        ours = client.post("/v1/chat/completions", json=own).json()
        said = whole["choices"][0]["message"]["content"]
        print("vLLM says:", said)
        assert said == ours["choices"][0]["message"]["content"]
        assert whole["usage"]["prompt_tokens"] == ours["usage"]["prompt_tokens"]
        stream = {**ASKED, "max_tokens": 24, "stream": True}
        body = client.post("/v1/chat/completions", json=stream).text
        events = [line[6:] for line in body.splitlines() if line.startswith("data: ")]
        assert events[-1] == "[DONE]"
        pieces = [json.loads(one)["choices"][0]["delta"].get("content") for one in events[:-1]]
        assert "".join(piece or "" for piece in pieces) == said
        bad = client.post(
            "/v1/completions", json={"model": "big", "prompt": "a", "max_tokens": 999}
        )
        assert bad.status_code == 400
    _resumes(running, replica["url"])
    for path, body in STREAMS:
        _goes_on(running, replica["url"], path, body)
    metrics = httpx2.get(f"{replica['url']}/metrics", timeout=60).text
    assert "vllm:generation_tokens_total" in metrics
    assert 'cloudlm_http_requests_total{route="/v1/chat/completions",status="200"}' in metrics


def _resumes(running: Installation, url: str) -> None:
    """A greedy answer cut anywhere goes on as it would have."""
    token = (running.home / "secrets" / "worker-token").read_text().strip()
    asked: dict[str, Any] = {
        "messages": ASKED["messages"],
        "sampling": {"temperature": 0, "max_tokens": 16},
    }

    def tokens(**more: Any) -> list[int]:
        answer = httpx2.post(
            f"{url}/internal/v1/generate",
            json={**asked, **more},
            headers={"authorization": f"Bearer {token}"},
            timeout=60,
        )
        lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
        assert lines[-1] == "[DONE]", answer.text
        return [token for line in lines[1:-1] for token in json.loads(line)["token_ids"]]

    whole = tokens()
    for cut in range(1, len(whole)):
        assert tokens(output_token_ids=whole[:cut]) == whole[cut:]


def _goes_on(running: Installation, url: str, path: str, body: dict[str, Any]) -> None:
    """A greedy stream cut after any chunk goes on as it would have."""
    token = (running.home / "secrets" / "worker-token").read_text().strip()
    headers = {"authorization": f"Bearer {token}", RESUMABLE_HEADER: "1"}
    asked = json.dumps({"model": "big", **body, "stream": True}).encode()

    def chunks(route: str, content: bytes) -> list[dict[str, Any]]:
        answer = httpx2.post(url + route, content=content, headers=headers, timeout=60)
        lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
        assert lines[-1] == "[DONE]", answer.text
        return [json.loads(line) for line in lines[:-1]]

    whole = chunks(path, asked)
    shown = [{name: said for name, said in one.items() if name != NOTE} for one in whole]
    for cut in range(1, len(whole) + 1):
        progress = Progress()
        for chunk in whole[:cut]:
            progress.take(dict(chunk))
        assert progress.resumable, whole
        rest = chunks(RESUME_PATH, progress.request(path, asked, 0))
        for chunk in rest:
            chunk.pop(NOTE)
        assert shown[:cut] + rest == shown
