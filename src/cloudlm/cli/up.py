"""``cloudlm up``: gateway, control and the starter model on this machine, until Ctrl-C."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from cloudlm.cli import connect
from cloudlm.cli.options import Json, absolute
from cloudlm.cli.screen import bytes_bar, out, print_json, print_marked, say, spinner
from cloudlm.cli.stack import Addresses, Stack, demand_free_port, free_port
from cloudlm.core.clock import SystemClock
from cloudlm.core.deployment import DeploymentPhase, DeploymentSpec, DeploymentStatus
from cloudlm.core.errors import BadSetting, Unavailable
from cloudlm.core.settings import Settings, environment_name
from cloudlm.security.tls import pinned_context
from cloudlm.security.transport import (
    CONTROL_SELF_SIGNED,
    SELF_SIGNED,
    gateway_pair,
    own_context,
    own_pair,
)
from cloudlm.state.home import Home, load_settings

READY_TIMEOUT_S = 300.0
_POLL_S = 0.1


@dataclass(frozen=True)
class Running:
    """What ``up`` started: addresses without a trailing slash, and the key if it is new."""

    gateway_url: str
    control_url: str
    admin_key: str | None
    starter: str | None
    status: DeploymentStatus | None
    trust: Path | None = None
    """The certificate that clients must be told to trust, if it is one for development."""
    control_trust: str | None = None
    """The same of the control API; the commands of this home trust it by themselves."""


def up(
    gateway_port: Annotated[
        int | None, typer.Option("--gateway-port", "--port", help="Port of the OpenAI API.")
    ] = None,
    control_port: Annotated[
        int | None, typer.Option("--control-port", help="Port of the control API.")
    ] = None,
    host: Annotated[str | None, typer.Option("--host", help="Address to listen on.")] = None,
    tls: Annotated[
        str | None,
        typer.Option(
            "--tls",
            metavar="self-signed|auto|off",
            help="self-signed: TLS with a certificate for development, made in home.",
        ),
    ] = None,
    tls_cert: Annotated[
        str | None,
        typer.Option("--tls-cert", "--ssl-certfile", help="PEM file of the gateway's certificate."),
    ] = None,
    tls_key: Annotated[
        str | None, typer.Option("--tls-key", "--ssl-keyfile", help="PEM file of its private key.")
    ] = None,
    control_tls: Annotated[
        str | None,
        typer.Option(
            "--control-tls",
            metavar="self-signed|auto|off",
            help="The same for the control API; its certificate is in control.tls_cert.",
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", help="Gateway processes on the one port.")
    ] = None,
    starter: Annotated[
        bool, typer.Option("--starter/--no-starter", help="Deploy the starter model.")
    ] = True,
    json_output: Json = False,
) -> None:
    """Run gateway and control with the starter model until Ctrl-C."""
    flags: dict[str, Any] = {
        "gateway.port": gateway_port,
        "control.port": control_port,
        "gateway.host": host,
        "gateway.tls": tls,
        "gateway.tls_cert": absolute(tls_cert),
        "gateway.tls_key": absolute(tls_key),
        "gateway.workers": workers,
        "control.tls": control_tls,
    }
    with running_stack(flags, starter=starter) as (running, stack):
        if json_output:
            print_json(_as_json(running))
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
    pair = gateway_pair(settings.gateway, home.tls, time.time())
    if pair is not None:
        _ = own_context(settings.gateway, pair)  # a bad file refuses before anything starts
    controls = own_pair("control", settings.control, home.tls, time.time())
    if controls is not None:
        _ = own_context(settings.control, controls)
    gateway_port, control_port = _choose_ports(settings)
    given = {environment_name(name): str(value) for name, value in flags.items() if value}
    environment = {
        **os.environ,
        **given,
        "CLOUDLM_HOME": str(home.path),
        "CLOUDLM_GATEWAY_HOST": settings.gateway.host,
        "CLOUDLM_GATEWAY_PORT": str(gateway_port),
        "CLOUDLM_CONTROL_PORT": str(control_port),
    }
    gateway_url = connect.gateway_url(settings.gateway, gateway_port)
    own = pinned_context(str(pair.files[0])) if pair is not None else None
    controls_own = pinned_context(str(controls.files[0])) if controls is not None else None
    control_url = connect.control_url(settings.control, control_port)
    with _terminate_as_interrupt(), Stack(home, environment) as stack:
        admin_key, name = asyncio.run(_prepare(settings, home, starter))
        with _key_shown_on_failure(admin_key):
            with spinner("starting gateway and control"):
                stack.start("gateway", "cloudlm.gateway", settings.gateway.drain_timeout_s)
                stack.start("control", "cloudlm.control", settings.control.drain_timeout_s)
                stack.wait_ready("gateway", f"{gateway_url}/readyz", own)
                stack.wait_ready("control", f"{control_url}/readyz", controls_own)
            status = _wait_for_model(settings, home, stack, name) if name else None
            stack.announce(Addresses(gateway_url, control_url))
        trusted = home.tls / SELF_SIGNED if settings.gateway.tls == "self-signed" else None
        made = settings.control.tls == "self-signed"
        control_trust = str(home.tls / CONTROL_SELF_SIGNED) if made else None
        yield (
            Running(gateway_url, control_url, admin_key, name, status, trusted, control_trust),
            stack,
        )


@contextlib.contextmanager
def _key_shown_on_failure(admin_key: str | None) -> Iterator[None]:
    """A new key exists from now on; if the start fails, this is the only time to show it."""
    try:
        yield
    except BaseException:
        if admin_key is not None:
            say(f"the owner key was made all the same, shown only now: {admin_key}")
        raise


def _choose_ports(settings: Settings) -> tuple[int, int]:
    gateway, control = settings.gateway, settings.control
    if gateway.port == control.port != 0:
        raise BadSetting(
            f"gateway.port and control.port are both {gateway.port}; choose another with "
            "--gateway-port or --control-port"
        )
    chosen = []
    for what, host, port in (
        ("gateway", gateway.host, gateway.port),
        ("control", control.host, control.port),
    ):
        if port:
            demand_free_port(host, port, what)
        chosen.append(port or free_port(host, what))
    return chosen[0], chosen[1]


async def _prepare(settings: Settings, home: Home, starter: bool) -> tuple[str | None, str | None]:
    """Make the first owner key and, in an installation without deployments, the starter's.

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


def _wait_for_model(settings: Settings, home: Home, stack: Stack, name: str) -> DeploymentStatus:
    """Wait until the deployment is ready; says what it waits for."""
    with spinner(f"loading {name}") as update:
        return asyncio.run(_model_ready(settings, home, stack, name, update))


async def _model_ready(
    settings: Settings, home: Home, stack: Stack, name: str, update: Callable[[str], None]
) -> DeploymentStatus:
    from cloudlm.state.open import open_state

    deadline = time.monotonic() + READY_TIMEOUT_S
    message = "control said nothing about it"
    state = await open_state(home.state_url(settings))
    try:
        while time.monotonic() < deadline:
            stack.check("control")
            status = await state.get_status(name)
            if status is not None:
                message = status.message or status.phase
                update(message)
                if status.phase in (DeploymentPhase.READY, DeploymentPhase.SLEEPING):
                    return status
                if status.phase is DeploymentPhase.FAILED:
                    raise Unavailable(f"{name} does not start: {message}")
            await asyncio.sleep(_POLL_S)
    finally:
        await state.close()
    raise Unavailable(f"{name} was not ready within {READY_TIMEOUT_S:.0f} s: {message}")


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
    trusting = f"--cacert {running.trust} " if running.trust else ""
    return (
        f"curl {trusting}{running.gateway_url}/v1/chat/completions \\\n"
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
        "certificate": str(running.trust) if running.trust else None,
        "control_certificate": running.control_trust,
    }


def _print_running(running: Running) -> None:
    print_marked("cloudlm is up", "bold", "  (Ctrl-C stops it)")
    out.print(f"  OpenAI API   {running.gateway_url}/v1")
    out.print(f"  control API  {running.control_url}")
    if running.trust:
        out.print("  certificate  self-signed, for development; clients trust it with")
        out.print(f"               export SSL_CERT_FILE={running.trust}")
    if running.control_trust:
        out.print("  control's    self-signed too; elsewhere clients trust it with")
        out.print(f"               export CLOUDLM_CA={running.control_trust}")
    if running.starter and running.status:
        out.print(f"  model        {running.starter} ({running.status.phase})")
    if running.admin_key:
        out.print(f"  owner key    {running.admin_key}")
        out.print("               shown once and stored only as a hash: keep it\n")
        out.print(f"export CLOUDLM_API_KEY={running.admin_key}")
    else:
        out.print("  owner key    as shown at the first start")
    if running.starter:
        out.print(curl_line(running, "$CLOUDLM_API_KEY"))
