"""Did every engine do the same work? Compare the "check" outputs in result files with HF float32.

    python check.py results/*.jsonl
For each line: how many of the first 16 greedy tokens match HF float32's own greedy output before the first
difference (mean over 8 prompts), and, feeding the engine's own tokens to HF float32, the share that is its
top choice and the mean logit gap to the top choice. A random model's logits are close together (the gap
between first and second is small), so a rounding flip is normal; a wrong model shows a gap of several units.
Needs: torch, transformers.
"""

import json, os, sys
import torch
from transformers import AutoModelForCausalLM, GenerationConfig
import common

torch.set_grad_enabled(False)
ps = common.check_prompts()
here = os.path.dirname(os.path.abspath(__file__))
models, refs = {}, {}


def ref(name):
    if name not in models:
        m = models[name] = AutoModelForCausalLM.from_pretrained(
            os.path.join(here, name), dtype=torch.float32
        ).eval()
        ids = torch.tensor(ps)
        gc = GenerationConfig(
            do_sample=False, max_new_tokens=16, min_new_tokens=16, eos_token_id=None, pad_token_id=0
        )
        refs[name] = m.generate(ids, attention_mask=torch.ones_like(ids), generation_config=gc)[
            :, 32:
        ].tolist()
        l = m(torch.cat([ids, torch.tensor(refs[name])], 1)).logits[:, 31:-1].float()
        top = l.topk(2).values
        print(
            f"{name}: HF float32 logits std {l.std():.3f}, median gap first-second {(top[..., 0] - top[..., 1]).median():.4f}, "
            f"random token's gap {(top[..., 0] - l.mean(-1)).mean():.2f}"
        )
    return models[name], refs[name]


for f in sys.argv[1:]:
    for line in open(f):
        if not line.startswith("{"):
            continue
        r = json.loads(line)
        tag = f"{r['engine']} {r['precision']} {r['mode']}".strip()
        if "check" not in r:
            print(f"{tag:45s} no check output: {r.get('check_error', '')[:80]}")
            continue
        m, want = ref(r["model"])
        got = torch.tensor(r["check"])
        lead = [next((i for i in range(16) if g[i] != w[i]), 16) for g, w in zip(r["check"], want)]
        l = m(torch.cat([torch.tensor(ps), got], 1)).logits[:, 31:-1].float()
        gap = l.max(-1).values - l.gather(-1, got[..., None])[..., 0]
        print(
            f"{tag:45s} leading tokens equal {sum(lead) / len(lead):4.1f}/16 {lead}  top-1 {100 * (gap == 0).float().mean():5.1f} %  "
            f"mean gap {gap.mean():.4f}  worst {gap.max():.3f}"
        )
