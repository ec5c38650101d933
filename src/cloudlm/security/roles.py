"""The built-in roles as rules. A role of one's own may not take their names.

What no rule allows is denied. The one place to read what ``developer`` means; ``docs/reference``
shows the same as a table.
"""

from __future__ import annotations

from collections.abc import Mapping

from cloudlm.core.access import Effect, Rule
from cloudlm.core.tenant import Role

_READ = ("read",)
_ALL = ("*",)
_PEOPLE = ("projects", "principals", "roles", "keys")
_MACHINES = ("models", "deployments", "jobs", "drivers", "logs")

BUILT_IN: Mapping[str, tuple[Rule, ...]] = {
    # Everything, wherever it is granted.
    Role.OWNER: (Rule(_ALL, _ALL),),
    # Everything but making and ending tenants.
    Role.ADMIN: (
        Rule(_ALL, _ALL),
        Rule(("create", "update", "delete"), ("tenants",), Effect.DENY),
    ),
    # Runs the machines; people and keys are none of its business.
    Role.OPERATOR: (
        Rule(_ALL, (*_MACHINES, "inference")),
        Rule(_READ, ("usage", "projects", "tenants")),
    ),
    # Builds on the models, with keys of its own.
    Role.DEVELOPER: (
        Rule(("use",), ("inference",)),
        Rule(_READ, ("models", "deployments", "jobs", "drivers", "projects", "usage")),
        Rule(("read", "create", "update", "delete"), ("keys:@self",)),
        Rule(_READ, ("principals:@self",)),
    ),
    # Looks, and changes nothing.
    Role.VIEWER: (
        Rule(_READ, ("models", "deployments", "jobs", "drivers", "projects", "tenants", "usage")),
    ),
    # Inference only.
    Role.USER: (Rule(("use",), ("inference",)),),
    # Sees who did what, and uses nothing.
    Role.AUDITOR: (Rule(_READ, ("audit", "usage", "tenants", *_PEOPLE)),),
}
