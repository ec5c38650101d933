"""``python -m cloudlm.gateway``: the gateway's process. Exit code 0 after SIGTERM, 1 if it cannot
start, with one line on standard error that says why."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import os
import socket
import sys
from collections.abc import AsyncIterator

from cloudlm.gateway import compiled

COMPILED = compiled.use()  # before any of the modules that it stands for is imported
# ruff: noqa: E402

from cloudlm.core.clock import SystemClock
from cloudlm.core.errors import CloudlmError
from cloudlm.core.settings import Settings
from cloudlm.gateway.app import Gateway, Place, make_server
from cloudlm.gateway.channel import Channel
from cloudlm.gateway.crew import Crew, Seat
from cloudlm.gateway.desk import Desk
from cloudlm.gateway.live_settings import Source
from cloudlm.gateway.server import GatewayServer, listen
from cloudlm.security.credentials import Credentials
from cloudlm.security.issuer import open_issuer
from cloudlm.security.policies import load_policies
from cloudlm.state.home import Home, load_settings, settings_path
from cloudlm.state.open import open_news, open_state
from cloudlm.telemetry.logs import get_logger, setup_logging

_log = get_logger("cloudlm.gateway")


async def serve(settings: Settings, seat: Seat | None = None) -> None:
    """Serve until a signal asks to stop; with a ``seat``, as one of several processes. Raises
    CloudlmError if it cannot start."""
    home = Home(settings.home).ensure()
    wanted = settings.gateway
    if seat is None:
        bound, channel = listen(wanted.host, wanted.port), None
    else:
        bound = socket.socket(fileno=seat.listener)
        channel = await Channel.open(socket.socket(fileno=seat.channel))
    clock = SystemClock()
    state = await open_state(home.state_url(settings))
    news = open_news(home.state_url(settings), clock)
    try:
        gateway = Gateway(
            wanted,
            state,
            home=home.path,
            pepper=home.pepper(),
            worker_token=home.worker_token(),
            issuer=open_issuer(settings.oidc, clock),
            policies=load_policies(settings.access.policies),
            clock=clock,
            external=settings.external,
            credentials=Credentials(home.credentials, os.environ),
            source=Source(settings_path(), lambda: load_settings()[0].gateway),
            news=news,
            place=Place(seat.number, channel) if seat is not None and channel is not None else None,
        )
        server = make_server(gateway)
        async with gateway.running(), _with_parent(channel, server):
            fields = {"host": wanted.host, "port": bound.getsockname()[1]}
            fields["compiled"] = COMPILED is not None
            _calm()
            _log.info("gateway_listens", extra={"fields": fields})
            await server.serve(bound)
        _log.info("gateway_stopped")
    finally:
        bound.close()
        if channel is not None:
            await channel.close()
        news.close()
        await state.close()


@contextlib.asynccontextmanager
async def _with_parent(channel: Channel | None, server: GatewayServer) -> AsyncIterator[None]:
    """Tell the parent that we are ready, and end when it does: nobody else would restart us."""
    if channel is None:
        yield
        return
    parent = asyncio.create_task(channel.ended())
    parent.add_done_callback(lambda _: server.stop())
    channel.tell("ready", None)
    try:
        yield
    finally:
        parent.cancel()


async def keep(settings: Settings) -> int:
    """Be the parent of several processes until a signal asks to stop; the exit code. Raises
    CloudlmError if the address cannot be had."""
    wanted = settings.gateway
    clock = SystemClock()
    with contextlib.closing(listen(wanted.host, wanted.port)) as bound:
        bound.setblocking(False)
        return await Crew(wanted.workers, bound, Desk(clock), clock).run()


def _calm() -> None:
    """Keep the search for garbage from holding up requests: what was loaded at start is none, and
    requests leave little that needs a search."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def main() -> int:
    """Read the settings and serve; the exit code."""
    try:
        settings, _ = load_settings()
        seat = _seat(sys.argv[1:])
        # The thread that writes the ledger must not hold up a request for the usual 5 ms.
        sys.setswitchinterval(0.0005)
        setup_logging(settings.log, process="gateway")
        if seat is None and settings.gateway.workers > 1:
            return asyncio.run(keep(settings))
        _run(settings, seat)
    except CloudlmError as error:
        print(f"cloudlm gateway: {error.message}", file=sys.stderr)  # noqa: T201
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _seat(arguments: list[str]) -> Seat | None:
    parser = argparse.ArgumentParser(
        prog="python -m cloudlm.gateway", description="The gateway; all else is in the settings."
    )
    parser.add_argument("--seat", type=Seat.read, help="for the processes of gateway.workers")
    found: Seat | None = parser.parse_args(arguments).seat
    return found


def _run(settings: Settings, seat: Seat | None) -> None:
    try:
        import uvloop
    except ImportError:  # not made for this system
        asyncio.run(serve(settings, seat))
    else:
        uvloop.run(serve(settings, seat))


if __name__ == "__main__":
    sys.exit(main())
