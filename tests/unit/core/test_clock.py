"""The manual clock wakes sleepers in order."""

import asyncio

from cloudlm.core.clock import ManualClock, SystemClock


async def test_sleepers_wake_in_order() -> None:
    clock = ManualClock()
    woken: list[tuple[str, float]] = []

    async def sleeper(name: str, seconds: float) -> None:
        await clock.sleep(seconds)
        woken.append((name, clock.monotonic()))

    tasks = [asyncio.create_task(sleeper(n, s)) for n, s in (("b", 2.0), ("a", 1.0), ("c", 9.0))]
    await asyncio.sleep(0)
    await clock.advance(5.0)
    assert woken == [("a", 1.0), ("b", 2.0)]
    assert clock.now() - 1_700_000_000.0 == 5.0
    await clock.advance(5.0)
    await asyncio.gather(*tasks)
    assert woken[-1] == ("c", 9.0)


async def test_the_system_clock_moves() -> None:
    clock = SystemClock()
    before = clock.monotonic()
    await clock.sleep(0)
    assert clock.monotonic() >= before
    assert clock.now() > 1_700_000_000
