"""``python -m cloudlm.control``: the control process. Exit code 0 after SIGTERM, 1 if it cannot
start, with one line on standard error that says why."""

from __future__ import annotations

import asyncio
import sys

from cloudlm.core.errors import CloudlmError
from cloudlm.state.home import load_settings
from cloudlm.telemetry.logs import setup_logging


def main() -> int:
    """Read the settings and serve; the exit code."""
    try:
        settings, rows = load_settings()
        setup_logging(settings.log, process="control")
        from cloudlm.control.app import serve

        asyncio.run(serve(settings, rows))
    except CloudlmError as error:
        print(f"cloudlm control: {error.message}", file=sys.stderr)  # noqa: T201
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
