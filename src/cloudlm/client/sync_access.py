"""The synchronous client's nouns for identities and keys; see ``client.access_calls``."""

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
    from cloudlm.client.sync import Client


class Tenants:
    """Tenants of the installation."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def list(self) -> builtins.list[Tenant]:
        return self._client.send(calls.list_tenants())

    def get(self, name: str) -> Tenant:
        return self._client.send(calls.get_tenant(name))

    def create(self, name: str, *, title: str = "", limits: Limits | None = None) -> Tenant:
        return self._client.send(calls.create_tenant(name, title, limits))

    def change(self, name: str, **changes: Any) -> Tenant:
        """Change ``title``, ``limits`` or ``disabled``."""
        return self._client.send(calls.change_tenant(name, changes))

    def remove(self, name: str) -> None:
        """Raises Conflict if it is not empty."""
        return self._client.send(calls.remove_tenant(name))


class Projects:
    """Projects of a tenant; the key's own unless another is given."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def list(self, tenant: str | None = None) -> builtins.list[Project]:
        return self._client.send(calls.list_projects(tenant))

    def create(
        self, name: str, *, tenant: str | None = None, title: str = "", limits: Limits | None = None
    ) -> Project:
        return self._client.send(calls.create_project(name, tenant, title, limits))

    def change(self, name: str, *, tenant: str | None = None, **changes: Any) -> Project:
        """Change ``title`` or ``limits``."""
        return self._client.send(calls.change_project(name, tenant, changes))

    def remove(self, name: str, *, tenant: str | None = None) -> None:
        """Raises Conflict if it is not empty."""
        return self._client.send(calls.remove_project(name, tenant))


class Principals:
    """People and services."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def list(self, tenant: str | None = None) -> builtins.list[Principal]:
        return self._client.send(calls.list_principals(tenant))

    def get(self, principal_id: str) -> Principal:
        return self._client.send(calls.get_principal(principal_id))

    def create(self, wanted: Principal) -> Principal:
        """Make one; its id is the server's, whatever ``wanted`` says."""
        return self._client.send(calls.create_principal(wanted))

    def change(self, principal_id: str, **changes: Any) -> Principal:
        """Change ``name``, ``grants``, ``limits`` or ``disabled``."""
        return self._client.send(calls.change_principal(principal_id, changes))

    def remove(self, principal_id: str) -> None:
        """Revokes its keys too."""
        return self._client.send(calls.remove_principal(principal_id))


class Roles:
    """Built-in and custom roles."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def list(self) -> builtins.list[RoleEntry]:
        return self._client.send(calls.list_roles())

    def create(self, role: Mapping[str, Any]) -> CustomRole:
        """Make a role of ``{"name", "scope"?, "rules"}``."""
        return self._client.send(calls.create_role(role))

    def change(
        self, name: str, rules: builtins.list[Any], *, scope: str | None = None
    ) -> CustomRole:
        return self._client.send(calls.change_role(name, scope, rules))

    def remove(self, name: str, *, scope: str | None = None) -> None:
        return self._client.send(calls.remove_role(name, scope))


class Keys:
    """API keys."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def list(self, tenant: str | None = None) -> builtins.list[KeyRecord]:
        return self._client.send(calls.list_keys(tenant))

    def create(self, name: str, role: str = Role.USER, **more: Any) -> NewKey:
        """Make a key; its text is in this answer and nowhere else. ``more``: see ``KeyRequest``."""
        return self._client.send(calls.create_key(KeyRequest(name, str(role), **more)))

    def create_as(self, wanted: KeyRequest) -> NewKey:
        """As ``create``, of a whole request."""
        return self._client.send(calls.create_key(wanted))

    def change(self, key_id: str, **changes: Any) -> KeyRecord:
        """Change ``name``, ``models``, ``limits`` or ``expires_in_s``."""
        return self._client.send(calls.change_key(key_id, changes))

    def rotate(self, key_id: str, *, overlap_s: float = 0.0) -> RotatedKey:
        """Replace a key by one with another secret; the old one stays good for ``overlap_s``."""
        return self._client.send(calls.rotate_key(key_id, overlap_s))

    def revoke(self, key_id: str, *, descendants: bool = False) -> KeyRecord:
        """With ``descendants`` also those that it made."""
        return self._client.send(calls.revoke_key(key_id, descendants=descendants))
