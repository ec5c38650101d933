"""The assembly of the control process: everything it is made of, joined once, visibly."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

import uvicorn

from cloudlm.control.api.app import build_api
from cloudlm.control.api.caller import Callers
from cloudlm.control.api.services import Services
from cloudlm.control.audit import Auditor
from cloudlm.control.budget import MemoryBudget, machine_bytes
from cloudlm.control.certificates import Certificates
from cloudlm.control.drivers import Drivers
from cloudlm.control.footprint import budget_of
from cloudlm.control.jobs import Jobs, import_kind
from cloudlm.control.leading import Leadership, holder_of
from cloudlm.control.metrics import ControlMetrics
from cloudlm.control.naps import HttpTurner
from cloudlm.control.observe import Observer
from cloudlm.control.people import open_people
from cloudlm.control.probe import HttpProber
from cloudlm.control.reconcile import Reconciler
from cloudlm.control.registry import Progress
from cloudlm.control.standby import Standby
from cloudlm.control.terms import Terms
from cloudlm.core.clock import Clock, SystemClock
from cloudlm.core.errors import BadSetting, Conflict, StorageFailed
from cloudlm.core.model import Manifest
from cloudlm.core.settings import ControlSettings, SettingRow, Settings
from cloudlm.drivers.base import DriverContext
from cloudlm.drivers.guard import lock_file
from cloudlm.registry.importer import import_address
from cloudlm.registry.registry import Registry, open_registry
from cloudlm.security.credentials import Credentials
from cloudlm.security.door import Door
from cloudlm.security.hosts import HostGuard
from cloudlm.security.policies import load_policies
from cloudlm.security.transport import replica_context
from cloudlm.state.base import State
from cloudlm.state.home import Home
from cloudlm.state.open import open_news, open_state
from cloudlm.telemetry.logs import get_logger

STOP_TIMEOUT_S = 5
# What a worker reads itself; all other settings are no business of it.
_WORKER_SETTINGS = ("engine.", "vllm.", "worker.", "log.", "registry.")
_log = get_logger("cloudlm.control")


async def serve(settings: Settings, rows: Sequence[SettingRow]) -> None:
    """Control until SIGTERM. Raises Conflict (another control, port in use), StorageFailed,
    BadSetting, Unavailable. Replicas go on: they end with the lifeline's owner."""
    home = Home(settings.home).ensure()
    with only_control_of(home), listening(settings.control) as listener:
        door = Door("control", settings.control, home.tls, SystemClock())
        state = await open_state(home.state_url(settings))
        registry = await asyncio.to_thread(
            open_registry, home.registry_url(settings), home=home.path, settings=settings.registry
        )
        try:
            async with running(settings, rows, home, state, registry) as services:
                await _answer(services, listener, door)
        finally:
            await asyncio.to_thread(registry.close)
            await state.close()


@contextlib.asynccontextmanager
async def running(
    settings: Settings,
    rows: Sequence[SettingRow],
    home: Home,
    state: State,
    registry: Registry,
) -> AsyncIterator[Services]:
    """The loop and the jobs at work, and what the API needs."""
    clock: Clock = SystemClock()
    certificates = Certificates(settings.worker, home, clock)
    made = await asyncio.to_thread(certificates.ensure)
    tls = replica_context(settings.gateway, home.tls)
    context = DriverContext(
        home=home.path,
        clock=clock,
        environment=dict(os.environ),
        worker_environment=worker_environment(settings, rows, home) | made,
        first_port=settings.worker.first_port,
    )
    drivers = Drivers(context)
    credentials = Credentials(home.credentials, os.environ)
    metrics = ControlMetrics()
    memory = MemoryBudget(
        registry,
        budget_of(settings.control.memory_budget, machine_bytes()),
        settings.control.min_residency_s,
        settings.engine,
    )

    def importer(source: str, name: str | None, alias: str | None, progress: Progress) -> Manifest:
        return import_address(registry, source, name, alias=alias, progress=progress)

    news = open_news(home.state_url(settings), clock)
    people = open_people(settings.oidc, state, clock)
    policies = load_policies(settings.access.policies)
    jobs = Jobs(state, clock, {"import": import_kind(importer)}, alone=False)
    async with (
        HttpProber(settings.control.probe_timeout_s, tls) as prober,
        HttpTurner(home.worker_token(), tls) as turner,
    ):
        leadership = Leadership(
            state, clock, metrics, holder_of(home.path), settings.control.lease_s
        )

        def reconciler(fenced: State, checked: Drivers) -> Reconciler:
            return Reconciler(
                fenced,
                checked,
                registry,
                prober,
                clock,
                settings.control,
                metrics,
                turner,
                credentials,
                memory,
                news,
                prober,
            )

        observer = Observer(drivers, prober, clock, settings.control.stall_timeout_s)
        standby = Standby(state, drivers, observer, clock, settings.control.drain_timeout_s)
        interval_s = settings.control.reconcile_interval_s
        terms = Terms(leadership, drivers, jobs, standby, interval_s, reconciler)
        loop = asyncio.create_task(terms.run())
        holding = asyncio.create_task(leadership.run())
        pepper = home.pepper()
        auditor = Auditor(state, clock, home.audit_seed(), home.audit_checkpoints)
        tending = [
            asyncio.create_task(run()) for run in (auditor.run, certificates.run, tls.follow)
        ]
        try:
            yield Services(
                state=state,
                registry=registry,
                drivers=drivers,
                reconciler=terms,
                jobs=jobs,
                metrics=metrics,
                pepper=pepper,
                clock=clock,
                callers=Callers(state, pepper, clock, people, policies),
                oidc=settings.oidc,
                auditor=auditor,
                credentials=credentials,
                guard=HostGuard(settings.control.host, settings.control.allowed_origins),
                leadership=leadership,
                memory=memory,
            )
        finally:
            # The lease goes last of these: nothing acts any more when another may.
            for task in (loop, holding, *tending):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
            await auditor.checkpoint()
            await jobs.close()
            news.close()
            await leadership.give_back()
            await drivers.close()


def worker_environment(
    settings: Settings, rows: Sequence[SettingRow], home: Home
) -> dict[str, str]:
    """What every replica is given, settings from file and flags included."""
    given = {
        row.environment: str(row.value)
        for row in rows
        if row.name.startswith(_WORKER_SETTINGS) and row.source != "default"
    }
    given["CLOUDLM_HOME"] = str(home.path)
    given["CLOUDLM_WORKER_TOKEN"] = home.worker_token()
    given["CLOUDLM_REGISTRY_URL"] = home.registry_url(settings)
    return given


@contextlib.contextmanager
def only_control_of(home: Home) -> Iterator[None]:
    """Be the one control of this home. The lock vanishes with the process, however it ends."""
    path: Path = home.run / "control.lock"
    try:
        lock = lock_file(path)
    except OSError as error:
        raise StorageFailed(f"cannot write {path}: {error.strerror}") from None
    if lock is None:
        raise Conflict(
            f"another control runs already with the home {home.path}; stop it, or give another "
            "folder with CLOUDLM_HOME"
        )
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(lock)


@contextlib.contextmanager
def listening(settings: ControlSettings) -> Iterator[socket.socket]:
    """The API's socket. Raises Conflict if the port is in use, BadSetting for a bad address."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((settings.host, settings.port))
            listener.listen(256)
        except (socket.gaierror, OverflowError) as error:
            raise BadSetting(f"control.host = {settings.host!r} is no address: {error}") from None
        except OSError as error:
            raise Conflict(
                f"control cannot listen on {settings.host} port {settings.port}: "
                f"{error.strerror}. Stop what uses it, or choose another with CLOUDLM_CONTROL_PORT"
            ) from None
        yield listener
    finally:
        listener.close()


class _Server(uvicorn.Server):
    """uvicorn without its own signal handling, which would end the process before we have."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _answer(services: Services, listener: socket.socket, door: Door) -> None:
    """Serve the API until a signal."""
    context = door.context
    config = uvicorn.Config(
        build_api(services),
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=STOP_TIMEOUT_S,
        lifespan="off",
        ssl_context_factory=None if context is None else lambda *_: context,
    )
    server = _Server(config)

    def stop() -> None:
        server.should_exit = True

    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stop)
    get_logger("uvicorn.error").setLevel(logging.WARNING)
    _log.info("control_listens", extra={"fields": {"port": listener.getsockname()[1]}})
    following = asyncio.create_task(door.run())
    try:
        await server.serve(sockets=[listener])
    finally:
        following.cancel()
    _log.info("control_stopped")
