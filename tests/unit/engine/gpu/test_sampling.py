"""Sampling waits for the device only to copy what was chosen. The meta device has no numbers, so
that whatever asks for one fails there: what runs on it never waits."""

from __future__ import annotations

import random
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


@pytest.mark.parametrize("shape", ["smooth", "peaked", "ties", "mostly forbidden", "all alike"])
def test_a_cpu_draws_the_same_tokens_as_a_gpu(shape: str) -> None:
    """A GPU's tensors, computed on a CPU, against the few passes that a CPU takes."""
    torch.manual_seed(3)
    rows, vocabulary = 60, 9001
    logits = torch.randn(rows, vocabulary) * torch.linspace(0.1, 6, rows)[:, None]
    if shape == "peaked":
        logits[:, 5000] += 40
    elif shape == "ties":
        logits = (logits * 2).round() / 2
    elif shape == "mostly forbidden":
        logits[torch.rand(rows, vocabulary) < 0.999] = -torch.inf
        logits[:, 7] = 1.0
    elif shape == "all alike":
        logits[:] = 3e38
    options = random.Random(shape)
    chunks: list[Any] = [
        chunk(
            Sampling(
                temperature=options.choice([0.01, 0.7, 1.0, 1.9]),
                top_k=options.choice([0, 1, 2, 40, 130, 5000, vocabulary - 1, vocabulary + 1]),
                top_p=options.choice([1.0, 0.999, 0.9, 0.3, 0.0001]),
                min_p=options.choice([0.0, 0.0, 0.05, 1.0]),
                seed=row,
            )
        )
        for row in range(rows)
    ]
    expected = sampler._drawn(logits, chunks).tolist()
    assert [one.token_id for one in sampler.sample(logits, chunks)] == expected
