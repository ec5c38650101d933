"""Ranks as processes that exchange over gloo: same tokens, a loud end, nothing left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cloudlm.core.chat import Sampling
from cloudlm.core.errors import BrokenModel, InternalError
from cloudlm.engine.parallel import team as team_module
from cloudlm.engine.parallel.team import LOST_TIMEOUT_S, Team

pytestmark = [pytest.mark.flow, pytest.mark.timeout(300)]

SAMPLINGS = (Sampling(temperature=0.0), Sampling(temperature=1.0, seed=11))
IDLE = "import socket,sys; socket.socket(fileno=int(sys.argv[1])).recv(1)"


@pytest.fixture
def over_processes(make_runner: Any) -> Iterator[Callable[..., Any]]:
    made: list[Any] = []

    def make(folder: Path, **settings: Any) -> Any:
        made.append(make_runner(folder, threads=1, **settings))
        return made[-1]

    yield make
    for runner in made:
        runner.close()
        assert not any(is_alive(pid) for pid in runner.team.pids.values())


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def answers(runner: Any, driver: Any) -> list[list[int]]:
    batch = driver(runner, budget=19)
    for sampling in SAMPLINGS:
        batch.add([5, 3, 250, 77, 12], sampling)
        batch.add(list(range(40, 70)), sampling)
    batch.run(16)
    return [one.output for one in batch.sequences]


@pytest.mark.parametrize(
    ("name", "tensor", "pipeline"),
    [("llama", 2, 1), ("qwen3", 2, 1), ("gemma2", 1, 2), ("mixtral", 2, 2)],
)
def test_processes_answer_as_one_does(
    name: str,
    tensor: int,
    pipeline: int,
    saved_model: Any,
    make_runner: Any,
    over_processes: Any,
    driver: Any,
) -> None:
    folder = saved_model(name).folder
    expected = answers(make_runner(folder, threads=1), driver)
    runner = over_processes(folder, tensor_parallel=tensor, pipeline_parallel=pipeline)
    assert answers(runner, driver) == expected
    runner.sleep(1)
    runner.wake()
    assert answers(runner, driver) == expected


def test_a_killed_rank_is_named_and_the_next_step_fails(
    saved_model: Any, over_processes: Any, driver: Any
) -> None:
    runner = over_processes(saved_model("llama").folder, tensor_parallel=2)
    told: list[str] = []
    noticed = threading.Event()
    runner.when_lost(lambda reason: (told.append(reason), noticed.set()))
    os.kill(runner.team.pids[1], signal.SIGKILL)
    assert noticed.wait(10)
    assert told == ["rank 1 of the model has ended (killed by SIGKILL)"]
    with pytest.raises(InternalError, match="rank 1 of the model has ended"):
        answers(runner, driver)


def test_a_rank_lost_in_an_exchange_is_named_by_the_step_that_fails(
    saved_model: Any, over_processes: Any, driver: Any
) -> None:
    runner = over_processes(saved_model("llama").folder, tensor_parallel=2)
    batch = driver(runner)
    batch.add([1, 2, 3])
    threading.Timer(0.3, os.kill, (runner.team.pids[1], signal.SIGKILL)).start()
    with pytest.raises(InternalError, match=r"rank 1 of the model has ended \(killed by SIGKILL\)"):
        batch.run(250)


def test_a_rank_that_stands_still_does_not_hang_the_step(
    saved_model: Any, over_processes: Any, driver: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cloudlm.engine.parallel.ranks.EXCHANGE_TIMEOUT_S", 8.0)
    runner = over_processes(saved_model("llama").folder, tensor_parallel=2)
    os.kill(runner.team.pids[1], signal.SIGSTOP)
    with pytest.raises(RuntimeError):
        answers(runner, driver)


def test_a_fault_of_another_rank_ends_the_start(
    saved_model: Any, make_runner: Any, tmp_path: Path
) -> None:
    """All that loading starts is gone when it fails."""
    for file in saved_model("llama").folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:-100])
    with pytest.raises(BrokenModel, match="cut or damaged"):
        make_runner(tmp_path, tensor_parallel=2, threads=1)
    assert not children_of(os.getpid())


def children_of(pid: int) -> list[str]:
    found = subprocess.run(
        ["ps", "-o", "args=", "--ppid", str(pid)], capture_output=True, text=True, check=False
    )
    return [line for line in found.stdout.splitlines() if "cloudlm.engine.parallel.rank" in line]


def test_an_engine_that_hangs_after_a_loss_ends_with_its_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(team_module, "LOST_TIMEOUT_S", 0.3)
    ended: list[int] = []
    done = threading.Event()
    team = Team(
        3, (sys.executable, "-c", IDLE), end_process=lambda code: (ended.append(code), done.set())
    )
    try:
        os.kill(team.pids[2], signal.SIGKILL)
        assert done.wait(60)
        assert ended == [1]
        assert "rank 2 of the model has ended (killed by SIGKILL)" in capsys.readouterr().err
        assert team.lost
    finally:
        team.close()
    assert not any(is_alive(pid) for pid in team.pids.values())
    assert LOST_TIMEOUT_S == 5.0


def test_a_team_that_is_closed_loses_nobody() -> None:
    team = Team(2, (sys.executable, "-c", IDLE))
    lost: list[str] = []
    team.when_lost(lost.append)
    began = time.monotonic()
    team.close()
    assert time.monotonic() - began < 60
    assert not lost and team.lost is None
    team.close()


def test_a_rank_whose_parent_dies_dies(tmp_path: Path) -> None:
    """A rank that waits for orders from a parent killed the hard way, its socket kept open."""
    code = (
        "import os,socket,subprocess,sys,time\n"
        "ours,theirs=socket.socketpair()\n"
        "os.set_inheritable(ours.fileno(),True)\n"
        "child=subprocess.Popen([sys.executable,'-m','cloudlm.engine.parallel.rank',"
        "str(theirs.fileno()),str(os.getpid())],pass_fds=(theirs.fileno(),ours.fileno()))\n"
        "ours.recv(8)\n"
        "print(child.pid,flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.stdout.close()
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 60
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(pid)


def is_running(pid: int) -> bool:
    """Not a zombie that nobody waits for, as in a container without an init."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
