"""Quick state of the machine: read bandwidth and bf16 GEMM rate, read before and after benchmarks.

    python bw.py [--threads 2]
One JSON line: GB/s and TFLOP/s, best, median and worst of a few passes. Needs: torch.
"""

import argparse
import json
import statistics
import time


def measure(threads=2):
    import torch

    torch.set_num_threads(threads)
    ones = torch.ones(2**28)  # 1 GiB, far beyond any cache
    left = torch.randn(4096, 4096, dtype=torch.bfloat16)
    right = torch.randn(4096, 4096, dtype=torch.bfloat16)
    return {
        "read_gbs": _rates(lambda: ones.sum(), 2**30 / 1e9, 7),
        "bf16_tflops": _rates(lambda: left @ right.T, 2 * 4096**3 / 1e12, 5),
    }


def _rates(work, amount, passes):
    work()
    seconds = []
    for _ in range(passes):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    found = {"best": min(seconds), "median": statistics.median(seconds), "worst": max(seconds)}
    return {name: round(amount / value, 2) for name, value in found.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    print(json.dumps(measure(parser.parse_args().threads)))
