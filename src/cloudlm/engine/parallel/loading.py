"""From a model folder to a model over several processes: checked, started, then loaded."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import msgspec
import torch

from cloudlm.core.errors import BadSetting
from cloudlm.core.settings import EngineSettings
from cloudlm.engine.adapter_files import Site, sites
from cloudlm.engine.architectures.base import Decoder, Shape
from cloudlm.engine.formats.opening import open_checkpoint
from cloudlm.engine.load import (
    Progress,
    build_network,
    cache_mb,
    pick_device,
    pick_dtype,
    pick_threads,
    plan_cache,
)
from cloudlm.engine.parallel.layout import Layout, Place
from cloudlm.engine.parallel.leader import LeaderRunner
from cloudlm.engine.parallel.messages import Start
from cloudlm.engine.parallel.ranks import DistributedRanks, Ranks
from cloudlm.engine.parallel.split import Split, check_split, split
from cloudlm.engine.parallel.team import Team
from cloudlm.engine.paths.choice import Choice
from cloudlm.engine.runner import RunnerFacts, Source
from cloudlm.engine.weights import load_weights

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Part:
    """One rank's part of a network, loaded. ``whole_sites`` are the projections of the whole."""

    model: Decoder
    source: Source
    split: Split
    whole_sites: dict[str, Site]


def read_part(
    folder: Path,
    ranks: Ranks,
    dtype: torch.dtype,
    device: torch.device,
    max_model_len: int,
    progress: Callable[[float], None] | None = None,
) -> Part:
    """Load what the rank of ``ranks`` holds; of the files no more is read than that. Raises as
    ``load_weights``, and BadSetting if the network cannot be split."""

    def load(told: Callable[[float], None] | None) -> tuple[Decoder, Split, dict[str, Site]]:
        model = build_network(folder)[2]
        whole_sites = sites(model)
        parts = split(model, ranks)
        model.limit(max_model_len)
        load_weights(
            model,
            open_checkpoint(folder),
            dtype=dtype,
            device=device,
            progress=told,
            split=parts,
        )
        return model, parts, whole_sites

    model, parts, whole_sites = load(progress)
    source = Source(lambda: load(None)[0], open_checkpoint(folder).files)
    return Part(model, source, parts, whole_sites)


def load_leader(
    folder: Path,
    settings: EngineSettings,
    eos_token_ids: tuple[int, ...],
    tell: Progress,
    stored_precision: str = "",
) -> LeaderRunner:
    """Start the other ranks, load all parts, try the whole out. Raises as ``load_runner``."""
    layout = Layout(settings.tensor_parallel, settings.pipeline_parallel)
    _check_settings(settings)
    name, config, model = build_network(folder)
    quantisation = open_checkpoint(folder).quantisation
    check_split(model, layout)
    devices = pick_devices(settings.device, layout)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    threads = max(1, pick_threads(settings.threads, parameters) // layout.ranks)
    asked = settings.dtype if settings.precision == "auto" else settings.precision
    dtype = pick_dtype(asked, config, parameters, devices[0], stored_precision)
    if quantisation:
        fields = {"stored": quantisation, "kept": 0, "dequantised_to": str(dtype)}
        _logger.info("quantised_weights", extra={"fields": fields})
    if not settings.kv_cache_mb:
        cache = _cache_mb(folder, settings, layout, devices, dtype)
        settings = replace(settings, kv_cache_mb=cache)
    num_blocks, max_model_len = plan_cache(largest_part(model.shape, layout), settings, dtype)
    parts = {"tensor": layout.tensor, "pipeline": layout.pipeline, "threads_of_each": threads}
    _logger.info("model_partitioned", extra={"fields": parts})
    torch.set_num_threads(threads)
    start = Start(
        str(folder.absolute()),
        "",
        0,
        layout.tensor,
        layout.pipeline,
        str(dtype).removeprefix("torch."),
        "",
        threads,
        num_blocks,
        settings.block_size,
        max_model_len,
    )
    tell(0.02, f"starting {layout.ranks} ranks")
    team = Team(layout.ranks)
    ranks: DistributedRanks | None = None
    try:
        ranks = _start_ranks(team, start, layout, devices)
        part = _load_parts(team, start, ranks, dtype, devices[0], tell)
        facts = RunnerFacts(name, max_model_len, num_blocks, settings.block_size, eos_token_ids)
        runner = LeaderRunner(
            part.model, facts, part.source, part.split, ranks, part.whole_sites, team, parameters
        )
        tell(0.9, "trying the model out")
        runner.check()
    except BaseException:
        team.close()
        if ranks is not None:
            ranks.close()
        raise
    return runner


def _check_settings(settings: EngineSettings) -> None:
    """Raise BadSetting for what a model over several processes cannot do."""
    for name, wrong, why in (
        ("kernels", settings.kernels == "native", "they hold a whole model"),
        ("precision", settings.precision.startswith("int"), "quantised weights are not cut"),
        ("deterministic", settings.deterministic, "ranks add up in an order of their own"),
    ):
        if wrong:
            value = str(getattr(settings, name)).lower()
            raise BadSetting(
                f"{name} = {value} is not possible with tensor_parallel or pipeline_parallel "
                f"above 1: {why}",
                param=name,
            )
    if settings.kernels == "auto":
        _logger.info("native_not_used", extra={"fields": {"obstacle": "the model is partitioned"}})


def pick_devices(asked: str, layout: Layout) -> list[torch.device]:
    """A device for each rank. Raises BadSetting if there are fewer GPUs than ranks."""
    device = pick_device(asked)
    if device.type != "cuda":
        return [device] * layout.ranks
    if torch.cuda.device_count() < layout.ranks:
        raise BadSetting(
            f"tensor_parallel = {layout.tensor} times pipeline_parallel = {layout.pipeline} needs "
            f"{layout.ranks} GPUs, and PyTorch finds {torch.cuda.device_count()}; lower them, or "
            "set device = cpu",
            param="tensor_parallel",
        )
    return [torch.device("cuda", rank) for rank in range(layout.ranks)]


def largest_part(shape: Shape, layout: Layout) -> Shape:
    """The shape of the rank whose cache needs the most memory per token: all ranks have as many
    blocks as that one has room for."""
    stages = [layout.at(rank).layers(shape.layers) for rank in range(layout.ranks)]
    begin, end = max(stages, key=lambda span: span[1] - span[0])
    first, last = layout.at(0).key_heads(shape.kv_heads)
    return replace(shape, windows=shape.windows[begin:end], kv_heads=last - first)


@dataclass(frozen=True, slots=True)
class _Planned:
    """Stands for ranks that are not there yet: enough to cut a network for one of them."""

    place: Place


def _cache_mb(
    folder: Path,
    settings: EngineSettings,
    layout: Layout,
    devices: list[torch.device],
    dtype: torch.dtype,
) -> int:
    """The cache's memory in each process, MiB: what the fullest one has room for. Raises
    BadSetting."""
    choice = Choice(dtype, str(dtype).removeprefix("torch."))
    found: list[int] = []
    for rank, device in enumerate(devices):
        model = build_network(folder)[2]
        split(model, cast(Ranks, _Planned(layout.at(rank))))
        found.append(cache_mb(model, settings, choice, device))
    return min(found)


def _start_ranks(
    team: Team, start: Start, layout: Layout, devices: list[torch.device]
) -> DistributedRanks:
    """All ranks, and this one, when they have found each other."""
    _raise_if_failed(team)  # the others have PyTorch now, so nobody waits long for anybody
    for rank in range(1, layout.ranks):
        store, device = str(team.store), str(devices[rank])
        team.tell_one(rank, msgspec.structs.replace(start, store=store, rank=rank, device=device))
    return DistributedRanks(layout.at(0), devices[0], team.store)


def _load_parts(
    team: Team,
    start: Start,
    ranks: Ranks,
    dtype: torch.dtype,
    device: torch.device,
    tell: Progress,
) -> Part:
    part = read_part(
        Path(start.folder),
        ranks,
        dtype,
        device,
        start.max_model_len,
        lambda share: tell(0.1 + 0.7 * share, "loading the weights"),
    )
    tell(0.8, "waiting for the other ranks")
    _raise_if_failed(team)
    return part


def _raise_if_failed(team: Team) -> None:
    fault = team.collect()
    if fault is not None:
        raise fault
