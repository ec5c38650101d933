"""What a simulated gateway sees of the state: one model and its endpoints, as ``gateway.view``
tells them apart. Stands in for ``gateway.view.View``. Must not decide.
"""

from __future__ import annotations

from cloudlm.core.deployment import Deployment, DeploymentSpec, Endpoint
from cloudlm.gateway.view import Snapshot, served


class Picture:
    """``endpoints`` take new requests, ``beside`` those of a revision that is tried out or was
    replaced."""

    ready = True

    def __init__(self, spec: DeploymentSpec) -> None:
        self._deployment = Deployment(spec)
        self.follow(())

    def follow(self, endpoints: tuple[Endpoint, ...]) -> None:
        """These are the endpoints from now on."""
        name = self._deployment.spec.name
        model = served(self._deployment, name, list(endpoints))
        self._snapshot = Snapshot(0, {name: model})
        self.written = endpoints
        self.model = model
        self.endpoints = model.endpoints
        self.beside = model.beside

    def snapshot(self) -> Snapshot:
        """As ``View.snapshot``."""
        return self._snapshot
