"""Health is progress: what samples add up to, and how answers are read."""

from __future__ import annotations

import asyncio

import pytest
from aiohttp import web

from cloudlm.control.probe import (
    START_TIMEOUT_S,
    UNREACHABLE,
    HttpProber,
    ProbeRecord,
    Sample,
    Verdict,
    judge,
    sample_from_body,
)

STALL_S = 20.0


def follow(samples, record=None):
    """Judge (time, sample) pairs; returns the last record."""
    record = record or ProbeRecord(progress_at=samples[0][0])
    for now, sample in samples:
        record = judge(record, sample, now, STALL_S)
    return record


def ready(steps=0, running=0, **more):
    return Sample(True, ready=True, steps=steps, running=running, **more)


def test_ready_when_it_says_so():
    assert follow([(0, ready())]).verdict is Verdict.READY
    assert follow([(0, Sample(True, ready=False))]).verdict is Verdict.NOT_READY


def test_idle_without_steps_is_no_stall():
    assert follow([(t, ready(steps=5)) for t in range(0, 1000, 10)]).verdict is Verdict.READY


@pytest.mark.promise(11)
def test_work_without_steps_is_a_stall():
    samples = [(t, ready(steps=5, running=1)) for t in range(0, 30)]
    assert follow(samples[:20]).verdict is Verdict.READY
    assert follow(samples).verdict is Verdict.STALLED


def test_queued_work_alone_is_a_stall_too():
    samples = [(t, Sample(True, ready=True, steps=5, waiting=3)) for t in range(0, 30)]
    assert follow(samples).verdict is Verdict.STALLED


def test_progress_is_no_stall_however_slow():
    samples = [(t, ready(steps=t // 15, running=1)) for t in range(0, 300)]
    assert follow(samples).verdict is Verdict.READY


@pytest.mark.promise(11)
@pytest.mark.known_failure("vllm#39863")
def test_a_dead_engine_behind_a_living_server_is_a_stall_at_once():
    assert follow([(0, ready()), (1, ready(alive=False))]).verdict is Verdict.STALLED


def test_one_missed_probe_is_forgiven_two_are_not():
    once = follow([(0, ready()), (1, UNREACHABLE)])
    assert once.verdict is Verdict.READY
    twice = judge(once, UNREACHABLE, 2, STALL_S)
    assert twice.verdict is Verdict.NOT_READY
    assert judge(twice, ready(), 3, STALL_S).verdict is Verdict.READY


@pytest.mark.promise(11)
def test_silence_after_it_once_answered_is_a_stall():
    record = follow([(0, ready())] + [(t, UNREACHABLE) for t in range(1, 22)])
    assert record.verdict is Verdict.STALLED


def test_a_start_may_take_its_time():
    record = follow([(t, UNREACHABLE) for t in range(0, int(START_TIMEOUT_S))])
    assert record.verdict is Verdict.NOT_READY
    assert judge(record, UNREACHABLE, START_TIMEOUT_S + 1, STALL_S).verdict is Verdict.STALLED


@pytest.mark.parametrize("body", [None, [], "x", 3, {}, {"ready": "yes"}, {"steps": 3}])
def test_what_is_no_health_answer_is_none(body):
    assert sample_from_body(body) is None


def test_nonsense_counts_are_nothing():
    sample = sample_from_body({"ready": True, "steps": "x", "running": -3, "waiting": None})
    assert sample == Sample(True, ready=True)


def test_an_unhealthy_replica_is_not_ready():
    assert not sample_from_body({"ready": True, "healthy": False}).ready


@pytest.fixture
async def server():
    """A worker's health routes, whose answers a test sets."""
    answers = {}

    async def handle(request):
        if "silent" in answers:
            await answers["silent"].wait()
        return answers[request.path]

    app = web.Application()
    app.router.add_route("GET", "/{tail:.*}", handle)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = site._server.sockets[0].getsockname()[1]
    yield answers, f"http://127.0.0.1:{port}"
    await runner.cleanup()


async def test_it_reads_the_verbose_health_whatever_its_status(server):
    answers, url = server
    body = {"ready": True, "alive": True, "steps": 7, "running": 2, "waiting": 1}
    answers["/health"] = web.json_response(body, status=503)
    async with HttpProber(1.0) as prober:
        assert await prober.probe(url) == Sample(True, True, True, 7, 2, 1)


@pytest.mark.parametrize(("status", "expected"), [(200, True), (503, False)])
async def test_another_server_is_asked_whether_it_is_ready(server, status, expected):
    answers, url = server
    answers["/health"] = web.Response()
    answers["/readyz"] = web.Response(status=status)
    async with HttpProber(1.0) as prober:
        assert (await prober.probe(url)).ready is expected


async def test_silence_nonsense_and_closed_ports_are_unreachable(server):
    answers, url = server
    answers["/health"] = web.Response(text="{ half", content_type="application/json")
    async with HttpProber(0.1) as prober:
        assert await prober.probe(url) == UNREACHABLE
        answers["/health"] = web.json_response({"ready": True})
        answers["silent"] = asyncio.Event()
        assert await prober.probe(url) == UNREACHABLE
        answers["silent"].set()
        assert await prober.probe("http://127.0.0.1:1") == UNREACHABLE


async def test_readiness_is_waited_for_at_the_replica(server):
    """The answer comes when the replica is ready, however long that takes: not within the time that
    a probe may take."""
    answers, url = server
    answers["/readyz"] = web.Response()
    answers["silent"] = asyncio.Event()
    async with HttpProber(0.05) as prober:
        asking = asyncio.create_task(prober.ready(url, 60.0))
        assert not (await prober.probe(url)).reachable  # a probe has given up meanwhile
        answers["silent"].set()
        assert await asking


@pytest.mark.parametrize("status", [404, 503])
async def test_who_is_not_ready_says_no(server, status):
    answers, url = server
    answers["/readyz"] = web.Response(status=status)
    async with HttpProber(1.0) as prober:
        assert not await prober.ready(url, 60.0)
        assert not await prober.ready("http://127.0.0.1:1", 60.0)
