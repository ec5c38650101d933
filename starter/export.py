"""Write a trained model as a Hugging Face folder, with its measured model card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from starter import card, corpus, evaluate
from starter.chat import END, PAD, SPECIAL, TEMPLATE, token_id
from starter.model import Llama


def _json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def config_of(model: Llama, end: int, pad: int) -> dict[str, Any]:
    """``config.json`` as ``LlamaForCausalLM`` reads it."""
    shape = model.shape
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": end,
        "pad_token_id": pad,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate_size,
        "max_position_embeddings": shape.max_positions,
        "mlp_bias": False,
        "num_attention_heads": shape.num_heads,
        "num_hidden_layers": shape.num_layers,
        "num_key_value_heads": shape.num_kv_heads,
        "rms_norm_eps": shape.rms_eps,
        "rope_scaling": None,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": shape.vocab_size,
    }


def write_tokenizer(folder: Path, tokenizer: Tokenizer, longest: int) -> None:
    """The three tokenizer files."""
    tokenizer.save(str(folder / "tokenizer.json"))
    others = [token for token in SPECIAL if token not in (END, PAD)]
    names = {"eos_token": END, "pad_token": PAD, "additional_special_tokens": others}
    _json(folder / "special_tokens_map.json", names)
    described = {
        str(token_id(tokenizer, token)): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for token in SPECIAL
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": longest,
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": described,
        "bos_token": None,
        **names,
        "chat_template": TEMPLATE,
    }
    _json(folder / "tokenizer_config.json", settings)


def write_model(folder: Path, model: Llama, tokenizer: Tokenizer) -> None:
    """Weights in bfloat16 (half the size), configuration and tokenizer."""
    end, pad = token_id(tokenizer, END), token_id(tokenizer, PAD)
    weights = {
        name: tensor.detach().to(torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    _json(folder / "config.json", config_of(model, end, pad))
    generation = {
        "do_sample": False,
        "eos_token_id": end,
        "pad_token_id": pad,
        "max_new_tokens": evaluate.LONGEST_REPLY,
    }
    _json(folder / "generation_config.json", generation)
    write_tokenizer(folder, tokenizer, model.shape.max_positions)


def swap(new: Path, target: Path) -> None:
    """Put ``new`` in the place of ``target``; a reader never sees a half-written file."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def write(target: Path, model: Llama, tokenizer: Tokenizer, seed: int, seconds: float) -> None:
    """Save beside the target, measure what was saved, describe it, and swap it in."""
    new = target.with_name(f".{target.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    write_model(new, model, tokenizer)
    shutil.copy(corpus.ROOT / "data" / "LICENSE-DATA.md", new / "LICENSE-DATA.md")
    found = evaluate.report(new)
    size = (new / "model.safetensors").stat().st_size
    parameters = sum(p.numel() for p in model.parameters())
    text = card.render(found, model.shape, parameters, size, seed, seconds)
    (new / "README.md").write_text(text, encoding="utf-8")
    swap(new, target)
    bank, talk = found["bank_questions"], found["small_talk"]
    print(
        f"saved {target.name}: {parameters / 1e6:.2f} M parameters, {size / 1e6:.2f} MB,"
        f" trained in {seconds / 60:.1f} min;"
        f" held-out bank questions {bank['share']:.1%}, small talk {talk['share']:.1%}"
    )
