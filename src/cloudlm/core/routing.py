"""How a deployment's requests are spread over its replicas: what a user may say of it.

Words and bounds alone. Must not choose a replica: ``gateway.policies`` does.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from cloudlm.core.errors import InvalidRequest
from cloudlm.core.fields import Fields, check_number

SESSION_HEADER = "x-session-id"
MAX_HEDGE_AFTER_S = 3600.0
_HEADER_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,63}", re.ASCII)
# Sessions named by these would be told by who asks or by what the connection needs.
_NO_SESSION = frozenset({"authorization", "x-api-key", "cookie", "host", "content-length"})


class Policy(StrEnum):
    """Which replica of a deployment gets a request."""

    LEAST_COST = "least_cost"
    ROUND_ROBIN = "round_robin"
    LEAST_LOAD = "least_load"
    POWER_OF_TWO = "power_of_two"
    SESSION_AFFINITY = "session_affinity"
    WEIGHTED = "weighted"


@dataclass(frozen=True, slots=True)
class Routing:
    """A deployment's wishes. ``session_header`` names the header that tells sessions apart, in
    lower case. A request without a first word after ``hedge_after_s`` is sent to a second replica
    too; 0 never does so."""

    policy: Policy = Policy.LEAST_COST
    session_header: str = SESSION_HEADER
    hedge_after_s: float = 0.0


DEFAULT_ROUTING = Routing()


def check_routing(routing: Routing) -> Routing:
    """Return ``routing`` if it may be used. Raises InvalidRequest naming the field."""
    header = routing.session_header
    if not _HEADER_NAME.fullmatch(header) or header in _NO_SESSION:
        raise InvalidRequest(
            f"routing.session_header {header[:80]!r} must be a header's name in lower case, such "
            f"as {SESSION_HEADER}, and none that holds a key or a cookie",
            param="routing.session_header",
        )
    check_number(routing.hedge_after_s, "routing.hedge_after_s", 0.0, MAX_HEDGE_AFTER_S)
    return routing


def routing_body(routing: Routing) -> dict[str, Any]:
    """A routing as JSON; ``routing_from_body`` reads it back."""
    return {
        "policy": routing.policy.value,
        "session_header": routing.session_header,
        "hedge_after_s": routing.hedge_after_s,
    }


def routing_from_body(body: Any, policy: Policy = Policy.LEAST_COST) -> Routing:
    """Read a routing by type, with ``policy`` if it names none; ``check_routing`` looks at the
    values. Raises InvalidRequest and
    UnprocessableRequest naming the field."""
    fields = Fields(body, "routing", path="routing.")
    found = Routing(
        policy=fields.choice("policy", Policy, policy),
        session_header=fields.text("session_header", SESSION_HEADER),
        hedge_after_s=fields.number("hedge_after_s", 0.0),
    )
    fields.end()
    return found
