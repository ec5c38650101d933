"""From examples to batches: conversations, the weight of each token, padding."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from tokenizers import Tokenizer
from torch import Tensor

from starter import chat
from starter.augment import Augmenter, crossed
from starter.corpus import Example
from starter.teacher import Teacher

WIDTHS = (12, 16, 20, 24, 28, 32, 40, 48, 64, 80, 96, 128, 192, 256, 384, 512)


@dataclass
class Replies:
    """The replies as tokens, and where in each the subject is still open.

    Only a few first tokens decide which intent is answered; they carry the weight of the loss,
    and most training sequences stop right after them, which saves half the time.
    """

    tokenizer: Tokenizer
    texts: dict[str, list[str]]
    ids: dict[str, list[int]] = field(default_factory=dict)
    open_at: dict[str, list[bool]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        owner = {text: intent for intent, texts in self.texts.items() for text in texts}
        self.ids = {text: self.tokenizer.encode(text).ids for text in owner}
        for text, ids in self.ids.items():
            rivals = [t for t in self.ids if owner[t] != owner[text]]
            self.open_at[text] = [
                any(self.ids[t][:i] == ids[:i] for t in rivals) for i in range(len(ids))
            ]

    def depth(self, text: str) -> int:
        """How many tokens it takes until only one intent is left."""
        return sum(self.open_at[text])


@dataclass(frozen=True)
class Mix:
    """Shares of the sequence kinds and weights of the kinds of token."""

    versions: int = 6  # altered versions of each question
    crossed: float = 1.5  # questions crossed out of two, per real question
    label: float = 0.4  # how far the label is trusted; the rest is the teacher's opinion
    full: float = 0.1  # sequences whose last reply is complete, not cut after its decision
    system: float = 0.08
    turns: tuple[float, ...] = (0.97, 0.02, 0.007, 0.003)  # conversations of 1, 2, 3, 5 turns
    history: float = 0.0  # earlier replies of a conversation that are cut short, to save time
    decision_weight: float = 2.0
    question_weight: float = 0.03
    rest_weight: float = 0.2


@dataclass(frozen=True)
class Item:
    """A question to train on, and how likely each intent is meant."""

    text: str
    intent: str
    belief: Tensor
    crossed: bool = False


@dataclass(frozen=True)
class Sequence:
    """A conversation as tokens; ``place`` is where the last reply's subject is decided."""

    ids: list[int]
    weights: list[float]
    place: int
    belief: Tensor


@dataclass(frozen=True)
class Batch:
    """Padded sequences."""

    ids: Tensor
    weights: Tensor
    place: Tensor
    belief: Tensor


def make_items(
    examples: list[Example], augment: Augmenter, teacher: Teacher, mix: Mix, rng: random.Random
) -> list[list[Item]]:
    """For each epoch of a cycle: every question in some version, and crossed questions."""
    crosses = int(len(examples) * mix.crossed) // mix.versions
    rounds: list[list[Item]] = []
    for _ in range(mix.versions):
        texts = [augment(e, rng) for e in examples]
        sources = list(range(len(examples)))
        for _ in range(crosses):
            first, second = rng.sample(examples, 2)
            texts.append(crossed(first.text, second.text, rng))
        beliefs = teacher.opinions(texts, sources + [-1] * crosses)
        items = []
        for i, (text, belief) in enumerate(zip(texts, beliefs, strict=True)):
            if i < len(examples):
                intent = examples[i].intent
                belief = belief * (1 - mix.label)
                belief[teacher.intents.index(intent)] += mix.label
                items.append(Item(text, intent, belief))
            else:
                intent = rng.choices(teacher.intents, belief.tolist())[0]
                items.append(Item(text, intent, belief, crossed=True))
        rounds.append(items)
    return rounds


class Sequences:
    """Builds the token sequences of an epoch."""

    def __init__(self, replies: Replies, mix: Mix, systems: list[str]) -> None:
        self.replies, self.mix, self.systems = replies, mix, systems
        self.assistant = chat.token_id(replies.tokenizer, chat.ASSISTANT)

    def conversation(
        self, last: Item, pool: list[Item], rng: random.Random
    ) -> tuple[list[chat.Message], list[str]]:
        """A chat that ends with ``last``, and its replies."""
        turns = 1 if last.crossed else rng.choices((1, 2, 3, 5), self.mix.turns)[0]
        messages: list[chat.Message] = []
        if rng.random() < self.mix.system:
            messages.append({"role": "system", "content": rng.choice(self.systems)})
        answers = []
        for item in [*rng.sample(pool, turns - 1), last]:
            answers.append(rng.choice(self.replies.texts[item.intent]))
            messages.append({"role": "user", "content": item.text})
            messages.append({"role": "assistant", "content": answers[-1]})
        return messages, answers

    def weigh(self, ids: list[int], answers: list[str], cut: bool, belief: Tensor) -> Sequence:
        """Set the loss weight of each token; optionally cut the last reply early."""
        weights = [self.mix.question_weight] * len(ids)
        starts = [i + 1 for i, token in enumerate(ids) if token == self.assistant]
        for start, answer in zip(starts, answers, strict=True):
            open_at = [*self.replies.open_at[answer], False]
            for i, is_open in enumerate(open_at):
                weights[start + i] = 1.0 if is_open else self.mix.rest_weight
        weights[starts[-1]] = 0.0  # judged by the belief instead
        depth = self.replies.depth(answers[-1])
        stop = starts[-1] + depth if cut else len(ids)
        return Sequence(ids[:stop], weights[:stop], starts[-1], belief)

    def shorten(self, sequence: Sequence, answers: list[str], rng: random.Random) -> Sequence:
        """Cut some earlier replies; nothing is learnt from the early stop itself."""
        dropped: set[int] = set()
        weights = list(sequence.weights)
        starts = [i + 1 for i, token in enumerate(sequence.ids) if token == self.assistant]
        for start, answer in zip(starts[:-1], answers, strict=False):
            if rng.random() < self.mix.history:
                end = start + len(self.replies.ids[answer])
                dropped.update(range(start + rng.randint(2, 12), end))
                weights[end] = 0.0
        return Sequence(
            [token for i, token in enumerate(sequence.ids) if i not in dropped],
            [weight for i, weight in enumerate(weights) if i not in dropped],
            sequence.place - len(dropped),
            sequence.belief,
        )

    def epoch(self, items: list[Item], rng: random.Random) -> list[Sequence]:
        """One sequence per item."""
        pool = [item for item in items if not item.crossed]
        chats = [self.conversation(item, pool, rng) for item in items]
        encoded = self.replies.tokenizer.encode_batch([chat.render(m) for m, _ in chats])
        found = []
        for item, e, (_, answers) in zip(items, encoded, chats, strict=True):
            if len(e.ids) > WIDTHS[-1]:
                continue
            cut = item.crossed or rng.random() >= self.mix.full
            sequence = self.weigh(e.ids, answers, cut, item.belief)
            if self.mix.history and len(answers) > 1:
                sequence = self.shorten(sequence, answers, rng)
            found.append(sequence)
        return found


def batched(sequences: list[Sequence], tokens: int, rng: random.Random) -> Iterator[Batch]:
    """Batches of about ``tokens`` tokens of similarly long sequences, in random order.

    Only a few shapes occur (a short batch is filled up with repetitions): the matrix kernels are
    compiled once per shape, which would otherwise take longer than the training itself.
    """
    by_width: dict[int, list[Sequence]] = {}
    for sequence in sequences:
        width = next(w for w in WIDTHS if w >= len(sequence.ids))
        by_width.setdefault(width, []).append(sequence)
    groups = []
    for width, members in sorted(by_width.items()):
        size = max(tokens // width, 1)
        rng.shuffle(members)
        members = members + rng.choices(members, k=-len(members) % size)
        groups += [(width, members[i : i + size]) for i in range(0, len(members), size)]
    rng.shuffle(groups)
    for width, group in groups:
        yield Batch(
            ids=torch.tensor([s.ids + [0] * (width - len(s.ids)) for s in group]),
            weights=torch.tensor([s.weights + [0.0] * (width - len(s.ids)) for s in group]),
            place=torch.tensor([s.place for s in group]),
            belief=torch.stack([s.belief for s in group]),
        )
