"""One schedule judged, and a failing one made as small as it gets. Must not print."""

from __future__ import annotations

import gc
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
from tests.fuzz import invariants
from tests.fuzz.play import play
from tests.fuzz.schedule import Schedule, draw

_MEMORY = Path("/dev/shm")  # files that no disk slows down, where there is such a place
_MOST_TRIES = 120


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a run went. ``trace`` is a digest of everything that happened, in order."""

    seed: int
    requests: int
    broken: tuple[tuple[str, str], ...]
    trace: str

    def told(self) -> str:
        """For people."""
        if not self.broken:
            return f"seed {self.seed}: {self.requests} requests, trace {self.trace}, no fault"
        lines = "".join(f"\n  {name}: {what}" for name, what in self.broken[:5])
        return f"seed {self.seed} broke:{lines}"


def judge(schedule: Schedule) -> Verdict:
    """Carry out a schedule and look at what happened."""
    place = _MEMORY if _MEMORY.is_dir() else None
    with tempfile.TemporaryDirectory(prefix="fuzz-fleet-", dir=place) as home:
        story = play(schedule, Path(home))
    broken = invariants.check(story)
    return Verdict(schedule.seed, len(story.seen), tuple(broken), story.trace)


def judge_seeds(seeds: Sequence[int]) -> list[Verdict]:
    """The verdicts of some seeds, for a process that does nothing else: it is quiet from then on.
    Stands here because a process that is begun anew does not find what is in ``__main__``."""
    logging.disable(logging.CRITICAL)
    if gc.isenabled():  # looking for garbage all the time takes a seventh of it
        gc.freeze()
        gc.disable()
    verdicts = [judge(draw(seed)) for seed in seeds]
    gc.collect()
    return verdicts


def shrunk(schedule: Schedule) -> Schedule:
    """Leave out faults and orders, then parts of the requests, while the same invariant breaks."""
    names = {name for name, _ in judge(schedule).broken}
    tries = 0

    def fails(small: Schedule) -> bool:
        nonlocal tries
        tries += 1
        if tries > _MOST_TRIES:
            return False
        return bool(names & {name for name, _ in judge(small).broken})

    for fault in schedule.faults:
        small = replace(schedule, faults=tuple(f for f in schedule.faults if f != fault))
        if fails(small):
            schedule = small
    for order in schedule.orders:
        small = replace(schedule, orders=tuple(o for o in schedule.orders if o != order))
        if fails(small):
            schedule = small
    size = len(schedule.asks)
    while size:
        begin = 0
        while begin < len(schedule.asks):
            left = schedule.asks[:begin] + schedule.asks[begin + size :]
            small = replace(schedule, asks=left)
            if fails(small):
                schedule = small
            else:
                begin += size
        size //= 2
    return schedule


def tried(schedule: Schedule) -> str:
    """A schedule for people, one thing a line, and as a script that ``again`` reads."""
    plain = replace(schedule, asks=(), faults=(), orders=())
    lines = [str(plain), *(f"  {ask}" for ask in schedule.asks[:12])]
    if len(schedule.asks) > 12:
        lines.append(f"  … {len(schedule.asks)} requests in all")
    lines += [f"  {one}" for one in (*schedule.orders, *schedule.faults)]
    return "\n".join([*lines, "as a script:", msgspec.json.encode(schedule).decode()])


def again(script: str) -> Schedule:
    """The schedule of a script. Raises ValueError naming what is wrong with it."""
    return msgspec.json.decode(script, type=Schedule)
