"""A model over several ranks answers as one process does. Ranks are threads here; processes are in
test_parallel_processes.py."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quantised_models import write_gptq
from thread_ranks import thread_runner

from cloudlm.core.chat import Sampling
from cloudlm.core.errors import BadSetting, BrokenModel, InternalError
from cloudlm.engine.parallel.layout import Layout, micro_batches
from cloudlm.engine.step import Chunk, Pooling, Step

SEEDED = Sampling(temperature=1.0, seed=7, top_p=0.9)
TOLERANCE = 2e-4
FAMILIES = (
    "llama",
    "llama-tied",
    "llama-biased",
    "qwen3",
    "gpt2",
    "gpt2-by-layer",
    "gemma2",
    "gemma3",
    "olmo2",
    "phi3",
    "mixtral",
    "qwen2-moe",
    "qwen3-moe",
    "gpt-neox",
    "falcon-7b",
    "falcon-40b",
    "falcon-sequential",
)


@pytest.fixture
def over_threads() -> Iterator[Callable[..., Any]]:
    """``thread_runner``, closed in the end."""
    made: list[Any] = []

    def make(folder: Path, *args: int, **kwargs: int) -> Any:
        made.append(thread_runner(folder, *args, **kwargs))
        return made[-1]

    yield make
    for runner in made:
        runner.close()


def prompts() -> list[list[int]]:
    source = random.Random(3)
    return [[source.randrange(307) for _ in range(length)] for length in (3, 17, 40)]


def answers(runner: Any, driver: Any, sampling: Sampling, count: int = 10) -> list[list[int]]:
    batch = driver(runner, budget=23)
    for prompt in prompts():
        batch.add(prompt, sampling)
    batch.run(count)
    return [one.output for one in batch.sequences]


def all_logits(runner: Any, driver: Any) -> torch.Tensor:
    batch = driver(runner, budget=31)
    for prompt in prompts():
        batch.add(prompt)
    return torch.cat(batch.all_logits())


@pytest.mark.parametrize(
    ("name", "tensor", "pipeline"),
    [
        *((name, 2, 1) for name in FAMILIES),
        ("llama", 1, 3),
        ("gpt2", 1, 2),
        ("gemma2", 2, 2),
        ("mixtral", 2, 3),
        ("llama-tied", 4, 1),  # more ranks than key heads
        ("olmo2", 4, 1),
        ("phi3", 4, 1),
        ("falcon-7b", 4, 1),
        ("falcon-40b", 4, 2),
    ],
)
def test_all_families_answer_as_one_process_does(
    name: str,
    tensor: int,
    pipeline: int,
    saved_model: Any,
    make_runner: Any,
    over_threads: Any,
    driver: Any,
) -> None:
    folder = saved_model(name).folder
    alone, parted = make_runner(folder), over_threads(folder, tensor, pipeline)
    assert (all_logits(alone, driver) - all_logits(parted, driver)).abs().max() < TOLERANCE
    for sampling in (Sampling(temperature=0.0), SEEDED):
        expected = answers(alone, driver, sampling)
        assert answers(parted, driver, sampling) == expected
        assert len({token for one in expected for token in one}) > 5, (
            "too monotonous to prove anything"
        )


def test_a_quantised_file_is_cut_as_its_numbers(
    saved_model: Any, make_runner: Any, over_threads: Any, driver: Any, tmp_path: Path
) -> None:
    folder = write_gptq(saved_model("qwen2-heads-32").folder, tmp_path).folder
    alone, parted = make_runner(folder), over_threads(folder, 2, 2)
    assert (all_logits(alone, driver) - all_logits(parted, driver)).abs().max() < TOLERANCE
    assert answers(parted, driver, SEEDED) == answers(alone, driver, SEEDED)


def test_prompt_scores_pooled_states_and_block_copies_are_those_of_one_process(
    saved_model: Any, make_runner: Any, over_threads: Any, driver: Any
) -> None:
    folder = saved_model("qwen3").folder
    prompt = tuple(prompts()[1])

    def whole(runner: Any) -> list[Any]:
        scored = Chunk(
            1,
            prompt,
            0,
            tuple(range(5)),
            samples=True,
            sampling=Sampling(temperature=0.0, logprobs=2),
            prompt_token_ids=prompt,
            prompt_logprobs=True,
        )
        pooled = Chunk(
            2,
            prompt,
            0,
            tuple(range(5, 10)),
            samples=False,
            sampling=Sampling(),
            prompt_token_ids=prompt,
            pooling=Pooling.MEAN,
        )
        first = runner.run(Step((scored, pooled)))
        # The last block goes elsewhere, and the sequence goes on from there.
        token = first[0].token_id
        moved = Chunk(
            1,
            (token,),
            len(prompt),
            (0, 1, 2, 3, 20),
            samples=True,
            sampling=Sampling(temperature=0.0, logprobs=0),
            prompt_token_ids=prompt,
            output_token_ids=(token,),
        )
        return [*first, *runner.run(Step((moved,), copies=((4, 20),)))]

    expected, found = whole(make_runner(folder)), whole(over_threads(folder, 2, 2))
    assert [one.token_id for one in found] == [one.token_id for one in expected]
    for one, other in ((0, 0), (2, 2)):
        assert found[one].logprob == pytest.approx(expected[other].logprob, abs=1e-3)
    scores = [score for score, _ in found[0].prompt_logprobs]
    assert scores == pytest.approx([s for s, _ in expected[0].prompt_logprobs], abs=1e-3)
    assert list(found[1].pooled) == pytest.approx(list(expected[1].pooled), abs=1e-2)


def test_a_batch_is_cut_for_a_pipeline_and_answers_stay(
    saved_model: Any, make_runner: Any, over_threads: Any, driver: Any
) -> None:
    folder = saved_model("llama").folder
    source = random.Random(4)
    many = [[source.randrange(307) for _ in range(60)] for _ in range(4)]
    found = []
    for runner in (make_runner(folder), over_threads(folder, 1, 3)):
        batch = driver(runner, budget=1000)
        for prompt in many:
            batch.add(prompt)
        batch.run(5)
        found.append([one.output for one in batch.sequences])
    assert found[0] == found[1]


def test_each_rank_holds_its_part_only(saved_model: Any, over_threads: Any) -> None:
    runner = over_threads(saved_model("llama").folder, 2, 3)
    held = [sum(one.numel() for one in runner.model.parameters())]
    for peer in runner.team.peers.values():
        held.append(sum(one.numel() for one in peer.runner.model.parameters()))
    norms = 3 * 2 * 64 + 64  # norms are on both ranks of a stage
    assert sum(held) == runner.info.parameters + norms
    assert max(held[1:]) < runner.info.parameters / 2
    assert runner._pool.blocks.shape[0] == 1 and runner._pool.blocks.shape[4] == 1
    assert (runner.info.tensor_parallel, runner.info.pipeline_parallel) == (2, 3)


def test_adapters_change_every_rank_and_can_go_again(
    saved_model: Any, make_runner: Any, over_threads: Any, driver: Any, tmp_path: Path
) -> None:
    save_adapter(tmp_path)
    folder = saved_model("llama-biased").folder
    found = []
    for runner in (make_runner(folder), over_threads(folder, 2, 3)):
        runner.add_adapter("tuned/1", runner.read_adapter(tmp_path))
        batch = driver(runner, budget=1000)
        for adapter in ("", "tuned/1"):
            batch.add(prompts()[1], adapter=adapter)
        batch.run(12)
        runner.remove_adapter("tuned/1")
        found.append([one.output for one in batch.sequences])
    assert found[0] == found[1]
    assert found[0][0] != found[0][1]


def save_adapter(folder: Path) -> None:
    """A LoRA adapter for queries, attention's output, gates and down projections."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(2)
    sizes = {
        "self_attn.q_proj": (64, 64),
        "self_attn.k_proj": (64, 32),
        "self_attn.o_proj": (64, 64),
        "mlp.gate_proj": (64, 96),
        "mlp.down_proj": (96, 64),
    }
    tensors = {}
    for layer in range(3):
        for name, (inputs, outputs) in sizes.items():
            path = f"base_model.model.model.layers.{layer}.{name}"
            for side, shape in (("A", (4, inputs)), ("B", (outputs, 4))):
                noise = torch.randn(shape, generator=generator)
                tensors[f"{path}.lora_{side}.weight"] = 0.2 * noise
    save_file(tensors, folder / "adapter_model.safetensors")
    names = [name.rpartition(".")[2] for name in sizes]
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": names}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def test_an_adapter_that_another_rank_cannot_read_is_nowhere(
    saved_model: Any, over_threads: Any, tmp_path: Path
) -> None:
    runner = over_threads(saved_model("llama-biased").folder, 2)
    save_adapter(tmp_path)
    adapter = runner.read_adapter(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(BrokenModel, match=r"adapter_model\.safetensors is missing"):
        runner.add_adapter("tuned/1", adapter)
    save_adapter(tmp_path)
    runner.add_adapter("tuned/1", adapter)  # nothing is left of the first try


@pytest.mark.parametrize("rank", [0, 1])
def test_an_adapter_that_one_rank_has_no_memory_for_is_nowhere(
    saved_model: Any,
    over_threads: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rank: int,
) -> None:
    runner = over_threads(saved_model("llama-biased").folder, 2)
    parts = [runner, runner.team.peers[1].runner]
    save_adapter(tmp_path)
    adapter = runner.read_adapter(tmp_path)

    def full(*args: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(parts[rank]._adapters, "add", full)
        with pytest.raises(MemoryError if rank == 0 else InternalError):
            runner.add_adapter("tuned/1", adapter)
    runner.sleep(1)
    runner.wake()  # adds what there is
    assert [one._adapters._adapters for one in parts] == [{}, {}]
    runner.add_adapter("tuned/1", adapter)
    runner.remove_adapter("tuned/1")


def test_all_ranks_sleep_and_wake_and_sleep_on_if_one_cannot(
    saved_model: Any, over_threads: Any, driver: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(saved_model("llama").folder, folder)
    runner = over_threads(folder, 2)
    before = answers(runner, driver, SEEDED)
    runner.sleep(1)
    peer = runner.team.peers[1].runner
    assert not hasattr(peer, "model") and not hasattr(runner, "model")
    (folder / "model.safetensors").rename(folder / "away")
    with pytest.raises(BrokenModel):
        runner.wake()
    assert not hasattr(peer, "model") and not hasattr(runner, "model")
    (folder / "away").rename(folder / "model.safetensors")
    runner.wake()
    assert answers(runner, driver, SEEDED) == before


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("llama", {"tensor_parallel": 3}, "does not divide this model's 4 attention heads"),
        ("llama", {"pipeline_parallel": 4}, "more than this model's 3 layers"),
        ("llama", {"tensor_parallel": 2, "kernels": "native"}, "kernels = native is not possible"),
        ("llama", {"tensor_parallel": 2, "precision": "int8"}, "precision = int8 is not possible"),
        ("llama", {"pipeline_parallel": 2, "deterministic": True}, "deterministic = true is not"),
    ],
)
def test_what_cannot_be_split_is_refused_before_anything_starts(
    name: str,
    settings: dict[str, Any],
    said: str,
    saved_model: Any,
    make_runner: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cloudlm.engine.parallel.loading.Team", None)
    with pytest.raises(BadSetting, match=said):
        make_runner(saved_model(name).folder, **settings)


@given(
    tensor=st.integers(1, 8),
    pipeline=st.integers(1, 8),
    size=st.integers(1, 1000),
    layers=st.integers(8, 80),
)
def test_rows_and_layers_are_dealt_out_without_gap_or_overlap(
    tensor: int, pipeline: int, size: int, layers: int
) -> None:
    layout = Layout(tensor, pipeline)
    places = [layout.at(rank) for rank in range(layout.ranks)]
    assert [place.rank for place in places] == list(range(layout.ranks))
    rows = [row for place in places[:tensor] for row in range(*place.rows(size))]
    assert rows == list(range(size))
    stages = [layer for place in places[::tensor] for layer in range(*place.layers(layers))]
    assert stages == list(range(layers))
    for place in places:
        assert layout.at(place.next_rank).previous_rank == place.rank
        assert layout.at(place.next_rank).shard == place.shard


@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=20), stages=st.integers(1, 6))
def test_micro_batches_are_the_batch_in_its_order(lengths: list[int], stages: int) -> None:
    chunks = tuple(
        Chunk(number, (0,) * length, 0, (), samples=False, sampling=Sampling())
        for number, length in enumerate(lengths)
    )
    batches = micro_batches(chunks, stages)
    assert tuple(chunk for batch in batches for chunk in batch) == chunks
    assert 1 <= len(batches) <= stages
    assert all(batches)
