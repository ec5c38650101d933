"""Train the starter model: ``python -m starter.train``.

With ``--tune`` the validation questions are kept out of training and measured, which is how the
recipe was chosen; the shipped model is then trained once, with that recipe, on both parts.
Held-out questions are used in neither.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import random
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm  # type: ignore[import-untyped]

from starter import corpus, export
from starter.augment import Augmenter, Noise
from starter.batches import Batch, Item, Mix, Replies, Sequences, batched, make_items
from starter.chat import render, train_tokenizer
from starter.corpus import Example
from starter.evaluate import answer_all, load
from starter.model import Llama, Shape
from starter.teacher import Teacher


@dataclass(frozen=True)
class Recipe:
    """All settings of a run; the defaults are the shipped recipe."""

    seed: int = 7
    epochs: int = 18
    batch_tokens: int = 2048
    rate: float = 2e-3
    warmup: float = 0.05
    decay: float = 0.1
    dropout: float = 0.15
    average: float = 0.995
    shape: Shape = field(default_factory=Shape)
    noise: Noise = field(default_factory=Noise)
    mix: Mix = field(default_factory=Mix)
    chat_epochs: int = 3
    chat_rate: float = 6e-4
    chat_mix: Mix = field(
        default_factory=lambda: Mix(turns=(0.4, 0.35, 0.17, 0.08), history=0.7, full=0.15)
    )


def with_setting(recipe: Recipe, setting: str) -> Recipe:
    """Apply ``key=value`` or ``part.key=value`` to a recipe."""
    name, _, text = setting.partition("=")
    part, _, key = name.rpartition(".")
    target = getattr(recipe, part) if part else recipe
    changes: dict[str, Any] = {key: type(getattr(target, key))(float(text))}
    changed: Any = dataclasses.replace(target, **changes)
    parts: dict[str, Any] = {part: changed}
    return dataclasses.replace(recipe, **parts) if part else changed


class Average:
    """An exponential moving average of the weights: it answers better than the last step."""

    def __init__(self, model: Llama, decay: float) -> None:
        self.decay, self.steps = decay, 0
        self.values = [p.detach().clone() for p in model.parameters()]

    @torch.no_grad()
    def update(self, model: Llama) -> None:
        """Take in the present weights (faster at the start)."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.values, list(model.parameters()), 1 - decay)

    @torch.no_grad()
    def copy_to(self, model: Llama) -> None:
        """Overwrite the model's weights with the average."""
        for p, value in zip(model.parameters(), self.values, strict=True):
            p.copy_(value)


def loss_of(model: Llama, batch: Batch, openings: Tensor, decision: float) -> Tensor:
    """Mean loss per sequence: its weighted next tokens, and the belief about its subject.

    ``openings`` turns a belief about intents into one about the first token of the reply.
    """
    rows = torch.arange(len(batch.ids))
    with torch.autocast("cpu", torch.bfloat16):
        hidden, _ = model.hidden(batch.ids[:, :-1])
        logits = model.logits(hidden)
    target, weight = batch.ids[:, 1:].reshape(-1), batch.weights[:, 1:].reshape(-1)
    each = F.cross_entropy(logits.flatten(0, 1).float(), target, reduction="none")
    first = logits[rows, batch.place - 1].float()
    subject = F.cross_entropy(first, batch.belief @ openings)
    return (each * weight).sum() / len(rows) + decision * subject


def optimizer_for(model: Llama, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW; norms and the shared embedding are not decayed."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim == 1 or "embed" in n]
    groups = [
        {"params": matrices, "weight_decay": recipe.decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.rate, betas=(0.9, 0.98), fused=True)


def rate_at(done: float, warmup: float) -> float:
    """Linear warm-up, then a cosine to a twentieth; ``done`` is the share of the stage."""
    if done < warmup:
        return done / warmup
    rest = (done - warmup) / (1 - warmup)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(rest, 1.0)))


def build_tokenizer(examples: list[Example], vocab_size: int) -> Tokenizer:
    """Words of the replies become single tokens, so that answers are short to generate."""
    texts = [f" {e.text}" for e in examples] + [f" {e.text.lower()}" for e in examples]
    texts += [reply for found in corpus.replies().values() for reply in found] * 20
    return train_tokenizer(texts, vocab_size)


@dataclass
class Trainer:
    """One training run."""

    recipe: Recipe
    bank: list[Example]
    talk: list[Example]

    def __post_init__(self) -> None:
        torch.manual_seed(self.recipe.seed)
        self.rng = random.Random(self.recipe.seed)
        self.tokenizer = build_tokenizer(self.bank + self.talk, self.recipe.shape.vocab_size)
        self.replies = Replies(self.tokenizer, corpus.replies())
        self.rounds = self._rounds(Augmenter(self.recipe.noise, corpus.smalltalk(), self.bank))
        self.openings = torch.zeros(len(self.replies.texts), self.recipe.shape.vocab_size)
        for i, intent in enumerate(sorted(self.replies.texts)):
            for text in self.replies.texts[intent]:
                self.openings[i, self.replies.ids[text][0]] = 1.0
        self.model = Llama(self.recipe.shape, self.recipe.dropout)

    def _rounds(self, augment: Augmenter) -> list[list[Item]]:
        """The items of a cycle of epochs, with the opinions of a teacher fitted here."""
        rare = [e for e in self.talk if e.intent != "out_of_scope"]  # few, so they count double
        examples = self.bank + self.talk + rare
        teacher = Teacher(examples, sorted(self.replies.texts))
        return make_items(examples, augment, teacher, self.recipe.mix, self.rng)

    def run(self, start: Path | None) -> None:
        """Both stages: single questions first, then conversations.

        The second begins from the weights as they are saved and from its own seed, so that it
        gives the same result whether the first was run before it or loaded from ``start``.
        """
        recipe = self.recipe
        if start is None:
            self.stage("questions", recipe.epochs, recipe.rate, recipe.mix)
        else:
            self.model = load(start)[0]
            self.model.dropout = recipe.dropout
            for layer in self.model.model.layers:
                layer.dropout = recipe.dropout  # type: ignore[assignment]
        with torch.no_grad():
            for p in self.model.parameters():
                p.copy_(p.bfloat16())
        torch.manual_seed(recipe.seed + 1)
        self.rng = random.Random(recipe.seed + 1)
        self.stage("conversations", recipe.chat_epochs, recipe.chat_rate, recipe.chat_mix)
        self.model.eval()

    def stage(self, name: str, epochs: int, rate: float, mix: Mix) -> None:
        """Train on one mix; leaves the averaged weights in the model."""
        sequences = Sequences(self.replies, mix, corpus.smalltalk()["systems"])
        optimizer = optimizer_for(self.model, self.recipe)
        average = Average(self.model, self.recipe.average)
        terminal, started = sys.stderr.isatty(), time.monotonic()
        bar = tqdm(total=epochs, unit="epoch", desc=name, disable=not terminal)
        for epoch in range(epochs):
            built = sequences.epoch(self.rounds[epoch % len(self.rounds)], self.rng)
            batches = list(batched(built, self.recipe.batch_tokens, self.rng))
            total = 0.0
            for i, batch in enumerate(batches):
                share = rate_at((epoch + i / len(batches)) / epochs, self.recipe.warmup)
                total += self.step(batch, optimizer, rate * share, mix)
                average.update(self.model)
                bar.update(1 / len(batches))
            bar.set_postfix(loss=f"{total / len(batches):.3f}")
            if not terminal:
                seconds, loss = time.monotonic() - started, total / len(batches)
                line = f"{name}: epoch {epoch + 1}/{epochs} loss {loss:.3f} ({seconds:.0f} s)"
                print(line, flush=True)
        bar.close()
        average.copy_to(self.model)

    def step(self, batch: Batch, optimizer: torch.optim.Optimizer, rate: float, mix: Mix) -> float:
        """One update; returns its loss."""
        self.model.train()
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = loss_of(self.model, batch, self.openings, mix.decision_weight)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    def share_right(self, examples: list[Example]) -> float:
        """Share of questions whose answer takes the right subject (not the whole reply)."""
        depth = max(self.replies.depth(text) for text in self.replies.ids)
        starts = {
            k: {tuple(self.replies.ids[t][: self.replies.depth(t)]) for t in texts}
            for k, texts in self.replies.texts.items()
        }
        prompts = [render([{"role": "user", "content": e.text}], True) for e in examples]
        right = 0
        for e, ids in zip(
            examples, answer_all(self.model, self.tokenizer, prompts, depth), strict=True
        ):
            right += any(tuple(ids[: len(s)]) == s for s in starts[e.intent])
        return right / len(examples)


def tune(recipe: Recipe, start: Path | None) -> None:
    """Train without the validation questions and print how many of those come out right."""
    bank, talk = corpus.split(corpus.bank_questions()), corpus.split(corpus.chat_questions())
    trainer = Trainer(recipe, bank.train, talk.train)
    trainer.run(start)
    print(
        f"validation: bank {trainer.share_right(bank.validation):.4f},"
        f" small talk {trainer.share_right(talk.validation):.4f}"
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m starter.train", description=__doc__)
    parser.add_argument("--out", type=Path, default=corpus.BUNDLED)
    parser.add_argument("--tune", action="store_true", help="measure on validation, save nothing")
    parser.add_argument("--start", type=Path, help="a folder saved after the first stage")
    parser.add_argument("--spent", type=float, default=0.0, help="seconds that stage took")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings")
    args = parser.parse_args()
    recipe = Recipe()
    for setting in args.settings:
        recipe = with_setting(recipe, setting)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    if args.tune:
        tune(recipe, args.start)
        return
    bank, talk = corpus.split(corpus.bank_questions()), corpus.split(corpus.chat_questions())
    started = time.monotonic() - args.spent
    trainer = Trainer(recipe, bank.train + bank.validation, talk.train + talk.validation)
    trainer.run(args.start)
    seconds = time.monotonic() - started
    export.write(args.out, trainer.model, trainer.tokenizer, recipe.seed, seconds)


if __name__ == "__main__":
    main()
