"""A small model with random weights, made on the spot: what real workers serve in a benchmark.

Every word of three letters is one token and takes four bytes with its space, so that a prompt's
length is known without a tokenizer. Answers are nonsense; what they cost is not. Needs
transformers.
"""

from __future__ import annotations

import itertools
import json
import string
from pathlib import Path
from random import Random

WORDS = 4096
"""Tokens of the vocabulary beside the two special ones."""
_VOCABULARY = ["".join(one) for one in itertools.product(string.ascii_lowercase, repeat=3)][:WORDS]
_END, _UNKNOWN = "<end>", "<unknown>"
# The prompt is the last message and nothing else: tokens can be counted beforehand.
_TEMPLATE = "{{ messages[-1].content }}"


def words(chance: Random, count: int) -> str:
    """A text of so many tokens that nobody has had before."""
    return " ".join(chance.choices(_VOCABULARY, k=count))


def save_small_model(
    folder: Path, *, hidden: int = 512, layers: int = 8, context: int = 2048
) -> Path:
    """Save the model into ``folder``; with the usual size it has 27 million weights of 16 bits."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    transformers.utils.logging.disable_progress_bar()
    folder.mkdir(parents=True, exist_ok=True)
    ids = {word: number for number, word in enumerate((_END, _UNKNOWN, *_VOCABULARY))}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=_UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([_END, _UNKNOWN])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": _END, "chat_template": _TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = transformers.Qwen3Config(
        vocab_size=len(ids),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        head_dim=64,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
    )
    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return folder
