"""Whether what a new key names is there: its scope, and the project that pays for it.

Errors say how to make what is missing, so ask only for callers who may act within the scope: to
others it would tell which tenants there are. Must not decide who may do what.
"""

from __future__ import annotations

from cloudlm.core.access import EVERYWHERE, Principal, tenant_of
from cloudlm.core.errors import InvalidRequest
from cloudlm.security.access import Directory


def demand_scope(directory: Directory, scope: str) -> None:
    """Raise InvalidRequest unless ``scope`` is everywhere, a tenant, or a project of one."""
    if scope == EVERYWHERE:
        return
    tenant, _, project = scope.partition("/")
    if directory.tenant(tenant) is None:
        how = f"'cloudlm tenants create {tenant}'"
        if project and project != "default":
            how += f", then 'cloudlm projects create {project} --tenant {tenant}',"
        raise InvalidRequest(
            f"scope {scope!r}: there is no tenant {tenant!r}; {how} makes it", param="scope"
        )
    if project and directory.project(tenant, project) is None:
        raise InvalidRequest(f"scope {scope!r}: {_no_project(tenant, project)}", param="scope")


def paying_project(directory: Directory, holder: Principal, scope: str, wanted: str) -> str:
    """The project of its holder's tenant that a key is accounted to: the one ``wanted``, else that
    of its scope if that lies in the same tenant, else the holder's own. Raises InvalidRequest if
    there is none of that name."""
    inside = scope.partition("/")[2] if tenant_of(scope) == holder.tenant else ""
    project = wanted or inside or holder.project
    if directory.project(holder.tenant, project) is None:
        raise InvalidRequest(_no_project(holder.tenant, project), param="project")
    return project


def _no_project(tenant: str, project: str) -> str:
    return (
        f"tenant {tenant!r} has no project {project!r}; 'cloudlm projects create {project} "
        f"--tenant {tenant}' makes it"
    )
