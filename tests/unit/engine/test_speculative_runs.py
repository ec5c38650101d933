"""Networks that guess ahead: the same tokens, in fewer steps, with and without it; to the bit where
a token's numbers depend on nothing else (deterministic mode, native kernels)."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from random_adapters import adapt
from thread_ranks import thread_runner

from cloudlm.core.chat import Sampling
from cloudlm.engine.limits import Limits
from cloudlm.engine.paths import choice
from cloudlm.engine.runner import Runner, RunnerFacts
from cloudlm.engine.scheduler import Scheduler
from cloudlm.engine.sequence import Sequence
from cloudlm.engine.speculate import Lookup

LOOKUP = Lookup(6, 1, 4)
# So few tokens that much is repeated, and much is guessed in vain.
FEW = Sampling(temperature=0.0, logit_bias=dict.fromkeys((5, 17, 90, 200), 60.0), logprobs=1)
SAMPLINGS = [
    FEW,
    replace(FEW, temperature=0.8, seed=7, top_p=0.9),
    replace(FEW, temperature=0.3, seed=8, frequency_penalty=0.1, repetition_penalty=1.1),
    Sampling(temperature=0.0, logprobs=0),
]


def prompts(count: int, longest: int = 60) -> list[tuple[int, ...]]:
    chance = random.Random(9)
    return [
        tuple(chance.choices((5, 17, 90, 200), k=chance.randint(2, longest))) for _ in range(count)
    ]


def answers(
    runner: Any,
    lookup: Lookup | None,
    crowd: list[tuple[tuple[int, ...], Sampling]],
    adapters: tuple[str, ...] = ("",),
    **limits: int,
) -> tuple[list[list[int]], list[list[float]], Scheduler]:
    """Tokens and log probabilities of all, computed at once; ``adapters`` are theirs in turn."""
    values = {"max_batch_tokens": 60, "max_batch_sequences": 8, **limits}
    scheduler = Scheduler(
        Limits(
            max_model_len=200,
            block_size=runner.block_size,
            blocks_total=runner.num_blocks,
            **values,
        ),
        lookup,
    )
    sequences = [
        Sequence(
            *(at, f"r{at}", prompt, sampling, len(prompt) + 60),
            salt=str(at),
            adapter=adapters[at % len(adapters)],
        )
        for at, (prompt, sampling) in enumerate(crowd)
    ]
    logprobs: list[list[float]] = [[] for _ in crowd]
    for sequence in sequences:
        scheduler.add(sequence)
    while scheduler.has_work:
        for advance in scheduler.apply(runner.run(scheduler.schedule())):
            if advance.sampled is not None and advance.sampled.logprob is not None:
                logprobs[advance.sequence.sequence_id].append(advance.sampled.logprob)
    return [one.outputs for one in sequences], logprobs, scheduler


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("name", ["llama", "mistral-window", "gpt2"])
def test_a_crowd_says_the_same(
    saved_model: Any, make_runner: Any, name: str, deterministic: bool
) -> None:
    runner = make_runner(saved_model(name).folder, deterministic=deterministic, kernels="torch")
    crowd = [(prompt, SAMPLINGS[at % 4]) for at, prompt in enumerate(prompts(12))]
    tokens, logprobs, _ = answers(runner, None, crowd)
    runner.num_blocks = 90  # too few for all at once
    guessed, their_logprobs, scheduler = answers(runner, LOOKUP, crowd)
    assert guessed == tokens
    if deterministic:
        assert their_logprobs == logprobs
    else:
        for mine, theirs in zip(logprobs, their_logprobs, strict=True):
            assert mine == pytest.approx(theirs, abs=1e-3)
    drafts = scheduler.drafts
    assert scheduler.preemptions > 0
    assert 0.1 * drafts.drafted_tokens < drafts.accepted_tokens < drafts.drafted_tokens


@pytest.mark.parametrize("name", ["llama-heads-32", "mistral-heads-32"])
@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_native_kernels_give_the_same_to_the_bit(
    saved_model: Any, make_runner: Any, library: Any, name: str, precision: str
) -> None:
    from cloudlm.engine.paths.native_path import NativePath

    plain = make_runner(saved_model(name).folder, dtype="bfloat16", kernels="torch")
    runner = Runner(
        plain.model,
        RunnerFacts(name, 256, 64, 32),
        make_path=lambda model: NativePath(model, library, precision, 64, 32),
    )
    crowd = [(prompt, SAMPLINGS[at % 4]) for at, prompt in enumerate(prompts(8, 100))]
    tokens, logprobs, _ = answers(runner, None, crowd)
    guessed, their_logprobs, scheduler = answers(runner, LOOKUP, crowd)
    assert (guessed, their_logprobs) == (tokens, logprobs)
    assert 0 < scheduler.drafts.accepted_tokens < scheduler.drafts.drafted_tokens


@pytest.mark.parametrize("native", [False, True], ids=["torch", "native"])
def test_adapters_guess_too_and_say_the_same(
    request: pytest.FixtureRequest,
    saved_model: Any,
    make_runner: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    native: bool,
) -> None:
    """Drafts are weighed by the adapter that the sequence asks for; to the bit on the kernels."""
    import torch

    saved = saved_model("mistral-heads-32")
    if native:
        library = request.getfixturevalue("library")
        monkeypatch.setattr(choice, "load_kernels", lambda threads, *, instructions: library)
    threads = torch.get_num_threads()
    settings = {"kernels": "native", "dtype": "auto"} if native else {}
    runner = make_runner(saved.folder, kv_cache_mb=8, **settings)
    torch.set_num_threads(threads)
    for seed, name in enumerate("ab"):
        adapt(saved.reference, ["q_proj", "gate_proj", "down_proj"], tmp_path / name, seed)
        runner.add_adapter(name, runner.read_adapter(tmp_path / name))
    crowd = [(prompts(1)[0] * 3, SAMPLINGS[at % 3]) for at in range(9)]
    names = ("", "a", "b")
    names = tuple(names[at // 3] for at in range(9))  # each with every way of sampling
    tokens, logprobs, _ = answers(runner, None, crowd, names)
    guessed, their_logprobs, scheduler = answers(runner, LOOKUP, crowd, names)
    assert guessed == tokens
    if native:
        assert their_logprobs == logprobs
    assert 0 < scheduler.drafts.accepted_tokens < scheduler.drafts.drafted_tokens
    assert len({tuple(logprobs[at]) for at in range(9)}) == 9  # each adapter has a say


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 3), (2, 2)])
def test_guesses_are_weighed_by_all_ranks(
    saved_model: Any, make_runner: Any, tensor: int, pipeline: int
) -> None:
    """Several rows of logits for a sequence, and a cache that is written ahead, on every rank."""
    folder = saved_model("llama").folder
    crowd = [(prompt, SAMPLINGS[at % 4]) for at, prompt in enumerate(prompts(8))]
    expected, _, _ = answers(make_runner(folder), None, crowd)
    runner = thread_runner(folder, tensor, pipeline)
    try:
        guessed, _, scheduler = answers(runner, LOOKUP, crowd)
    finally:
        runner.close()
    assert guessed == expected
    assert 0 < scheduler.drafts.accepted_tokens < scheduler.drafts.drafted_tokens
