"""What control must know of endpoints that are not ours: their facts, and who may name a secret.

Pure but for reading a secret's facts. Must not connect, and must not touch a key.
"""

from __future__ import annotations

from dataclasses import replace

from cloudlm.core.deployment import DeploymentSpec, Endpoint, GroupObservation
from cloudlm.core.errors import InvalidRequest
from cloudlm.core.external import origin_of
from cloudlm.security.credentials import Credentials, NoCredential


def as_external(endpoint: Endpoint, group: GroupObservation) -> Endpoint:
    """The endpoint of one of the group's replicas, with what the gateway must know if another's
    service answers there."""
    spec = group.spec
    if spec is None or not spec.endpoints:
        return endpoint
    number = int(endpoint.replica.rpartition("-")[2])
    one = spec.endpoints[number]
    return replace(
        endpoint,
        weight=endpoint.weight * one.weight,
        priority=one.priority,
        upstream_model=one.model,
        secret=one.secret,
    )


def check_secrets(spec: DeploymentSpec, credentials: Credentials | None) -> None:
    """Raise InvalidRequest if an endpoint names a secret of another tenant or another address.

    One that is not known here may be in the environment of the gateway alone, and is looked for
    when it is needed; a tenant's own deployment may use none but its tenant's.
    """
    for number, one in enumerate(spec.endpoints):
        if not one.secret:
            continue
        param = f"endpoints.{number}.secret"
        try:
            found = credentials.find(one.secret) if credentials is not None else None
        except NoCredential as error:
            raise InvalidRequest(error.message, param=param) from None
        if found is not None and found.tenant == spec.tenant:
            if found.origin != origin_of(one.url):
                raise InvalidRequest(
                    f"the secret {one.secret!r} is for another address than {origin_of(one.url)}",
                    param=param,
                )
        elif found is not None or spec.tenant:
            whose = f"tenant {spec.tenant!r} has" if spec.tenant else "the installation has"
            raise InvalidRequest(f"{whose} no secret {one.secret!r}", param=param)
