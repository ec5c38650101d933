"""Jobs end exactly once, tell their progress, and begin again after a restart."""

from __future__ import annotations

import asyncio
import threading

import pytest

from cloudlm.control.jobs import MAX_ATTEMPTS, Jobs, JobStopped, Kind, import_kind
from cloudlm.core.clock import ManualClock
from cloudlm.core.errors import BrokenModel, InvalidRequest, NotFound
from cloudlm.core.job import Job, JobState
from cloudlm.core.model import Manifest
from cloudlm.core.wire import import_from_body
from cloudlm.state.memory import MemoryState


async def ended(jobs, job_id):
    async with asyncio.timeout(60):
        while not (job := await jobs.get(job_id)).state.ended:
            await asyncio.sleep(0.01)
    return job


def jobs_with(work, state=None):
    return Jobs(state or MemoryState(), ManualClock(), {"work": Kind(lambda a: a, work)})


async def test_it_runs_in_a_thread_and_keeps_the_result():
    loop_thread = threading.get_ident()

    def work(arguments, report):
        assert threading.get_ident() != loop_thread
        report(0.5, "half way")
        return {"doubled": arguments["n"] * 2}

    jobs = jobs_with(work)
    submitted = await jobs.submit("work", {"n": 4})
    assert submitted.state is JobState.QUEUED
    job = await ended(jobs, submitted.id)
    assert (job.state, job.progress, job.result) == (JobState.SUCCEEDED, 1.0, {"doubled": 8})


async def test_failures_keep_openais_shape_and_foreign_ones_no_detail():
    def broken(arguments, report):
        raise BrokenModel("config.json is missing")

    def bug(arguments, report):
        raise RuntimeError("secret detail")

    jobs = jobs_with(broken)
    job = await ended(jobs, (await jobs.submit("work", {})).id)
    assert job.state is JobState.FAILED
    assert job.error["error"]["code"] == "broken_model"
    assert job.message == "config.json is missing"
    jobs = jobs_with(bug)
    job = await ended(jobs, (await jobs.submit("work", {})).id)
    assert "secret" not in str(job)


async def test_progress_is_told_while_it_runs():
    told, go_on = threading.Event(), threading.Event()

    def work(arguments, report):
        report(0.25, "a quarter")
        told.set()
        go_on.wait(10)
        return {}

    jobs = jobs_with(work)
    submitted = await jobs.submit("work", {})
    async with asyncio.timeout(60):
        while (await jobs.get(submitted.id)).progress != 0.25:
            await asyncio.sleep(0.02)
    assert (await jobs.get(submitted.id)).message == "a quarter"
    go_on.set()
    await ended(jobs, submitted.id)


async def test_cancelling_stops_at_the_next_report():
    begun = threading.Event()

    def work(arguments, report):
        while True:
            report(0.1, "working")
            begun.set()

    jobs = jobs_with(work)
    submitted = await jobs.submit("work", {})
    await asyncio.to_thread(begun.wait, 10)
    await jobs.cancel(submitted.id)
    job = await ended(jobs, submitted.id)
    assert job.state is JobState.CANCELLED
    assert await jobs.cancel(submitted.id) == job


async def test_a_queued_job_can_be_cancelled_before_it_begins():
    go_on = threading.Event()
    jobs = jobs_with(lambda arguments, report: go_on.wait(10) and {})
    first = [await jobs.submit("work", {}) for _ in range(2)]
    waiting = await jobs.submit("work", {})
    await asyncio.sleep(0.05)
    assert (await jobs.get(waiting.id)).state is JobState.QUEUED
    await jobs.cancel(waiting.id)
    go_on.set()
    assert (await ended(jobs, waiting.id)).state is JobState.CANCELLED
    for job in first:
        assert (await ended(jobs, job.id)).state is JobState.SUCCEEDED


async def test_unknown_kinds_arguments_and_ids_are_refused():
    jobs = Jobs(MemoryState(), ManualClock(), {"import": Kind(import_from_body, lambda a, r: {})})
    with pytest.raises(InvalidRequest, match="there are: import"):
        await jobs.submit("train", {})
    with pytest.raises(InvalidRequest, match="source"):
        await jobs.submit("import", {})
    with pytest.raises(NotFound):
        await jobs.get("job-0")
    with pytest.raises(NotFound):
        await jobs.cancel("job-0")


async def test_a_closing_control_leaves_the_job_for_the_next():
    begun = threading.Event()

    def endless(arguments, report):
        while True:
            report(0.1, "working")
            begun.set()

    state = MemoryState()
    first = jobs_with(endless, state)
    submitted = await first.submit("work", {})
    await asyncio.to_thread(begun.wait, 10)
    await first.close()
    assert (await state.get_job(submitted.id)).state is JobState.RUNNING
    second = jobs_with(lambda arguments, report: {"done": True}, state)
    await second.resume()
    job = await ended(second, submitted.id)
    assert (job.state, job.result) == (JobState.SUCCEEDED, {"done": True})


async def test_a_job_that_takes_control_down_again_and_again_is_given_up():
    state = MemoryState()
    attempts = {"attempts": MAX_ATTEMPTS}
    await state.put_job(Job("job-1", "work", {}, state=JobState.RUNNING, result=attempts))
    await state.put_job(Job("job-2", "gone-kind", {}, state=JobState.QUEUED))
    jobs = jobs_with(lambda arguments, report: {}, state)
    await jobs.resume()
    assert "interrupted" in (await jobs.get("job-1")).error["error"]["message"]
    assert (await jobs.get("job-2")).state is JobState.FAILED


async def test_an_import_tells_bytes_as_a_share_and_names_its_version():
    seen = []

    def importer(source, name, alias, progress):
        seen.append((source, name, alias))
        progress(0, 0, "looking")
        progress(5, 10, "copying")
        return Manifest("bank", 3, (), "generate", "LlamaForCausalLM", "float32", 1, 64)

    reported = []
    kind = import_kind(importer)
    arguments = kind.check({"source": "/models/bank", "name": "bank"})
    result = kind.work(arguments, lambda progress, message: reported.append((progress, message)))
    assert seen == [("/models/bank", "bank", None)]
    assert reported == [(0.0, "looking"), (0.5, "copying")]
    assert result == {"model": "models:/bank/3", "name": "bank", "version": 3}


async def test_of_several_controls_the_leader_runs_what_any_was_asked_for():
    state, clock, ran = MemoryState(), ManualClock(), []

    def work(arguments, report):
        ran.append(arguments["n"])
        return {}

    kinds = {"work": Kind(lambda a: a, work)}
    leading, other = (Jobs(state, clock, kinds, alone=False) for _ in range(2))
    submitted = await other.submit("work", {"n": 1})
    await asyncio.sleep(0)
    assert (await other.get(submitted.id)).state is JobState.QUEUED
    lead = asyncio.create_task(leading.lead(state))
    job = await ended(leading, submitted.id)
    assert (job.state, ran) == (JobState.SUCCEEDED, [1])
    await ended(leading, (await leading.submit("work", {"n": 2})).id)
    later = await other.submit("work", {"n": 3})
    await clock.advance(2.5)
    await ended(leading, later.id)
    assert ran == [1, 2, 3]
    lead.cancel()
    await asyncio.gather(lead, return_exceptions=True)
    await leading.close()


async def test_a_cancel_at_another_control_stops_it_and_a_new_leader_goes_on_with_the_rest():
    state, clock = MemoryState(), ManualClock()
    began, stopped = threading.Semaphore(0), []

    def work(arguments, report):
        began.release()
        try:
            while True:
                report(0.5, "half way")
                threading.Event().wait(0.01)
        except JobStopped:
            stopped.append(arguments["n"])
            raise

    kinds = {"work": Kind(lambda a: a, work)}
    leading, other = (Jobs(state, clock, kinds, alone=False) for _ in range(2))
    lead = asyncio.create_task(leading.lead(state))
    await asyncio.sleep(0)
    first = await leading.submit("work", {"n": 1})
    await asyncio.to_thread(began.acquire)
    await other.cancel(first.id)
    async with asyncio.timeout(60):
        while stopped != [1]:
            await asyncio.sleep(0.01)
    assert (await other.get(first.id)).state is JobState.CANCELLED
    second = await leading.submit("work", {"n": 2})
    await asyncio.to_thread(began.acquire)
    lead.cancel()
    await asyncio.gather(lead, return_exceptions=True)
    await leading.close()
    assert stopped == [1, 2]
    assert (await other.get(second.id)).state is JobState.RUNNING, "the next leader's"
    lead = asyncio.create_task(other.lead(state))
    await asyncio.to_thread(began.acquire)
    assert (await other.get(second.id)).result == {"attempts": 2}
    lead.cancel()
    await asyncio.gather(lead, return_exceptions=True)
    await other.close()


async def test_an_old_job_is_gone_on_with_however_many_newer_ones_have_ended():
    state = MemoryState()
    await state.put_job(Job("job-old", "work", {}, created_at=1.0))
    for number in range(1100):
        at = 2.0 + number
        await state.put_job(Job(f"job-{number}", "work", {}, JobState.SUCCEEDED, created_at=at))
    jobs = jobs_with(lambda arguments, report: {"done": True}, state)
    await jobs.resume()
    assert (await ended(jobs, "job-old")).state is JobState.SUCCEEDED
