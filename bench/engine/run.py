"""Our engine and every installed peer on the same work, in one run.

    make bench-engine                          the lot
    python bench/engine/run.py --engines cloudlm,vllm --precisions bf16 --workloads W1,W3 --runs 5
    python bench/engine/run.py --tiny --engines cloudlm     tries the machinery out, in minutes

Engines run one after the other, each in a process (and a peer in an environment) of its own, on
the model of make_model.py; between them the machine's read bandwidth and matrix rate are measured,
from which the limits come. One JSON line per engine and precision goes to ``--out``; the tables are
printed and, with ``--record``, written into RESULTS.md. A run may be made in pieces with one
``--out``: of two lines of an engine at a precision the later counts. Peers are installed by
peers.py; those that are not there are named and left out. An engine has ``--limit`` seconds for a
workload (with its warm-up and all runs; fewer runs where no more fit) and is ended then.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import check
import peers
import report
import watch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import results  # noqa: E402 - a folder up

# Our precisions by those of the table. The peers' kernels take the inputs of 8-bit and 4-bit
# weights in 8 bits, as cloudlm-a8 does; cloudlm keeps 16 bits of them.
OURS = {
    "cloudlm": {"bf16": "bf16", "int8": "int8", "int4": "int4"},
    "cloudlm-a8": {"int8": "int8-a8", "int4": "int4-a8"},
}

_ABILITIES_LIMIT_S = 1800.0


def main() -> int:
    options = _options()
    if options.tiny:
        os.environ["BENCH_TINY"] = "1"  # the scripts' workloads: common.py
    options.work.mkdir(parents=True, exist_ok=True)
    out = options.out or options.work / time.strftime("results-%Y%m%d-%H%M%S.jsonl")
    model = _model(options)
    absent = []
    for precision in options.precisions:
        for engine in [] if options.report else options.engines:
            command = _command(engine, precision, options, model)
            if isinstance(command, str):
                absent.append(command)
                print(f"{engine} {precision}: {command}", file=sys.stderr, flush=True)
            elif command:
                _measure(engine, precision, command, options, out)
    if options.abilities and not options.report:
        _measure_abilities(options, model, out)
    if not out.exists():
        print("nothing was measured: " + "; ".join(sorted(set(absent))), file=sys.stderr)
        return 1
    _check(out, model)
    table = report.table(out, options, sorted(set(absent)))
    print(table)
    if options.record:
        results.record("bench-engine", table)
    return 0


def _options() -> argparse.Namespace:
    names = [*OURS, *peers.PEERS]
    parser = argparse.ArgumentParser(description="Engine benchmark with peers")
    parser.add_argument("--engines", default=",".join(names))
    parser.add_argument("--precisions", default="bf16,int8,int4")
    parser.add_argument("--workloads", default="W1,W2,W3,W4,W4w")
    parser.add_argument("--runs", type=int, default=3, help="timed repetitions of each workload")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peers", type=Path, default=peers.default_folder())
    parser.add_argument("--work", type=Path, help="models and results; out/bench-engine")
    parser.add_argument("--out", type=Path, help="append JSON lines here, and report all in it")
    parser.add_argument("--limit", type=float, default=300, help="seconds for one workload")
    parser.add_argument("--load-limit", type=float, default=600, help="seconds until it is loaded")
    parser.add_argument("--record", action="store_true", help="write the table into RESULTS.md")
    parser.add_argument("--abilities", action="store_true", help="ours: what abilities.py measures")
    parser.add_argument("--report", action="store_true", help="measure nothing: tables of --out")
    parser.add_argument("--tiny", action="store_true", help="few tokens, a toy model: no figures")
    options = parser.parse_args()
    folder = "bench-engine-tiny" if options.tiny else "bench-engine"
    options.work = options.work or HERE.parents[1] / "out" / folder
    if options.report and not (options.out and options.out.exists()):
        parser.error("--report wants the file of a former run: --out FILE")
    if options.tiny and options.record:
        parser.error("--tiny measures nothing that should be recorded")
    for field in ("runs", "threads", "limit", "load_limit"):
        if not getattr(options, field) > 0:
            parser.error(f"--{field.replace('_', '-')} must be above 0")
    workloads = list(report.COLUMNS)
    for field, known in (
        ("engines", names),
        ("precisions", ["bf16", "int8", "int4"]),
        ("workloads", workloads),
    ):
        chosen = getattr(options, field).split(",")
        if unknown := set(chosen) - set(known):
            parser.error(
                f"unknown {field}: {', '.join(sorted(unknown))}; known: {', '.join(known)}"
            )
        setattr(options, field, chosen)
    return options


def _model(options: argparse.Namespace) -> Path:
    model: Path = options.work / "model"
    if not (model / "config.json").exists():
        tiny = ["--tiny"] if options.tiny else []
        subprocess.run([sys.executable, HERE / "make_model.py", "--out", model, *tiny], check=True)
    return model


def _command(
    engine: str, precision: str, options: argparse.Namespace, model: Path
) -> list[str] | str | None:
    """What to run; a string says why it cannot run; None if the engine has no such precision."""
    common = ["--model", str(model), "--threads", str(options.threads)]
    common += ["--runs", str(options.runs), "--limit", str(options.limit)]
    if engine in OURS:
        own = OURS[engine].get(precision)
        script = str(HERE / "bench_cloudlm.py")
        return own and [sys.executable, script, "--precision", own, *common]
    peer = peers.PEERS[engine]
    if precision not in peer.precisions:
        return None
    python = peers.python_of(options.peers, engine)
    if python is None and engine == "transformers":
        python = Path(sys.executable)  # a development dependency of ours
    if python is None:
        return f"{engine} is not installed in {options.peers.name}/ (peers.py installs it)"
    if peer.convert and not (model.parent / peer.converted).exists():
        converter = peers.python_of(options.peers, peer.convert_with)
        if converter is None:
            return f"{engine} wants the environment {peer.convert_with!r} to convert the model"
        done = subprocess.run([converter, HERE / peer.convert, "--model", model], check=False)
        if done.returncode:
            return f"{engine}: {peer.convert} could not convert the model (its output says why)"
    return [
        str(python),
        str(HERE / peer.script),
        "--precision",
        peer.precisions[precision],
        *common,
    ]


def _measure(
    engine: str, precision: str, command: list[str], options: argparse.Namespace, out: Path
) -> None:
    print(f"{time.strftime('%H:%M:%S')} {engine} {precision}", file=sys.stderr, flush=True)
    before = _machine(options.threads)
    line = _run(command, options)
    after = _machine(options.threads)
    line |= {"name": engine, "bits": precision, "state": [before, after]}
    with out.open("a") as file:
        file.write(json.dumps(line) + "\n")


def _measure_abilities(options: argparse.Namespace, model: Path, out: Path) -> None:
    print(f"{time.strftime('%H:%M:%S')} abilities", file=sys.stderr, flush=True)
    command = [sys.executable, str(HERE / "abilities.py"), "--model", str(model)]
    command += ["--threads", str(options.threads), "--rounds", str(options.runs)]
    if options.tiny:
        command += ["--sequences", "4,8", "--output", "8"]
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
    whole = watch.Limits(_ABILITIES_LIMIT_S, 1.0)  # it tells one line, at its end
    told, ended = watch.run(command, whole, environment)
    found = told or {"failed": watch.words(ended or {"error": "told nothing"})}
    with out.open("a") as file:
        file.write(json.dumps({"name": "abilities", "bits": "", "abilities": found}) + "\n")


def _check(results: Path, model: Path) -> None:
    """Adds to every line how its greedy tokens compare with float32's."""
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    if any("check" in line for line in lines):
        reference = check.Reference(model)
        for line in lines:
            if "check" in line and "checked" not in line:
                line["checked"] = reference.compare(line["check"])
    results.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _run(command: list[str], options: argparse.Namespace) -> dict[str, Any]:
    threads = str(options.threads)
    environment = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    # Installed packages are compiled once; an engine run from its sources is not to pay each time.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    limits = watch.Limits(options.load_limit, options.limit)

    def attempt(workloads: Sequence[str]) -> tuple[watch.Facts, watch.Ended]:
        return watch.run([*command, "--workloads", ",".join(workloads)], limits, environment)

    return watch.measure(attempt, options.workloads)


def _machine(threads: int) -> dict[str, Any]:
    command = [sys.executable, str(HERE / "bw.py"), "--threads", str(threads)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    state: dict[str, Any] = json.loads(done.stdout)
    return state


if __name__ == "__main__":
    sys.exit(main())
