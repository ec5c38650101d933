"""Sampling waits for the device only to copy what was chosen. The meta device has no numbers, so
that whatever asks for one fails there: what runs on it never waits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from cloudlm.core.chat import Sampling
from cloudlm.engine import sampler
from cloudlm.engine.step import Chunk

EVERYTHING = Sampling(
    temperature=0.7,
    top_k=20,
    top_p=0.8,
    min_p=0.05,
    repetition_penalty=1.1,
    presence_penalty=0.3,
    frequency_penalty=0.2,
    logit_bias={3: 2.0},
    seed=7,
)


def chunk(sampling: Sampling) -> Chunk:
    return Chunk(0, (1,), 4, (0,), True, sampling, (1, 2, 3), (4, 4))


@pytest.mark.parametrize("sampling", [Sampling(temperature=0.0), EVERYTHING])
def test_nothing_is_waited_for(sampling: Sampling) -> None:
    logits = torch.empty(3, 300, device="meta")
    mask = np.ones(300, dtype=np.bool_)
    mask[5] = False
    chunks = [chunk(Sampling(temperature=0.0)), chunk(sampling), chunk(sampling)]
    chosen = sampler._chosen(logits, chunks, [None, mask, None])
    assert chosen.device.type == "meta" and chosen.shape == (3,)
    with pytest.raises((NotImplementedError, RuntimeError)):
        chosen.tolist()


def test_a_nucleus_is_the_same_with_and_without_guesses(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU does, which cannot guess, on the CPU."""
    torch.manual_seed(3)
    logits = torch.randn(40, 3000) * torch.linspace(0.1, 6, 40)[:, None]
    chunks: list[Any] = [
        chunk(Sampling(temperature=1.0, top_p=0.05 + 0.02 * row, seed=row)) for row in range(40)
    ]
    guessed = [one.token_id for one in sampler.sample(logits, chunks)]
    monkeypatch.setattr(sampler, "_NUCLEUS_GUESSES", ())
    assert [one.token_id for one in sampler.sample(logits, chunks)] == guessed
