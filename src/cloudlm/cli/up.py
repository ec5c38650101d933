"""``cloudlm up``: gateway, control and the starter model on this machine, until Ctrl-C."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from cloudlm.cli.connect import local_url
from cloudlm.cli.screen import bytes_bar, out, print_json, say, spinner
from cloudlm.cli.stack import Stack, demand_free_port, free_port
from cloudlm.core.clock import SystemClock
from cloudlm.core.deployment import DeploymentPhase, DeploymentSpec, DeploymentStatus
from cloudlm.core.errors import Unavailable
from cloudlm.core.settings import Settings
from cloudlm.state.home import Home, load_settings

READY_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Running:
    """What ``up`` started: addresses without a trailing slash, and the key if it is new."""

    gateway_url: str
    control_url: str
    admin_key: str | None
    starter: str | None
    status: DeploymentStatus | None


def add_to(app: typer.Typer) -> None:
    app.command("up")(up)


def up(
    gateway_port: Annotated[
        int | None, typer.Option("--gateway-port", "--port", help="Port of the OpenAI API.")
    ] = None,
    control_port: Annotated[
        int | None, typer.Option("--control-port", help="Port of the control API.")
    ] = None,
    host: Annotated[str | None, typer.Option("--host", help="Address to listen on.")] = None,
    starter: Annotated[
        bool, typer.Option("--starter/--no-starter", help="Deploy the starter model.")
    ] = True,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Run gateway and control with the starter model until Ctrl-C."""
    flags: dict[str, Any] = {
        "gateway.port": gateway_port,
        "control.port": control_port,
        "gateway.host": host,
    }
    with running_stack(flags, starter=starter) as (running, stack):
        if json_output:
            print_json(_as_json(running))
            sys.stdout.flush()
        else:
            _print_running(running)
        stopped = stop_signal(stack)
        stack.wait_until(stopped)
        say("stopping (Ctrl-C again to stop at once)")


@contextlib.contextmanager
def running_stack(flags: dict[str, Any], *, starter: bool) -> Iterator[tuple[Running, Stack]]:
    """Start everything and hand it out when it is ready; leaving stops everything.

    Raises Conflict (port or home in use), StorageFailed, BadSetting, Unavailable (a process or
    the starter model does not start).
    """
    settings, _ = load_settings(flags)
    home = Home(settings.home).ensure()
    gateway_port, control_port = _choose_ports(settings)
    environment = {
        **os.environ,
        "CLOUDLM_HOME": str(home.path),
        "CLOUDLM_GATEWAY_HOST": settings.gateway.host,
        "CLOUDLM_GATEWAY_PORT": str(gateway_port),
        "CLOUDLM_CONTROL_PORT": str(control_port),
    }
    gateway_url = local_url(settings.gateway.host, gateway_port)
    control_url = local_url(settings.control.host, control_port)
    with _terminate_as_interrupt(), Stack(home, environment) as stack:
        admin_key, name = asyncio.run(_prepare(settings, home, starter))
        with spinner("starting gateway and control"):
            stack.start("gateway", "cloudlm.gateway", settings.gateway.drain_timeout_s)
            stack.start("control", "cloudlm.control", settings.control.drain_timeout_s)
            stack.wait_ready("gateway", f"{gateway_url}/readyz")
            stack.wait_ready("control", f"{control_url}/readyz")
        status = _wait_for_model(settings, home, stack, name) if name else None
        yield Running(gateway_url, control_url, admin_key, name, status), stack


def _choose_ports(settings: Settings) -> tuple[int, int]:
    chosen = []
    for what, host, port in (
        ("gateway", settings.gateway.host, settings.gateway.port),
        ("control", settings.control.host, settings.control.port),
    ):
        if port:
            demand_free_port(host, port, what)
        chosen.append(port or free_port(host))
    return chosen[0], chosen[1]


async def _prepare(settings: Settings, home: Home, starter: bool) -> tuple[str | None, str | None]:
    """Make the first admin key and, in an installation without deployments, the starter's.

    Returns the key if it is new, and the starter's name if it is deployed.
    """
    from cloudlm.control.first_key import ensure_admin_key
    from cloudlm.registry.bundled import BUNDLED
    from cloudlm.state.open import open_state

    clock = SystemClock()
    state = await open_state(home.state_url(settings))
    try:
        admin_key = await ensure_admin_key(state, home.pepper(), clock)
        home.worker_token()
        deployments = await state.list_deployments()
        if starter and not deployments:
            model = await asyncio.to_thread(_register_starter, settings, home)
            spec = DeploymentSpec(name=BUNDLED, model=model)
            deployments = [await state.put_deployment(spec, now=clock.now())]
        deployed = any(deployment.spec.name == BUNDLED for deployment in deployments)
        return admin_key, BUNDLED if deployed else None
    finally:
        await state.close()


def _register_starter(settings: Settings, home: Home) -> str:
    from cloudlm.registry.bundled import ensure_bundled
    from cloudlm.registry.registry import open_registry

    registry = open_registry(
        home.registry_url(settings),
        home=home.path,
        settings=settings.registry,
        clock=SystemClock(),
    )
    with bytes_bar("registering the starter model"):
        manifest = ensure_bundled(registry)
    return f"models:/{manifest.name}@champion"


def _wait_for_model(
    settings: Settings, home: Home, stack: Stack, name: str
) -> DeploymentStatus | None:
    """Wait until the deployment is ready; says what it waits for."""
    deadline = time.monotonic() + READY_TIMEOUT_S
    with spinner(f"loading {name}") as update:
        while time.monotonic() < deadline:
            stack.check("control")
            status = asyncio.run(_read_status(settings, home, name))
            if status is not None:
                update(status.message or status.phase)
                if status.phase is DeploymentPhase.READY:
                    return status
                if status.phase is DeploymentPhase.FAILED:
                    raise Unavailable(f"{name} does not start: {status.message}")
            time.sleep(0.1)
    raise Unavailable(f"{name} was not ready within {READY_TIMEOUT_S:.0f} s")


async def _read_status(settings: Settings, home: Home, name: str) -> DeploymentStatus | None:
    from cloudlm.state.open import open_state

    state = await open_state(home.state_url(settings))
    try:
        return await state.get_status(name)
    finally:
        await state.close()


@contextlib.contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """While starting, SIGTERM ends like Ctrl-C: orderly."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def stop_signal(stack: Stack) -> Callable[[], bool]:
    """True after the first SIGINT or SIGTERM; a second one stops without waiting."""
    seen: list[int] = []

    def note(number: int, _: object) -> None:
        seen.append(number)
        if len(seen) > 1:
            stack.hurry()

    signal.signal(signal.SIGINT, note)
    signal.signal(signal.SIGTERM, note)
    return lambda: bool(seen)


def curl_line(running: Running, key: str) -> str:
    """A request that a person can paste."""
    body = (
        f'{{"model": "{running.starter}", '
        '"messages": [{"role": "user", "content": "My card has not arrived yet"}]}'
    )
    return (
        f"curl {running.gateway_url}/v1/chat/completions \\\n"
        f'  -H "Authorization: Bearer {key}" -H "Content-Type: application/json" \\\n'
        f"  -d '{body}'"
    )


def _as_json(running: Running) -> dict[str, Any]:
    return {
        "gateway_url": running.gateway_url,
        "openai_base_url": f"{running.gateway_url}/v1",
        "control_url": running.control_url,
        "admin_key": running.admin_key,
        "model": running.starter,
        "phase": running.status.phase if running.status else None,
    }


def _print_running(running: Running) -> None:
    out.print("[bold]cloudlm is up[/]  (Ctrl-C stops it)")
    out.print(f"  OpenAI API   {running.gateway_url}/v1")
    out.print(f"  control API  {running.control_url}")
    if running.starter and running.status:
        out.print(f"  model        {running.starter} ({running.status.phase})")
    if running.admin_key:
        out.print(f"  admin key    {running.admin_key}", markup=False)
        out.print("               shown once and stored only as a hash: keep it\n")
        out.print(f"export CLOUDLM_API_KEY={running.admin_key}", markup=False)
    else:
        out.print("  admin key    as shown at the first start")
    if running.starter:
        out.print(curl_line(running, "$CLOUDLM_API_KEY"), markup=False)
