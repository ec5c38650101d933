"""A whole worker on a real port: opens at once, gets ready, serves, stops, fails plainly."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import httpx2
import openai
import pytest

from cloudlm.core.errors import BrokenModel
from cloudlm.engine.api import EngineStats
from cloudlm.worker.app import run_worker
from cloudlm.worker.config import WorkerConfig


class Running:
    """A worker in a thread around the deterministic engine."""

    def __init__(self, config: WorkerConfig, serving_of: Callable[..., Any], engine: Any) -> None:
        self.engine = engine
        self.url = ""
        self.code: int | None = None
        ready = threading.Event()

        async def load(_: WorkerConfig, tell: Callable[[float, str], None]) -> Any:
            tell(0.5, "half way")
            return serving_of(engine)

        def on_ready(url: str) -> None:
            self.url = url
            ready.set()

        def work() -> None:
            self.code = run_worker(replace(config, port=0, on_ready=on_ready), load=load)

        self._thread = threading.Thread(target=work)
        self._thread.start()
        assert ready.wait(20)

    def stop(self) -> int | None:
        """Let the engine die: the worker must notice and end by itself."""
        self.engine.now = EngineStats(alive=False)
        self._thread.join(20)
        return self.code


@pytest.fixture
def worker(config: WorkerConfig, serving_of: Any, echo_engine: Any) -> Iterator[Running]:
    running = Running(replace(config, token="secret"), serving_of, echo_engine())
    yield running
    running.stop()


def client_of(worker: Running, key: str = "secret") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{worker.url}/v1", api_key=key, max_retries=0)


def test_the_openai_package(worker: Running) -> None:
    messages: Any = [{"role": "user", "content": "hi"}]
    with client_of(worker) as client:
        assert [model.id for model in client.models.list()] == ["echo"]
        assert client.models.retrieve("echo").owned_by == "cloudlm"
        whole = client.chat.completions.create(
            model="echo", messages=messages, n=2, logprobs=True, top_logprobs=2, seed=1
        )
        assert [choice.message.content for choice in whole.choices] == ["Hello, world"] * 2
        assert whole.choices[0].logprobs is not None
        assert whole.choices[0].logprobs.content is not None
        assert len(whole.choices[0].logprobs.content[0].top_logprobs) == 2
        assert whole.usage is not None
        assert whole.usage.completion_tokens == 26
        stream = client.chat.completions.create(
            model="echo",
            messages=messages,
            stream=True,
            stop=[","],
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert text == "Hello"
        assert chunks[-1].usage is not None
        plain = client.completions.create(model="echo", prompt="hi", max_tokens=5, logprobs=1)
        assert plain.choices[0].text == "Hello"
        streamed = client.completions.create(model="echo", prompt="hi", stream=True)
        assert "".join(c.choices[0].text for c in streamed) == "Hello, world"


def test_the_openai_packages_errors(worker: Running) -> None:
    messages: Any = [{"role": "user", "content": "hi"}]
    with client_of(worker) as client:
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="other", messages=messages)
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="echo", messages=messages, temperature=9)
        assert caught.value.param == "temperature"
        huge: Any = [{"role": "user", "content": "x" * 10_000_000}]
        with pytest.raises(openai.APIStatusError) as too_large:
            client.chat.completions.create(model="echo", messages=huge)
        assert too_large.value.status_code == 413
        chunks = (b"x" * 100_000 for _ in range(100))
        chunked = httpx2.post(
            f"{worker.url}/v1/chat/completions",
            content=chunks,
            headers={"authorization": "Bearer secret"},
            timeout=60,
        )
        assert chunked.status_code == 413
        worker.engine.answer = "x" * 50
        worker.engine.fail_after = 5
        worker.engine.failure = BrokenModel("broke in the middle")
        stream = client.chat.completions.create(model="echo", messages=messages, stream=True)
        with pytest.raises(openai.APIError, match="broke in the middle"):
            list(stream)
    with client_of(worker, "wrong") as stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()


@pytest.mark.promise(2)
def test_a_dropped_connection_frees_its_slot_at_once(worker: Running) -> None:
    worker.engine.answer = "x" * 200
    host, port = worker.url.removeprefix("http://").split(":")
    body = b'{"model":"echo","prompt":"hi","max_tokens":100,"stream":%s}'
    for stream in (b"true", b"false"):
        worker.engine.gate.clear()
        payload = body % stream
        with socket.create_connection((host, int(port))) as raw:
            raw.sendall(
                b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer secret\r\n"
                b"content-length: %d\r\n\r\n" % len(payload) + payload
            )
            assert wait_for(lambda: len(worker.engine.open) == 1)
        began = time.monotonic()
        assert wait_for(lambda: not worker.engine.open)
        assert time.monotonic() - began < 5.0  # long before the answer would end


def wait_for(true: Callable[[], bool], seconds: float = 60.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if true():
            return True
        time.sleep(0.002)
    return False


@pytest.mark.promise(11)
@pytest.mark.known_failure("vllm#48966")
def test_a_dead_engine_ends_the_process_with_a_reason(
    config: WorkerConfig, serving_of: Any, echo_engine: Any, capfd: Any
) -> None:
    running = Running(config, serving_of, echo_engine())
    assert running.stop() == 1
    assert "the engine has stopped; the worker ends" in capfd.readouterr().err
    assert running.engine.closed


def test_a_failed_load_is_one_plain_line(config: WorkerConfig, capfd: Any) -> None:
    async def broken(*_: Any) -> Any:
        raise BrokenModel("model.safetensors: the header is cut off")

    async def worse(*_: Any) -> Any:
        raise ZeroDivisionError("oops")

    assert run_worker(replace(config, port=0), load=broken) == 1
    assert capfd.readouterr().err == ("cloudlm worker: model.safetensors: the header is cut off\n")
    assert run_worker(replace(config, port=0), load=worse) == 1
    err = capfd.readouterr().err
    assert "ZeroDivisionError: oops" in err
    assert "Traceback" not in err


def test_a_port_in_use_has_its_own_exit_code(config: WorkerConfig, capfd: Any) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert run_worker(replace(config, port=port)) == 98
    err = capfd.readouterr().err
    assert err.startswith(f"cloudlm worker: port in use: 127.0.0.1:{port}")
    assert err.count("\n") == 1


def test_a_bad_start_is_refused(config: WorkerConfig, capfd: Any) -> None:
    assert run_worker(replace(config, host="0.0.0.0")) == 1
    assert "needs a token" in capfd.readouterr().err


def run_and_terminate(config: WorkerConfig, load: Any, during: Callable[[str], None]) -> int:
    """Run a worker in this, the main, thread and send it SIGTERM after ``during``."""

    def work(url: str) -> None:
        try:
            during(url)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_ready(url: str) -> None:
        threading.Thread(target=work, args=(url,)).start()

    return run_worker(replace(config, port=0, on_ready=on_ready), load=load)


def loader(serving_of: Any, engine: Any) -> Any:
    async def load(*_: Any) -> Any:
        return serving_of(engine)

    return load


def test_sigterm_lets_running_requests_finish(
    config: WorkerConfig, serving_of: Any, echo_engine: Any
) -> None:
    engine = echo_engine()
    engine.gate.clear()
    answers: list[httpx2.Response] = []
    askers: list[threading.Thread] = []

    def ask(url: str) -> None:
        body = {"model": "echo", "prompt": "hi"}
        answers.append(httpx2.post(f"{url}/v1/completions", json=body, timeout=60))

    def during(url: str) -> None:
        askers.append(threading.Thread(target=ask, args=(url,)))
        askers[0].start()
        assert wait_for(lambda: len(engine.open) == 1)

    async def load(*_: Any) -> Any:
        async def open_later() -> None:
            while not engine.open:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.4)  # by now the signal has been handled
            engine.gate.set()

        load.task = asyncio.create_task(open_later())  # type: ignore[attr-defined]
        return serving_of(engine)

    assert run_and_terminate(config, load, during) == 0
    askers[0].join(20)
    assert answers[0].status_code == 200
    assert answers[0].json()["choices"][0]["text"] == "Hello, world"
    assert engine.closed


def test_sigterm_ends_what_outlasts_the_grace(
    config: WorkerConfig, serving_of: Any, echo_engine: Any
) -> None:
    engine = echo_engine()
    engine.answer = "x" * 200
    texts: list[str] = []
    askers: list[threading.Thread] = []

    def ask(url: str) -> None:
        body = {"model": "echo", "prompt": "hi", "stream": True, "max_tokens": 150}
        texts.append(httpx2.post(f"{url}/v1/completions", json=body, timeout=60).text)

    def during(url: str) -> None:
        askers.append(threading.Thread(target=ask, args=(url,)))
        askers[0].start()
        assert wait_for(lambda: len(engine.open) == 1)

    class Gate:
        async def wait(self) -> None:
            await asyncio.sleep(0.05)

    engine.gate = Gate()
    code = run_and_terminate(replace(config, grace_s=0.3), loader(serving_of, engine), during)
    assert code == 0
    askers[0].join(20)
    assert "the replica stopped before the answer was complete" in texts[0]
    assert "[DONE]" not in texts[0]


def test_the_command_refuses_plainly(tmp_path: Any) -> None:
    environment = {**os.environ, "CLOUDLM_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "cloudlm.worker", "--port", "0", "--model"]
    empty = tmp_path / "empty"
    empty.mkdir()
    done = subprocess.run(
        [*command, str(empty)], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "model.safetensors is missing" in done.stderr
    misuse = subprocess.run(
        [*command, "x", "--option", "y"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert misuse.returncode == 1
    assert "key=value" in misuse.stderr
