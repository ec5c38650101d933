"""A tiny Llama with random weights, a byte-level tokenizer and a chat template that shows tools."""

from __future__ import annotations

import json
from pathlib import Path

SPECIAL = ("<|end|>", "<|start|>", "<tool_call>")
EOS = "<|end|>"
UNUSED_IDS = 9  # the network knows more ids than the tokenizer, as padded vocabularies do
TEMPLATE = (
    "{% if tools %}<|start|>tools {{ tools | tojson }}<|end|>{% endif %}"
    "{% for m in messages %}<|start|>{{ m.role }} {{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>"
    "{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant {% endif %}"
)
_TEXT = ['{"name": "Ada", "age": 36, "tags": ["a", "b"]}', "true false null", "yes or no, maybe"]


def save_tiny_chat_model(folder: Path, context: int = 512) -> Path:
    """Save the model into ``folder``."""
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT * 20, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": EOS, "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.get_vocab_size() + UNUSED_IDS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=context,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8.0)  # so that answers are not all alike
    model.save_pretrained(folder)
    return folder
