"""The gateways of the benchmark: ours, and peers where they are installed.

nginx is taken from PATH; LiteLLM from the command that CLOUDLM_BENCH_LITELLM names. Every one gets
one worker and no retries; peers keep no keys or accounts unless they must.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cloudlm.core.deployment import DeploymentSpec, Endpoint
from cloudlm.core.tenant import Role
from cloudlm.security.keys import mint
from cloudlm.state.home import Home, load_settings
from cloudlm.state.open import open_state

FAST, SLOW = "bench", "bench-slow"
_PEERS = Path(__file__).parent / "peers"


@dataclass
class Contender:
    """How a gateway is started and asked. ``port`` leads to the fast mock, ``slow_port`` to the
    slow one; they are one where the model's name decides."""

    name: str
    command: list[str]
    port: int
    slow_port: int
    ready: str
    key: str = "sk-bench"
    environment: dict[str, str] = field(default_factory=dict)
    home: Home | None = None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ours(name: str, folder: Path, fast: int, slow: int, source: str = "") -> Contender:
    """Our gateway with all its duties; ``source`` is the ``src`` of another checkout."""
    return deployed(name, folder, {FAST: [fast], SLOW: [slow]}, source=source)


def deployed(
    name: str,
    folder: Path,
    models: Mapping[str, Sequence[int]],
    *,
    source: str = "",
    settings: Mapping[str, str] | None = None,
) -> Contender:
    """Our gateway over models with replicas at these ports. ``settings`` are more variables of its
    environment."""
    home, port = Home(folder).ensure(), free_port()
    environment = {
        "CLOUDLM_HOME": str(folder),
        "CLOUDLM_GATEWAY_PORT": str(port),
        "CLOUDLM_LOG_LEVEL": "warning",
        **(settings or {}),
    }
    if source:
        environment["PYTHONPATH"] = source
    return Contender(
        name,
        [sys.executable, "-m", "cloudlm.gateway"],
        port,
        port,
        "/readyz",
        key=asyncio.run(_prepare(home, models)),
        environment=environment,
        home=home,
    )


async def _prepare(home: Home, models: Mapping[str, Sequence[int]]) -> str:
    """Deploy mocks under these names and make a key; the key."""
    settings, _ = load_settings({"home": str(home.path)}, {})
    state = await open_state(home.state_url(settings))
    now = time.time()
    for model, ports in models.items():
        await state.put_deployment(DeploymentSpec(model, "models:/bench/1"), now=now)
        await state.put_endpoints(
            model,
            [
                Endpoint(model, f"{model}-r1-{number}", f"http://127.0.0.1:{port}", 1)
                for number, port in enumerate(ports)
            ],
        )
    minted = mint("bench", Role.USER, home.pepper(), now)
    await state.put_key(minted.record)
    await state.close()
    return minted.text


def peers(folder: Path, fast: int, slow: int) -> list[Contender]:
    """Those that are installed."""
    found: list[Contender] = []
    if shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin"):
        port, second = free_port(), free_port()
        conf = _written(folder, "nginx.conf", FAST=fast, SLOW=slow, PORT=port, SECOND=second)
        nginx = shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin") or "nginx"
        found.append(Contender("nginx", [nginx, "-c", conf], port, second, "/_stats"))
    litellm = os.environ.get("CLOUDLM_BENCH_LITELLM")
    if litellm:
        port = free_port()
        conf = _written(folder, "litellm.yaml", FAST=fast, SLOW=slow)
        command = [litellm, "--config", conf, "--host", "127.0.0.1", "--port", str(port)]
        environment = {
            "LITELLM_LOG": "ERROR",
            "LITELLM_TELEMETRY": "False",
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            "LITELLM_MODE": "PRODUCTION",
        }
        one = [*command, "--num_workers", "1", "--telemetry", "False"]
        ready = "/health/liveliness"
        found.append(Contender("litellm", one, port, port, ready, environment=environment))
    return found


def _written(folder: Path, name: str, **values: object) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    text = (_PEERS / name).read_text()
    for word, value in {"FOLDER": folder, **values}.items():
        text = text.replace(word, str(value))
    path = folder / name
    path.write_text(text)
    return str(path)
