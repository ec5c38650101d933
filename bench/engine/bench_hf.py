"""Hugging Face transformers. --mode static (generate, one batch) or continuous (ContinuousBatchingManager).

    python bench_hf.py --precision bf16 --mode static
Needs: torch (CPU build), transformers, accelerate.
"""

import common, time

a = common.args("bf16", ["bf16", "fp32"])
a.mode = a.mode or "static"
rss = common.PeakRSS()
import torch, transformers
from transformers import AutoModelForCausalLM, GenerationConfig

torch.set_num_threads(a.threads)
transformers.logging.set_verbosity_error()

t0 = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(
    a.model,
    dtype={"bf16": torch.bfloat16, "fp32": torch.float32}[a.precision],
    attn_implementation="sdpa",
).eval()
load_s = time.perf_counter() - t0
settings = {"attn": "sdpa", "torch": torch.__version__}

if a.mode == "static":

    class First:
        def __init__(self):
            self.n, self.t = 0, None

        def put(self, v):
            self.n += 1
            if self.n == 2:
                self.t = time.perf_counter()

        def end(self):
            pass

    @torch.inference_mode()
    def generate(ps, n_new):
        ids = torch.tensor(ps)
        gc = GenerationConfig(
            do_sample=False,
            max_new_tokens=n_new,
            min_new_tokens=n_new,
            use_cache=True,
            eos_token_id=None,
            pad_token_id=0,
        )
        first = First() if len(ps) == 1 else None
        t0 = time.perf_counter()
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=gc, streamer=first
        )
        return out[:, ids.shape[1] :].tolist(), (first.t - t0 if first else None)
else:
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    gc = GenerationConfig(do_sample=False, max_new_tokens=128, eos_token_id=-1, pad_token_id=0)
    page = 256 if a.mode == "continuous" else int(a.mode.rsplit("-", 1)[1])
    kw = dict(
        page_size=page,
        num_blocks=32768 // page,
        max_batch_tokens=2304,
        max_requests_per_batch=16,
        allow_block_sharing=True,
    )
    settings |= kw
    manager = model.init_continuous_batching(
        generation_config=gc, continuous_batching_config=ContinuousBatchingConfig(**kw)
    )
    manager.start()
    settings["attn"] = model.config._attn_implementation

    def generate(ps, n_new):
        t0 = time.perf_counter()
        if len(ps) == 1:
            rids, ttft = (
                [manager.add_request(ps[0], max_new_tokens=n_new, eos_token_id=-1, streaming=True)],
                None,
            )
        else:
            rids, ttft = manager.add_requests(ps, max_new_tokens=n_new), None
        done = {}
        while len(done) < len(rids):
            r = manager.get_result(timeout=120)
            if r is None:
                raise RuntimeError(f"no result: {manager.background_thread_status.fatal_error!r}")
            if r.error:
                raise RuntimeError(r.error)
            if ttft is None and len(ps) == 1 and len(r.generated_tokens):
                ttft = time.perf_counter() - t0
            if r.is_finished():
                done[r.request_id] = list(r.generated_tokens)
        return [done[i] for i in rids], ttft


common.run_all(a, "transformers", transformers.__version__, load_s, generate, rss, settings)
if a.mode != "static":
    manager.stop(block=False)
    import os

    os._exit(0)
