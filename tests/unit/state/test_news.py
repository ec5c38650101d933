"""When to look into the state again: at once after a write of anybody, and not in vain."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from cloudlm.core.clock import ManualClock, SystemClock
from cloudlm.core.deployment import DeploymentSpec
from cloudlm.state import news as news_module
from cloudlm.state.news import LOOK_S, FileNews, PolledNews
from cloudlm.state.open import open_news, open_state

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="inotify is Linux's")


class CountingClock(SystemClock):
    """Waits as it should, and notes for how long."""

    def __init__(self) -> None:
        self.slept: list[float] = []

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        await super().sleep(seconds)


async def test_where_nothing_tells_the_time_to_look_comes_often() -> None:
    clock = ManualClock()
    news = open_news("postgresql+psycopg://x@db/y", clock)
    assert isinstance(news, PolledNews)
    waiting = asyncio.create_task(news.wait(10.0))
    await asyncio.sleep(0)
    await clock.advance(LOOK_S / 2)
    assert not waiting.done()
    await clock.advance(LOOK_S)
    assert waiting.done()


async def test_never_longer_than_asked() -> None:
    clock = ManualClock()
    waiting = asyncio.create_task(PolledNews(clock).wait(LOOK_S / 5))
    await asyncio.sleep(0)
    await clock.advance(LOOK_S / 5)
    assert waiting.done()


@on_linux
async def test_a_write_of_another_is_told_and_silence_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"sqlite:///{tmp_path / 'state.db'}"
    ours, theirs = await open_state(url), await open_state(url)
    try:
        await ours.version()
        await theirs.put_deployment(DeploymentSpec("a", "models:/m/1"), now=1.0)
        # Only a write can end this wait: no time passes for the fallback within a test's limit.
        monkeypatch.setattr(news_module, "SELDOM_S", 3600.0)
        news = open_news(url, SystemClock())
        assert isinstance(news, FileNews)
        waiting = asyncio.create_task(news.wait(3600.0))
        await ours.version()  # reading is no news
        assert not waiting.done()
        before = await ours.version()
        await theirs.put_deployment(DeploymentSpec("b", "models:/m/1"), now=2.0)
        await waiting
        assert await ours.version() > before
        news.close()
    finally:
        await ours.close()
        await theirs.close()


@on_linux
async def test_a_write_between_two_waits_is_not_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(news_module, "SELDOM_S", 3600.0)
    log = tmp_path / "state.db-wal"
    log.write_bytes(b"")
    news = FileNews(log, SystemClock())
    waiting = asyncio.create_task(news.wait(3600.0))
    await asyncio.sleep(0)
    with log.open("ab") as file:
        file.write(b"1")
    await waiting
    with log.open("ab") as file:
        file.write(b"2")
    await news.wait(3600.0)
    news.close()


@on_linux
async def test_after_a_write_it_looks_once_more_soon(tmp_path: Path) -> None:
    """A write is told of when it begins: what was not there yet is seen a moment later."""
    log = tmp_path / "state.db-wal"
    log.write_bytes(b"")
    news = FileNews(log, SystemClock())
    waiting = asyncio.create_task(news.wait(3600.0))
    await asyncio.sleep(0)
    with log.open("ab") as file:
        file.write(b"1")
    await waiting
    assert news._wrote
    await news.wait(3600.0)  # ends without a write
    assert not news._wrote
    news.close()


@on_linux
async def test_many_writes_are_looked_at_a_few_times(tmp_path: Path) -> None:
    log = tmp_path / "state.db-wal"
    log.write_bytes(b"")
    clock = CountingClock()
    news = FileNews(log, clock)
    await news.wait(0.0)
    for number in range(4):
        with log.open("ab") as file:
            file.write(b"%d" % number)
        await news.wait(3600.0)
    pauses = clock.slept[-3:]
    assert all(pause >= news_module.SETTLE_S for pause in pauses)
    assert sum(pauses) > news_module.APART_S
    news.close()


@on_linux
async def test_a_file_that_cannot_be_watched_is_looked_at_often(tmp_path: Path) -> None:
    clock = ManualClock()
    news = FileNews(tmp_path / "state.db-wal", clock)
    waiting = asyncio.create_task(news.wait(10.0))
    await asyncio.sleep(0)
    await clock.advance(LOOK_S)
    await waiting
    news.close()


@on_linux
async def test_a_file_that_was_replaced_is_watched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(news_module, "SELDOM_S", 3600.0)
    log = tmp_path / "state.db-wal"
    log.write_bytes(b"")
    news = FileNews(log, SystemClock())
    waiting = asyncio.create_task(news.wait(3600.0))
    await asyncio.sleep(0)
    log.unlink()
    await waiting
    log.write_bytes(b"")
    waiting = asyncio.create_task(news.wait(3600.0))
    await asyncio.sleep(0)
    with log.open("ab") as file:
        file.write(b"1")
    await waiting
    news.close()
