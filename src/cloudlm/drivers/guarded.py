"""Groups of guarded processes, as files and processes: the blocking half of the process driver.

Every call first puts right what it finds (``_settle``): a guard that was killed is replaced and
whatever it left is killed, a replica too many is stopped, one that is missing is started. Nothing
here knows asyncio; one lock makes every call whole.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from cloudlm.core.deployment import GroupObservation, GroupSpec, Replica, ReplicaState
from cloudlm.core.external import endpoints_body
from cloudlm.core.health import MISSES_TO_FAIL
from cloudlm.drivers import procfs
from cloudlm.drivers.base import DriverContext
from cloudlm.drivers.fence import NotedToken
from cloudlm.drivers.groups import (
    check_same_group,
    group_from_body,
    replica_ids,
    replica_index,
)
from cloudlm.drivers.guard import EXIT_ALREADY_GUARDED, backoff_s
from cloudlm.drivers.launch import GuardOptions, GuardTiming, lifeline_from, start_guard
from cloudlm.drivers.runfiles import read_json, write_json

CommandBuilder = Callable[[GroupSpec, str], list[str]]
PORT_PLACEHOLDER = "{port}"
_GROUP_FILE = "group.json"
_GUARD_START_TIMEOUT_S = 10.0
_GUARD_STOP_MARGIN_S = 5.0
# Settings of other processes, and what belongs to our own guard, are no business of a worker.
_WITHHELD = (
    "CLOUDLM_STATE_",
    "CLOUDLM_GATEWAY_",
    "CLOUDLM_CONTROL_",
    "CLOUDLM_GUARD_",
    "CLOUDLM_EXTERNAL_",
    "CLOUDLM_SECRET_",
    "CLOUDLM_ORIGIN_",
)


@dataclass(frozen=True, slots=True)
class _Group:
    spec: GroupSpec
    deleting: bool


@dataclass(frozen=True, slots=True)
class _Guarded:
    """A guard's state file, and whether that guard still runs."""

    replica: str
    body: dict[str, Any]
    guard: procfs.ProcessId | None
    alive: bool

    @property
    def stopping(self) -> bool:
        return bool(self.body.get("phase") == "stopping")


@dataclass(slots=True)
class _StartFailure:
    """A guard that could not be started; tried again after a growing pause."""

    count: int
    retry_at: float
    message: str


class GuardedReplicas:
    """All groups under ``home/run``. Methods block and raise OSError or Conflict; those that put
    something right take the token of whoever asks."""

    def __init__(
        self, context: DriverContext, command_builder: CommandBuilder, timing: GuardTiming
    ) -> None:
        self._run = context.home / "run"
        self._logs = context.home / "logs"
        self._context = context
        # The address must say what the worker is told to speak.
        certificate = context.worker_environment.get("CLOUDLM_WORKER_TLS_CERT")
        self._scheme = "https" if certificate else "http"
        self._command_builder = command_builder
        self._timing = timing
        self._token = NotedToken(self._run / "leader.json")
        self._lifeline = lifeline_from(context.environment)
        self._lock = threading.RLock()
        self._guards: dict[int, subprocess.Popen[bytes]] = {}
        self._applied: set[str] = set()
        self._stop_asked: dict[str, float] = {}
        self._start_failures: dict[str, _StartFailure] = {}

    # Verbs --------------------------------------------------------------------------------------

    def groups(self) -> list[str]:
        return sorted(path.parent.name for path in self._run.glob(f"*/{_GROUP_FILE}"))

    def observe(self, name: str, token: int) -> GroupObservation:
        with self._lock:
            group = self._read_group(name)
            if group is None:
                return GroupObservation(name, None)
            guarded = self._settle(group) if self._token.allows(token) else self._living(name)
            if group.deleting:
                if not guarded and self._token.allows(token):
                    self._forget(name)
                    return GroupObservation(name, None)
                replicas = [self._replica(one) for one in guarded.values()]
                return GroupObservation(name, replace(group.spec, replicas=0), tuple(replicas))
            failed = [
                _not_started(replica, self._start_failures[replica])
                for replica in _wanted(group)
                if replica in self._start_failures and replica not in guarded
            ]
            replicas = [self._replica(one) for one in guarded.values()] + failed
            return GroupObservation(
                name, group.spec, tuple(sorted(replicas, key=lambda one: replica_index(one.id)))
            )

    def apply(self, spec: GroupSpec, token: int) -> None:
        with self._lock:
            self._token.check(token)
            group = self._read_group(spec.name)
            exists = group is not None and not group.deleting
            if group is not None and exists:
                check_same_group(group.spec, spec)
            if group is None or not exists or group.spec != spec:
                self._write_group(_Group(spec, deleting=False))
            self._applied.add(spec.name)
            self._settle(_Group(spec, deleting=False))

    def stop_replica(self, name: str, replica: str, token: int) -> None:
        with self._lock:
            self._token.check(token)
            found = self._guarded(name).get(replica)
            if found is None or not found.alive:
                return
            child = procfs.process_id_from_body(found.body.get("child"))
            if child is not None:
                procfs.send(child, signal.SIGKILL)

    def delete(self, name: str, token: int) -> None:
        with self._lock:
            self._token.check(token)
            group = self._read_group(name)
            if group is None:
                return
            if not group.deleting:
                self._write_group(_Group(group.spec, deleting=True))
            self._applied.discard(name)
            if not self._settle(_Group(group.spec, deleting=True)):
                self._forget(name)

    def log_paths(self, name: str) -> list[Path] | None:
        """The current log of each replica that ever ran; None if there is no such group."""
        if self._read_group(name) is None:
            return None
        return sorted((self._logs / name).glob("*.log"), key=lambda path: replica_index(path.stem))

    def close(self) -> None:
        with self._lock:
            self._reap()
            for process in self._guards.values():
                process.returncode = 0  # left running on purpose: nobody waits for it here
            self._guards.clear()

    # Putting right ------------------------------------------------------------------------------

    def _settle(self, group: _Group) -> dict[str, _Guarded]:
        """Make processes agree with the group's file; returns the guards that live afterwards."""
        name = group.spec.name
        self._reap()
        wanted = [] if group.deleting else _wanted(group)
        guarded = self._guarded(name)
        for replica in [one for one in self._stop_asked if one not in guarded]:
            if replica.rpartition("-")[0] == name:
                del self._stop_asked[replica]
        to_start: dict[str, int] = {}
        for replica, one in guarded.items():
            if not one.alive:
                self._clean_up(name, one)
                if replica in wanted:
                    to_start[replica] = int(one.body.get("restarts", 0)) + 1
            elif replica not in wanted:
                self._ask_to_stop(one)
        if name in self._applied:
            to_start.update({replica: 0 for replica in wanted if replica not in guarded})
        if to_start:
            self._start(group.spec, to_start)
        found = self._guarded(name) if to_start else guarded
        return {replica: one for replica, one in found.items() if one.alive}

    def _living(self, name: str) -> dict[str, _Guarded]:
        """The guards that live, with nothing put right: another control's business."""
        return {replica: one for replica, one in self._guarded(name).items() if one.alive}

    def _clean_up(self, name: str, one: _Guarded) -> None:
        """After a guard that was killed: nothing it started may live on, nor its files."""
        token = str(one.body.get("token", ""))
        if token:
            procfs.kill_all_with_token(token)
        for suffix in (".json", ".lock"):
            (self._run / name / f"{one.replica}{suffix}").unlink(missing_ok=True)
        self._stop_asked.pop(one.replica, None)

    def _ask_to_stop(self, one: _Guarded) -> None:
        now = time.monotonic()
        asked = self._stop_asked.setdefault(one.replica, now)
        overdue = now - asked > self._timing.grace_s + _GUARD_STOP_MARGIN_S
        if one.guard is not None and overdue:  # it is stopped or stuck: its command dies with it
            procfs.send(one.guard, signal.SIGKILL)
        elif one.guard is not None and not one.stopping:
            procfs.send(one.guard, signal.SIGTERM)

    def _start(self, spec: GroupSpec, restarts: dict[str, int]) -> None:
        """Start guards together, then wait until each has written its state file."""
        started: dict[str, subprocess.Popen[bytes]] = {}
        for replica, count in restarts.items():
            failure = self._start_failures.get(replica)
            if failure is not None and time.monotonic() < failure.retry_at:
                continue
            self._stop_asked.pop(replica, None)
            try:
                process = start_guard(
                    self._options(spec, replica, count), self._environment(spec), self._lifeline
                )
            except OSError as error:
                self._note_start_failure(replica, f"cannot start a guard: {error}")
                continue
            started[replica] = self._guards[process.pid] = process
        for replica, process in started.items():
            self._await_guard(spec.name, replica, process)

    def _await_guard(self, name: str, replica: str, process: subprocess.Popen[bytes]) -> None:
        path = self._run / name / f"{replica}.json"
        deadline = time.monotonic() + _GUARD_START_TIMEOUT_S
        while time.monotonic() < deadline:
            guard = procfs.process_id_from_body((read_json(path) or {}).get("guard"))
            if guard is not None and guard.pid == process.pid:
                self._start_failures.pop(replica, None)
                return
            code = process.poll()
            if code == EXIT_ALREADY_GUARDED:  # the one before it is about to end
                return
            if code is not None:
                self._note_start_failure(replica, f"its guard ended with exit code {code}")
                return
            time.sleep(0.01)
        self._note_start_failure(replica, "its guard did not start in time")

    def _note_start_failure(self, replica: str, message: str) -> None:
        count = self._start_failures.get(replica, _StartFailure(0, 0.0, "")).count + 1
        pause_s = backoff_s(count, self._timing.backoff_first_s, self._timing.backoff_longest_s)
        self._start_failures[replica] = _StartFailure(count, time.monotonic() + pause_s, message)

    def _options(self, spec: GroupSpec, replica: str, restarts: int) -> GuardOptions:
        return GuardOptions(
            state=self._run / spec.name / f"{replica}.json",
            log=self._logs / spec.name / f"{replica}.log",
            command=self._command_builder(spec, PORT_PLACEHOLDER),
            restarts=restarts,
            first_port=self._context.first_port,
            timing=self._timing,
        )

    def _environment(self, spec: GroupSpec) -> dict[str, str]:
        inherited = {
            key: value
            for key, value in self._context.environment.items()
            if not key.startswith(_WITHHELD)
        }
        return {**inherited, **spec.env, **self._context.worker_environment}

    def _reap(self) -> None:
        for pid, process in list(self._guards.items()):
            if process.poll() is not None:
                del self._guards[pid]

    # Files --------------------------------------------------------------------------------------

    def _read_group(self, name: str) -> _Group | None:
        path = self._run / name / _GROUP_FILE
        body = read_json(path)
        if body is None and not path.exists():
            return None
        try:
            return _Group(group_from_body((body or {})["spec"]), bool((body or {})["deleting"]))
        except (KeyError, TypeError):
            # Unreadable: belongs to no deployment, so that control deletes it and starts afresh.
            return _Group(GroupSpec(name, "", 0, "", replicas=0), deleting=False)

    def _write_group(self, group: _Group) -> None:
        folder = self._run / group.spec.name
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        spec = {field.name: getattr(group.spec, field.name) for field in fields(group.spec)}
        spec |= {
            "options": dict(group.spec.options),
            "env": dict(group.spec.env),
            "adapters": dict(group.spec.adapters),
            "endpoints": endpoints_body(group.spec.endpoints),
        }
        write_json(folder / _GROUP_FILE, {"spec": spec, "deleting": group.deleting})

    def _guarded(self, name: str) -> dict[str, _Guarded]:
        found: dict[str, _Guarded] = {}
        for path in (self._run / name).glob(f"{name}-*.json"):
            body = read_json(path)
            if body is None:  # removed meanwhile: its guard ended
                continue
            guard = procfs.process_id_from_body(body.get("guard"))
            found[path.stem] = _Guarded(path.stem, body, guard, procfs.alive(guard))
        return found

    def _forget(self, name: str) -> None:
        shutil.rmtree(self._run / name, ignore_errors=True)
        shutil.rmtree(self._logs / name, ignore_errors=True)
        self._applied.discard(name)
        for replica in [one for one in self._start_failures if one.rpartition("-")[0] == name]:
            del self._start_failures[replica]

    def _replica(self, one: _Guarded) -> Replica:
        body = one.body
        phases = {
            "running": ReplicaState.STARTING,
            "backoff": ReplicaState.BACKOFF,
            "stopping": ReplicaState.DRAINING,
        }
        state = phases.get(str(body.get("phase")), ReplicaState.STARTING)
        if one.replica in self._stop_asked:
            state = ReplicaState.DRAINING
        child = procfs.process_id_from_body(body.get("child"))
        port = body.get("port")
        return Replica(
            id=one.replica,
            state=state,
            url=f"{self._scheme}://127.0.0.1:{port}" if port and child else None,
            pid=child.pid if child else None,
            restarts=int(body.get("restarts", 0)),
            message=str(body.get("message", "")),
            started_at=float(body.get("started_at", 0.0)),
        )


def _not_started(replica: str, failure: _StartFailure) -> Replica:
    misses = min(failure.count, MISSES_TO_FAIL)
    return Replica(replica, ReplicaState.FAILED, message=failure.message, misses=misses)


def _wanted(group: _Group) -> list[str]:
    return replica_ids(group.spec)
