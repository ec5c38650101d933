"""llama.cpp through llama-cpp-python's low-level batch API: one llama_batch with several sequences,
which is what llama-server's slots do.

    python make_gguf.py --model model && python bench_llamacpp.py --precision q4_0
--mode ""        the best we know here: one KV stream per sequence; in W4 a prefix common to all requests is
                 evaluated once and copied to the other sequences (llama_memory_seq_cp)
--mode noshare   as llama-server does for requests that arrive together: every prompt is evaluated in full
--mode unified   one unified KV cache (llama-server's default for -np auto)
--mode norepack  no repacked/AMX weight buffers
--mode nofa      flash attention off;  ubatch<N>: n_ubatch (512)
Needs: llama-cpp-python (built with CMAKE_ARGS=-DGGML_NATIVE=ON), numpy.
"""

import common, ctypes, os, time

a = common.args("q8_0", ["bf16", "f16", "q8_0", "q4_0"])
modes = set(a.mode.split("+"))
rss = common.PeakRSS()
import llama_cpp as L, numpy as np

path = f"{a.model}/model-{a.precision}.gguf"
quiet = L.llama_log_callback(lambda level, text, data: None)
if "verbose" not in modes:
    L.llama_log_set(quiet, ctypes.c_void_p(0))
t0 = time.perf_counter()
L.llama_backend_init()
mp = L.llama_model_default_params()
if "norepack" in modes:
    mp.use_extra_bufts = False
model = L.llama_model_load_from_file(path.encode(), mp)
cp = L.llama_context_default_params()
ubatch = next((int(m[6:]) for m in modes if m.startswith("ubatch")), 512)
cp.n_seq_max, cp.n_ctx, cp.n_batch, cp.n_ubatch = (
    16,
    24576 if "unified" not in modes else 24576,
    2048,
    ubatch,
)
cp.n_threads = cp.n_threads_batch = a.threads
cp.kv_unified = "unified" in modes
if "nofa" in modes:
    cp.flash_attn_type = 0


# a single stream owns n_ctx / n_seq_max cells unless the cache is unified, so W3 gets a context of its own
def context(n_seq, n_ctx):
    cp.n_seq_max, cp.n_ctx = n_seq, n_ctx
    return L.llama_init_from_model(model, cp)


ctxs = {16: context(16, 16 * 1536), 1: context(1, 4096)}
load_s = time.perf_counter() - t0
settings = {
    "system": L.llama_print_system_info().decode(),
    "n_batch": 2048,
    "n_ubatch": ubatch,
    "kv_unified": bool(cp.kv_unified),
    "flash_attn": "auto",
    "kv": "f16",
    "file_gib": round(os.path.getsize(path) / 2**30, 3),
}
batch = L.llama_batch_init(2048, 0, 1)
V = common.VOCAB


def run(ctx, items):
    """items: (token, position, sequence, wants logits) -> next greedy token per item that wants logits"""
    out = []
    for lo in range(0, len(items), 2048):
        part = items[lo : lo + 2048]
        batch.n_tokens = len(part)
        for i, (t, p, s, w) in enumerate(part):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = (
                t,
                p,
                1,
                s,
                w,
            )
        rc = L.llama_decode(ctx, batch)
        if rc:
            raise RuntimeError(f"llama_decode {rc}")
        for i, it in enumerate(part):
            if it[3]:
                out.append(
                    int(np.ctypeslib.as_array(L.llama_get_logits_ith(ctx, i), shape=(V,)).argmax())
                )
    return out


cached = []  # the prefix kept in sequence 0 by the last call (W4w)


def generate(ps, n_new):
    global cached
    # the request that puts W4w's prefix into the cache belongs to the sixteen
    alone = len(ps) == 1 and len(ps[0]) != common.WORKLOADS["W4w"][3] + 2
    ctx = ctxs[1 if alone else 16]
    mem = L.llama_get_memory(ctx)
    t0 = time.perf_counter()
    share = 0
    if len(ps) > 1 and "noshare" not in modes:
        while share < len(ps[0]) - 1 and all(p[share] == ps[0][share] for p in ps):
            share += 1
        if share < 32:
            share = 0
    if share and cached[:share] == ps[0][:share]:
        L.llama_memory_seq_rm(mem, 0, share, -1)
    else:
        L.llama_memory_clear(mem, False)
        if share:
            run(ctx, [(t, i, 0, 0) for i, t in enumerate(ps[0][:share])])
    if share:
        for s in range(1, len(ps)):
            L.llama_memory_seq_rm(mem, s, -1, -1)
            L.llama_memory_seq_cp(mem, 0, s, -1, -1)
    items = [
        (t, share + i, s, int(share + i == len(p) - 1))
        for s, p in enumerate(ps)
        for i, t in enumerate(p[share:])
    ]
    nxt = run(ctx, items)
    ttft = time.perf_counter() - t0
    outs = [[t] for t in nxt]
    for k in range(1, n_new):
        nxt = run(ctx, [(nxt[s], len(p) + k - 1, s, 1) for s, p in enumerate(ps)])
        for o, t in zip(outs, nxt):
            o.append(t)
    cached = list(ps[0]) if len(ps) == 1 and ctx is ctxs[16] else []
    return outs, ttft


common.run_all(a, "llama-cpp-python", L.__version__, load_s, generate, rss, settings)
