"""The GPU path beside `transformers` generate and beside the memory's bandwidth.

    python bench/engine/gpu.py [--precision bfloat16] [--batch 1 16 64 256] [--json gpu.json]

Random weights in the shape of Llama 3.1 8B, made on the device; nothing is downloaded. Per batch
size: requests of 128 tokens in and 128 out, greedy, through scheduler, cache and sampling; the
whole time, and that of decoding alone (whole minus a run that stops at the first token). The limit
is what a step must read (weights and the keys and values of all sequences) at the bandwidth of a
copy measured in the same run. Prints a table, and JSON where --json says. --device cpu --shape
tiny tries the script out without a GPU; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

BLOCK_SIZE = 16
SHAPES: dict[str, dict[str, Any]] = {
    "llama-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rope_theta": 10000.0,
    },
}
Generate = Callable[[list[list[int]], int], None]


class Words:
    """A tokenizer that shows nothing: text costs no time here."""

    def detokenizer(self, prompt_ids: list[int]) -> Words:
        return self

    def push(self, token_ids: list[int]) -> str:
        return ""

    def flush(self) -> str:
        return ""


def main() -> int:
    options = _options()
    shape = SHAPES[options.shape]
    if options.device == "cuda":
        from cloudlm.engine.load import pick_device

        pick_device("cuda")  # says what is missing
    bandwidth = _bandwidth(options.device)
    rows: dict[int, dict[str, Any]] = {batch: {"batch": batch} for batch in options.batch}
    if not options.no_peer:
        _measure_all(_transformers(shape, options), shape, options, rows, "transformers")
    ours, weights_bytes, close = _cloudlm(shape, options)
    _measure_all(ours, shape, options, rows, "cloudlm")
    close()
    for row in rows.values():
        _add_ratios(row, shape, weights_bytes, bandwidth, options)
    _print(rows.values(), bandwidth, options)
    if options.json:
        result = {**_facts(options), "bandwidth_gb_s": bandwidth / 1e9, "rows": list(rows.values())}
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="GPU benchmark")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--shape", default="llama-8b", choices=tuple(SHAPES))
    parser.add_argument("--precision", default="bfloat16", choices=("bfloat16", "int8", "int4"))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--input", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--output", type=int, default=128, help="tokens generated per request")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-peer", action="store_true", help="leave transformers out")
    parser.add_argument("--no-graphs", action="store_true", help="decode without CUDA graphs")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    if min(options.batch) < 1 or options.rounds < 1 or options.input < 1 or options.output < 2:
        parser.error("--batch, --rounds and --input are at least 1, --output at least 2")
    longest = SHAPES[options.shape]["max_position_embeddings"]
    if options.input + options.output > longest:
        parser.error(f"--input and --output together are at most {longest} tokens")
    return options


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _bandwidth(device: str) -> float:
    """Bytes per second that a copy reads and writes, median of ten."""
    size = 2 * 2**30 if device == "cuda" else 2**26
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    seconds = []
    for _ in range(12):
        _wait(device)
        began = time.perf_counter()
        target.copy_(source)
        _wait(device)
        seconds.append(time.perf_counter() - began)
    return 2 * size / statistics.median(seconds[2:])


def _cloudlm(
    shape: dict[str, Any], options: argparse.Namespace
) -> tuple[Generate, int, Callable[[], None]]:
    """Our engine, the bytes of its weights that a step reads, and how to end it."""
    from cloudlm.core.chat import Sampling
    from cloudlm.engine.api import GenerateRequest
    from cloudlm.engine.engine import LocalEngine
    from cloudlm.engine.runner import Runner, RunnerFacts

    most = max(options.batch)
    longest = options.input + options.output
    num_blocks = most * (-(-longest // BLOCK_SIZE) + 1)
    model = _random_decoder(shape, options.device)
    weights_bytes = _weights_bytes(model, options.precision)
    facts = RunnerFacts("LlamaForCausalLM", longest, num_blocks, BLOCK_SIZE)
    runner = Runner(model, facts, make_path=_path_maker(options, num_blocks, longest, most))
    engine = LocalEngine.start(
        runner,
        Words(),  # type: ignore[arg-type]
        max_batch_tokens=8192,
        max_batch_sequences=most,
        max_waiting=most,
    )
    loop = asyncio.new_event_loop()
    numbers = iter(range(10**9))

    async def one(prompt: list[int], count: int) -> None:
        sampling = Sampling(temperature=0.0, max_tokens=count, ignore_eos=True)
        request = GenerateRequest(f"r{next(numbers)}", tuple(prompt), sampling)
        got = sum([len(event.token_ids) async for event in engine.submit(request)])
        assert got == count, f"{got} tokens in the place of {count}"

    async def everyone(prompts: list[list[int]], count: int) -> None:
        await asyncio.gather(*(one(prompt, count) for prompt in prompts))

    def close() -> None:
        loop.run_until_complete(engine.close())
        loop.close()

    def generate(prompts: list[list[int]], count: int) -> None:
        loop.run_until_complete(everyone(prompts, count))

    return generate, weights_bytes, close


def _random_decoder(shape: dict[str, Any], device: str) -> Any:
    from cloudlm.engine.architectures import find_architecture
    from cloudlm.engine.architectures.config import ModelConfig

    _, architecture = find_architecture(["LlamaForCausalLM"])
    with torch.device("meta"):
        model = architecture.from_config(ModelConfig(shape)).to(torch.bfloat16)
    model = model.to_empty(device=device).requires_grad_(False)
    _fill(model)
    return model


def _fill(model: Any) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.02)
            else:
                parameter.fill_(1.0)


def _path_maker(options: argparse.Namespace, num_blocks: int, longest: int, most: int) -> Any:
    from cloudlm.engine.gpu.accelerator import CudaAccelerator, HostAccelerator
    from cloudlm.engine.gpu.graphs import graph_sizes
    from cloudlm.engine.paths.gpu_choice import make_operations, triton_obstacle
    from cloudlm.engine.paths.gpu_path import GpuFacts, GpuPath

    on_gpu = options.device == "cuda"
    if on_gpu and triton_obstacle() is not None:
        sys.exit(f"gpu.py: {triton_obstacle()}")
    sizes = () if options.no_graphs or not on_gpu else graph_sizes(most)
    facts = GpuFacts(options.precision, num_blocks, BLOCK_SIZE, longest, sizes)

    def make(model: Any) -> GpuPath:
        accelerator = CudaAccelerator(torch.device("cuda")) if on_gpu else HostAccelerator()
        operations = make_operations("triton" if on_gpu else "torch", accelerator)
        return GpuPath(model, operations, accelerator, facts)

    return make


def _weights_bytes(model: Any, precision: str) -> int:
    """What a step reads of the weights: all but the embeddings, which are looked up."""
    from cloudlm.engine.paths.gpu_path import memory_load

    load = memory_load(model, precision, torch.bfloat16, batch_tokens=0, batch_sequences=0)
    embeddings = model.model.embed_tokens.weight.numel() * 2
    # A quantised head takes the place of the one in full that is counted with the embeddings.
    again = embeddings if precision != "bfloat16" else 0
    return int(load.weights_bytes - embeddings - again)


def _transformers(shape: dict[str, Any], options: argparse.Namespace) -> Generate:
    import transformers

    values = {**shape, "rope_parameters": {"rope_type": "default"}}
    values["rope_parameters"]["rope_theta"] = values.pop("rope_theta")
    config = transformers.LlamaConfig(
        **values, eos_token_id=None, bos_token_id=None, pad_token_id=0, tie_word_embeddings=False
    )
    with torch.device(options.device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    _fill(model)

    def generate(prompts: list[list[int]], count: int) -> None:
        ids = torch.tensor(prompts, device=options.device)
        with torch.inference_mode():
            answer = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=count,
                max_new_tokens=count,
            )
        assert answer.shape == (len(prompts), len(prompts[0]) + count)

    return generate


def _measure_all(
    generate: Generate,
    shape: dict[str, Any],
    options: argparse.Namespace,
    rows: dict[int, dict[str, Any]],
    name: str,
) -> None:
    chance = random.Random(1)
    vocabulary = shape["vocab_size"]

    def seconds(batch: int, count: int) -> float:
        # New prompts every time: nothing is found in the prefix cache.
        prompts = [
            [chance.randrange(vocabulary) for _ in range(options.input)] for _ in range(batch)
        ]
        _wait(options.device)
        began = time.perf_counter()
        generate(prompts, count)
        _wait(options.device)
        return time.perf_counter() - began

    for batch in options.batch:
        seconds(batch, options.output)  # warms up
        whole = [seconds(batch, options.output) for _ in range(options.rounds)]
        first = statistics.median(seconds(batch, 1) for _ in range(options.rounds))
        spent = statistics.median(whole)
        # On a machine too noisy for so short a run the difference may come out as nothing.
        decoding = max(spent - first, 1e-9)
        rows[batch][name] = {
            "tokens_s": batch * options.output / spent,
            "decode_tokens_s": batch * (options.output - 1) / decoding,
            "whole_s": whole,
            "first_token_s": first,
        }
        print(
            f"{name}: batch {batch}: {batch * options.output / spent:.1f} tokens/s", file=sys.stderr
        )


def _add_ratios(
    row: dict[str, Any],
    shape: dict[str, Any],
    weights_bytes: int,
    bandwidth: float,
    options: argparse.Namespace,
) -> None:
    head_dim = shape["hidden_size"] // shape["num_attention_heads"]
    per_token = 2 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * head_dim * 2
    seen = row["batch"] * (options.input + options.output / 2) * per_token
    row["limit_tokens_s"] = row["batch"] * bandwidth / (weights_bytes + seen)
    row["share_of_limit"] = row["cloudlm"]["decode_tokens_s"] / row["limit_tokens_s"]
    if "transformers" in row:
        row["ratio"] = row["cloudlm"]["tokens_s"] / row["transformers"]["tokens_s"]


def _facts(options: argparse.Namespace) -> dict[str, Any]:
    device = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    return {
        "device": device,
        "torch": torch.__version__,
        "shape": options.shape,
        "precision": options.precision,
        "graphs": options.device == "cuda" and not options.no_graphs,
        "input": options.input,
        "output": options.output,
    }


def _print(rows: Any, bandwidth: float, options: argparse.Namespace) -> None:
    facts = ", ".join(f"{name} {value}" for name, value in _facts(options).items())
    print(f"{facts}; copy bandwidth {bandwidth / 1e9:.0f} GB/s\n")
    print("| batch | cloudlm | transformers | ratio | decoding | limit | share of limit |")
    print("|--:|--:|--:|--:|--:|--:|--:|")
    for row in rows:
        ours, peer = row["cloudlm"], row.get("transformers")
        beside = f"{peer['tokens_s']:,.1f} | {row['ratio']:.2f}" if peer else "– | –"
        print(
            f"| {row['batch']} | {ours['tokens_s']:,.1f} | {beside} | "
            f"{ours['decode_tokens_s']:,.1f} | {row['limit_tokens_s']:,.1f} | "
            f"{row['share_of_limit']:.2f} |"
        )


if __name__ == "__main__":
    sys.exit(main())
