"""The roofline: what is known by hand, and what must hold for every machine."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloudlm.control.catalogue.words import Device, FiguresOf, Kind
from cloudlm.control.needs import Batch, need_of
from cloudlm.control.speed import (
    MEASURED_DECODE,
    PEAK_DECODE,
    PEAK_PREFILL,
    SPLIT_SHARE,
    alone,
    capacity,
    speed_of,
)
from cloudlm.core.figures import ModelFigures
from cloudlm.core.placement import Measured, Placement, ServiceLevel, Traffic

FIGURES = ModelFigures(8_000_000_000, 32, 8, 128, 4096, 128_256, widest=28_672)
GPU = Device("gpu", Kind.GPU, 80, 2000, 400)
TRAFFIC = Traffic(1.0, 1000, 200)


def test_decode_moves_the_weights_once() -> None:
    speed = speed_of(FIGURES, GPU, 1, TRAFFIC)
    assert speed is not None
    assert speed.estimated
    assert speed.weights_s == pytest.approx(16e9 / (2000e9 * PEAK_DECODE))
    cache = 1100 * 2 * 32 * 8 * 128 * 2
    assert speed.sequence_s == pytest.approx(cache / (2000e9 * PEAK_DECODE))
    assert speed.step_s(1) == pytest.approx(speed.weights_s + speed.sequence_s)


def test_prefill_computes_every_fresh_token() -> None:
    whole = speed_of(FIGURES, GPU, 1, TRAFFIC)
    cached = speed_of(FIGURES, GPU, 1, Traffic(1.0, 1000, 200, cached_share=0.75))
    assert whole is not None
    assert cached is not None
    operations = 2 * 8e9 * 1000 + 4 * 32 * 4096 * 1000 * 500
    assert whole.prefill_s == pytest.approx(operations / (400e12 * PEAK_PREFILL))
    assert cached.prefill_s < whole.prefill_s


def test_two_devices_are_less_than_twice_as_quick() -> None:
    one, two = speed_of(FIGURES, GPU, 1, TRAFFIC), speed_of(FIGURES, GPU, 2, TRAFFIC)
    assert one is not None
    assert two is not None
    assert one.weights_s / two.weights_s == pytest.approx(2 * SPLIT_SHARE)


def test_measured_bandwidth_of_a_cpu_is_not_discounted_as_a_peak() -> None:
    cpu = Device("cpu", Kind.CPU, 0, 4.0, 0.3, FiguresOf.MEASURED)
    speed = speed_of(FIGURES, cpu, 8, TRAFFIC)
    assert speed is not None
    assert speed.weights_s == pytest.approx(16e9 / (32e9 * MEASURED_DECODE))


def test_what_was_measured_is_taken_as_it_is() -> None:
    measured = Measured("gpu", 2, 10_000, 10.0, 0.5)
    speed = speed_of(FIGURES, GPU, 2, TRAFFIC, (measured,))
    assert speed is not None
    assert not speed.estimated
    assert speed.prefill_s == pytest.approx(0.1)
    assert speed.step_s(1) == pytest.approx(0.010)
    assert speed.step_s(11) == pytest.approx(0.015)


def test_experts_that_rest_are_not_read_for_one_sequence() -> None:
    sparse = ModelFigures(8_000_000_000, 32, 8, 128, 4096, 128_256, active_parameters=10**9)
    speed = speed_of(sparse, GPU, 1, TRAFFIC)
    assert speed is not None
    assert speed.step_s(1) < speed.step_s(8)
    assert speed.step_s(8) == pytest.approx(speed.weights_s + 8 * speed.sequence_s)


def test_no_figures_no_speed() -> None:
    assert speed_of(FIGURES, Device("x", Kind.GPU, 80, 2000, 0), 1, TRAFFIC) is None


@given(
    st.floats(100, 8000),
    st.floats(30, 2500),
    st.integers(1, 8000),
    st.integers(1, 2000),
    st.floats(1, 200),
    st.floats(20, 5000),
    st.integers(1, 256),
)
@settings(max_examples=200, deadline=None)
def test_the_level_is_kept_at_the_limit(
    bandwidth: float,
    tflops: float,
    prompt: int,
    output: int,
    tpot_ms: float,
    ttft_ms: float,
    sequences: int,
) -> None:
    traffic, level = Traffic(1.0, prompt, output), ServiceLevel(ttft_ms, tpot_ms)
    speed = speed_of(FIGURES, Device("x", Kind.GPU, 80, bandwidth, tflops), 1, traffic)
    assert speed is not None
    found = capacity(speed, traffic, level, sequences)
    quickest = alone(speed, traffic)
    if found is None:
        assert quickest.ttft_ms > ttft_ms or quickest.tpot_ms > tpot_ms
        return
    assert found.ttft_ms <= ttft_ms
    assert found.tpot_ms <= tpot_ms
    assert found.batch <= sequences
    assert found.requests_per_s > 0
    assert found.requests_per_s * speed.prefill_s < 1  # never more prompts than time
    looser = capacity(speed, traffic, ServiceLevel(2 * ttft_ms, 2 * tpot_ms), sequences)
    assert looser is not None
    assert looser.requests_per_s >= found.requests_per_s * (1 - 1e-6)


def test_a_need_is_weights_and_what_sequences_hold() -> None:
    need = need_of(FIGURES, Placement(concurrency=4, context_tokens=8192), TRAFFIC, Batch())
    assert need.weights_bytes == 16e9
    assert need.sequence_tokens == 8192
    assert need.least == 4
    one, two = need.bytes_for(1, Kind.GPU, 1), need.bytes_for(2, Kind.GPU, 1)
    assert two - one == 8192 * 2 * 32 * 8 * 128 * 2
    assert need.bytes_for(1, Kind.GPU, 2) > one
    fits = need.sequences_in(80e9, Kind.GPU, 1)
    assert need.bytes_for(fits, Kind.GPU, 1) <= 80e9 < need.bytes_for(fits + 1, Kind.GPU, 1)
    assert need.sequences_in(1e9, Kind.GPU, 1) < 0
