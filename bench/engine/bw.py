"""Quick state of the machine: read bandwidth and bf16 GEMM rate, to be run before and after benchmarks."""

import torch, time, sys

torch.set_num_threads(2)
x = torch.ones(2**28)


def t(f, n=7):
    f()
    r = []
    for _ in range(n):
        t0 = time.perf_counter()
        f()
        r.append(time.perf_counter() - t0)
    r.sort()
    return r[0], r[n // 2], r[-1]


a, b, c = t(lambda: x.sum())
print(
    f"read GB/s best {2**30 / a / 1e9:.1f} median {2**30 / b / 1e9:.1f} worst {2**30 / c / 1e9:.1f}"
)
A = torch.randn(4096, 4096, dtype=torch.bfloat16)
B = torch.randn(4096, 4096, dtype=torch.bfloat16)
a, b, c = t(lambda: A @ B.T, 5)
print(
    f"bf16 GEMM TFLOP/s best {2 * 4096**3 / a / 1e12:.2f} median {2 * 4096**3 / b / 1e12:.2f} worst {2 * 4096**3 / c / 1e12:.2f}"
)
