"""Guardrails that follow their file: a changed one is read beside the running requests, and holds
for those that come after it.

A file that cannot be used is logged, and the last good one goes on. Must not look at texts.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from cloudlm.core.errors import CloudlmError
from cloudlm.gateway.account import Exchange
from cloudlm.gateway.dialects.openai import Call
from cloudlm.gateway.guardrails import open_guardrails
from cloudlm.gateway.live_settings import mark_of
from cloudlm.gateway.meter import Meter
from cloudlm.gateway.view import ServedModel
from cloudlm.security.guardrails.config import Moderation
from cloudlm.telemetry.logs import get_logger

FOLLOW_INTERVAL_S = 2.0

_log = get_logger(__name__)


class LiveGuardrails:
    """The guardrails of a file, as it is now. Raises BadSetting and MissingExtra if it cannot be
    used at the start."""

    def __init__(self, path: Path, meter: Meter) -> None:
        self._path = path
        self._meter = meter
        self._mark = mark_of(path)
        self._refused = False
        self._current = open_guardrails(path, meter)

    @property
    def moderation(self) -> Moderation:
        """Who moderates."""
        return self._current.moderation

    @property
    def notes(self) -> list[str]:
        """What an operator should know."""
        if not self._refused:
            return []
        return [
            "the guardrails' file changed and was refused: the last good one holds; the gateway's "
            "log says why"
        ]

    async def screen(self, exchange: Exchange, call: Call, model: ServedModel) -> Call:
        """As ``Guardrails.screen``."""
        return await self._current.screen(exchange, call, model)

    async def renew(self) -> bool:
        """Read the file again if it changed; whether what it says holds now."""
        mark = await asyncio.to_thread(mark_of, self._path)
        if mark == self._mark:
            return False
        self._mark = mark
        fields = {"file": str(self._path)}
        try:
            made = await asyncio.to_thread(open_guardrails, self._path, self._meter)
        except CloudlmError as error:
            reason = {**fields, "reason": error.message}
            _log.error("guardrails_not_renewed", extra={"fields": reason})
            self._refused = True
            return False
        self._refused = False
        # Here, on the loop, no request is between its look at ``_current`` and its reader.
        before, self._current = self._current, made
        before.close()
        _log.info("guardrails_renewed", extra={"fields": fields})
        return True

    async def follow(self, interval_s: float = FOLLOW_INTERVAL_S) -> None:
        """Renew until cancelled: a fault that nobody thought of is told and ends nothing."""
        while True:
            await asyncio.sleep(interval_s)
            try:
                await self.renew()
            except Exception as error:
                reason = {"file": str(self._path), "reason": f"unexpected {type(error).__name__}"}
                _log.exception("guardrails_not_renewed", extra={"fields": reason})
                self._refused = True

    def close(self) -> None:
        """Let go of the readers."""
        self._current.close()
