"""Write <model>/model-{bf16,f16,q8_0,q4_0}.gguf from the HF directory (Qwen3, tied embeddings only).

    python make_gguf.py --model model
q8_0 and q4_0 are made by llama.cpp's own llama_model_quantize with its default choices
(the tied embedding / output matrix becomes q8_0 and q6_K respectively).
Needs: gguf, numpy, safetensors, llama-cpp-python.
"""

import argparse, ctypes, json, os, struct
import gguf, llama_cpp, numpy as np
from gguf import GGMLQuantizationType as Q

ap = argparse.ArgumentParser()
ap.add_argument("--model", default="model")
a = ap.parse_args()
cfg = json.load(open(a.model + "/config.json"))
tok = json.load(open(a.model + "/tokenizer.json"))
assert cfg["model_type"] == "qwen3" and cfg["tie_word_embeddings"]

names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
for i in range(cfg["num_hidden_layers"]):
    p, b = f"model.layers.{i}.", f"blk.{i}."
    for h, g in {
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }.items():
        names[p + h] = b + g


def tensors():
    """bf16 tensors of the safetensors file as (name, uint16 array)."""
    with open(a.model + "/model.safetensors", "rb") as f:
        n = struct.unpack("<Q", f.read(8))[0]
        head = json.loads(f.read(n))
    data = np.memmap(a.model + "/model.safetensors", dtype=np.uint8, mode="r", offset=8 + n)
    for name, t in head.items():
        if name != "__metadata__":
            assert t["dtype"] == "BF16"
            x, y = t["data_offsets"]
            yield name, np.frombuffer(data[x:y].tobytes(), dtype=np.uint16).reshape(t["shape"])


def f32(u16):
    return (u16.astype(np.uint32) << 16).view(np.float32)


def write(path, kind):
    w = gguf.GGUFWriter(path, "qwen3")
    w.add_name("random-qwen3")
    w.add_context_length(cfg["max_position_embeddings"])
    w.add_embedding_length(cfg["hidden_size"])
    w.add_block_count(cfg["num_hidden_layers"])
    w.add_feed_forward_length(cfg["intermediate_size"])
    w.add_head_count(cfg["num_attention_heads"])
    w.add_head_count_kv(cfg["num_key_value_heads"])
    w.add_key_length(cfg["head_dim"])
    w.add_value_length(cfg["head_dim"])
    w.add_rope_freq_base((cfg.get("rope_parameters") or cfg)["rope_theta"])
    w.add_layer_norm_rms_eps(cfg["rms_norm_eps"])
    w.add_vocab_size(cfg["vocab_size"])
    w.add_file_type(
        gguf.LlamaFileType.MOSTLY_BF16 if kind == "bf16" else gguf.LlamaFileType.MOSTLY_F16
    )
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("gpt-2")
    vocab = sorted(tok["model"]["vocab"].items(), key=lambda kv: kv[1])
    special = {t["id"] for t in tok["added_tokens"]}
    w.add_token_list([k for k, _ in vocab])
    w.add_token_types([3 if i in special else 1 for _, i in vocab])
    w.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in tok["model"]["merges"]])
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)
    w.add_pad_token_id(0)
    w.add_add_bos_token(False)
    for name, u in tensors():
        out = names[name.removesuffix(".weight")] + ".weight"
        if u.ndim == 1:
            w.add_tensor(out, f32(u))
        elif kind == "bf16":
            w.add_tensor(out, u.view(np.uint8).reshape(u.shape[0], -1), raw_dtype=Q.BF16)
        else:
            w.add_tensor(out, f32(u).astype(np.float16))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


for kind in ("bf16", "f16"):
    write(f"{a.model}/model-{kind}.gguf", kind)
llama_cpp.llama_backend_init()
for kind, ftype in (
    ("q8_0", llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0),
    ("q4_0", llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0),
):
    p = llama_cpp.llama_model_quantize_default_params()
    p.ftype, p.nthread = ftype, os.cpu_count()
    rc = llama_cpp.llama_model_quantize(
        f"{a.model}/model-bf16.gguf".encode(),
        f"{a.model}/model-{kind}.gguf".encode(),
        ctypes.byref(p),
    )
    print(kind, "rc", rc)
for k in ("bf16", "f16", "q8_0", "q4_0"):
    print(k, os.path.getsize(f"{a.model}/model-{k}.gguf"))
