"""The sampler against a plain reference, its distribution, and its independence of the batch."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cloudlm.core.chat import Sampling
from cloudlm.engine.sampler import sample, token_logprobs, uniform
from cloudlm.engine.step import Chunk

VOCABULARY = 12
KNOWN_DRAWS = [0.499804430242, 0.19139714468, 0.448761947931]


def chunk(
    sampling: Sampling,
    prompt: tuple[int, ...] = (1,),
    output: tuple[int, ...] = (),
    index: int = 0,
) -> Chunk:
    last = (*prompt, *output)[-1]
    start = len(prompt) + len(output) - 1
    return Chunk(0, (last,), start, (0,), True, sampling, prompt, output, index)


def reference(logits: list[float], one: Chunk) -> dict[int, float]:
    """The distribution that a request asks for, written as the definitions read: token to
    probability, greedy as certainty."""
    s = one.sampling
    scores = list(logits)
    for token, bias in s.logit_bias.items():
        scores[token] += bias
    for token in {*one.prompt_token_ids, *one.output_token_ids}:
        factor = s.repetition_penalty
        scores[token] = scores[token] / factor if scores[token] > 0 else scores[token] * factor
    for token, count in Counter(one.output_token_ids).items():
        scores[token] -= s.presence_penalty + s.frequency_penalty * count
    if s.temperature == 0:
        return {max(range(len(scores)), key=lambda token: scores[token]): 1.0}
    best = max(scores)
    weights = {t: math.exp((score - best) / s.temperature) for t, score in enumerate(scores)}
    if s.top_k:
        least = sorted(weights.values(), reverse=True)[: s.top_k][-1]
        weights = {t: w for t, w in weights.items() if w >= least}
    if s.top_p < 1:
        total, mass, least = sum(weights.values()), 0.0, 0.0
        for weight in sorted(weights.values(), reverse=True):
            if mass >= s.top_p:
                break
            mass, least = mass + weight / total, weight
        weights = {t: w for t, w in weights.items() if w >= least}
    weights = {t: w for t, w in weights.items() if w >= s.min_p}
    total = sum(weights.values())
    return {t: w / total for t, w in weights.items()}


def expected(logits: list[float], one: Chunk) -> int:
    """The token that the reference distribution gives for the request's own draw."""
    target = uniform(one.sampling.seed, one.index, len(one.output_token_ids))
    mass = 0.0
    distribution = reference(logits, one)
    for token in sorted(distribution):
        mass += distribution[token]
        if target < mass:
            return token
    return max(distribution)


samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    top_p=st.sampled_from([1.0, 0.93, 0.55, 0.07]),
    top_k=st.sampled_from([0, 1, 3, 11, 50]),
    min_p=st.sampled_from([0.0, 0.03, 0.37, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
    presence_penalty=st.sampled_from([0.0, 0.7, -0.4]),
    frequency_penalty=st.sampled_from([0.0, 0.45, -1.1]),
    logit_bias=st.dictionaries(st.integers(0, VOCABULARY - 1), st.sampled_from([-100.0, 2.5])),
    seed=st.integers(-(2**70), 2**70),
)
token_ids = st.integers(0, VOCABULARY - 1)
chunks = st.builds(
    chunk,
    samplings,
    st.lists(token_ids, min_size=1, max_size=6).map(tuple),
    st.lists(token_ids, max_size=6).map(tuple),
    st.integers(0, 3),
)


@given(st.lists(chunks, min_size=1, max_size=6), st.integers(0, 2**32))
@settings(max_examples=150, deadline=None)
def test_every_row_of_a_batch_is_drawn_as_the_definitions_say(
    batch: list[Chunk], noise: int
) -> None:
    generator = torch.Generator().manual_seed(noise)
    logits = torch.randn(len(batch), VOCABULARY, generator=generator) * 2.5
    before = logits.clone()
    chosen = [choice.token_id for choice in sample(logits, batch)]
    assert chosen == [expected(row, one) for row, one in zip(logits.tolist(), batch, strict=True)]
    assert torch.equal(logits, before), "the caller's logits were changed"


@given(st.lists(chunks, min_size=2, max_size=5), st.integers(0, 2**32))
@settings(max_examples=50, deadline=None)
def test_neighbours_in_the_batch_change_nothing(batch: list[Chunk], noise: int) -> None:
    generator = torch.Generator().manual_seed(noise)
    logits = torch.randn(len(batch), VOCABULARY, generator=generator)
    together = sample(logits, batch)
    alone = [sample(logits[row : row + 1], [one])[0] for row, one in enumerate(batch)]
    backwards = sample(logits.flip(0), batch[::-1])[::-1]
    assert together == alone == backwards


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.6),
        Sampling(top_k=4),
        Sampling(top_p=0.8),
        Sampling(min_p=0.15),
        Sampling(temperature=1.4, top_k=9, top_p=0.9, min_p=0.02, presence_penalty=0.5),
    ],
)
def test_many_seeds_give_the_distribution(sampling: Sampling) -> None:
    logits = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(3)) * 1.5
    draws = 20_000
    batch = [chunk(_with_seed(sampling, seed), output=(2, 2, 5)) for seed in range(draws)]
    found = Counter(choice.token_id for choice in sample(logits.expand(draws, -1), batch))
    probabilities = reference(logits[0].tolist(), batch[0])
    assert set(found) <= set(probabilities)
    for token, probability in probabilities.items():
        deviation = math.sqrt(draws * probability * (1 - probability))
        assert abs(found[token] - draws * probability) <= 5 * deviation + 1


@pytest.mark.parametrize("likely", [1, 100, 1000, 3000])
def test_a_nucleus_of_any_size_is_found_whole(likely: int) -> None:
    """Four thousand tokens, of which so many share nearly all probability."""
    order = torch.randperm(4000, generator=torch.Generator().manual_seed(likely))
    logits = -20.0 * (order >= likely).float() - order / 4000
    batch = [chunk(Sampling(seed=seed, top_p=0.9)) for seed in range(12)]
    narrow = chunk(Sampling(seed=1, top_p=0.01))  # its neighbours' size must not matter
    choices = sample(logits.expand(13, -1), [*batch, narrow])
    drawn = [choice.token_id for choice in choices]
    assert drawn == [expected(logits.tolist(), one) for one in [*batch, narrow]]


def test_positions_and_choices_draw_independently() -> None:
    """Within one seed, over positions and choice numbers: uniform and uncorrelated."""
    draws = [[uniform(7, index, position) for position in range(4000)] for index in range(2)]
    first, second = torch.tensor(draws, dtype=torch.float64)
    for one in (first, second):
        assert abs(one.mean() - 0.5) < 0.03
        assert abs(one.var() - 1 / 12) < 0.01
        assert torch.corrcoef(torch.stack((one[:-1], one[1:])))[0, 1].abs() < 0.08
    assert torch.corrcoef(torch.stack((first, second)))[0, 1].abs() < 0.08
    assert 0 <= min(first.min(), second.min()) <= max(first.max(), second.max()) < 1


def test_the_draw_never_changes_between_releases() -> None:
    """A request that is resumed after an upgrade must go on with the same draws."""
    assert [round(uniform(42, 0, position), 12) for position in range(3)] == KNOWN_DRAWS


def test_without_a_seed_draws_differ() -> None:
    logits = torch.zeros(64, 1000)
    batch = [chunk(Sampling())] * 64
    assert len({choice.token_id for choice in sample(logits, batch)}) > 30


def test_tiny_differences_of_the_logits_do_not_move_the_choice() -> None:
    """Prefill and decoding round differently; a resumed request must not notice."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(500, 300, generator=generator) * 2
    nearby = logits + torch.randn(500, 300, generator=generator) * 1e-6
    batch = [chunk(Sampling(seed=seed, top_p=0.9, top_k=200)) for seed in range(500)]
    assert sample(logits, batch) == sample(nearby, batch)


def test_logprobs_are_of_the_raw_logits_best_first() -> None:
    logits = torch.randn(3, VOCABULARY, generator=torch.Generator().manual_seed(5))
    changing = Sampling(temperature=0.2, seed=1, logit_bias={4: 100.0}, logprobs=3, top_k=2)
    batch = [chunk(changing), chunk(Sampling(seed=1)), chunk(Sampling(temperature=0, logprobs=0))]
    biased, plain, own_only = sample(logits, batch)
    truth = logits.log_softmax(-1)
    assert biased.token_id == 4
    assert biased.logprob == pytest.approx(truth[0, 4].item())
    order = truth[0].argsort(descending=True)[:3].tolist()
    assert [token for token, _ in biased.top] == order
    assert [value for _, value in biased.top] == pytest.approx(truth[0, order].tolist())
    assert (plain.logprob, plain.top) == (None, ())
    assert own_only.logprob == pytest.approx(truth[2].max().item())
    assert own_only.top == ()


def test_more_logprobs_than_tokens_are_all_tokens() -> None:
    ((own, top),) = token_logprobs(torch.zeros(1, 4), torch.tensor([2]), 9)
    assert own == pytest.approx(math.log(0.25))
    assert sorted(token for token, _ in top) == [0, 1, 2, 3]


def test_a_nucleus_wider_than_the_guess_is_exact() -> None:
    """The tokens looked at first do not hold 0.9 of a flat distribution."""
    logits = torch.linspace(0, 0.5, 4000).unsqueeze(0)
    rows = 400
    batch = [chunk(Sampling(seed=seed, top_p=0.9)) for seed in range(rows)]
    allowed = reference(logits[0].tolist(), batch[0])
    assert 1024 < len(allowed) < 4000
    drawn = [choice.token_id for choice in sample(logits.expand(rows, -1), batch)]
    assert set(drawn) <= set(allowed)
    assert drawn[:20] == [expected(logits[0].tolist(), one) for one in batch[:20]]


@pytest.mark.parametrize(("draw", "token"), [(0.0, 2), (1 - 2**-53, 4)])
def test_the_ends_of_the_draw_hit_possible_tokens(
    draw: float, token: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cloudlm.engine.sampler.uniform", lambda seed, index, position: draw)
    logits = torch.tensor([[0.0, 0.0, 5.0, 4.5, 4.0, 0.0, 0.0]])
    assert sample(logits, [chunk(Sampling(top_k=3))])[0].token_id == token


@pytest.mark.parametrize("temperature", [0.0, 1e-9, 1.0])
@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_impossible_logits_are_never_chosen(temperature: float, bad: float) -> None:
    logits = torch.full((50, 6), bad)
    logits[:, 3] = 1.0
    batch = [chunk(Sampling(temperature=temperature, seed=seed)) for seed in range(50)]
    assert {choice.token_id for choice in sample(logits, batch)} == {3}


@given(
    st.lists(
        st.lists(
            st.sampled_from([0.0, 1.0, math.nan, math.inf, -math.inf]), min_size=4, max_size=4
        ),
        min_size=1,
        max_size=4,
    )
)
def test_greedy_is_the_same_alone_and_beside_one_who_asks_for_more(rows: list[list[float]]) -> None:
    """All rows greedy takes a short way, which must not show."""
    logits = torch.tensor([*rows, rows[0]])
    plain = [chunk(Sampling(temperature=0)) for _ in rows]
    scored = chunk(Sampling(temperature=0, logprobs=1))
    alone = sample(logits[:-1], plain)
    beside = sample(logits, [*plain, scored])
    assert [one.token_id for one in alone] == [one.token_id for one in beside[:-1]]


def test_a_row_of_nothing_possible_still_gives_a_token() -> None:
    """One broken sequence must not end the whole batch."""
    logits = torch.tensor([[math.nan] * 6, [0.0, 9.0, 0.0, 0.0, 0.0, 0.0]])
    for s in (Sampling(seed=1), Sampling(temperature=0), Sampling(seed=1, top_p=0.5, top_k=2)):
        broken, sound = sample(logits, [chunk(s), chunk(Sampling(temperature=0, logprobs=1))])
        assert 0 <= broken.token_id < 6
        assert sound.token_id == 1


def test_a_bias_on_an_unknown_token_is_ignored() -> None:
    s = Sampling(temperature=0, logit_bias={99: 5.0, -1: 5.0, 2: 1.0})
    assert sample(torch.zeros(1, 4), [chunk(s)])[0].token_id == 2


def _with_seed(sampling: Sampling, seed: int) -> Sampling:
    fields: dict[str, Any] = {name: getattr(sampling, name) for name in Sampling.__slots__}
    return Sampling(**{**fields, "seed": seed})
