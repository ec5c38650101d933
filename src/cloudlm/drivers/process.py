"""The driver of this machine: replicas are child processes, each under a guard of its own.

What runs is kept in files alone (``run/<group>/group.json`` and one state file per guard), so that
a new control process adopts the replicas of the one before it. A replica whose process runs is
reported as STARTING with its address: whether it can answer is for the caller to probe.
Must not do blocking work on the event loop, and must not signal a pid without its start time.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

from cloudlm.core.deployment import GroupObservation, GroupSpec
from cloudlm.core.errors import NotFound, StorageFailed
from cloudlm.drivers.base import Ability, DriverContext
from cloudlm.drivers.groups import check_group, check_group_name
from cloudlm.drivers.guarded import CommandBuilder, GuardedReplicas
from cloudlm.drivers.launch import GuardTiming
from cloudlm.drivers.rotating import LogFollower, last_lines

P = ParamSpec("P")
T = TypeVar("T")
_FOLLOW_INTERVAL_S = 0.25


def worker_command(spec: GroupSpec, port: str) -> list[str]:
    """The command line of one replica; ``port`` is a number or the guard's placeholder."""
    command = [sys.executable, "-m", "cloudlm.worker", "--model", spec.model]
    command += ["--served-model-name", spec.deployment, "--host", "127.0.0.1", "--port", port]
    command += ["--engine", spec.engine]
    for name, address in spec.adapters.items():
        command += ["--adapter", f"{name}={address}"]
    for key, value in sorted(spec.options.items()):
        text = str(value).lower() if isinstance(value, bool) else str(value)
        command += ["--option", f"{key}={text}"]
    return command


class ProcessDriver:
    """Runs groups as guarded processes of this machine (the port's ``Driver``)."""

    name = "process"
    abilities = frozenset(
        {
            Ability.REPLICA_LOGS,
            Ability.PER_REPLICA_ADDRESS,
            Ability.RESTARTS_REPLICAS,
            Ability.STOPS_ONE_REPLICA,
            Ability.ONLY_HERE,
            Ability.THIS_MACHINE,
        }
    )

    def __init__(
        self,
        context: DriverContext,
        *,
        command_builder: CommandBuilder = worker_command,
        timing: GuardTiming | None = None,
    ) -> None:
        self._clock = context.clock
        self._replicas = GuardedReplicas(context, command_builder, timing or GuardTiming())
        self._token = 0

    def fence(self, token: int) -> None:
        self._token = token

    async def groups(self) -> list[str]:
        return await _in_thread(self._replicas.groups)

    async def observe(self, name: str) -> GroupObservation:
        return await _in_thread(self._replicas.observe, check_group_name(name), self._token)

    async def apply(self, spec: GroupSpec) -> None:
        check_group(spec)
        await _in_thread(self._replicas.apply, spec, self._token)

    async def stop_replica(self, name: str, replica: str) -> None:
        await _in_thread(self._replicas.stop_replica, check_group_name(name), replica, self._token)

    async def delete(self, name: str) -> None:
        await _in_thread(self._replicas.delete, check_group_name(name), self._token)

    async def logs(
        self, name: str, *, replica: str | None = None, tail: int = 100, follow: bool = False
    ) -> AsyncIterator[str]:
        """Lines of the replicas, replica after replica. Raises NotFound for an unknown group or
        replica. Following ends when the group does."""
        followers: dict[Path, LogFollower] = {}
        first = True
        while True:
            paths = await _in_thread(self._replicas.log_paths, check_group_name(name))
            if first and paths is None:
                raise NotFound(f"group {name!r} does not exist")
            chosen = [path for path in paths or () if replica in (None, path.stem)]
            if first and replica is not None and not chosen:
                raise NotFound(f"group {name!r} has no replica {replica!r}")
            for path in chosen:
                for line in await _in_thread(_new_lines, path, followers, tail if first else None):
                    yield line
            if not follow or paths is None:
                return
            first = False
            await self._clock.sleep(_FOLLOW_INTERVAL_S)

    async def close(self) -> None:
        await _in_thread(self._replicas.close)


def _new_lines(path: Path, followers: dict[Path, LogFollower], tail: int | None) -> list[str]:
    """Lines not handed out yet: the last ``tail`` at first, then what was appended."""
    if path in followers:
        return list(followers[path].read())
    if tail is None:  # a replica that was started while we follow
        followers[path] = LogFollower(path, 0)
        return list(followers[path].read())
    lines, position = last_lines(path, tail)
    followers[path] = LogFollower(path, position)
    return lines


async def _in_thread(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run blocking work in a thread, its foreign errors translated."""
    try:
        return await asyncio.to_thread(work, *args, **kwargs)
    except OSError as error:
        place = f" {error.filename}" if error.filename else ""
        raise StorageFailed(
            f"the process driver cannot use{place}: {error.strerror or error}; free space or make "
            "the installation's home writable"
        ) from error
