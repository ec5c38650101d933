"""The guard, as a real process around tiny commands."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from cloudlm.drivers import procfs
from cloudlm.drivers.guard import EXIT_ALREADY_GUARDED, EXIT_MISUSE, backoff_s, lock_file
from cloudlm.drivers.launch import GuardOptions, GuardTiming, guard_command, start_guard
from cloudlm.drivers.runfiles import read_json

pytestmark = pytest.mark.flow

FAST = GuardTiming(grace_s=1.0, backoff_first_s=0.05, backoff_longest_s=0.2)


@pytest.fixture
def guarded(tmp_path, lifeline):
    """Start a guard around a command; end it afterwards."""
    started = []

    def start(command, **changes):
        options = GuardOptions(
            state=tmp_path / "g" / "one.json",
            log=tmp_path / "logs" / "one.log",
            command=command,
            **{"timing": FAST, **changes},
        )
        environment = {**os.environ, "MARK": str(tmp_path)}
        started.append(start_guard(options, environment, lifeline.read_end))
        return options, started[-1]

    yield start
    lifeline.cut()
    for process in started:
        process.wait(timeout=60)


def child_of(options):
    body = read_json(options.state) or {}
    return (
        procfs.process_id_from_body(body.get("child")) if body.get("phase") == "running" else None
    )


def test_output_is_captured_and_the_exit_code_returned(guarded):
    options, guard = guarded(
        [sys.executable, "-c", "import sys; print('out'); sys.stderr.write('err\\n'); sys.exit(7)"],
        restart=False,
    )
    assert guard.wait(timeout=60) == 7
    assert sorted(options.log.read_text().split()) == ["err", "out"]
    assert list(options.state.parent.iterdir()) == []


def test_death_by_signal_is_told_as_128_plus_signal(guarded):
    _, guard = guarded(["sh", "-c", "kill -9 $$"], restart=False)
    assert guard.wait(timeout=60) == 137


def test_a_command_that_cannot_start_says_why(guarded, eventually):
    options, _ = guarded(["/no/such/program"])
    body = eventually(lambda: read_json(options.state))
    assert "cannot start '/no/such/program'" in body["message"]
    assert body["phase"] == "backoff"


def test_crashes_are_restarted_with_growing_pauses(guarded, eventually):
    options, _ = guarded(["sh", "-c", "echo why it failed; exit 3"])
    body = eventually(lambda: (b := read_json(options.state)) and b["restarts"] >= 3 and b)
    assert body["last_exit"]["code"] == 3
    assert body["message"] == "exit code 3: why it failed"


def test_backoff_doubles_from_half_a_second_to_thirty():
    assert [backoff_s(n, 0.5, 30.0) for n in (1, 2, 3, 4, 5, 6, 7, 99)] == [
        0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0,
    ]  # fmt: skip


def test_sigterm_ends_the_group_and_leaves_no_file(guarded, eventually):
    options, guard = guarded(["sh", "-c", "sleep 1000 & sleep 1000"])
    child = eventually(lambda: child_of(options))
    guard.send_signal(signal.SIGTERM)
    assert guard.wait(timeout=60) == 0
    assert not procfs.alive(child)
    assert list(options.state.parent.iterdir()) == []


def test_a_command_that_ignores_sigterm_is_killed_after_the_grace(guarded, eventually):
    options, guard = guarded(["sh", "-c", "trap '' TERM; echo set; while :; do sleep 0.1; done"])
    eventually(lambda: "set" in options.log.read_text())
    begun = time.monotonic()
    guard.send_signal(signal.SIGTERM)
    assert guard.wait(timeout=60) == 0
    assert time.monotonic() - begun > 0.9


def test_the_lifelines_end_kills_everything(guarded, lifeline, eventually, processes_of, tmp_path):
    options, guard = guarded(
        ["sh", "-c", "trap '' TERM; setsid sleep 1000 & while :; do sleep 0.1; done"]
    )
    eventually(lambda: child_of(options) and len(processes_of(tmp_path)) >= 3)
    lifeline.cut()
    guard.wait(timeout=60)
    assert processes_of(tmp_path) == []
    assert list(options.state.parent.iterdir()) == []


def test_killing_the_guard_kills_the_command(guarded, eventually):
    options, guard = guarded(["sleep", "1000"])
    child = eventually(lambda: child_of(options))
    guard.kill()
    eventually(lambda: not procfs.alive(child), timeout_s=2)


def test_a_second_guard_of_the_same_state_refuses(guarded, eventually):
    options, _ = guarded(["sleep", "1000"])
    first = eventually(lambda: child_of(options))
    _, second = guarded(["sleep", "1000"])
    assert second.wait(timeout=60) == EXIT_ALREADY_GUARDED
    assert "guarded already" in options.log.read_text()
    assert procfs.alive(first)


def test_a_lock_is_free_again_when_its_holder_is_gone(tmp_path):
    path = tmp_path / "x.lock"
    held = lock_file(path)
    assert lock_file(path) is None
    os.close(held)
    again = lock_file(path)
    assert again is not None
    os.close(again)


def test_the_port_is_filled_in_and_answers(guarded, eventually, server_command):
    options, _ = guarded(server_command, first_port=18200)
    eventually(lambda: options.log.exists() and "listening" in options.log.read_text())
    port = read_json(options.state)["port"]
    assert port >= 18200
    assert urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=60).read() == b"ok"


def test_a_port_taken_in_between_is_passed_over_without_backoff(guarded, eventually, tmp_path):
    script = (
        "import sys, pathlib; p = pathlib.Path(sys.argv[2]); n = int(p.read_text() or 0) + 1; "
        "p.write_text(str(n)); port = sys.argv[1]; print(port, flush=True)\n"
        "if n < 3: sys.exit('OSError: [Errno 98] Address already in use')\n"
        "import time; time.sleep(1000)"
    )
    counter = tmp_path / "count"
    counter.write_text("")
    options, _ = guarded([sys.executable, "-c", script, "{port}", str(counter)], first_port=18300)
    eventually(lambda: counter.read_text() == "3")
    body = eventually(lambda: (b := read_json(options.state)) and b["port"] >= 18302 and b)
    assert body["restarts"] == 0
    ports = [int(line) for line in options.log.read_text().split("\n") if line.isdigit()]
    assert ports == sorted(set(ports))


def test_without_a_lifeline_it_refuses(tmp_path):
    command = guard_command(GuardOptions(tmp_path / "s.json", tmp_path / "l.log", ["true"]))
    environment = {k: v for k, v in os.environ.items() if k != "CLOUDLM_LIFELINE_FD"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == EXIT_MISUSE
    assert "CLOUDLM_LIFELINE_FD" in ended.stderr


def test_the_command_does_not_inherit_the_lifeline_unless_asked(guarded, eventually, lifeline):
    look = (
        "import os; "
        "print(os.environ.get('CLOUDLM_LIFELINE_FD'), sorted(os.listdir('/proc/self/fd')))"
    )
    options, guard = guarded([sys.executable, "-c", look], restart=False)
    guard.wait(timeout=60)
    assert options.log.read_text().startswith("None ['0', '1', '2', '3']")  # 3 reads the folder
    options, guard = guarded([sys.executable, "-c", look], restart=False, pass_lifeline=True)
    guard.wait(timeout=60)
    assert options.log.read_text().splitlines()[1].startswith(f"{lifeline.read_end} ")


def test_the_state_file_is_private_and_whole(guarded, eventually):
    options, _ = guarded(["sleep", "1000"])
    eventually(lambda: child_of(options))
    assert options.state.stat().st_mode & 0o777 == 0o600
    assert json.loads(options.state.read_text())["format"] == 1
    assert [p.name for p in sorted(options.state.parent.iterdir())] == ["one.json", "one.lock"]


def test_output_survives_an_unwritable_log(guarded, tmp_path, eventually):
    """A log that cannot be written (here: a device that is always full) ends nothing."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "one.log").symlink_to(Path("/dev/full"))
    _options, guard = guarded(["sh", "-c", "echo lost; exit 5"], restart=False)
    assert guard.wait(timeout=60) == 5


def test_a_guard_reads_nothing_that_it_can_do_without(tmp_path):
    """Who asks for a model without a replica waits until its guard has begun."""
    source = Path(procfs.__file__).parents[2]
    code = f"import sys; sys.path.append({str(source)!r}); import cloudlm.drivers.guard as guard"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"{code}; print(*sys.modules)"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    read = set(done.stdout.split())
    assert "cloudlm.drivers.procfs" in read
    slow = {"asyncio", "dataclasses", "inspect", "json", "logging", "pathlib", "secrets", "typing"}
    assert read & slow == set()
