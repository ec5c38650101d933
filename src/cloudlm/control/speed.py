"""How quick a version is on a device: from what was measured, else estimated by the roofline. Pure.

The roofline model (Williams, Waterman and Patterson, "Roofline: an insightful visual performance
model for multicore architectures", CACM 52(4), 2009): a step takes as long as the slower of moving
its bytes and computing its products.

- decode moves the weights once and each sequence's keys and values, and computes 2 operations per
  active weight and sequence;
- prefill computes 2 operations per active weight and token, and 4 per layer, width and pair of
  tokens for attention (half of the pairs, by the causal mask).

A vendor's peak is multiplied by ``PEAK_DECODE`` and ``PEAK_PREFILL``; these two and
``SPLIT_SHARE`` are assumptions, since our GPU path has not been measured. What was measured of a
device is multiplied by the shares of it that the engine reached (``bench/RESULTS.md``: W1 in
bfloat16, W3 at 8 bits).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cloudlm.control.catalogue.words import Device, FiguresOf, Kind
from cloudlm.core.figures import ModelFigures
from cloudlm.core.placement import Measured, ServiceLevel, Traffic

PEAK_DECODE = 0.6
PEAK_PREFILL = 0.4
MEASURED_DECODE = 0.76
MEASURED_PREFILL = 0.82
# What is kept of two GPUs' speed together, for each doubling.
SPLIT_SHARE = 0.85


@dataclass(frozen=True, slots=True)
class Speed:
    """What a replica takes for one prompt, and for a step with ``batch`` sequences (``step_s``).

    ``weights_s`` moves all weights, ``active_s`` those that one sequence needs, ``sequence_s`` one
    sequence's keys and values; ``product_s`` computes one sequence's products.
    """

    prefill_s: float
    weights_s: float
    active_s: float
    sequence_s: float
    product_s: float
    estimated: bool

    def step_s(self, batch: float) -> float:
        read = min(self.weights_s, self.active_s * max(1.0, batch))
        return max(read + self.sequence_s * batch, self.product_s * batch)


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a replica bears at its limit: requests per second, sequences at once, and the mean
    milliseconds to the first token and between tokens there."""

    requests_per_s: float
    batch: float
    ttft_ms: float
    tpot_ms: float


def speed_of(
    figures: ModelFigures,
    device: Device,
    pieces: int,
    traffic: Traffic,
    measured: Sequence[Measured] = (),
) -> Speed | None:
    """The speed of a replica on ``pieces`` of a device; None if neither was measured nor the
    device's bandwidth and compute are known."""
    for one in measured:
        if one.device == device.name and one.count == pieces:
            return _measured(one, traffic)
    if not device.bandwidth_gb_per_s or not device.tflops:
        return None
    split = 1.0 if device.kind is Kind.CPU else SPLIT_SHARE ** math.log2(pieces)
    of_peak = device.figures is FiguresOf.PEAK
    bandwidth = device.bandwidth_gb_per_s * 1e9 * pieces * split
    bandwidth *= PEAK_DECODE if of_peak else MEASURED_DECODE
    compute = device.tflops * 1e12 * pieces * split
    compute *= PEAK_PREFILL if of_peak else MEASURED_PREFILL
    context = traffic.prompt_tokens + traffic.output_tokens / 2
    return Speed(
        prefill_s=max(
            _prefill_operations(figures, traffic) / compute, figures.active_bytes / bandwidth
        ),
        weights_s=figures.weights_bytes / bandwidth,
        active_s=figures.active_bytes / bandwidth,
        sequence_s=context * figures.cache_bytes_per_token / bandwidth,
        product_s=2 * figures.active / compute,
        estimated=True,
    )


def capacity(
    speed: Speed, traffic: Traffic, level: ServiceLevel, sequences: int, network_ms: float = 0.0
) -> Capacity | None:
    """The most a replica bears at this service level with at most ``sequences`` at once; None if
    not even one request alone is answered in time.

    More sequences at once mean more requests and longer waits, so the largest batch that keeps
    the level is found by halving.
    """
    if not _keeps(_at(speed, traffic, 1e-3, network_ms), level):
        return None
    low, high = 1e-3, float(sequences)
    if _keeps(_at(speed, traffic, high, network_ms), level):
        low = high
    for _ in range(40):
        middle = (low + high) / 2
        if _keeps(_at(speed, traffic, middle, network_ms), level):
            low = middle
        else:
            high = middle
    return _at(speed, traffic, low, network_ms)


def alone(speed: Speed, traffic: Traffic, network_ms: float = 0.0) -> Capacity:
    """How quickly a request is answered that has a replica for itself."""
    return _at(speed, traffic, 1e-3, network_ms)


def _at(speed: Speed, traffic: Traffic, batch: float, network_ms: float) -> Capacity:
    """A replica in balance with ``batch`` sequences decoding.

    Prompts take a share ``busy`` of its time, decoding the rest, so requests x answer = batch /
    step x (1 - busy); the wait for other prompts is that of a queue with fixed service times
    (M/D/1: busy x service / 2 (1 - busy), Pollaczek and Khinchine).
    """
    step_s = speed.step_s(batch)
    per_s = batch / step_s
    requests = per_s / (traffic.output_tokens + speed.prefill_s * per_s)
    busy = requests * speed.prefill_s
    wait_s = busy * speed.prefill_s / (2 * (1 - busy))
    return Capacity(
        requests_per_s=requests,
        batch=batch,
        ttft_ms=1000 * (wait_s + speed.prefill_s + step_s) + network_ms,
        tpot_ms=1000 * step_s / (1 - busy),
    )


def _keeps(found: Capacity, level: ServiceLevel) -> bool:
    in_time = not level.ttft_ms or found.ttft_ms <= level.ttft_ms
    return in_time and (not level.tpot_ms or found.tpot_ms <= level.tpot_ms)


def _prefill_operations(figures: ModelFigures, traffic: Traffic) -> float:
    fresh = traffic.prompt_tokens * (1 - traffic.cached_share)
    pairs = fresh * (traffic.prompt_tokens - fresh / 2)
    return 2 * figures.active * fresh + 4 * figures.layers * figures.hidden_size * pairs


def _measured(one: Measured, traffic: Traffic) -> Speed:
    fresh = traffic.prompt_tokens * (1 - traffic.cached_share)
    each_s = one.step_ms_per_sequence / 1000
    first_s = max(0.0, one.step_ms / 1000 - each_s)
    return Speed(fresh / one.prefill_tokens_per_s, first_s, first_s, each_s, 0.0, estimated=False)
