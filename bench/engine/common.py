"""What every engine's script shares: the workloads, the prompts, timing, memory, the command line.

Only the standard library is needed here, so that it works in every engine's own venv.
Prompts are token ids (never text), drawn from a seeded generator, and differ from one
repetition to the next, so that no engine's prefix cache helps it where it should not.
"""

import argparse, json, os, platform, random, statistics, sys, threading, time
import probe

VOCAB = 32000
LO = 300  # skip the byte tokens and the special ones
WORKLOADS = {
    # name: (requests, prompt tokens, generated tokens each, shared prefix tokens)
    "W1": (1, 128, 128, 0),  # single stream: decode tokens/s, time to first token
    "W2": (16, 256, 128, 0),  # throughput: generated tokens/s, wall seconds
    "W3": (1, 2048, 1, 0),  # prefill: prompt tokens/s
    "W4": (16, 1056, 64, 1024),  # 16 requests at once, cold shared prefix of 1024 + 32 of their own
    "W4w": (
        16,
        1056,
        64,
        1024,
    ),  # the same after one untimed request has put the prefix in the cache
    # For the model of `make_model.py --copy` only: it writes its prompt once more, without the
    # tokens that were put in wrong, one of 16 (W5) or one of 3 (W5h: guessing should not pay).
    "W5": (1, 128, 128, 0),
    "W5h": (1, 128, 128, 0),
}
WRONG = {"W5": 16, "W5h": 3}
if os.environ.get("BENCH_TINY"):  # run.py --tiny: does everything run? Figures mean nothing.
    WORKLOADS = {
        name: (min(n, 4), -(-p // 16) + 1, min(new, 8), shared // 16)
        for name, (n, p, new, shared) in WORKLOADS.items()
    }


def successors():
    """The token that the copying model writes after each: one long cycle over LO to VOCAB."""
    ring = list(range(LO, VOCAB))
    random.Random("successors").shuffle(ring)
    return dict(zip(ring, ring[1:] + ring[:1]))


def copied(workload, rep):
    """A prompt whose last token is its first: the copying model begins again there."""
    r = random.Random(f"{workload}/{rep}")
    follow, every = successors(), WRONG[workload]
    walk = [r.randrange(LO, VOCAB)]
    while len(walk) < WORKLOADS[workload][1] - 1:
        walk.append(follow[walk[-1]])
    wrong = [r.randrange(LO, VOCAB) if at % every == every - 1 else t for at, t in enumerate(walk)]
    return wrong + walk[:1]


def prompts(workload, rep):
    """The token ids of repetition `rep` (rep -1 is the warm-up's)."""
    n, p, _, shared = WORKLOADS[workload]
    if workload in WRONG:
        return [copied(workload, rep)]
    r = random.Random(f"{workload}/{rep}")
    draw = lambda k: [r.randrange(LO, VOCAB) for _ in range(k)]
    head = draw(shared)
    return [head + draw(p - shared) for _ in range(n)]


def new_tokens(workload):
    return WORKLOADS[workload][2]


def check_prompts():
    """Eight prompts of 32 tokens: 16 greedy tokens each are compared with HF float32 (check.py)."""
    r = random.Random("check")
    return [[r.randrange(LO, VOCAB) for _ in range(32)] for _ in range(8)]


CHECK_NEW = 16


def args(default_precision, precisions):
    ap = argparse.ArgumentParser()
    ap.add_argument(
        "--model", default=os.path.join(os.path.dirname(os.path.abspath(__file__)), "model")
    )
    ap.add_argument("--precision", default=default_precision, choices=precisions)
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--runs", type=int, default=3)
    ap.add_argument("--limit", type=float, default=0, help="seconds for a workload; 0: no limit")
    ap.add_argument("--workloads", default="W1,W2,W3,W4,W4w")
    ap.add_argument("--mode", default="", help="engine-specific variant")
    ap.add_argument("--no-check", action="store_true")
    ap.add_argument("--out", default="", help="append the JSON line here too")
    a = ap.parse_args()
    a.workloads = [w for w in a.workloads.split(",") if w]
    for v in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(v, str(a.threads))
    return a


class PeakRSS(threading.Thread):
    """Highest resident size of this process and its descendants, sampled five times a second."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak = 0
        self.page = os.sysconf("SC_PAGE_SIZE")
        self.start()

    def _tree(self):
        parent = {}
        for d in os.listdir("/proc"):
            if d.isdigit():
                try:
                    s = open(f"/proc/{d}/stat").read()
                    parent[int(d)] = int(s[s.rindex(")") + 2 :].split()[1])
                except (OSError, ValueError):
                    pass
        mine, todo = set(), [os.getpid()]
        while todo:
            p = todo.pop()
            mine.add(p)
            todo += [c for c, q in parent.items() if q == p and c not in mine]
        return mine

    def run(self):
        while True:
            tot = 0
            for p in self._tree():
                try:
                    tot += int(open(f"/proc/{p}/statm").read().split()[1]) * self.page
                except (OSError, ValueError, IndexError):
                    pass
            self.peak = max(self.peak, tot)
            time.sleep(0.2)


MAX_OTHERS = (
    5.0  # percent of the machine; a run disturbed by more is repeated, up to MAX_TRIES in all
)
MAX_TRIES = 6
SEPARATE = 1.6  # probe.py: two threads do at least this many times one thread's work
WAIT = float(
    os.environ.get("BENCH_WAIT", 10)
)  # seconds to wait before each run for a quiet machine


class Machine:
    """What else the machine did while a run was timed: shares of all its cores, in percent."""

    def __init__(self, rss):
        self.rss, self.hz, self.cores = rss, os.sysconf("SC_CLK_TCK"), os.cpu_count()

    def now(self):
        f = [int(v) for v in open("/proc/stat").readline().split()[1:9]]
        own = 0
        for p in self.rss._tree():
            try:
                s = open(f"/proc/{p}/stat").read()
                s = s[s.rindex(")") + 2 :].split()
                own += int(s[11]) + int(s[12])
            except (OSError, ValueError, IndexError):
                pass
        return time.perf_counter(), sum(f) - f[3] - f[4] - f[7], f[7], own

    def wait_quiet(self, limit=WAIT):
        """Wait (bounded) until the others use less than MAX_OTHERS of the machine."""
        end = time.perf_counter() + limit
        while time.perf_counter() < end:
            m = self.now()
            time.sleep(0.5)
            m = self.since(m)
            if (
                m["others_pct"] + m["steal_pct"] <= MAX_OTHERS
                and probe.probe()["scaling"] >= SEPARATE
            ):
                break

    def since(self, a):
        b = self.now()
        t = max(b[0] - a[0], 1e-3) * self.hz * self.cores / 100
        own, busy, steal = (b[3] - a[3]) / t, (b[1] - a[1]) / t, (b[2] - a[2]) / t
        return {
            "own_pct": round(own, 1),
            "others_pct": round(max(0.0, busy - own), 1),
            "steal_pct": round(steal, 1),
        }


def summary(xs):
    return {
        "median": round(statistics.median(xs), 4),
        "min": round(min(xs), 4),
        "max": round(max(xs), 4),
        "runs": [round(x, 4) for x in xs],
    }


def run_all(a, engine, version, load_s, generate, rss, settings, prepare_w4w=None, after_run=None):
    """Time the workloads and print one JSON line.

    generate(prompts, n_new) -> (list of generated id lists, seconds to the first token or None).
    It must generate exactly n_new tokens per prompt, greedily, ignoring EOS.
    """
    out = {
        "engine": engine,
        "version": version,
        "precision": a.precision,
        "mode": a.mode,
        "threads": a.threads,
        "model": os.path.basename(os.path.normpath(a.model)),
        "python": platform.python_version(),
        "settings": settings,
        "load_s": round(load_s, 2),
    }
    machine = Machine(rss)
    out["rss_after_load_gib"] = out["peak_rss_gib"] = round(rss.peak / 2**30, 3)
    print(json.dumps(out), flush=True)  # loaded: from here on a workload's time limit counts
    for w in a.workloads:
        n_new = new_tokens(w)
        n, p, _, shared = WORKLOADS[w]
        started = time.perf_counter()

        def fits(wall):  # whether one more run of this length is within the limit
            spent = time.perf_counter() - started
            return not a.limit or spent + wall + WAIT < 0.95 * a.limit

        try:
            if w not in ("W4", "W4w") or w == a.workloads[0]:  # W1 to W3 have warmed W4's shapes up
                generate(prompts(w, -1), min(n_new, 16))
            walls, ttfts, load, tries, dropped = [], [], [], 0, []
            while len(walls) < a.runs and not (walls and not fits(max(walls))):
                ps = prompts(w, tries)
                tries += 1
                if w == "W4w":
                    generate([ps[0][:shared] + [LO, LO + 1]], 1)
                machine.wait_quiet()
                before = probe.probe()["scaling"]
                m = machine.now()
                t0 = time.perf_counter()
                toks, ttft = generate(ps, n_new)
                wall = time.perf_counter() - t0
                m = machine.since(m)
                m["scaling"] = [before, probe.probe()["scaling"]]
                if (
                    m["others_pct"] + m["steal_pct"] > MAX_OTHERS
                    and tries + a.runs - len(walls) <= MAX_TRIES
                    and fits(wall)
                ):
                    dropped.append([round(wall, 3), m])
                else:
                    walls.append(wall)
                    ttfts.append(ttft)
                    load.append(m)
                assert len(toks) == n and all(len(t) == n_new for t in toks), (
                    f"{w}: wrong token counts {[len(t) for t in toks]}"
                )
            res = {"wall_s": summary(walls), "machine": load}
            if dropped:
                res["dropped"] = dropped
            if w in ("W1", "W5", "W5h"):
                if any(t is None for t in ttfts):  # no streaming: time one-token runs instead
                    ttfts = []
                    for rep in range(a.runs):
                        t0 = time.perf_counter()
                        generate(prompts(w, 100 + rep), 1)
                        ttfts.append(time.perf_counter() - t0)
                res["ttft_ms"] = summary([1000 * t for t in ttfts])
                res["decode_tps"] = summary([(n_new - 1) / (x - t) for x, t in zip(walls, ttfts)])
            elif w == "W3":
                res["prompt_tps"] = summary([p / x for x in walls])
            else:
                res["gen_tps"] = summary([n * n_new / x for x in walls])
            out[w] = res
        except Exception as e:  # a failure is a result too
            out[w] = {"error": f"{type(e).__name__}: {e}"[:500]}
        print(w, json.dumps(out[w]), file=sys.stderr, flush=True)
        out["peak_rss_gib"] = round(rss.peak / 2**30, 3)
        print(json.dumps(out), flush=True)  # what is known already, should this run be cut short
    if not a.no_check:
        try:
            out["check"] = generate(check_prompts(), CHECK_NEW)[0]
        except Exception as e:
            out["check_error"] = f"{type(e).__name__}: {e}"[:500]
    out["peak_rss_gib"] = round(rss.peak / 2**30, 3)
    line = json.dumps(out)
    print(line, flush=True)
    if a.out:
        with open(a.out, "a") as f:
            f.write(line + "\n")
