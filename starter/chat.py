"""The chat format: special tokens, the template, and the tokenizer that knows them."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

PAD, END, SYSTEM, USER, ASSISTANT = SPECIAL = (
    "<|pad|>",
    "<|end|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
)
# The space before a customer's text lets its first word share a token with the same word later
# in a sentence; a reply starts without one, so that it needs no trimming.
TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{{- '<|assistant|>' + (message['content'] | trim) + '<|end|>' -}}"
    "{%- else -%}"
    "{{- '<|' + message['role'] + '|> ' + (message['content'] | trim) + '<|end|>' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)

Message = dict[str, str]


def render(messages: Iterable[Message], add_generation_prompt: bool = False) -> str:
    """What ``TEMPLATE`` renders, without the cost of a template engine (training is hot)."""
    text = ""
    for message in messages:
        gap = "" if message["role"] == "assistant" else " "
        text += f"<|{message['role']}|>{gap}{message['content'].strip()}{END}"
    return text + (ASSISTANT if add_generation_prompt else "")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn a byte-level BPE: any input can be encoded, nothing is ever unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """The number of a token that has to be there."""
    found = tokenizer.token_to_id(token)
    if found is None:
        raise ValueError(f"the tokenizer has no {token}")
    return found
