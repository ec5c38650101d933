"""Long work behind an answer of 202: runs in threads, tells its progress to the state, and begins
again after a restart of control (every kind must be idempotent).

Must not know what a job does; kinds are given by the assembly.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from cloudlm.control.registry import Importer
from cloudlm.core.clock import Clock
from cloudlm.core.errors import CloudlmError, Conflict, InternalError, InvalidRequest, NotFound
from cloudlm.core.job import Job, JobState
from cloudlm.core.wire import import_from_body
from cloudlm.state.base import State
from cloudlm.telemetry.logs import get_logger

MAX_ATTEMPTS = 3
_RUNNING_AT_ONCE = 2
_TELL_INTERVAL_S = 0.5
_WRITE_ATTEMPTS = 5
_LOOK_INTERVAL_S = 2.0
_JOBS_AT_ONCE = 1000
_log = get_logger(__name__)

Report = Callable[[float, str], None]
"""Called by the work with progress from 0 to 1 and a message. Raises JobStopped."""

Work = Callable[[Mapping[str, object], Report], Mapping[str, object]]
"""Called in a thread with the job's arguments; returns its result. Raises CloudlmError."""


class JobStopped(Exception):
    """The job was cancelled, or control is closing."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of job: ``check`` reads its arguments (InvalidRequest), ``work`` does it."""

    check: Callable[[object], Mapping[str, object]]
    work: Work


@dataclass(slots=True)
class _Running:
    state: State
    stop: threading.Event = field(default_factory=threading.Event)
    progress: float = 0.0
    message: str = ""
    left: bool = False
    """Whether another control goes on with it."""


def import_kind(importer: Importer) -> Kind:
    """Jobs that bring a model into the registry: ``{"source", "name"?, "alias"?}``."""

    def work(arguments: Mapping[str, object], report: Report) -> Mapping[str, object]:
        def progress(done_bytes: int, total_bytes: int, what: str) -> None:
            report(done_bytes / total_bytes if total_bytes else 0.0, what)

        name, alias = arguments.get("name"), arguments.get("alias")
        manifest = importer(
            str(arguments["source"]),
            None if name is None else str(name),
            None if alias is None else str(alias),
            progress,
        )
        return {"model": manifest.ref, "name": manifest.name, "version": manifest.version}

    return Kind(import_from_body, work)


class Jobs:
    """Submits, runs, cancels and resumes jobs."""

    def __init__(
        self, state: State, clock: Clock, kinds: Mapping[str, Kind], *, alone: bool = True
    ) -> None:
        """``alone``: what is submitted runs here at once; else only while ``lead`` runs."""
        self._state = state
        self._writer: State | None = state if alone else None
        self._clock = clock
        self._kinds = dict(kinds)
        self._slots = asyncio.Semaphore(_RUNNING_AT_ONCE)
        self._running: dict[str, _Running] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False

    async def submit(self, kind: str, arguments: object) -> Job:
        """Accept a job. Raises InvalidRequest for an unknown kind or bad arguments."""
        known = self._kinds.get(kind)
        if known is None:
            raise InvalidRequest(
                f"unknown kind of job {kind!r}; there are: {', '.join(sorted(self._kinds))}",
                param="kind",
            )
        checked = known.check(arguments)
        now = self._clock.now()
        job = Job(
            f"job-{secrets.token_hex(8)}", kind, dict(checked), created_at=now, updated_at=now
        )
        await self._state.put_job(job)
        self._start(job)  # if this control leads; else the leader finds it
        return job

    async def cancel(self, job_id: str) -> Job:
        """Ask a job to stop; one that has ended stays as it is. Raises NotFound."""
        job = await self.get(job_id)
        running = self._running.get(job_id)
        if running is not None:
            running.stop.set()
            return replace(job, message="being cancelled") if not job.state.ended else job
        if job.state.ended:
            return job
        cancelled = replace(job, state=JobState.CANCELLED, updated_at=self._clock.now())
        await self._state.put_job(cancelled)
        return cancelled

    async def get(self, job_id: str) -> Job:
        """Raises NotFound."""
        job = await self._state.get_job(job_id)
        if job is None:
            raise NotFound(f"job {job_id[:80]!r} does not exist")
        return job

    async def lead(self, state: State) -> None:
        """Run the jobs of all controls until cancelled, writing to ``state``; what is unfinished
        then is the next leader's."""
        self._writer = state
        try:
            while True:
                try:
                    await self.resume()
                except CloudlmError as error:
                    _log.warning("jobs_not_seen", extra={"fields": {"reason": error.message}})
                await self._clock.sleep(_LOOK_INTERVAL_S)
        finally:
            self._writer = None
            for running in self._running.values():
                running.left = True
                running.stop.set()

    async def resume(self) -> None:
        """Go on with what another control was asked for, or left unfinished, the oldest first."""
        for job in await self._state.list_unfinished_jobs(limit=_JOBS_AT_ONCE):
            if job.id in self._running:
                continue
            attempts = _attempts(job)
            if job.kind not in self._kinds or attempts >= MAX_ATTEMPTS:
                error = InternalError(f"interrupted {attempts} times by the end of control")
                failed = replace(job, state=JobState.FAILED, error=error.body())
                await self._end(failed, self._writer or self._state)
                continue
            self._start(job)

    async def close(self) -> None:
        """Stop working; unfinished jobs begin again at the next start."""
        self._closing = True
        for running in self._running.values():
            running.stop.set()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=10.0)

    def _start(self, job: Job) -> None:
        if self._writer is None or job.id in self._running:
            return
        self._running[job.id] = _Running(self._writer)
        task = asyncio.create_task(self._run(job))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, job: Job) -> None:
        running = self._running[job.id]
        try:
            async with self._slots:
                if not running.stop.is_set():
                    await self._work(job, running)
                elif not (self._closing or running.left):
                    await self._end(replace(job, state=JobState.CANCELLED), running.state)
        except Conflict:
            pass  # it has ended otherwise, or is another control's
        except Exception:
            _log.exception("job_not_recorded", extra={"fields": {"job": job.id}})
        finally:
            self._running.pop(job.id, None)

    async def _work(self, job: Job, running: _Running) -> None:
        def report(progress: float, message: str) -> None:
            running.progress, running.message = min(max(progress, 0.0), 1.0), message[:200]
            if running.stop.is_set():
                raise JobStopped

        now = self._clock.now()
        attempts = {"attempts": _attempts(job) + 1}
        job = replace(job, state=JobState.RUNNING, result=attempts, updated_at=now)
        await running.state.put_job(job)
        work = asyncio.create_task(
            asyncio.to_thread(self._kinds[job.kind].work, job.arguments, report)
        )
        while not (await asyncio.wait({work}, timeout=_TELL_INTERVAL_S))[0]:
            await self._tell(job, running)
        ended = self._ended(job, work, running)
        if ended is not None:
            await self._end(ended, running.state)

    async def _tell(self, job: Job, running: _Running) -> None:
        """Progress is a nicety: that it cannot be written now ends no job."""
        told = replace(
            job,
            progress=running.progress,
            message=running.message,
            updated_at=self._clock.now(),
        )
        try:
            await running.state.put_job(told)
        except Conflict:  # cancelled at another control, or another control's by now
            running.stop.set()
        except CloudlmError:
            pass

    def _ended(
        self, job: Job, work: asyncio.Task[Mapping[str, object]], running: _Running
    ) -> Job | None:
        """The job as its end leaves it; None if it is to begin again after a restart."""
        error = work.exception()
        told = replace(job, progress=running.progress, message=running.message, result={})
        if error is None:
            return replace(told, state=JobState.SUCCEEDED, progress=1.0, result=work.result())
        if isinstance(error, JobStopped):
            return (
                None if self._closing or running.left else replace(told, state=JobState.CANCELLED)
            )
        if not isinstance(error, CloudlmError):
            _log.error("job_failed", exc_info=error, extra={"fields": {"job": job.id}})
            error = InternalError("the job failed; see control's log")
        return replace(told, state=JobState.FAILED, message=error.message, error=error.body())

    async def _end(self, job: Job, state: State) -> None:
        """Write the end; a store that is away for a moment must not lose it."""
        job = replace(job, updated_at=self._clock.now())
        for attempt in range(1, _WRITE_ATTEMPTS + 1):
            try:
                await state.put_job(job)
                break
            except Conflict:
                return  # it has ended otherwise
            except CloudlmError:
                if attempt == _WRITE_ATTEMPTS:
                    raise
                await self._clock.sleep(attempt)
        _log.info("job_ended", extra={"fields": {"job": job.id, "state": job.state.value}})


def _attempts(job: Job) -> int:
    attempts = job.result.get("attempts", 0)
    return attempts if isinstance(attempts, int) else 0
