"""``make fuzz-fleet``: many seeds, or one again.

    python -m tests.fuzz --seeds 1000        seeds 0 to 999 over all cores
    python -m tests.fuzz --seed 17           one seed again; if it fails, shrunk
    python -m tests.fuzz --script FILE       the script that a failing seed printed ("-": input)
    python -m tests.fuzz --bugs              every planted bug must be caught

Ends with 1 if an invariant was broken or a planted bug was not caught.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator

from tests.fuzz import bugs
from tests.fuzz.run import Verdict, again, judge, judge_seeds, shrunk, tried
from tests.fuzz.schedule import draw

_BATCH = 10
_TELL_EVERY_S = 15.0


def _all(seeds: range, jobs: int) -> Iterator[Verdict]:
    batches = [seeds[n : n + _BATCH] for n in range(0, len(seeds), _BATCH)]
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        for verdicts in pool.imap_unordered(judge_seeds, batches):
            yield from verdicts


def many(seeds: range, jobs: int) -> int:
    """Run seeds; the number of those that broke an invariant."""
    began, requests, failed = time.perf_counter(), 0, []
    tell_at = began + _TELL_EVERY_S
    print(f"{len(seeds)} seeds in {jobs} processes", flush=True)
    for count, verdict in enumerate(_all(seeds, jobs), 1):
        requests += verdict.requests
        if verdict.broken:
            failed.append(verdict.seed)
            print(verdict.told(), flush=True)
        if (now := time.perf_counter()) >= tell_at:
            tell_at = now + _TELL_EVERY_S
            print(_so_far(count, len(seeds), now - began, len(failed)), flush=True)
    took_s = time.perf_counter() - began
    rate = len(seeds) / took_s
    print(
        f"{len(seeds):,} seeds and {requests:,} requests in {took_s:.0f} s: {rate:.1f} seeds and "
        f"{requests / took_s:,.0f} requests a second"
    )
    print(f"10,000 seeds at this pace: {10_000 / rate / 60:.1f} minutes")
    for seed in failed[:3]:
        one(seed)
    print(f"{len(failed)} seeds broke an invariant" if failed else "no invariant was broken")
    return len(failed)


def _so_far(done: int, of: int, took_s: float, failed: int) -> str:
    left_s = took_s / done * (of - done)
    return f"  {done:,} of {of:,} seeds, {failed} broken, {left_s:.0f} s left"


def one(seed: int) -> int:
    """Run one seed and tell of it; if it fails, with as few faults and requests as still do."""
    verdict = judge(draw(seed))
    print(verdict.told())
    if not verdict.broken:
        return 0
    small = shrunk(draw(seed))
    print(f"\nseed {seed}, the least that still fails (make fuzz-fleet SEED={seed}):")
    print(tried(small))
    print(judge(small).told())
    return 1


def replayed(script: str) -> int:
    """Run a script; 1 if it still breaks an invariant."""
    try:
        schedule = again(script)
    except ValueError as error:
        print(f"this is no script of a run: {error}; give the line that a failing seed printed")
        return 2
    verdict = judge(schedule)
    print(verdict.told())
    return int(bool(verdict.broken))


def planted(most_seeds: int) -> int:
    """Plant every bug; the number of those that no invariant caught."""
    missed = 0
    print(f"{'planted bug':<34} {'caught by':<14} seed  how")
    for name in bugs.BUGS:
        found = bugs.caught(name, most_seeds)
        if found is None:
            missed += 1
            print(f"{name:<34} NOT CAUGHT in {most_seeds} seeds")
        else:
            invariant, what = found.broken[0]
            print(f"{name:<34} {invariant:<14} {found.seed:<5} {what[:90]}", flush=True)
    print(f"{len(bugs.BUGS) - missed} of {len(bugs.BUGS)} planted bugs were caught")
    return missed


def main() -> int:
    ask = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    ask.add_argument("--seeds", type=int, default=200, help="how many seeds")
    ask.add_argument("--first", type=int, default=0, help="the first seed")
    ask.add_argument("--seed", type=int, help="this seed alone")
    ask.add_argument("--script", type=argparse.FileType("r"), help="a printed script")
    ask.add_argument("--bugs", action="store_true", help="plant bugs, one after the other")
    ask.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    asked = ask.parse_args()
    logging.disable(logging.CRITICAL)
    if asked.bugs:
        return int(planted(asked.seeds) > 0)
    if asked.script is not None:
        return replayed(asked.script.read())
    if asked.seed is not None:
        return one(asked.seed)
    return int(many(range(asked.first, asked.first + asked.seeds), asked.jobs) > 0)


if __name__ == "__main__":
    sys.exit(main())
