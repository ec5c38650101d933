"""Our engine and every installed peer on the same work, in one run.

    make bench-engine                          the lot
    python bench/engine/run.py --engines cloudlm,vllm --precisions bf16 --workloads W1,W3 --runs 5

Engines run one after the other, each in a process (and a peer in an environment) of its own, on
the model of make_model.py; between them the machine's read bandwidth and matrix rate are measured,
from which the limits come. One JSON line per engine and precision goes to ``--out``; the tables are
printed and, with ``--record``, written into RESULTS.md. Peers are installed by peers.py; those that
are not there are named and left out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import check
import peers
import report

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import results  # noqa: E402 - a folder up

# Our precisions by those of the table. The peers' kernels take the inputs of 8-bit and 4-bit
# weights in 8 bits, as cloudlm-a8 does; cloudlm keeps 16 bits of them.
OURS = {
    "cloudlm": {"bf16": "bf16", "int8": "int8", "int4": "int4"},
    "cloudlm-a8": {"int8": "int8-a8", "int4": "int4-a8"},
}


def main() -> int:
    options = _options()
    options.work.mkdir(parents=True, exist_ok=True)
    out = options.out or options.work / time.strftime("results-%Y%m%d-%H%M.jsonl")
    model = _model(options.work)
    absent = []
    for precision in options.precisions:
        for engine in options.engines:
            command = _command(engine, precision, options, model)
            if isinstance(command, str):
                absent.append(command)
                print(f"{engine} {precision}: {command}", file=sys.stderr, flush=True)
            elif command:
                _measure(engine, precision, command, options, out)
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
    parser.add_argument("--work", type=Path, default=HERE.parents[1] / "out" / "bench-engine")
    parser.add_argument("--out", type=Path, help="append JSON lines here, and report all in it")
    parser.add_argument("--timeout", type=float, default=1200, help="seconds for one engine")
    parser.add_argument("--record", action="store_true", help="write the table into RESULTS.md")
    options = parser.parse_args()
    for field, known in (("engines", names), ("precisions", ["bf16", "int8", "int4"])):
        chosen = getattr(options, field).split(",")
        if unknown := set(chosen) - set(known):
            parser.error(
                f"unknown {field}: {', '.join(sorted(unknown))}; known: {', '.join(known)}"
            )
        setattr(options, field, chosen)
    return options


def _model(work: Path) -> Path:
    model = work / "model"
    if not (model / "config.json").exists():
        subprocess.run([sys.executable, HERE / "make_model.py", "--out", model], check=True)
    return model


def _command(
    engine: str, precision: str, options: argparse.Namespace, model: Path
) -> list[str] | str | None:
    """What to run; a string says why it cannot run; None if the engine has no such precision."""
    common = ["--model", str(model), "--threads", str(options.threads)]
    common += ["--workloads", options.workloads, "--runs", str(options.runs)]
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
        subprocess.run([converter, HERE / peer.convert, "--model", model], check=True)
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
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            text=True,
            timeout=options.timeout,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        told = (error.stdout or b"").decode()  # bytes here, whatever ``text`` says
        return _last(told) or {"failed": f"no result within {options.timeout:.0f} s"}
    return _last(done.stdout) or {"failed": f"exit {done.returncode}"}


def _last(told: str) -> dict[str, Any] | None:
    """The last JSON line that was told whole; an engine that is cut short has told its first
    workloads."""
    for line in reversed(told.splitlines()):
        if line.startswith("{") and line.endswith("}"):
            found: dict[str, Any] = json.loads(line)
            return found
    return None


def _machine(threads: int) -> dict[str, Any]:
    command = [sys.executable, str(HERE / "bw.py"), "--threads", str(threads)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    state: dict[str, Any] = json.loads(done.stdout)
    return state


if __name__ == "__main__":
    sys.exit(main())
