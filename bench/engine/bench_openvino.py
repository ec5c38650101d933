"""OpenVINO GenAI's ContinuousBatchingPipeline on CPU.

    python export_openvino.py --model model && python bench_openvino.py --precision int8
--mode is '+'-separated: batch<N> = max_num_batched_tokens (2304 without it; the library's default is 256),
noprefix = prefix caching off, kvbf16 = KV cache in bf16 (the CPU default is u8), f32 = inference in f32.
Needs: openvino-genai.
"""

import common, time

a = common.args("bf16", ["bf16", "int8", "int4"])
modes = set(a.mode.split("+"))
rss = common.PeakRSS()
import numpy as np, openvino as ov, openvino_genai as g

batch = next((int(m[5:]) for m in modes if m.startswith("batch")), 2304)
sc = g.SchedulerConfig()
sc.cache_size = 4  # GB
sc.max_num_batched_tokens = batch
sc.max_num_seqs = 16
sc.enable_prefix_caching = "noprefix" not in modes
props = {"INFERENCE_NUM_THREADS": a.threads, "PERFORMANCE_HINT": "LATENCY"}
if "kvbf16" in modes:
    props["KV_CACHE_PRECISION"] = "bf16"
if "f32" in modes:
    props["INFERENCE_PRECISION_HINT"] = "f32"
d = a.model + "-ov-" + {"bf16": "fp16"}.get(a.precision, a.precision)
t0 = time.perf_counter()
pipe = g.ContinuousBatchingPipeline(d, sc, "CPU", props)
load_s = time.perf_counter() - t0
settings = {
    "props": props,
    "max_num_batched_tokens": batch,
    "cache_size_gb": 4,
    "model_dir": d,
    "prefix_caching": sc.enable_prefix_caching,
    "dynamic_split_fuse": sc.dynamic_split_fuse,
}
count = 0


def generate(ps, n_new):
    global count
    gc = g.GenerationConfig()
    gc.max_new_tokens = gc.min_new_tokens = n_new
    gc.ignore_eos, gc.do_sample, gc.num_beams = True, False, 1
    t0 = time.perf_counter()
    hs = []
    for p in ps:
        hs.append(pipe.add_request(count, ov.Tensor(np.array([p], dtype=np.int64)), gc))
        count += 1
    outs, ttft = [[] for _ in ps], None
    while pipe.has_non_finished_requests():
        pipe.step()
        for o, h in zip(outs, hs):
            while h.can_read():
                o += next(iter(h.read().values())).generated_ids
                ttft = ttft or time.perf_counter() - t0
    return outs, ttft if len(ps) == 1 else None


common.run_all(a, "openvino-genai", g.__version__, load_s, generate, rss, settings)
