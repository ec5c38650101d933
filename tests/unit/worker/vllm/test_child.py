"""The command, the environment, and a child process that does not outlive anybody."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from mock_vllm import mock_python

from cloudlm.core.errors import BadSetting
from cloudlm.worker.app import _new_loop
from cloudlm.worker.vllm.child import Child
from cloudlm.worker.vllm.command import child_environment, find_python, server_command
from cloudlm.worker.vllm.reading import read_metrics, stats_of


def test_a_missing_environment_is_named_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(BadSetting, match=r"CLOUDLM_VLLM_PYTHON.*DIR/bin/python") as caught:
        find_python("")
    assert "pip install vllm" in caught.value.message
    with pytest.raises(BadSetting, match="is no program"):
        find_python(str(tmp_path / "python"))
    with pytest.raises(BadSetting, match="has no vLLM in its environment"):
        find_python(sys.executable)
    assert find_python(str(mock_python(tmp_path))) == tmp_path / "python"


def test_the_command_reads_safetensors_only_and_runs_no_code() -> None:
    command = server_command(Path("/e/python"), Path("/m"), "bank", Path("/s"), {"seed": "3"})
    assert command[:3] == ["/e/python", "-m", "vllm.entrypoints.openai.api_server"]
    text = " ".join(command)
    assert "--load-format safetensors" in text
    assert "--seed 3" in text
    assert "trust" not in text


def test_what_is_ours_stays_ours() -> None:
    ours = {
        "PATH": "/bin",
        "PYTHONPATH": "/src",
        "CLOUDLM_WORKER_TOKEN": "secret",
        "CLOUDLM_REGISTRY_URL": "s3://secret",
        "CLOUDLM_GUARD_TOKEN": "mark",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    found = child_environment(Path("/e/bin/python"), {"enable_lora": "true"}, ours)
    assert "secret" not in str(found)
    assert "PYTHONPATH" not in found
    assert found["PATH"] == "/e/bin:/bin"
    assert found["CLOUDLM_GUARD_TOKEN"] == "mark"
    assert found["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert found["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    assert "VLLM_SERVER_DEV_MODE" not in found


def python(*lines: str) -> list[str]:
    return [sys.executable, "-S", "-c", "\n".join(lines)]


async def test_its_last_words_are_kept_and_passed_on(capfd: pytest.CaptureFixture[str]) -> None:
    child = Child(
        python(
            "import sys",
            "print('loading')",
            "print('ValueError: Unsupported head size 17')",
            "print('(x) RuntimeError: Engine core initialization failed. See root cause above.')",
            "sys.exit(1)",
        ),
        {},
    )
    await child.start()
    assert await child.wait() == 1
    assert not child.alive
    assert child.last_words == "exit code 1: ValueError: Unsupported head size 17"
    assert "loading" in capfd.readouterr().err
    await child.stop()


def test_it_starts_on_the_loop_that_a_worker_runs() -> None:
    async def run() -> int:
        child = Child(
            python("import os, sys", "sys.exit(7 if os.getpgid(0) == os.getpid() else 1)"), {}
        )
        await child.start()
        try:
            return await child.wait()
        finally:
            await child.stop()

    with asyncio.Runner(loop_factory=_new_loop) as runner:
        assert runner.run(run()) == 7


async def test_stopping_reaches_its_children_too() -> None:
    child = Child(
        python(
            "import os, signal, sys, time",
            "signal.signal(signal.SIGTERM, signal.SIG_IGN) if os.fork() == 0 else None",
            "print('up', flush=True)",
            "time.sleep(60)",
        ),
        {},
    )
    await child.start()
    assert child._process is not None
    group = child._process.pid
    await asyncio.sleep(0.2)
    await child.stop()
    assert not child.alive
    async with asyncio.timeout(60):
        while _group_lives(group):
            await asyncio.sleep(0.01)


def test_it_dies_with_the_worker_however_that_dies() -> None:
    source = """
import asyncio, sys
from cloudlm.worker.app import _new_loop
from cloudlm.worker.vllm.child import Child
async def main():
    child = Child([sys.executable, "-S", "-c", "import time; time.sleep(60)"], {})
    await child.start()
    print(child._process.pid, flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""
    worker = subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE)
    assert worker.stdout is not None
    pid = int(worker.stdout.readline())
    os.kill(worker.pid, signal.SIGKILL)
    worker.wait()
    worker.stdout.close()
    for _ in range(200):
        if not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text():
            return
        os.sched_yield()
        signal.sigtimedwait([], 0.01)
    pytest.fail("the child outlived its worker")


def _group_lives(group: int) -> bool:
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            return True
    return False


def test_metrics_are_read_by_name_and_summed() -> None:
    text = """# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="a b"} 2.0
vllm:num_requests_running{engine="1",model_name="a b"} 1.0
vllm:num_requests_waiting_by_reason{reason="capacity"} 5.0
vllm:generation_tokens_total{engine="0"} 40.0
vllm:iteration_tokens_total_count{engine="0"} 12.0
vllm:kv_cache_usage_perc{engine="0"} nan
garbage
"""
    found = read_metrics(text)
    stats = stats_of(found, ongoing=7, answering=True)
    assert (stats.running, stats.waiting, stats.steps, stats.kv_usage) == (3, 0, 52, 0.0)
    assert stats_of(found, ongoing=7, answering=False).running == 7
    assert stats_of({}, ongoing=0, answering=True).steps == 0
