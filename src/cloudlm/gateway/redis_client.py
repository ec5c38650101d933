"""Connections to Redis or Valkey for what several gateways share. Must not know what is kept."""

from __future__ import annotations

from typing import Any

from cloudlm.core.errors import BadSetting, MissingExtra


def connect(url: str, setting: str, timeout_s: float) -> Any:
    """A client of the server at ``url``, which ``setting`` names; it connects when it is first
    used. Raises BadSetting and MissingExtra."""
    try:
        from redis.asyncio import Redis
    except ImportError:
        raise MissingExtra("redis", setting) from None
    try:
        return Redis.from_url(url, socket_connect_timeout=timeout_s)
    except ValueError as error:
        raise BadSetting(
            f"{setting} is no address of Redis (redis://host:6379/0): {error}", param=setting
        ) from None
