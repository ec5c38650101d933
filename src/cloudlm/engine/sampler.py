"""Chooses the next tokens from logits. Deterministic: nothing but its arguments decides, unless a
request has no seed."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cloudlm.core.chat import Sampling
from cloudlm.engine.draw import draw
from cloudlm.engine.ops.transfer import to_device
from cloudlm.engine.step import Chunk

# Stands for an impossible logit: finite, so that a row of nothing else still has a distribution.
_LEAST = -3e38


@dataclass(frozen=True, slots=True)
class Choice:
    """A chosen token; ``logprob`` and ``top`` (best first) are there if asked for."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def uniform(seed: int | None, index: int, position: int) -> float:
    """A number in [0, 1) keyed by (seed, choice index, position) alone; without a seed it is
    random. 53 bits of a BLAKE2b hash: the same on every machine, whatever else is in the batch."""
    if seed is None:
        digest = os.urandom(8)
    else:
        digest = blake2b(f"{seed}/{index}/{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


Mask = NDArray[np.bool_] | None


def sample(logits: Tensor, chunks: Sequence[Chunk], allowed: Sequence[Mask] = ()) -> list[Choice]:
    """The next token of each chunk from its row of ``logits`` [chunks, vocabulary], float32.

    ``allowed`` has, for each chunk whose next token is constrained, which tokens [vocabulary] it
    may be, at least one; none other is ever chosen. Order of processing: logit bias; repetition
    (Hugging Face), presence and frequency (OpenAI) penalties; constraint; temperature; top_k;
    top_p; min_p; one draw. Ties at the edge of top_k and top_p all stay in. Log probabilities are
    those of the logits as they came. NaN counts as impossible.

    On a GPU nothing is waited for but a copy of the chosen tokens, and of the log probabilities if
    any are asked for.
    """
    greedy = _greedy(logits, chunks, allowed)
    if greedy is not None:
        return greedy
    if logits.device.type != "cpu" or not bool(logits.sum().isfinite()):
        logits = logits.nan_to_num(nan=_LEAST, posinf=-_LEAST, neginf=_LEAST)
    chosen = _chosen(logits, chunks, allowed)
    return _with_logprobs(logits, chosen, [chunk.sampling.logprobs for chunk in chunks])


def _chosen(logits: Tensor, chunks: Sequence[Chunk], allowed: Sequence[Mask]) -> Tensor:
    """The chosen tokens [chunks], still on the device; the host learns nothing on the way."""
    processed = _penalised(logits, chunks)
    processed = _constrained(processed, allowed, keep=processed is logits)
    if logits.device.type == "cpu":
        pairs = zip(processed.numpy(), chunks, strict=True)
        return torch.tensor([_drawn_or_likeliest(row, chunk) for row, chunk in pairs])
    chosen = processed.argmax(-1)
    random = [row for row, chunk in enumerate(chunks) if chunk.sampling.temperature > 0]
    if random:
        rows = _ids(random, logits)
        chosen[rows] = _drawn(processed[rows], [chunks[row] for row in random])
    return chosen


def _drawn_or_likeliest(row: NDArray[np.float32], chunk: Chunk) -> int:
    sampling = chunk.sampling
    if sampling.temperature <= 0:
        return int(row.argmax())
    return draw(
        row,
        uniform(sampling.seed, chunk.index, len(chunk.output_token_ids)),
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
    )


def _greedy(
    logits: Tensor, chunks: Sequence[Chunk], allowed: Sequence[Mask]
) -> list[Choice] | None:
    """The likeliest tokens where nobody asks for more, in one pass over the logits; None where
    somebody does, or where a row's largest logit is not a finite number."""
    if logits.device.type != "cpu" or any(mask is not None for mask in allowed):
        return None
    for sampling in (chunk.sampling for chunk in chunks):
        if sampling.temperature > 0 or sampling.logprobs is not None or not _plain(sampling):
            return None
    array = logits.numpy()  # its search is several times as quick as PyTorch's
    chosen = array.argmax(1)  # a NaN counts as the largest, so the check below sees it
    if not np.isfinite(array[np.arange(len(array)), chosen]).all():
        return None
    return [Choice(token_id) for token_id in chosen.tolist()]


def token_logprobs(
    logits: Tensor, token_ids: Tensor, top: int
) -> list[tuple[float, tuple[tuple[int, float], ...]]]:
    """Per row of ``logits`` [rows, vocabulary] the log probability of ``token_ids`` [rows] and the
    ``top`` likeliest tokens with theirs, best first."""
    logprobs = logits.log_softmax(-1)
    own = logprobs.gather(1, token_ids.unsqueeze(1)).squeeze(1).tolist()
    values, ids = logprobs.topk(min(top, logits.shape[1]), dim=-1)
    return [
        (one, tuple(zip(row_ids, row_values, strict=True)))
        for one, row_ids, row_values in zip(own, ids.tolist(), values.tolist(), strict=True)
    ]


def _with_logprobs(logits: Tensor, chosen: Tensor, asked: list[int | None]) -> list[Choice]:
    choices = [Choice(token_id) for token_id in chosen.tolist()]
    wanted = [(row, count) for row, count in enumerate(asked) if count is not None]
    if wanted:
        rows = _ids([row for row, _ in wanted], logits)
        most = max(count for _, count in wanted)
        found = token_logprobs(logits[rows], chosen[rows], most)
        for (row, count), (logprob, top) in zip(wanted, found, strict=True):
            choices[row] = Choice(choices[row].token_id, logprob, top[:count])
    return choices


def _plain(sampling: Sampling) -> bool:
    return (
        not sampling.logit_bias
        and sampling.repetition_penalty == 1.0
        and sampling.presence_penalty == 0.0
        and sampling.frequency_penalty == 0.0
    )


def _penalised(logits: Tensor, chunks: Sequence[Chunk]) -> Tensor:
    """A copy with bias and penalties applied; ``logits`` itself if no row asks for any."""
    if all(_plain(chunk.sampling) for chunk in chunks):
        return logits
    logits = logits.clone()
    bias, factors, subtracted = _Edits(), _Edits(), _Edits()
    for row, chunk in enumerate(chunks):
        sampling, base = chunk.sampling, row * logits.shape[1]
        known = {t: v for t, v in sampling.logit_bias.items() if 0 <= t < logits.shape[1]}
        bias.add(base + _array(known), np.array(list(known.values())))
        if sampling.repetition_penalty != 1.0:
            # A token seen twice is edited twice, to the same value.
            seen = _array(chunk.prompt_token_ids + chunk.output_token_ids)
            factors.add(base + seen, np.full(len(seen), sampling.repetition_penalty))
        presence, frequency = sampling.presence_penalty, sampling.frequency_penalty
        if presence or frequency:
            token_ids, counts = np.unique(_array(chunk.output_token_ids), return_counts=True)
            subtracted.add(base + token_ids, presence + frequency * counts.astype(np.float64))
    flat = logits.view(-1)
    for places, amounts in bias.on(flat):
        flat[places] += amounts
    for places, amounts in factors.on(flat):
        values = flat[places]
        flat[places] = torch.where(values > 0, values / amounts, values * amounts)
    for places, amounts in subtracted.on(flat):
        flat[places] -= amounts
    return logits.clamp_(_LEAST, -_LEAST)


def _constrained(logits: Tensor, allowed: Sequence[Mask], keep: bool) -> Tensor:
    """``logits`` with forbidden tokens at minus infinity, below anything an allowed one may be.
    With ``keep`` the tensor given stays as it is."""
    known = [(row, mask) for row, mask in enumerate(allowed) if mask is not None]
    if not known:
        return logits
    if keep:
        logits = logits.clone()
    if logits.device.type == "cpu":
        array = logits.numpy()  # one plain pass per row; PyTorch would wake its threads for each
        for row, mask in known:
            np.copyto(array[row], -np.inf, where=~mask)
        return logits
    rows = _ids([row for row, _ in known], logits)
    forbidden = to_device(~np.stack([mask for _, mask in known]), logits.device)
    logits[rows] = logits[rows].masked_fill(forbidden, -torch.inf)
    return logits


class _Edits:
    """Places in the flattened logits, with an amount for each, collected row by row. NumPy, since
    the tokens of long prompts pass through here at every step."""

    def __init__(self) -> None:
        self._places: list[NDArray[np.int64]] = []
        self._amounts: list[NDArray[np.float64]] = []

    def add(self, places: NDArray[np.int64], amounts: NDArray[np.float64]) -> None:
        if len(places):
            self._places.append(places)
            self._amounts.append(amounts)

    def on(self, flat: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """All edits at once, as tensors that fit ``flat``; nothing if there are none."""
        if self._places:
            amounts = to_device(np.concatenate(self._amounts), flat.device)
            yield to_device(np.concatenate(self._places), flat.device), amounts.to(flat.dtype)


def _array(token_ids: Collection[int]) -> NDArray[np.int64]:
    return np.fromiter(token_ids, dtype=np.int64, count=len(token_ids))


def _ids(values: Iterable[int], like: Tensor) -> Tensor:
    return to_device(np.fromiter(values, dtype=np.int64), like.device)


def _drawn(logits: Tensor, chunks: Sequence[Chunk]) -> Tensor:
    """On a GPU: one draw per row by inverting the cumulative distribution over the vocabulary in
    its own order: a tiny difference in the logits moves the borders a tiny bit, and no token's
    place."""
    samplings = [chunk.sampling for chunk in chunks]
    temperature = _column([s.temperature for s in samplings], logits)
    scores = logits.double()
    scores = (scores - scores.amax(-1, keepdim=True)) / temperature
    scores = _only_top_k(scores, samplings)
    scores = _only_top_p(scores, samplings)
    min_p = _column([s.min_p for s in samplings], logits)
    # The best score is 0, so its probability relative to the best is exp(score).
    weights = scores.exp()
    weights = weights.masked_fill(weights < min_p, 0.0)
    cumulative = weights.cumsum(-1)
    total = cumulative[:, -1:]
    draws = [uniform(c.sampling.seed, c.index, len(c.output_token_ids)) for c in chunks]
    target = _column(draws, logits) * total
    # Rounding must not push the target onto the total, behind the last possible token.
    target = torch.minimum(target, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True).squeeze(1)


def _column(values: list[float], like: Tensor) -> Tensor:
    return to_device(np.array(values, dtype=np.float64), like.device).unsqueeze(1)


def _only_top_k(scores: Tensor, samplings: list[Sampling]) -> Tensor:
    vocabulary = scores.shape[1]
    counts = [s.top_k if 0 < s.top_k < vocabulary else vocabulary for s in samplings]
    rows = [row for row, count in enumerate(counts) if count < vocabulary]
    if not rows:
        return scores
    index = _ids(rows, scores)
    largest = scores[index].topk(max(counts[row] for row in rows), dim=-1).values
    last = _ids([counts[row] - 1 for row in rows], scores).unsqueeze(1)
    return _without(scores, index, scores[index] < largest.gather(1, last))


def _only_top_p(scores: Tensor, samplings: list[Sampling]) -> Tensor:
    """Keep the fewest likeliest tokens whose probabilities sum to at least top_p."""
    rows = [row for row, s in enumerate(samplings) if s.top_p < 1.0]
    if not rows:
        return scores
    index = _ids(rows, scores)
    limit = _column([samplings[row].top_p for row in rows], scores)
    probabilities = scores[index].softmax(-1)
    likeliest = probabilities.sort(dim=-1, descending=True).values
    before = likeliest.cumsum(-1) - likeliest
    kept = (before < limit).sum(-1, keepdim=True).clamp(min=1)
    border = likeliest.gather(1, kept - 1)
    return _without(scores, index, probabilities < border)


def _without(scores: Tensor, rows: Tensor, removed: Tensor) -> Tensor:
    """A copy of ``scores`` in which the ``removed`` [rows, vocabulary] tokens are impossible."""
    scores = scores.clone()
    scores[rows] = scores[rows].masked_fill(removed, -torch.inf)
    return scores
