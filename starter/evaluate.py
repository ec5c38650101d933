"""Measure a model folder on held-out questions: ``python -m starter.evaluate [--json]``.

A question counts as right only if the greedy answer, through the folder's own chat template and
up to the stop token, is exactly one of the replies written for the question's intent.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from starter import corpus
from starter.chat import END, Message, token_id
from starter.corpus import Example
from starter.model import Llama, Shape, greedy

LONGEST_REPLY = 120


def load(folder: Path) -> tuple[Llama, Tokenizer, jinja2.Template]:
    """The model, tokenizer and chat template of a folder, as an independent reader would."""
    config = json.loads((folder / "config.json").read_text())
    shape = Shape(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
    )
    model = Llama(shape).eval()
    weights = load_file(folder / "model.safetensors")
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    template = json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return model, tokenizer, jinja2.Environment(autoescape=False).from_string(template)


def answer_all(
    model: Llama, tokenizer: Tokenizer, prompts: Sequence[str], max_new: int = LONGEST_REPLY
) -> list[list[int]]:
    """Greedy continuations; prompts of one length run together, so nothing is padded."""
    by_length: dict[int, list[tuple[int, list[int]]]] = defaultdict(list)
    for i, encoding in enumerate(tokenizer.encode_batch(list(prompts))):
        by_length[len(encoding.ids)].append((i, encoding.ids))
    stop = token_id(tokenizer, END)
    answers: list[list[int]] = [[] for _ in prompts]
    for rows in by_length.values():
        found = greedy(model, torch.tensor([ids for _, ids in rows]), stop, max_new)
        for (i, _), ids in zip(rows, found, strict=True):
            answers[i] = ids
    return answers


def wilson(right: int, total: int) -> tuple[float, float]:
    """95 % confidence interval of a share (Wilson)."""
    if not total:
        return 0.0, 1.0
    z, p = 1.96, right / total
    middle = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(p * (1 - p) / total + z * z / (4 * total**2)) / (1 + z * z / total)
    return middle - half, middle + half


def second_turn(examples: list[Example]) -> list[list[Message]]:
    """Each question after another one, of the same set, and that one's right reply."""
    replies, step = corpus.replies(), len(examples) // 2
    earlier = examples[step:] + examples[:step]
    return [
        [
            {"role": "user", "content": before.text},
            {"role": "assistant", "content": replies[before.intent][0]},
            {"role": "user", "content": e.text},
        ]
        for before, e in zip(earlier, examples, strict=True)
    ]


def measure(
    folder: Path, examples: list[Example], chats: list[list[Message]] | None = None
) -> dict[str, Any]:
    """The share answered right, its interval, and where it goes wrong."""
    model, tokenizer, template = load(folder)
    chats = chats or [[{"role": "user", "content": e.text}] for e in examples]
    prompts = [template.render(messages=chat, add_generation_prompt=True) for chat in chats]
    texts = tokenizer.decode_batch(answer_all(model, tokenizer, prompts))
    owner = {reply: k for k, found in corpus.replies().items() for reply in found}
    got = [owner.get(text, "no known reply") for text in texts]
    right = sum(e.intent == g for e, g in zip(examples, got, strict=True))
    low, high = wilson(right, len(examples))
    missed = Counter((e.intent, g) for e, g in zip(examples, got, strict=True) if e.intent != g)
    asked = Counter(e.intent for e in examples)
    wrong = Counter(intent for intent, _ in missed.elements())
    weakest = sorted(asked, key=lambda k: (-wrong[k] / asked[k], k))[:8]
    return {
        "questions": len(examples),
        "right": right,
        "share": round(right / len(examples), 4),
        "interval_95": [round(low, 4), round(high, 4)],
        "no_known_reply": got.count("no known reply"),
        "weakest_intents": [[k, asked[k] - wrong[k], asked[k]] for k in weakest],
        "confusions": [[a, b, n] for (a, b), n in missed.most_common(10)],
    }


def report(folder: Path) -> dict[str, Any]:
    """Everything that is measured about a folder."""
    bank = corpus.split(corpus.bank_questions()).held_out
    return {
        "bank_questions": measure(folder, bank),
        "bank_questions_second_turn": measure(folder, bank, second_turn(bank)),
        "small_talk": measure(folder, corpus.split(corpus.chat_questions()).held_out),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m starter.evaluate", description=__doc__)
    parser.add_argument("--folder", type=Path, default=corpus.BUNDLED)
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    found = report(args.folder)
    if args.json:
        print(json.dumps(found, indent=2))
        return
    for name, part in found.items():
        low, high = part["interval_95"]
        print(
            f"{name.replace('_', ' ')}: {part['right']} of {part['questions']} held-out questions"
            f" answered right = {part['share']:.1%} (95 % interval {low:.1%} to {high:.1%})"
        )
    print("weakest intents (right/asked):")
    for intent, right, asked in found["bank_questions"]["weakest_intents"]:
        print(f"  {intent}: {right}/{asked}")


if __name__ == "__main__":
    main()
