"""The physical limit of every workload: bytes over bandwidth against operations over peak, step by step.

    python roofline.py --gbs 31 --tflops 1.8
Prefill is taken at the bf16 peak for bf16 and at twice that for int8; KV is bf16 unless --kv 1 (bytes).
"""

import argparse

ap = argparse.ArgumentParser()
ap.add_argument("--gbs", type=float, default=31)
ap.add_argument("--tflops", type=float, default=1.8)
ap.add_argument("--kv", type=float, default=2, help="bytes per KV element")
a = ap.parse_args()
H, L, I, V, QH, KVH, D = 1024, 28, 3072, 32000, 16, 8, 128
body = L * (H * QH * D * 2 + 2 * H * KVH * D + 3 * H * I)
head = H * V
kv_tok = L * 2 * KVH * D * a.kv
attn = lambda q, ctx: 4 * L * QH * D * q * ctx  # QK^T and PV
for name, wb, mul in (("bf16", 2, 1), ("int8", 1, 2), ("int4 g128 ~4.25 bit", 4.25 / 8, 2)):
    bw, pk = a.gbs * 1e9, a.tflops * 1e12 * mul
    wbytes = (body + head) * wb

    def prefill(q, heads, ctx_avg, seqs_kv=0):
        return max(
            (2 * (q * body + heads * head)) / pk + attn(q, ctx_avg) / (a.tflops * 1e12), wbytes / bw
        )

    def decode(n, ctx, read_ctx_tokens):
        return max((wbytes + read_ctx_tokens * kv_tok) / bw, n * 2 * (body + head) / pk)

    ttft = prefill(128, 1, 64)
    w1 = sum(decode(1, 128 + i, 128 + i) for i in range(1, 128)) / 127
    w2 = prefill(4096, 16, 128) + sum(decode(16, 0, 16 * (256 + i)) for i in range(1, 128))
    w3 = prefill(2048, 1, 1024)
    pre4 = (2 * ((1024 + 512) * body + 16 * head)) / pk + (attn(1024, 512) + attn(512, 1040)) / (
        a.tflops * 1e12
    )
    w4a = pre4 + sum(decode(16, 0, 16 * (1056 + i)) for i in range(1, 64))
    w4b = pre4 + sum(decode(16, 0, 1024 + 16 * (32 + i)) for i in range(1, 64))
    w4n = (2 * (16 * 1056 * body)) / pk + attn(16 * 1056, 528) / (a.tflops * 1e12) + (w4a - pre4)
    print(
        f"{name:22s} W1 {1 / w1:6.1f} tok/s, ttft {1000 * ttft:4.0f} ms | W2 {w2:5.2f} s = {2048 / w2:5.0f} tok/s | "
        f"W3 {2048 / w3:5.0f} tok/s | W4 {w4b:5.2f} s (prefix KV read once a step), {w4a:5.2f} s (per sequence), {w4n:5.2f} s (no sharing at all)"
    )
