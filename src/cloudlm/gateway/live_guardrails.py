"""Guardrails that follow their file: a changed one holds for the requests that come after it. Must
not look at texts.
"""

from __future__ import annotations

from pathlib import Path

from cloudlm.gateway.account import Exchange
from cloudlm.gateway.dialects.openai import Call
from cloudlm.gateway.guardrails import Guardrails, open_guardrails
from cloudlm.gateway.live_file import LiveFile
from cloudlm.gateway.meter import Meter
from cloudlm.gateway.view import ServedModel
from cloudlm.security.guardrails.config import Moderation


class LiveGuardrails(LiveFile[Guardrails]):
    """The guardrails of a file, as it is now. Raises BadSetting and MissingExtra if it cannot be
    used at the start."""

    def __init__(self, path: Path, meter: Meter) -> None:
        super().__init__(path, "guardrails' file", "guardrails")
        self._meter = meter
        self._current = open_guardrails(path, meter)
        self._mark = self._seen  # what was read is what was there, or came after

    @property
    def moderation(self) -> Moderation:
        """Who moderates."""
        return self._current.moderation

    async def screen(self, exchange: Exchange, call: Call, model: ServedModel) -> Call:
        """As ``Guardrails.screen``."""
        return await self._current.screen(exchange, call, model)

    def close(self) -> None:
        """Let go of the readers."""
        self._current.close()

    def _read(self) -> Guardrails:
        return open_guardrails(self._path, self._meter)

    async def _take(self, found: Guardrails) -> str:
        # Here, on the loop, no request is between its look at ``_current`` and its reader.
        before, self._current = self._current, found
        before.close()
        return "the rules"

    def _left(self, found: Guardrails) -> None:
        found.close()
