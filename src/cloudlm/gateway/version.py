"""What answers under a model's name at this moment, told apart from what did before."""

from __future__ import annotations

from typing import NamedTuple

from cloudlm.gateway.view import ServedModel


class Version(NamedTuple):
    """What answers under a model's name: a deployment, told by its birth too from an earlier one of
    the same name, and its revision."""

    model: str
    created_at: float
    revision: int


def version_of(model: ServedModel) -> Version | None:
    """What serves a model. None while no revision does or several do: then each answers its share,
    and no answer is for all."""
    revisions = {endpoint.revision for endpoint in model.endpoints}
    if len(revisions) != 1:
        return None
    return Version(model.name, model.created_at, revisions.pop())
