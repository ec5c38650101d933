"""The physical limit of every workload: bytes over bandwidth against operations over peak.

Step by step, for the model of make_model.py.

    python roofline.py --gbs 31 --tflops 1.8
Prefill is taken at the bf16 peak for bf16 and at twice that for int8; KV is bf16 unless --kv 1
(bytes).
"""

import argparse

H, L, INNER, V, QH, KVH, D = 1024, 28, 3072, 32000, 16, 8, 128
BODY = L * (H * QH * D * 2 + 2 * H * KVH * D + 3 * H * INNER)
HEAD = H * V
PRECISIONS = {"bf16": (2, 1), "int8": (1, 2), "int4": (4.25 / 8, 2)}  # bytes a weight, peak factor


def attention_flops(queries, context):
    return 4 * L * QH * D * queries * context  # QK^T and PV


def limits(precision, gbs, tflops, kv_bytes=2):
    """Tokens/s of W1, W2, W3 and seconds of W4 (and its variants without sharing) at that rate."""
    weight_bytes, factor = PRECISIONS[precision]
    bandwidth, flops = gbs * 1e9, tflops * 1e12
    peak = flops * factor
    kv_token = L * 2 * KVH * D * kv_bytes
    weights = (BODY + HEAD) * weight_bytes

    def prefill(queries, heads, context):
        products = 2 * (queries * BODY + heads * HEAD) / peak
        return max(products + attention_flops(queries, context) / flops, weights / bandwidth)

    def decode(sequences, read_tokens):
        return max(
            (weights + read_tokens * kv_token) / bandwidth, sequences * 2 * (BODY + HEAD) / peak
        )

    w1 = sum(decode(1, 128 + i) for i in range(1, 128)) / 127
    w2 = prefill(4096, 16, 128) + sum(decode(16, 16 * (256 + i)) for i in range(1, 128))
    w3 = prefill(2048, 1, 1024)
    own = 2 * (512 * BODY + 16 * HEAD) / peak + attention_flops(512, 1040) / flops
    prefix = 2 * 1024 * BODY / peak + attention_flops(1024, 512) / flops
    shared = sum(decode(16, 1024 + 16 * (32 + i)) for i in range(1, 64))
    apart = sum(decode(16, 16 * (1056 + i)) for i in range(1, 64))
    return {
        "W1": 1 / w1,
        "W1_ttft_ms": 1000 * prefill(128, 1, 64),
        "W2": 2048 / w2,
        "W3": 2048 / w3,
        "W4": prefix + own + shared,
        "W4w": own + shared,
        "W4_read_per_sequence": prefix + own + apart,
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--gbs", type=float, default=31)
    parser.add_argument("--tflops", type=float, default=1.8)
    parser.add_argument("--kv", type=float, default=2, help="bytes per KV element")
    a = parser.parse_args()
    for precision in PRECISIONS:
        found = limits(precision, a.gbs, a.tflops, a.kv)
        print(f"{precision:5s}", "  ".join(f"{name} {value:.4g}" for name, value in found.items()))


if __name__ == "__main__":
    main()
