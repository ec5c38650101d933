"""The asynchronous client's nouns for identities and keys; see ``client.access_calls``."""

from __future__ import annotations

import builtins
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cloudlm.client import access_calls as calls
from cloudlm.client.access_calls import RoleEntry
from cloudlm.client.calls import NewKey, RotatedKey
from cloudlm.core.access import CustomRole, Limits, Principal, Project, Tenant
from cloudlm.core.tenant import KeyRecord, Role
from cloudlm.core.wire_access import KeyRequest

if TYPE_CHECKING:
    from cloudlm.client.asynchronous import AsyncClient


class AsyncTenants:
    """Tenants of the installation."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def list(self) -> builtins.list[Tenant]:
        return await self._client.send(calls.list_tenants())

    async def get(self, name: str) -> Tenant:
        return await self._client.send(calls.get_tenant(name))

    async def create(self, name: str, *, title: str = "", limits: Limits | None = None) -> Tenant:
        return await self._client.send(calls.create_tenant(name, title, limits))

    async def change(self, name: str, **changes: Any) -> Tenant:
        """Change ``title``, ``limits`` or ``disabled``."""
        return await self._client.send(calls.change_tenant(name, changes))

    async def remove(self, name: str) -> None:
        """Raises Conflict if it is not empty."""
        return await self._client.send(calls.remove_tenant(name))


class AsyncProjects:
    """Projects of a tenant; the key's own unless another is given."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def list(self, tenant: str | None = None) -> builtins.list[Project]:
        return await self._client.send(calls.list_projects(tenant))

    async def create(
        self, name: str, *, tenant: str | None = None, title: str = "", limits: Limits | None = None
    ) -> Project:
        return await self._client.send(calls.create_project(name, tenant, title, limits))

    async def change(self, name: str, *, tenant: str | None = None, **changes: Any) -> Project:
        """Change ``title`` or ``limits``."""
        return await self._client.send(calls.change_project(name, tenant, changes))

    async def remove(self, name: str, *, tenant: str | None = None) -> None:
        """Raises Conflict if it is not empty."""
        return await self._client.send(calls.remove_project(name, tenant))


class AsyncPrincipals:
    """People and services."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def list(self, tenant: str | None = None) -> builtins.list[Principal]:
        return await self._client.send(calls.list_principals(tenant))

    async def get(self, principal_id: str) -> Principal:
        return await self._client.send(calls.get_principal(principal_id))

    async def create(self, wanted: Principal) -> Principal:
        """Make one; its id is the server's, whatever ``wanted`` says."""
        return await self._client.send(calls.create_principal(wanted))

    async def change(self, principal_id: str, **changes: Any) -> Principal:
        """Change ``name``, ``grants``, ``limits`` or ``disabled``."""
        return await self._client.send(calls.change_principal(principal_id, changes))

    async def remove(self, principal_id: str) -> None:
        """Revokes its keys too."""
        return await self._client.send(calls.remove_principal(principal_id))


class AsyncRoles:
    """Built-in and custom roles."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def list(self) -> builtins.list[RoleEntry]:
        return await self._client.send(calls.list_roles())

    async def create(self, role: Mapping[str, Any]) -> CustomRole:
        """Make a role of ``{"name", "scope"?, "rules"}``."""
        return await self._client.send(calls.create_role(role))

    async def change(
        self, name: str, rules: builtins.list[Any], *, scope: str | None = None
    ) -> CustomRole:
        return await self._client.send(calls.change_role(name, scope, rules))

    async def remove(self, name: str, *, scope: str | None = None) -> None:
        return await self._client.send(calls.remove_role(name, scope))


class AsyncKeys:
    """API keys."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def list(self, tenant: str | None = None) -> builtins.list[KeyRecord]:
        return await self._client.send(calls.list_keys(tenant))

    async def create(self, name: str, role: str = Role.USER, **more: Any) -> NewKey:
        """Make a key; its text is in this answer and nowhere else. ``more``: see ``KeyRequest``."""
        return await self._client.send(calls.create_key(KeyRequest(name, str(role), **more)))

    async def create_as(self, wanted: KeyRequest) -> NewKey:
        """As ``create``, of a whole request."""
        return await self._client.send(calls.create_key(wanted))

    async def change(self, key_id: str, **changes: Any) -> KeyRecord:
        """Change ``name``, ``models``, ``limits`` or ``expires_in_s``."""
        return await self._client.send(calls.change_key(key_id, changes))

    async def rotate(self, key_id: str, *, overlap_s: float = 0.0) -> RotatedKey:
        """Replace a key by one with another secret; the old one stays good for ``overlap_s``."""
        return await self._client.send(calls.rotate_key(key_id, overlap_s))

    async def revoke(self, key_id: str, *, descendants: bool = False) -> KeyRecord:
        """With ``descendants`` also those that it made."""
        return await self._client.send(calls.revoke_key(key_id, descendants=descendants))
