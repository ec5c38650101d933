"""The training material: questions, replies, small talk, and which of them are held out.

The split depends on nothing but the texts (a hash orders them), so no seed, no run and no
machine can move a held-out question into training.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections import defaultdict
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent
BUNDLED = ROOT.parent / "src" / "cloudlm" / "registry" / "bundled" / "bank-helper"
HELD_OUT, VALIDATION = 0.10, 0.10


@dataclass(frozen=True)
class Example:
    """A question and the intent (or small-talk group) whose replies answer it."""

    text: str
    intent: str


@dataclass(frozen=True)
class Split:
    """Examples to learn from, to choose settings by, and to report on."""

    train: list[Example]
    validation: list[Example]
    held_out: list[Example]


def _yaml(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))
    return loaded


def smalltalk() -> dict[str, Any]:
    """Everything in ``smalltalk.yaml``."""
    return _yaml("smalltalk.yaml")


def replies() -> dict[str, list[str]]:
    """All full replies by intent, small talk included."""
    found = {**_yaml("replies.yaml"), **smalltalk()["groups"]}
    return {k: [f"{v['opening']} {ending}" for ending in v["endings"]] for k, v in found.items()}


def bank_intents() -> list[str]:
    """The intents of the bank questions, sorted."""
    return sorted(_yaml("replies.yaml"))


def bank_questions() -> list[Example]:
    """The rows of ``banking77.csv`` in their order."""
    with (ROOT / "data" / "banking77.csv").open(encoding="utf-8", newline="") as file:
        return [Example(row["text"].strip(), row["category"]) for row in csv.DictReader(file)]


def chat_questions() -> list[Example]:
    """The small-talk questions: handwritten ones and filled templates."""
    talk = smalltalk()
    found: list[Example] = []
    for group, entry in talk["groups"].items():
        found += [Example(text, group) for text in entry["questions"]]
        for template in entry.get("templates", []):
            names = re.findall(r"{(\w+)}", template)
            for values in product(*(talk["slots"][name] for name in names)):
                filled = template.format(**dict(zip(names, values, strict=True)))
                found.append(Example(filled, group))
    return found


def _key(text: str) -> str:
    """Texts that differ only in case and punctuation count as one question."""
    return re.sub(r"[^a-z0-9]+", " ", text.lower()).strip() or text


def split(examples: list[Example]) -> Split:
    """Cut each intent into held-out, validation and training questions, copies together."""
    groups: dict[str, dict[str, list[Example]]] = defaultdict(lambda: defaultdict(list))
    for example in examples:
        groups[example.intent][_key(example.text)].append(example)
    parts: tuple[list[Example], list[Example], list[Example]] = ([], [], [])
    for intent in sorted(groups):
        keys = sorted(groups[intent], key=lambda k: hashlib.sha256(k.encode()).digest())
        first, second = len(keys) * HELD_OUT, len(keys) * (HELD_OUT + VALIDATION)
        for i, key in enumerate(keys):
            part = 0 if i < round(first) else 1 if i < round(second) else 2
            parts[part].extend(groups[intent][key])
    return Split(train=parts[2], validation=parts[1], held_out=parts[0])


def demo_questions() -> list[Example]:
    """The held-out questions that the demonstration asks."""
    entries = json.loads((ROOT / "questions.json").read_text(encoding="utf-8"))
    return [Example(entry["question"], entry["intent"]) for entry in entries]
