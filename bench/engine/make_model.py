"""Make the common model: a randomly initialised causal LM (bf16 safetensors) with a byte-level BPE tokenizer.

    python make_model.py --out model                 # Qwen3-0.6B's shape, vocabulary 32000, tied embeddings
    python make_model.py --out model-llama --arch llama   # the same size, Llama architecture
    python make_model.py --out model-copy --copy     # writes common.successors(): for W5
    python make_model.py --out model-tiny --tiny     # two layers of 64, to try scripts out

The tokenizer is trained on the Python standard library's sources, which every machine has.
Needs: torch, transformers, tokenizers, safetensors.
"""

import argparse, glob, os, sysconfig
import common
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

ap = argparse.ArgumentParser()
ap.add_argument("--out", default="model")
ap.add_argument("--arch", default="qwen3", choices=["qwen3", "llama"])
ap.add_argument("--layers", type=int, default=28)
ap.add_argument("--seed", type=int, default=0)
ap.add_argument("--copy", action="store_true", help="each token is followed by its successor")
ap.add_argument("--tiny", action="store_true", help="two small layers")
a = ap.parse_args()

shape = dict(
    vocab_size=32000,
    hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=a.layers,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=8192,
    rms_norm_eps=1e-6,
    tie_word_embeddings=not a.copy,
    hidden_act="silu",
    attention_bias=False,
    initializer_range=0.02,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
if a.tiny:
    shape |= dict(hidden_size=64, intermediate_size=192, num_hidden_layers=2, head_dim=32)
    shape |= dict(num_attention_heads=4, num_key_value_heads=2)
try:
    rope = dict(rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    if a.arch == "qwen3":
        from transformers import Qwen3Config as C, Qwen3ForCausalLM as M
    else:
        from transformers import LlamaConfig as C, LlamaForCausalLM as M
    cfg = C(**shape, **rope)
except TypeError:
    cfg = C(**shape, rope_theta=10000.0)

torch.manual_seed(a.seed)
model = M(cfg)
with torch.no_grad():
    for name, p in model.named_parameters():
        if p.ndim > 1:
            p.normal_(0.0, 0.02)
        else:
            p.fill_(1.0)
    if a.copy:  # layers that add next to nothing, and a head that knows the last token's successor
        for name, p in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                p.mul_(1e-3)
        head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
        for token, follower in common.successors().items():
            head.weight[follower] = embeddings.weight[token]
model = model.to(torch.bfloat16)
model.generation_config.eos_token_id = 2
model.save_pretrained(a.out, safe_serialization=True)
n = sum(p.numel() for p in model.parameters())
print(f"{n / 1e6:.1f} M parameters, {2 * n / 1e9:.3f} GB in bf16")

std = sysconfig.get_paths()["stdlib"]
files = sorted(f for f in glob.glob(std + "/**/*.py", recursive=True) if "site-packages" not in f)[
    :2500
]
tok = Tokenizer(models.BPE())
tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tok.decoder = decoders.ByteLevel()
tr = trainers.BpeTrainer(
    vocab_size=32000,
    special_tokens=["<pad>", "<s>", "</s>"],
    show_progress=False,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
)


def texts():
    for f in files:
        try:
            yield open(f, encoding="utf-8").read()
        except (UnicodeDecodeError, OSError):
            pass


tok.train_from_iterator(texts(), tr)
assert tok.get_vocab_size() == 32000, tok.get_vocab_size()
PreTrainedTokenizerFast(
    tokenizer_object=tok,
    bos_token="<s>",
    eos_token="</s>",
    pad_token="<pad>",
    model_max_length=8192,
).save_pretrained(a.out)
print("wrote", a.out, sorted(os.listdir(a.out)))
