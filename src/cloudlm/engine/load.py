"""From a model folder to a running engine. The one place that knows all parts of the engine."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from cloudlm.core.errors import BadSetting, UnsafeModel, UnsupportedModel
from cloudlm.core.settings import EngineSettings
from cloudlm.engine.architectures import find_architecture
from cloudlm.engine.architectures.base import Decoder, Shape
from cloudlm.engine.architectures.config import ModelConfig, read_json
from cloudlm.engine.formats.base import Checkpoint
from cloudlm.engine.formats.opening import open_checkpoint
from cloudlm.engine.kept_weights import packed_file
from cloudlm.engine.ops.cache import block_size_bytes
from cloudlm.engine.paths.base import ComputePath
from cloudlm.engine.paths.choice import Choice, choose_path
from cloudlm.engine.paths.gpu_choice import cuda_obstacle
from cloudlm.engine.paths.native_path import NativePath, native_block_size
from cloudlm.engine.runner import Runner, RunnerFacts, Source
from cloudlm.engine.speculate import Lookup
from cloudlm.engine.step import Pooling
from cloudlm.engine.tokens import Tokenizer
from cloudlm.engine.weights import load_weights

if TYPE_CHECKING:
    from cloudlm.engine.engine import LocalEngine

_logger = logging.getLogger(__name__)
Progress = Callable[[float, str], None]
_CPU_CACHE_MB = 512
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Below this size a CPU computes float32 faster than half precision, and memory does not matter.
_SMALL_PARAMETERS = 50_000_000
# Below this size a step is so short that threads wait for each other longer than they work, above
# all on a machine that has other work too.
_ONE_THREAD_PARAMETERS = 20_000_000


def load_engine(
    folder: Path,
    settings: EngineSettings,
    *,
    max_waiting: int,
    progress: Progress | None = None,
    stored_precision: str = "",
) -> LocalEngine:
    """Load the model of ``folder`` (Hugging Face layout, safetensors) and start its engine.

    ``max_waiting`` is the longest queue. ``progress`` is told the share that is done (0 to 1) and
    what is being done. ``stored_precision`` is what the manifest says that the weights are held in:
    it decides where the settings leave ``precision`` and ``dtype`` at auto; empty leaves it to
    config.json. Raises BrokenModel and its kinds naming file and fault, BadSetting.
    """
    from cloudlm.engine.engine import LocalEngine

    tell = progress or (lambda share, what: None)
    lookup = lookup_of(settings)
    tell(0.0, "reading the configuration")
    tokenizer = Tokenizer(folder)
    runner = load_runner(folder, settings, tokenizer.eos_token_ids, tell, stored_precision)
    engine = LocalEngine.start(
        runner,
        tokenizer,
        max_batch_tokens=settings.max_batch_tokens,
        max_batch_sequences=settings.max_batch_sequences,
        max_waiting=max_waiting,
        pooling=Pooling(settings.pooling),
        lookup=lookup,
    )
    runner.when_lost(engine.fail)
    tell(1.0, "ready")
    return engine


def load_runner(
    folder: Path,
    settings: EngineSettings,
    eos_token_ids: tuple[int, ...],
    tell: Progress,
    stored_precision: str = "",
) -> Runner:
    """The model of ``folder`` with its cache, tried out once. See ``load_engine``."""
    if settings.tensor_parallel * settings.pipeline_parallel > 1:
        from cloudlm.engine.parallel.loading import load_leader

        return load_leader(folder, settings, eos_token_ids, tell, stored_precision)
    name, config, model = build_network(folder)
    checkpoint = open_checkpoint(folder)
    device = pick_device(settings.device)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    threads = pick_threads(settings.threads, parameters)
    torch.set_num_threads(threads)
    tell(0.02, "building kernels")
    choice = choose_path(
        model,
        settings,
        parameters=parameters,
        device=device,
        pick_dtype=lambda asked: pick_dtype(asked, config, parameters, device, stored_precision),
        threads=threads,
        stored=checkpoint.precision,
    )
    if choice.kernels is not None:
        settings = replace(settings, block_size=native_block_size(settings.block_size))
    if not settings.kv_cache_mb:
        settings = replace(settings, kv_cache_mb=cache_mb(model, settings, choice, device))
    num_blocks, max_model_len = plan_cache(model.shape, settings, choice.dtype)

    packed = choice.kernels is not None or bool(choice.operations)

    def read(network: Decoder, checkpoint: Checkpoint, told: Progress) -> Decoder:
        network.limit(max_model_len)
        kept = load_weights(
            network,
            checkpoint,
            dtype=choice.dtype,
            device=torch.device("cpu") if packed else device,
            progress=lambda share: told(0.05 + 0.55 * share, "loading the weights"),
            copy=not packed,  # packing copies
            keep_codes=choice.stored != "",
        )
        if checkpoint.quantisation:
            _tell_of_quantisation(checkpoint, kept, choice.dtype)
        return network

    read(model, checkpoint, tell)

    def on_kernels(loaded: Decoder) -> ComputePath:
        if choice.kernels is None:
            return _on_gpu(
                loaded,
                choice,
                device,
                settings,
                (num_blocks, max_model_len),
                lambda share: tell(0.6 + 0.3 * share, "packing the weights, recording graphs"),
            )
        torch.set_num_threads(1)  # the kernels' own threads must not be disturbed
        return NativePath(
            loaded,
            choice.kernels,
            choice.precision,
            num_blocks,
            settings.block_size,
            progress=lambda share: tell(0.6 + 0.3 * share, "packing the weights"),
            stored=choice.stored,
            kept=packed_file(folder, checkpoint, choice, settings.packed_cache_mb),
            deterministic=settings.deterministic,
        )

    facts = RunnerFacts(
        name,
        max_model_len,
        num_blocks,
        settings.block_size,
        eos_token_ids,
        deterministic=settings.deterministic,
    )

    def again() -> Decoder:
        return read(build_network(folder)[2], open_checkpoint(folder), lambda share, what: None)

    kept = packed_file(folder, checkpoint, choice, settings.packed_cache_mb)
    source = Source(again, (*checkpoint.files, *([] if kept is None else [kept.path])))
    runner = Runner(model, facts, source, on_kernels if packed else None)
    tell(0.9, "trying the model out")
    runner.check()
    return runner


def build_network(folder: Path) -> tuple[str, ModelConfig, Decoder]:
    """The architecture's name, the configuration, and the network without memory."""
    values = read_json(folder / "config.json")
    try:
        name, architecture = find_architecture(values.get("architectures"))
    except UnsupportedModel:
        if values.get("auto_map"):  # of no interest where the network is our own
            raise UnsafeModel(
                "config.json: auto_map asks for code of the model's own, which is not run"
            ) from None
        raise
    config = ModelConfig(values)
    with torch.device("meta"), _NoValues():
        return name, config, architecture.from_config(config)


class _NoValues(TorchFunctionMode):
    """Inside, new parameters get no first values. They would be overwritten anyway, and on the meta
    device drawing them makes PyTorch import its compiler, which takes seconds."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def _tell_of_quantisation(checkpoint: Checkpoint, kept: int, dtype: torch.dtype) -> None:
    """Whoever deploys a quantised file wants to know whether its memory stays as small."""
    fields = {"stored": checkpoint.quantisation, "kept": kept}
    if not kept:
        fields["dequantised_to"] = str(dtype).removeprefix("torch.")
    _logger.info("quantised_weights", extra={"fields": fields})


def _on_gpu(
    model: Decoder,
    choice: Choice,
    device: torch.device,
    settings: EngineSettings,
    sizes: tuple[int, int],
    progress: Callable[[float], None],
) -> ComputePath:
    """The path on the GPU; ``sizes`` are those of ``plan_cache``."""
    from cloudlm.engine.gpu.accelerator import CudaAccelerator
    from cloudlm.engine.gpu.graphs import graph_sizes
    from cloudlm.engine.paths.gpu_choice import make_operations
    from cloudlm.engine.paths.gpu_path import GpuFacts, GpuPath

    accelerator = CudaAccelerator(device)
    # PyTorch's operations gather a whole context per sequence when recorded: never worth it.
    recorded = settings.cuda_graphs and choice.operations == "triton"
    num_blocks, longest = sizes
    facts = GpuFacts(
        choice.precision,
        num_blocks,
        settings.block_size,
        longest,
        graph_sizes(settings.max_batch_sequences) if recorded else (),
    )
    return GpuPath(
        model, make_operations(choice.operations, accelerator), accelerator, facts, progress
    )


def cache_mb(model: Decoder, settings: EngineSettings, choice: Choice, device: torch.device) -> int:
    """The cache's memory, MiB, where the settings leave it to us. Raises BadSetting."""
    if device.type != "cuda":
        return _CPU_CACHE_MB
    from cloudlm.engine.gpu.budget import cache_bytes
    from cloudlm.engine.paths.gpu_path import memory_load

    load = memory_load(
        model,
        choice.precision,
        choice.dtype,
        batch_tokens=settings.max_batch_tokens,
        batch_sequences=settings.max_batch_sequences,
    )
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    share = settings.gpu_memory_utilization
    return max(1, cache_bytes(free_bytes, total_bytes, share, load) // 2**20)


def lookup_of(settings: EngineSettings) -> Lookup | None:
    """How tokens are guessed; None if they are not. Raises BadSetting."""
    if settings.speculative == "off":
        return None
    return Lookup(
        settings.num_speculative_tokens, settings.prompt_lookup_min, settings.prompt_lookup_max
    )


def pick_threads(asked: int, parameters: int) -> int:
    """CPU threads of a step; 0 is all cores, but one for a very small model."""
    if asked:
        return asked
    return 1 if parameters < _ONE_THREAD_PARAMETERS else len(os.sched_getaffinity(0))


def pick_device(asked: str) -> torch.device:
    """``auto`` is cuda if there is one. Raises BadSetting if cuda is asked for and missing."""
    obstacle = cuda_obstacle() if asked != "cpu" else None
    if asked == "cuda" and obstacle is not None:
        raise BadSetting(
            f"device cuda asked for, but this PyTorch has no CUDA: {obstacle}", param="device"
        )
    if asked == "auto":
        return torch.device("cpu" if obstacle else "cuda")
    return torch.device(asked)


def pick_dtype(
    asked: str, config: ModelConfig, parameters: int, device: torch.device, stored: str = ""
) -> torch.dtype:
    """``auto`` is the type that the weights are stored in; where that is none (they are quantised,
    or ``stored`` is empty), the one that the configuration names. But float32 for a small model on
    a CPU."""
    if asked != "auto":
        return _DTYPES[asked]
    if device.type == "cpu" and parameters < _SMALL_PARAMETERS:
        return torch.float32
    if stored in _DTYPES:
        return _DTYPES[stored]
    name = "dtype" if "dtype" in config else "torch_dtype"
    return _DTYPES[config.choice(name, "float32", _DTYPES)]


def plan_cache(shape: Shape, settings: EngineSettings, dtype: torch.dtype) -> tuple[int, int]:
    """Number of cache blocks and longest sequence (tokens) for these settings.

    ``max_model_len`` 0 takes the model's context, or what the cache holds if that is less. Raises
    BadSetting if an explicit length exceeds either, or not even one block fits.
    """
    size = block_size_bytes(
        shape.layers, shape.kv_heads, shape.head_dim, settings.block_size, dtype
    )
    num_blocks = settings.kv_cache_mb * 2**20 // size
    capacity = num_blocks * settings.block_size
    needed_mb = -(-size * -(-settings.max_model_len // settings.block_size) // 2**20)
    if num_blocks < 1:
        raise BadSetting(
            f"kv_cache_mb = {settings.kv_cache_mb} does not hold one block of {size} bytes; "
            f"set it to at least {-(-size // 2**20)}",
            param="kv_cache_mb",
        )
    if settings.max_model_len > shape.context:
        raise BadSetting(
            f"max_model_len = {settings.max_model_len} is more than the model's context of "
            f"{shape.context} tokens",
            param="max_model_len",
        )
    if settings.max_model_len > capacity:
        raise BadSetting(
            f"max_model_len = {settings.max_model_len} does not fit into kv_cache_mb = "
            f"{settings.kv_cache_mb}, which holds {capacity} tokens; set kv_cache_mb to at least "
            f"{needed_mb}",
            param="max_model_len",
        )
    return num_blocks, settings.max_model_len or min(shape.context, capacity)
