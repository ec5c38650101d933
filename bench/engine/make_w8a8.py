"""Write <model>-w8a8: the same weights in compressed-tensors int8 (per-channel weights, dynamic per-token
activations, embedding and head left in bf16), which vLLM runs with int8 kernels on CPU.

    python make_w8a8.py --model model
Needs: torch, safetensors.
"""

import argparse, json, os, shutil
import torch
from safetensors.torch import load_file, save_file

ap = argparse.ArgumentParser()
ap.add_argument("--model", default="model")
a = ap.parse_args()
out = a.model + "-w8a8"
os.makedirs(out, exist_ok=True)
sd, new = load_file(a.model + "/model.safetensors"), {}
for k, w in sd.items():
    if k.endswith("_proj.weight"):
        w = w.float()
        s = w.abs().amax(1, keepdim=True) / 127
        new[k] = (w / s).round().clamp(-127, 127).to(torch.int8)
        new[k[: -len("weight")] + "weight_scale"] = s.to(torch.bfloat16)
    else:
        new[k] = w
save_file(new, out + "/model.safetensors", metadata={"format": "pt"})
for f in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
    shutil.copy(f"{a.model}/{f}", out)
cfg = json.load(open(a.model + "/config.json"))
q = lambda **k: dict(num_bits=8, type="int", symmetric=True, **k)
cfg["quantization_config"] = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "kv_cache_scheme": None,
    "global_compression_ratio": None,
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "output_activations": None,
            "weights": q(strategy="channel", dynamic=False, group_size=None, observer="minmax"),
            "input_activations": q(strategy="token", dynamic=True, group_size=None, observer=None),
        }
    },
}
json.dump(cfg, open(out + "/config.json", "w"), indent=1)
print(out, os.path.getsize(out + "/model.safetensors"))
