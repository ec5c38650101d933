"""Every route of every server with what it demands: one table, read by the servers and by people.

Control refuses what has no row here; tests fail when a route of gateway, control or worker lacks
one, or a row its route. ``python -m docs.generate`` shows the table against the built-in roles, and
``cloudlm roles matrix`` prints it.

A row's verb and resource are demanded of the key. ``SHARED`` resources belong to the installation
and are checked here, by the name in the path; the others belong to tenants (deployments to one, or
to the installation), and the handler checks the very object.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import StrEnum
from typing import Any, NamedTuple

from cloudlm.core.access import DEFAULT_TENANT, Resource, Verb
from cloudlm.security.access import Ask, permits, spell_out
from cloudlm.security.roles import BUILT_IN


class Server(StrEnum):
    """Who answers a route."""

    CONTROL = "control"
    GATEWAY = "gateway"
    WORKER = "worker"


class Holder(StrEnum):
    """Who may ask: everybody, any valid key, a key with the right, or the installation itself with
    the workers' token."""

    OPEN = "open"
    ANY_KEY = "any key"
    KEY = "key"
    WORKER_TOKEN = "worker token"  # noqa: S105 - the kind, not the token


class Row(NamedTuple):
    """One route. ``verb`` and ``resource`` are set for ``Holder.KEY`` alone."""

    server: Server
    method: str
    path: str
    holder: Holder
    verb: Verb | None = None
    resource: Resource | None = None


SHARED = frozenset((Resource.MODELS, Resource.JOBS, Resource.DRIVERS))

_CONTROL: tuple[tuple[str, Verb, Resource], ...] = (
    ("GET /models", Verb.READ, Resource.MODELS),
    ("POST /models", Verb.CREATE, Resource.MODELS),
    ("GET /models/{name}", Verb.READ, Resource.MODELS),
    ("GET /models/{name}/versions/{version}", Verb.READ, Resource.MODELS),
    ("DELETE /models/{name}/versions/{version}", Verb.DELETE, Resource.MODELS),
    ("PUT /models/{name}/aliases/{alias}", Verb.UPDATE, Resource.MODELS),
    ("DELETE /models/{name}/aliases/{alias}", Verb.UPDATE, Resource.MODELS),
    ("GET /deployments", Verb.READ, Resource.DEPLOYMENTS),
    ("POST /deployments", Verb.CREATE, Resource.DEPLOYMENTS),
    ("GET /deployments/{name}", Verb.READ, Resource.DEPLOYMENTS),
    ("PUT /deployments/{name}", Verb.UPDATE, Resource.DEPLOYMENTS),
    ("DELETE /deployments/{name}", Verb.DELETE, Resource.DEPLOYMENTS),
    ("POST /deployments/{name}/scale", Verb.UPDATE, Resource.DEPLOYMENTS),
    ("POST /deployments/{name}/sleep", Verb.UPDATE, Resource.DEPLOYMENTS),
    ("POST /deployments/{name}/wake", Verb.UPDATE, Resource.DEPLOYMENTS),
    ("GET /deployments/{name}/logs", Verb.READ, Resource.LOGS),
    ("GET /deployments/{name}/rollout", Verb.READ, Resource.DEPLOYMENTS),
    ("GET /deployments/{name}/revisions", Verb.READ, Resource.DEPLOYMENTS),
    ("POST /deployments/{name}/rollout/pause", Verb.UPDATE, Resource.DEPLOYMENTS),
    ("POST /deployments/{name}/rollout/resume", Verb.UPDATE, Resource.DEPLOYMENTS),
    ("POST /deployments/{name}/rollout/promote", Verb.UPDATE, Resource.DEPLOYMENTS),
    ("POST /deployments/{name}/rollout/abort", Verb.UPDATE, Resource.DEPLOYMENTS),
    ("POST /deployments/{name}/rollout/undo", Verb.UPDATE, Resource.DEPLOYMENTS),
    ("POST /deployments/{name}/score", Verb.UPDATE, Resource.DEPLOYMENTS),
    ("GET /jobs", Verb.READ, Resource.JOBS),
    ("POST /jobs", Verb.CREATE, Resource.JOBS),
    ("GET /jobs/{job_id}", Verb.READ, Resource.JOBS),
    ("DELETE /jobs/{job_id}", Verb.DELETE, Resource.JOBS),
    ("GET /drivers", Verb.READ, Resource.DRIVERS),
    ("GET /audit", Verb.READ, Resource.AUDIT),
    ("GET /tenants", Verb.READ, Resource.TENANTS),
    ("POST /tenants", Verb.CREATE, Resource.TENANTS),
    ("GET /tenants/{tenant}", Verb.READ, Resource.TENANTS),
    ("PATCH /tenants/{tenant}", Verb.UPDATE, Resource.TENANTS),
    ("DELETE /tenants/{tenant}", Verb.DELETE, Resource.TENANTS),
    ("GET /projects", Verb.READ, Resource.PROJECTS),
    ("POST /projects", Verb.CREATE, Resource.PROJECTS),
    ("GET /projects/{project}", Verb.READ, Resource.PROJECTS),
    ("PATCH /projects/{project}", Verb.UPDATE, Resource.PROJECTS),
    ("DELETE /projects/{project}", Verb.DELETE, Resource.PROJECTS),
    ("GET /principals", Verb.READ, Resource.PRINCIPALS),
    ("POST /principals", Verb.CREATE, Resource.PRINCIPALS),
    ("GET /principals/{principal}", Verb.READ, Resource.PRINCIPALS),
    ("PATCH /principals/{principal}", Verb.UPDATE, Resource.PRINCIPALS),
    ("DELETE /principals/{principal}", Verb.DELETE, Resource.PRINCIPALS),
    ("GET /roles", Verb.READ, Resource.ROLES),
    ("POST /roles", Verb.CREATE, Resource.ROLES),
    ("GET /roles/{role}", Verb.READ, Resource.ROLES),
    ("PUT /roles/{role}", Verb.UPDATE, Resource.ROLES),
    ("DELETE /roles/{role}", Verb.DELETE, Resource.ROLES),
    ("GET /usage", Verb.READ, Resource.USAGE),
    ("GET /keys", Verb.READ, Resource.KEYS),
    ("POST /keys", Verb.CREATE, Resource.KEYS),
    ("GET /keys/{key_id}", Verb.READ, Resource.KEYS),
    ("PATCH /keys/{key_id}", Verb.UPDATE, Resource.KEYS),
    ("DELETE /keys/{key_id}", Verb.DELETE, Resource.KEYS),
    ("POST /keys/{key_id}/rotate", Verb.UPDATE, Resource.KEYS),
)
_GATEWAY = (
    "POST /v1/chat/completions",
    "POST /v1/completions",
    "POST /v1/embeddings",
    "GET /v1/chat/completions",
    "GET /v1/completions",
    "GET /v1/embeddings",
    "POST /v1/moderations",
    "POST /tokenize",
    "POST /detokenize",
    "GET /v1/models",
    "GET /v1/models/{name}",
    "POST /v1/responses",
    "POST /v1/messages",
    "POST /v1/messages/count_tokens",
    "POST /api/chat",
    "POST /api/generate",
    "POST /api/embed",
    "POST /api/embeddings",
    "POST /api/show",
    "GET /api/tags",
    "GET /api/version",
    "POST /",
    "POST /generate",
    "POST /generate_stream",
    "GET /info",
    "POST /invocations",
    "POST /v1/models/{name}:predict",
    "GET /v2",
    "GET /v2/models/{name}",
    "GET /v2/models/{name}/ready",
    "POST /v2/models/{name}/infer",
    "POST /predictions/{name}",
)
_WORKER = (
    "POST /v1/chat/completions",
    "POST /v1/completions",
    "POST /v1/embeddings",
    "GET /v1/models",
    "GET /v1/models/{model_id}",
    "POST /v1/load_lora_adapter",
    "POST /v1/unload_lora_adapter",
    "POST /sleep",
    "POST /wake_up",
    "GET /is_sleeping",
    "POST /tokenize",
    "POST /detokenize",
    "POST /internal/v1/generate",
    "POST /internal/v1/resume",
    "GET /version",
)
OPEN = {
    Server.CONTROL: ("/livez", "/readyz", "/metrics"),
    Server.GATEWAY: (
        "/livez",
        "/readyz",
        "/health",
        "/metrics",
        "/ping",
        "/v2/health/live",
        "/v2/health/ready",
        "/openapi.json",
    ),
    Server.WORKER: ("/livez", "/readyz", "/health", "/metrics"),
}
PREFIX = "/api/v1"


def _rows() -> Iterator[Row]:
    for server, paths in OPEN.items():
        yield from (Row(server, "GET", path, Holder.OPEN) for path in paths)
    yield Row(Server.CONTROL, "GET", f"{PREFIX}/signin", Holder.OPEN)
    for path in ("/openapi.json", "/whoami", "/leader"):
        yield Row(Server.CONTROL, "GET", PREFIX + path, Holder.ANY_KEY)
    for line, verb, resource in _CONTROL:
        method, path = line.split()
        yield Row(Server.CONTROL, method, PREFIX + path, Holder.KEY, verb, resource)
    for line in _GATEWAY:
        method, path = line.split()
        yield Row(Server.GATEWAY, method, path, Holder.KEY, Verb.USE, Resource.INFERENCE)
    for line in _WORKER:
        method, path = line.split()
        yield Row(Server.WORKER, method, path, Holder.WORKER_TOKEN)


ROWS: tuple[Row, ...] = tuple(_rows())


def _form(path: str) -> re.Pattern[str]:
    parts = re.split(r"\{([a-z_]+)\}", path)
    pieces = (
        f"(?P<{part}>[^/]+)" if number % 2 else re.escape(part) for number, part in enumerate(parts)
    )
    return re.compile("".join(pieces))


_CONTROL_FORMS = tuple((row, _form(row.path)) for row in ROWS if row.server is Server.CONTROL)


class Found(NamedTuple):
    """The row of a request, None if its method has none; and the names in the path."""

    row: Row | None
    names: dict[str, str]


def control_row(method: str, path: str) -> Found | None:
    """The row of a request to control; None if no method has one at this path."""
    at_path = None
    for row, form in _CONTROL_FORMS:
        match = form.fullmatch(path)
        if match is not None:
            at_path = Found(None, match.groupdict())
            if row.method == method:
                return Found(row, match.groupdict())
    return at_path


def shared_ask(row: Row, names: dict[str, str]) -> Ask:
    """What a row of a shared resource demands."""
    assert row.verb is not None and row.resource is not None
    return Ask(row.verb, row.resource, next(iter(names.values()), ""), DEFAULT_TENANT)


def role_may(role: str, row: Row) -> bool:
    """Whether a built-in role, granted everywhere, opens a route for some object."""
    if row.holder is not Holder.KEY:
        return row.holder is not Holder.WORKER_TOKEN
    assert row.verb is not None and row.resource is not None
    powers = spell_out(BUILT_IN[role], "*", "x")
    ask = Ask(row.verb, row.resource, "x")
    return permits(powers, ask)


def as_data() -> list[dict[str, Any]]:
    """The matrix as JSON: each route with the built-in roles that open it."""
    return [
        {
            "server": row.server.value,
            "method": row.method,
            "path": row.path,
            "holder": row.holder.value,
            "verb": row.verb and row.verb.value,
            "resource": row.resource and row.resource.value,
            "roles": [str(role) for role in BUILT_IN if role_may(role, row)],
        }
        for row in ROWS
    ]
