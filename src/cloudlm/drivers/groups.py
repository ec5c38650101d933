"""Rules that every driver keeps for groups: names, replica ids, what may change."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from cloudlm.core.deployment import GroupSpec
from cloudlm.core.errors import Conflict, InvalidRequest
from cloudlm.core.external import ExternalEndpoint

_GROUP_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}", re.ASCII)


def check_group_name(name: str) -> str:
    """Return ``name`` if it may name a group (and a folder); raise InvalidRequest if not."""
    if not _GROUP_NAME.fullmatch(name) or ".." in name:
        raise InvalidRequest(
            f"group name {name[:80]!r} is not valid: use lower-case letters, digits, '.', '_', '-'"
        )
    return name


def check_group(spec: GroupSpec) -> GroupSpec:
    """Return ``spec`` if a driver can run it; raise InvalidRequest if not."""
    check_group_name(spec.name)
    if spec.replicas < 0:
        raise InvalidRequest(f"group {spec.name!r} cannot have {spec.replicas} replicas")
    return spec


def check_same_group(existing: GroupSpec, spec: GroupSpec) -> None:
    """Raise Conflict if the specs differ in more than ``replicas``."""
    if replace(existing, replicas=spec.replicas) != spec:
        raise Conflict(
            f"group {spec.name!r} exists and runs something else; a changed revision needs a group "
            "of its own"
        )


def replica_ids(spec: GroupSpec) -> list[str]:
    """The ids of the replicas that ``spec`` asks for; the newest has the highest number."""
    return [f"{spec.name}-{number}" for number in range(spec.replicas)]


def replica_index(replica: str) -> int:
    """The number at the end of a replica's id; 0 if there is none."""
    number = replica.rpartition("-")[2]
    return int(number) if number.isdigit() else 0


def group_from_body(body: Mapping[str, Any]) -> GroupSpec:
    """A group out of the JSON of its fields. Raises TypeError and KeyError if it is none."""
    endpoints = tuple(ExternalEndpoint(**entry) for entry in body.get("endpoints", ()))
    return GroupSpec(**{**body, "endpoints": endpoints})
