"""Whose share of the engine a request uses: what the gateway says of its sender.

The headers are the gateway's own words, which only holders of the worker's token can speak.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cloudlm.core.errors import InvalidRequest
from cloudlm.core.requests import read_priority
from cloudlm.core.tenant import MAX_WEIGHT, MIN_WEIGHT, TENANT_HEADER, WEIGHT_HEADER

_LONGEST_TENANT = 128


@dataclass(frozen=True, slots=True)
class Share:
    """As in ``GenerateRequest``: a higher ``priority`` goes first."""

    tenant: str = ""
    priority: int = 0
    weight: float = 1.0


USUAL = Share()


def share_of(headers: Mapping[str, str], body: Mapping[str, Any]) -> Share:
    """What headers and body say. Raises InvalidRequest naming the field."""
    tenant = headers.get(TENANT_HEADER, "")
    if len(tenant) > _LONGEST_TENANT:
        raise InvalidRequest(
            f"{TENANT_HEADER} must have at most {_LONGEST_TENANT} characters", param=TENANT_HEADER
        )
    # vLLM's field counts the other way round.
    return Share(tenant, -read_priority(body), _weight(headers.get(WEIGHT_HEADER, "1")))


def _weight(text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not MIN_WEIGHT <= weight <= MAX_WEIGHT:
        raise InvalidRequest(
            f"{WEIGHT_HEADER} must be a number from {MIN_WEIGHT} to {MAX_WEIGHT}",
            param=WEIGHT_HEADER,
        )
    return weight
