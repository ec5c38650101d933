"""The runner beyond parity: resuming, copies, log probabilities, isolation between sequences."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from cloudlm.core.chat import Sampling
from cloudlm.core.errors import BadSetting, BrokenModel
from cloudlm.engine.step import Chunk, Step

PROMPT = [3, 141, 59, 26, 53, 58, 97, 93, 238, 46]


@pytest.fixture
def runner(saved_model: Any, make_runner: Any) -> Any:
    return make_runner(saved_model("llama").folder)


def test_facts_are_those_of_the_model(runner: Any, saved_model: Any) -> None:
    info = runner.info
    reference = saved_model("llama").reference
    assert info.architecture == "LlamaForCausalLM"
    assert info.parameters == sum(p.numel() for p in reference.parameters())
    assert (info.dtype, info.device, info.vocab_size) == ("float32", "cpu", 307)
    assert (info.weights, info.deterministic) == ("float32", False)
    assert info.kernels == f"PyTorch with {torch.backends.cpu.get_cpu_capability()}"
    assert (info.block_size, info.blocks_total) == (4, runner.num_blocks)
    # 2 MiB of keys and values: 3 layers × 2 × 2 heads × 16 numbers × 4 bytes per token.
    assert runner.num_blocks == 2 * 2**20 // (4 * 3 * 2 * 2 * 16 * 4)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(seed=1, temperature=1.3),
        Sampling(seed=2, top_p=0.9, top_k=40, min_p=0.01),
        Sampling(seed=3, repetition_penalty=1.2, presence_penalty=0.4, frequency_penalty=0.3),
        Sampling(temperature=0, frequency_penalty=1.5, logit_bias={5: 3.0}),
    ],
)
def test_a_resumed_request_goes_on_exactly(runner: Any, driver: Any, sampling: Sampling) -> None:
    """Cut anywhere, in other company, its cache computed anew: the same tokens."""
    whole = driver(runner)
    first = whole.add(PROMPT, sampling, index=2)
    whole.run(40)
    assert len(set(first.output)) > 5
    for cut in (1, 13, 39):
        again = driver(runner, budget=9, seed=cut)
        resumed = again.add(PROMPT, sampling, index=2)
        resumed.output = first.output[:cut]
        again.add([7] * 21, Sampling(seed=5))
        again.run(40)
        assert resumed.output == first.output


def test_choices_of_one_request_differ(runner: Any, driver: Any) -> None:
    batch = driver(runner)
    for index in range(4):
        batch.add(PROMPT, Sampling(seed=9), index=index)
    batch.run(12)
    assert len({tuple(one.output) for one in batch.sequences}) == 4


def test_sampled_logprobs_are_those_of_transformers(
    runner: Any, driver: Any, saved_model: Any
) -> None:
    batch = driver(runner, budget=7)
    asked = batch.add(PROMPT, Sampling(temperature=0.7, seed=4, top_k=50, logprobs=4))
    silent = batch.add(PROMPT[:4], Sampling(seed=4))
    batch.run(10)
    truth = saved_model("llama").logits(asked.tokens).log_softmax(-1)
    for step, sampled in enumerate(asked.sampled):
        row = truth[len(PROMPT) - 1 + step]
        assert sampled.logprob == pytest.approx(row[asked.output[step]].item(), abs=1e-4)
        best = row.topk(4)
        assert [token for token, _ in sampled.top] == best.indices.tolist()
        assert [value for _, value in sampled.top] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert {(sampled.logprob, sampled.top) for sampled in silent.sampled} == {(None, ())}


@pytest.mark.parametrize("budget", [1000, 64, 3])
def test_prompt_logprobs_are_those_of_transformers(
    runner: Any, driver: Any, saved_model: Any, budget: int
) -> None:
    source = random.Random(2)
    prompt = [source.randrange(307) for _ in range(200)]
    batch = driver(runner, budget=budget)
    scored = batch.add(prompt, Sampling(temperature=0, logprobs=2), prompt_logprobs=True)
    batch.add(PROMPT)
    batch.run(1)
    found = [entry for sampled in scored.sampled for entry in sampled.prompt_logprobs]
    assert len(found) == len(prompt), "one per position; the last is about the chosen token"
    truth = saved_model("llama").logits(scored.tokens).log_softmax(-1)
    for position, (logprob, top) in enumerate(found):
        row, follower = truth[position], scored.tokens[position + 1]
        assert logprob == pytest.approx(row[follower].item(), abs=2e-4)
        assert [token for token, _ in top] == row.topk(2).indices.tolist()
    assert [sampled.token_id is None for sampled in scored.sampled[:-1]] == [True] * (
        len(scored.sampled) - 1
    )


def test_a_prompt_that_is_only_scored_has_no_entry_behind_its_end(runner: Any) -> None:
    chunk = Chunk(
        8, tuple(PROMPT), 0, (0, 1, 2), False, Sampling(), tuple(PROMPT), prompt_logprobs=True
    )
    (sampled,) = runner.run(Step((chunk,)))
    assert sampled.token_id is None
    assert len(sampled.prompt_logprobs) == len(PROMPT) - 1
    assert {top for _, top in sampled.prompt_logprobs} == {()}


def test_an_inner_chunk_gives_nothing(runner: Any) -> None:
    chunk = Chunk(8, tuple(PROMPT[:4]), 0, (0,), False, Sampling(), tuple(PROMPT))
    assert runner.run(Step((chunk,))) == []
    assert runner.run(Step(())) == []


def test_copied_blocks_serve_as_the_originals(runner: Any, driver: Any) -> None:
    """Prefix sharing by copies: the second sequence computes only what follows the first's."""
    batch = driver(runner)
    first = batch.add(PROMPT)
    batch.run(6)
    blocks = (50, 51, 52)
    copies = tuple(zip(first.blocks[:3], blocks, strict=True))
    last = Chunk(
        9, (PROMPT[-1],), len(PROMPT) - 1, blocks, True, Sampling(temperature=0), tuple(PROMPT)
    )
    (sampled,) = runner.run(Step((last,), copies))
    assert sampled.token_id == first.output[0]
    assert runner.run(Step((), copies)) == []


def test_infinities_of_one_sequence_do_not_reach_the_next(runner: Any, driver: Any) -> None:
    """A block that held an overflow is given to another sequence, whose mask hides the rest."""
    clean = driver(runner)
    clean.add(PROMPT)
    clean.run(8)
    weight = runner.model.model.layers[1].self_attn.v_proj.weight
    sound = weight.data.clone()
    weight.data.fill_(torch.inf)
    spoiler = driver(runner)
    spoiler.add(PROMPT * 2)
    spoiler.run(3)
    weight.data.copy_(sound)
    again = driver(runner)
    again.add(PROMPT)
    again.run(8)
    assert again.sequences[0].blocks[0] == spoiler.sequences[0].blocks[0]
    assert again.sequences[0].output == clean.sequences[0].output


def test_logits_are_computed_only_where_they_are_needed(
    runner: Any, driver: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    logits = runner.model.logits

    def counting(hidden: torch.Tensor) -> torch.Tensor:
        rows.append(len(hidden))
        result: torch.Tensor = logits(hidden)
        return result

    monkeypatch.setattr(runner.model, "logits", counting)
    batch = driver(runner)
    batch.add(PROMPT)
    batch.add(PROMPT[:3])
    batch.run(3)
    assert rows == [2, 2, 2]


def test_a_model_that_gives_no_numbers_is_broken(runner: Any) -> None:
    runner.check()
    runner.model.model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(BrokenModel, match="not finite"):
        runner.check()


def test_a_cache_larger_than_memory_is_a_bad_setting(saved_model: Any, make_runner: Any) -> None:
    with pytest.raises(BadSetting, match="lower kv_cache_mb"):
        make_runner(saved_model("llama").folder, kv_cache_mb=2**37)


def test_close_frees_weights_and_cache(runner: Any) -> None:
    runner.close()
    with pytest.raises(AttributeError):
        runner.run(Step((Chunk(1, (1,), 0, (0,), True, Sampling(), (1,)),)))
