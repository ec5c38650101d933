"""Policies in Cedar beside roles: what an installation permits or forbids in its own words.

A policy speaks of a principal, an action (a verb) and a resource. A fitting ``forbid`` beats every
role and every ``permit``; a ``permit`` counts as a grant of the installation itself, so that keys
stay narrowed to their own role; silence leaves it to roles. Policies are checked against a schema
when they are read. Must not know routes or read a clock: verdicts are remembered.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from cloudlm.core.access import EVERYWHERE, Principal, Resource, Verb, tenant_of
from cloudlm.core.errors import BadSetting, MissingExtra
from cloudlm.security.access import Ask

EXTRA = "cedar"
MAX_FILE_BYTES = 1_000_000
_MAX_REMEMBERED = 50_000
_MAX_ERRORS_SHOWN = 5


def schema() -> str:
    """The schema that policies are checked against, in Cedar's own language."""
    kinds = [kind.value.capitalize() for kind in Resource]
    lines = [
        "entity Tenant;",
        "entity Project in [Tenant];",
        "entity Principal in [Project, Tenant] = {",
        "  name: String, kind: String, tenant: String, project: String, subject: String,",
        '  grants: Set<String>,  // "developer@acme/web"',
        "};",
        *(
            f"entity {kind} in [Project, Tenant] = {{ name: String, scope: String }};"
            for kind in kinds
        ),
        f"action {', '.join(verb.value for verb in Verb)} appliesTo {{",
        f"  principal: [Principal], resource: [{', '.join(kinds)}], context: {{}},",
        "};",
    ]
    return "\n".join(lines) + "\n"


class CedarPolicies:
    """A set of policies that were found good."""

    def __init__(self, text: str) -> None:
        self._cedar = _library()
        self._policies = self._cedar.PolicySet.from_str(text)
        self.decide = lru_cache(_MAX_REMEMBERED)(self._decide)

    def __len__(self) -> int:
        return len(self._policies)

    def _decide(self, principal: Principal, ask: Ask) -> bool | None:
        """True if a policy permits, False if one forbids or cannot be evaluated, None if none
        speaks of it."""
        resource = {"type": ask.resource.capitalize(), "id": ask.name}
        request = {
            "principal": {"type": "Principal", "id": principal.id},
            "action": {"type": "Action", "id": str(ask.verb)},
            "resource": resource,
            "context": {},
        }
        entities = [
            _principal(principal),
            {
                "uid": resource,
                "attrs": {"name": ask.name, "scope": ask.scope},
                "parents": _places(ask.scope),
            },
        ]
        found = self._cedar.is_authorized(request, self._policies, entities)
        if found.diagnostics.errors:
            return False  # Cedar passes over a policy that fails: it might have been a forbid
        if found.decision is self._cedar.Decision.Allow:
            return True
        return False if found.diagnostics.reasons else None


def _principal(principal: Principal) -> dict[str, Any]:
    attributes = {
        "name": principal.name,
        "kind": str(principal.kind),
        "tenant": principal.tenant,
        "project": principal.project,
        "subject": principal.subject,
        "grants": [f"{grant.role}@{grant.scope}" for grant in principal.grants],
    }
    return {
        "uid": {"type": "Principal", "id": principal.id},
        "attrs": attributes,
        "parents": _places(principal.scope),
    }


def _places(scope: str) -> list[dict[str, str]]:
    """What something of this scope lies in."""
    if scope == EVERYWHERE:
        return []
    found = [{"type": "Tenant", "id": tenant_of(scope)}]
    return found if "/" not in scope else [*found, {"type": "Project", "id": scope}]


def load_policies(setting: str) -> CedarPolicies | None:
    """The policies in the files that ``access.policies`` names, None for none. Raises BadSetting
    naming file, policy and fault; MissingExtra."""
    paths = [Path(part.strip()).expanduser() for part in setting.split(",") if part.strip()]
    if not paths:
        return None
    texts = [read_policy_file(path) for path in paths]
    for path, text in zip(paths, texts, strict=True):
        check_policies(text, str(path))
    return CedarPolicies("\n".join(texts))


def read_policy_file(path: Path) -> str:
    """The text of a file. Raises BadSetting."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        text = content.decode("utf-8")
    except OSError as error:
        raise BadSetting(
            f"the policy file {path} cannot be read: {error.strerror}", param="access.policies"
        ) from None
    except UnicodeDecodeError:
        raise BadSetting(f"the policy file {path} is not UTF-8", param="access.policies") from None
    if len(content) > MAX_FILE_BYTES:
        raise BadSetting(
            f"the policy file {path} is larger than {MAX_FILE_BYTES} bytes",
            param="access.policies",
        )
    return text


def check_policies(text: str, source: str) -> int:
    """How many policies ``text`` holds. Raises BadSetting naming ``source`` and what is wrong with
    which policy: its grammar, or a type, attribute or action that there is not; MissingExtra."""
    cedar = _library()
    found = cedar.validate_policies(text, schema())
    if not found.validation_passed:
        errors = [str(error.error) for error in found.errors]
        more = len(errors) - _MAX_ERRORS_SHOWN
        shown = "; ".join(errors[:_MAX_ERRORS_SHOWN]) + (f"; and {more} more" if more > 0 else "")
        raise BadSetting(
            f"the policies in {source} are not good: {shown}. 'cloudlm policies schema' shows what "
            "they may speak of",
            param="access.policies",
        )
    count = len(cedar.PolicySet.from_str(text))
    if not count:
        raise BadSetting(f"{source} holds no policy", param="access.policies")
    return count


def _library() -> Any:
    try:
        import cedarpy
    except ImportError:
        raise MissingExtra(EXTRA, "access.policies") from None
    return cedarpy
