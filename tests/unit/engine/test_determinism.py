"""Deterministic mode: a token depends on its own sequence and on nothing else, to the last bit."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from cloudlm.core.chat import Sampling
from cloudlm.core.errors import BadSetting

GREEDY = Sampling(temperature=0.0)
SEEDED = Sampling(temperature=1.2, top_p=0.95, seed=11, frequency_penalty=0.2, logprobs=2)
# What computes: settings of the engine.
KINDS = {
    "float32": {"dtype": "float32", "kernels": "torch"},
    "bfloat16": {"dtype": "bfloat16", "kernels": "torch"},
    "native": {"dtype": "auto", "kernels": "native"},
    "native-int8": {"dtype": "auto", "kernels": "native", "precision": "int8"},
    "native-int4-a8": {"dtype": "auto", "kernels": "native", "precision": "int4-a8"},
}
LENGTH = 40  # tokens of every answer
CUTS = 250  # per kind and way of sampling: 2,500 in all


@pytest.fixture(params=list(KINDS))
def make(
    request: pytest.FixtureRequest, make_runner: Any, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Any]]:
    """``make(folder, block_size=16)``: a deterministic runner of each kind."""
    import torch

    if request.param.startswith("native"):
        from cloudlm.engine.paths import choice

        library = request.getfixturevalue("library")
        monkeypatch.setattr(choice, "load_kernels", lambda threads, *, instructions: library)
    threads = torch.get_num_threads()
    yield lambda folder, **more: make_runner(
        folder, deterministic=True, **{**KINDS[request.param], **more}
    )
    torch.set_num_threads(threads)


def words(chance: random.Random, count: int) -> list[int]:
    return [chance.randrange(307) for _ in range(count)]


@pytest.mark.parametrize(
    ("name", "block_size"),
    [
        ("llama-heads-32", 16),
        ("qwen2-heads-32", 5),
        ("mistral-heads-32", 32),
        ("gemma2", 4),
        ("gpt2", 16),
    ],
)
def test_hidden_states_are_equal_bit_by_bit(
    request: pytest.FixtureRequest,
    saved_model: Any,
    make: Any,
    driver: Any,
    name: str,
    block_size: int,
) -> None:
    import torch

    if "native" in request.node.callspec.id and name in ("gemma2", "gpt2"):
        pytest.skip("the kernels do not run this family")
    runner = make(saved_model(name).folder, block_size=block_size, kv_cache_mb=4)
    chance = random.Random(5)
    sequences = [words(chance, length) for length in (60, 3, 140, 33)]
    alone = []
    for sequence in sequences:
        one = driver(runner)
        one.add(sequence)
        alone += one.all_logits()
    for budget in (1, 13, 1000):
        together = driver(runner, budget=budget, seed=budget)
        for sequence in sequences:
            together.add(sequence)
        if budget == 1:
            together.sequences = together.sequences[:2]
        for mine, theirs in zip(together.all_logits(), alone, strict=False):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_resumed_anywhere_in_any_company_it_goes_on_as_uninterrupted(
    saved_model: Any, make: Any, driver: Any, sampling: Sampling
) -> None:
    runner = make(saved_model("llama-heads-32").folder, block_size=16, kv_cache_mb=4)
    chance = random.Random(3)
    prompts = [words(chance, chance.randint(1, 20)) for _ in range(6)]
    whole = []
    for prompt in prompts:
        one = driver(runner)
        whole.append(one.add(prompt, sampling, index=1))
        one.run(LENGTH)
    done = compared = 0
    while done < CUTS:
        batch = driver(runner, budget=chance.choice([16, 50, 1000]), seed=done)
        resumed = []
        for _ in range(chance.randint(1, 24)):
            first = chance.choice(whole)
            cut = chance.randrange(LENGTH)
            again = batch.add(first.prompt, sampling, index=1)
            again.output = first.output[:cut]
            resumed.append((again, first, cut))
        done += len(resumed)
        for _ in range(4):
            batch.step(LENGTH)
        for again, first, cut in resumed:
            compared += len(again.output) - cut
            assert again.output == first.output[: len(again.output)]
            assert again.sampled == _renumbered(first.sampled, again, cut)
    assert compared > CUTS


def test_a_beginning_that_others_share_changes_nothing(
    saved_model: Any, make: Any, driver: Any
) -> None:
    """Five sequences decode behind the same 160 tokens in the same blocks; each of them alone."""
    runner = make(saved_model("llama-heads-32").folder, block_size=32, kv_cache_mb=4)
    head = words(random.Random(8), 160)

    def behind(batch: Any, tail: int) -> Any:
        one = batch.add([*head, tail, 30], SEEDED)
        one.blocks, one.computed = list(first.blocks), 160
        return one

    batch = driver(runner)
    first = batch.add(head)
    batch.all_logits()
    together = [behind(batch, tail) for tail in range(5)]
    batch.run(12)
    free = list(batch.free)
    for tail, one in enumerate(together):
        lonely = driver(runner)
        lonely.free = list(free)
        again = behind(lonely, tail)
        lonely.run(12)
        assert again.output == one.output
        assert [s.logprob for s in again.sampled] == [s.logprob for s in one.sampled]


def _renumbered(sampled: list[Any], again: Any, cut: int) -> list[Any]:
    """What was sampled from ``cut`` on, log probabilities too, as of the sequence ``again``."""
    from dataclasses import replace

    mine = sampled[cut : len(again.output)]
    return [replace(one, sequence_id=again.sequence_id) for one in mine]


def test_deterministic_answers_are_right(saved_model: Any, make_runner: Any, driver: Any) -> None:
    model = saved_model("llama")
    runner = make_runner(model.folder, deterministic=True)
    one = driver(runner)
    answer = one.add([5, 9, 200, 17, 3])
    one.run(30)
    assert model.greedy_along([5, 9, 200, 17, 3], answer.output) == answer.output


def test_a_mixture_of_experts_is_refused(saved_model: Any, make_runner: Any) -> None:
    with pytest.raises(BadSetting, match="mixture of experts"):
        make_runner(saved_model("mixtral").folder, deterministic=True)


def test_kernels_that_treat_rows_differently_are_found_out(
    saved_model: Any, make_runner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    runner = make_runner(saved_model("llama").folder, deterministic=True)
    logits = runner.model.logits

    def uneven(hidden: Any) -> Any:
        return logits(hidden) + torch.arange(len(hidden)).unsqueeze(1) * 1e-5

    monkeypatch.setattr(runner.model, "logits", uneven)
    with pytest.raises(BadSetting, match="deterministic"):
        runner.check()
