"""A deployment over two processes: same answers, and a lost rank is a lost replica, which control
replaces."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from installations import MODEL, QUESTION, Installation, processes_of, wait_for

from cloudlm.drivers.ports import port_is_free

pytestmark = [pytest.mark.flow, pytest.mark.timeout(300)]

NAME = "in-two"
END_S = 60.0


def asked(model: str, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": QUESTION}]
    return {"model": model, "messages": messages, "max_tokens": 48, **fields}


def ranks_of(home: Path) -> list[int]:
    found = processes_of(home)
    return [pid for pid, command in found.items() if "cloudlm.engine.parallel.rank" in command]


def test_a_deployment_over_two_processes_answers_alike_and_is_restarted_when_one_is_lost(
    own_installation: Callable[..., Installation],
) -> None:
    running = own_installation()
    running.cli("deploy", f"models:/{MODEL}/1", "--name", NAME, "--tensor-parallel", "2")
    with running.http() as client:

        def text(model: str, **fields: Any) -> str:
            answer = client.post("/v1/chat/completions", json=asked(model, **fields))
            assert answer.status_code == 200, answer.text
            return str(answer.json()["choices"][0]["message"]["content"])

        for fields in ({"temperature": 0.0}, {"temperature": 0.8, "seed": 5}):
            assert text(NAME, **fields) == text(MODEL, **fields)

        (before,) = running.replicas(NAME)
        (rank,) = ranks_of(running.home)
        os.kill(rank, signal.SIGKILL)

        def replaced() -> bool:
            (replica,) = running.replicas(NAME)
            return replica["pid"] != before["pid"] and replica["state"] == "ready"

        wait_for("a new replica", replaced, 150)
        assert text(NAME, temperature=0.0) == text(MODEL, temperature=0.0)
    (after,) = running.replicas(NAME)
    assert after["restarts"] == 1
    (new_rank,) = ranks_of(running.home)
    assert new_rank != rank
    assert before["pid"] not in processes_of(running.home)
    running.cli("delete", NAME)
    wait_for("the end of the rank", lambda: not ranks_of(running.home))


def test_a_worker_that_loses_a_rank_says_so_and_ends(tmp_path: Path) -> None:
    """In the middle of a stream, without guard or control."""
    import httpx2

    import cloudlm.registry

    folder = Path(cloudlm.registry.__file__).parent / "bundled" / MODEL
    port = next(port for port in range(18200, 18400) if port_is_free("127.0.0.1", port))
    environment = {**os.environ, "CLOUDLM_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "cloudlm.worker", "--model", str(folder)]
    command += ["--served-model-name", MODEL, "--port", str(port), "-tp", "2"]
    log = tmp_path / "worker.log"
    with log.open("wb") as errors:
        worker = subprocess.Popen(command, env=environment, stderr=errors)
    try:
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=30.0) as client:

            def ready() -> bool:
                assert worker.poll() is None, log.read_text()
                try:
                    return client.get("/readyz").status_code == 200
                except httpx2.TransportError:
                    return False

            wait_for("a ready worker", ready, 180)
            report = client.get("/health", params={"verbose": "1"}).json()
            assert (report["tensor_parallel"], report["pipeline_parallel"]) == (2, 1)
            long = asked(MODEL, stream=True, ignore_eos=True) | {"max_tokens": 200}
            with client.stream("POST", "/v1/chat/completions", json=long) as stream:
                lines = stream.iter_lines()
                read = [next(lines) for _ in range(8)]
                (rank,) = ranks_of(tmp_path)
                began = time.monotonic()
                os.kill(rank, signal.SIGKILL)
                read.extend(lines)
        events = [line[6:] for line in read if line.startswith("data: ")]
        assert "error" in json.loads(events[-1])
        assert worker.wait(END_S) == 1
        assert time.monotonic() - began < END_S
        assert "rank 1 of the model has ended (killed by SIGKILL)" in log.read_text()
    finally:
        if worker.poll() is None:
            worker.kill()
            worker.wait()
    assert processes_of(tmp_path) == {}
