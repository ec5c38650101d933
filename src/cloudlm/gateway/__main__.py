"""``python -m cloudlm.gateway``: the gateway's process. Exit code 0 after SIGTERM, 1 if it cannot
start, with one line on standard error that says why."""

from __future__ import annotations

import asyncio
import gc
import sys

from cloudlm.core.clock import SystemClock
from cloudlm.core.errors import CloudlmError
from cloudlm.core.settings import Settings
from cloudlm.gateway.app import Gateway, make_server
from cloudlm.gateway.server import listen
from cloudlm.security.issuer import open_issuer
from cloudlm.security.policies import load_policies
from cloudlm.state.home import Home, load_settings
from cloudlm.state.open import open_state
from cloudlm.telemetry.logs import get_logger, setup_logging

_log = get_logger("cloudlm.gateway")


async def serve(settings: Settings) -> None:
    """Serve until a signal asks to stop. Raises CloudlmError if it cannot start."""
    home = Home(settings.home).ensure()
    wanted = settings.gateway
    bound = listen(wanted.host, wanted.port)
    clock = SystemClock()
    state = await open_state(home.state_url(settings))
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
        )
        server = make_server(gateway)
        async with gateway.running():
            fields = {"host": wanted.host, "port": bound.getsockname()[1]}
            _calm()
            _log.info("gateway_listens", extra={"fields": fields})
            await server.serve(bound)
        _log.info("gateway_stopped")
    finally:
        bound.close()
        await state.close()


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
        setup_logging(settings.log, process="gateway")
        _run(settings)
    except CloudlmError as error:
        print(f"cloudlm gateway: {error.message}", file=sys.stderr)  # noqa: T201
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _run(settings: Settings) -> None:
    try:
        import uvloop
    except ImportError:  # not made for this system
        asyncio.run(serve(settings))
    else:
        uvloop.run(serve(settings))


if __name__ == "__main__":
    sys.exit(main())
