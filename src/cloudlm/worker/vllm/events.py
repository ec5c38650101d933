"""vLLM's server-sent events as the JSON that they hold. Must not know what a chunk says."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

import aiohttp
import msgspec

_DATA = b"data:"
_DONE_DATA = b"[DONE]"


async def chunks_of(
    answer: aiohttp.ClientResponse,
) -> AsyncGenerator[dict[str, Any] | None, None]:
    """The JSON of each event, None for ``[DONE]``."""
    rest = b""
    async for piece in answer.content.iter_any():
        *events, rest = (rest + piece).split(b"\n\n")
        for one in events:
            data = one.strip().removeprefix(_DATA).strip()
            if data:
                yield None if data == _DONE_DATA else msgspec.json.decode(data)
