"""What the engine's abilities cost: overhead of a step, constrained answers, sleep and wake.

    python abilities.py --model out/bench-engine/model [--sequences 16,64,256]
One JSON line. Everything but the runner's passes counts as overhead: scheduling, streams, events.
Constrained answers are compared with free ones of the same length in turn, each after a warm-up.
Needs: cloudlm.
"""

import argparse
import asyncio
import json
import random
import statistics
import time
from pathlib import Path


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--precision", default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sequences", default="16,64,256")
    parser.add_argument("--output", type=int, default=64, help="tokens generated per request")
    parser.add_argument("--rounds", type=int, default=3)
    a = parser.parse_args()
    print(json.dumps(asyncio.run(measure(a))))


async def measure(a):
    from cloudlm.core.settings import EngineSettings
    from cloudlm.engine.load import load_engine

    most = max(int(count) for count in a.sequences.split(","))
    settings = EngineSettings(
        precision=a.precision,
        threads=a.threads,
        kv_cache_mb=4096,
        max_batch_tokens=2304,
        max_batch_sequences=most,
    )
    engine = load_engine(a.model, settings, max_waiting=max(most, 16))
    found = {"precision": a.precision, "threads": a.threads, "overhead": {}}
    for count in a.sequences.split(","):
        found["overhead"][count] = await overhead(engine, int(count), a.output)
    found["constrained"] = await constrained(engine, a)
    found["sleep"] = await sleep_and_wake(engine)
    await engine.close()
    return found


async def answers(engine, count, output, seed, constraint=None):
    """Seconds that ``count`` requests of 32 tokens in and ``output`` out take together."""
    from cloudlm.core.chat import Sampling
    from cloudlm.engine.api import GenerateRequest

    draw = random.Random(seed)
    sampling = Sampling(temperature=0.0, max_tokens=output, ignore_eos=True, constraint=constraint)

    async def one(number):
        prompt = tuple(draw.randrange(300, 32000) for _ in range(32))
        guide = None if constraint is None else await engine.guide(constraint)
        request = GenerateRequest(f"r{seed}-{number}", prompt, sampling, guide=guide)
        return sum([len(event.token_ids) async for event in engine.submit(request)])

    began = time.perf_counter()
    counts = await asyncio.gather(*(one(number) for number in range(count)))
    seconds = time.perf_counter() - began
    if counts != [output] * count:
        raise SystemExit(f"wrong token counts: {counts}")
    return seconds


async def overhead(engine, count, output):
    """Share of the wall time in which no pass ran, and its length for one step."""
    runner = engine._loop._runner
    run, passes = runner.run, []

    def timed(*step):
        began = time.perf_counter()
        sampled = run(*step)
        passes.append(time.perf_counter() - began)
        return sampled

    await answers(engine, count, 8, seed=count)
    runner.run = timed
    try:
        seconds = await answers(engine, count, output, seed=count + 1)
    finally:
        runner.run = run
    apart = seconds - sum(passes)
    return {
        "steps": len(passes),
        "pass_ms": round(1000 * statistics.median(passes), 2),
        "overhead_ms": round(1000 * apart / len(passes), 3),
        "share": round(apart / seconds, 4),
    }


async def constrained(engine, a):
    """16 answers free and by a regular expression that allows any such length, in turn."""
    from cloudlm.core.chat import Constraint, ConstraintKind

    text = Constraint(ConstraintKind.REGEX, "[a-zA-Z ]{4000}")
    free, bound = [], []
    for number in range(a.rounds + 1):
        free.append(await answers(engine, 16, a.output, 1000 + number))
        bound.append(await answers(engine, 16, a.output, 1000 + number, text))
    free, bound = statistics.median(free[1:]), statistics.median(bound[1:])
    return {"free_s": round(free, 3), "constrained_s": round(bound, 3), "ratio": bound / free}


async def sleep_and_wake(engine):
    found = {"sleep_s": [], "wake_s": []}
    for _ in range(3):
        began = time.perf_counter()
        await engine.sleep(1)
        asleep = time.perf_counter()
        await engine.wake()
        found["sleep_s"].append(round(asleep - began, 3))
        found["wake_s"].append(round(time.perf_counter() - asleep, 3))
    return found


if __name__ == "__main__":
    main()
