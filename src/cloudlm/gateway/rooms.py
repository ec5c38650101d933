"""All that the handler of a request and its errands work with; assembled in ``app``. Plain data."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from cloudlm.core.clock import Clock
from cloudlm.core.errors import CloudlmError
from cloudlm.core.settings import GatewaySettings
from cloudlm.gateway.account import Exchange
from cloudlm.gateway.demand import DemandReporter
from cloudlm.gateway.dialects.openai import Call
from cloudlm.gateway.exchange import GatewayRequest
from cloudlm.gateway.gate import Gate
from cloudlm.gateway.known import Tenants
from cloudlm.gateway.ledger import Ledger
from cloudlm.gateway.limiter import Limiter
from cloudlm.gateway.loads import Loads
from cloudlm.gateway.meter import Meter
from cloudlm.gateway.model_routes import ModelRoute
from cloudlm.gateway.people import People
from cloudlm.gateway.sender import Sender
from cloudlm.gateway.view import ServedModel, View
from cloudlm.gateway.waiting import Waiting

if TYPE_CHECKING:
    from cloudlm.gateway.semantic.likeness import Likeness
    from cloudlm.security.guardrails.config import Moderation


class Screen(Protocol):
    """What looks at requests and answers between client and model: ``guardrails``."""

    @property
    def moderation(self) -> Moderation: ...

    async def screen(self, exchange: Exchange, call: Call, model: ServedModel) -> Call: ...


@dataclass(frozen=True, slots=True)
class Rooms:
    """One of each; those with a value are there in some gateways only."""

    settings: GatewaySettings
    pepper: bytes
    tenants: Tenants
    clock: Clock
    view: View
    limiter: Limiter
    gate: Gate
    waiting: Waiting
    loads: Loads
    demand: DemandReporter
    upstream: Sender
    ledger: Ledger
    meter: Meter
    weights: Mapping[str, float] = field(default_factory=dict)
    likeness: Likeness | None = None
    routes: Mapping[str, ModelRoute] = field(default_factory=dict)
    people: People | None = None
    fraction: Callable[[], float] = random.random
    guardrails: Screen | None = None
    refused: Callable[[GatewayRequest, Exchange, CloudlmError], None] = lambda *_: None
    cooled: Callable[[str, float], None] = lambda *_: None
