"""What is said to those who ask for a model that sleeps. Must not decide whether it does.

Requests wake nobody: a model that was put to sleep stays so until somebody wakes it, and nobody
knows when. A time to come back is named only where it wakes up already.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from cloudlm.core.errors import ModelAsleep, NoReplica, Unavailable

if TYPE_CHECKING:
    from cloudlm.gateway.view import ServedModel

WAKING_RETRY_AFTER_S: Final = 2.0


def asleep(model: ServedModel) -> Unavailable:
    """The refusal for a model whose replicas all sleep."""
    if model.to_wake:
        return NoReplica(
            f"model {model.name!r} is waking up; try again in a few seconds",
            retry_after_s=WAKING_RETRY_AFTER_S,
        )
    return ModelAsleep(
        f"model {model.name!r} is asleep: its memory was given back, and no request wakes it; "
        f"'cloudlm wake {' '.join(model.behind) or model.parent or model.name}' does"
    )
