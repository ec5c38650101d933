"""Roll-outs for ``Client``; what is asked is in ``rollout_calls``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from cloudlm.client import rollout_calls
from cloudlm.core.rollout import Revision
from cloudlm.core.wire_rollout import RolloutView, Score

if TYPE_CHECKING:
    from cloudlm.client.sync import Client


class Rollouts:
    """How new revisions of deployments take over."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def get(self, name: str) -> RolloutView:
        return self._client.send(rollout_calls.get_rollout(name))

    def history(self, name: str) -> list[Revision]:
        """Newest first."""
        return self._client.send(rollout_calls.list_revisions(name))

    def pause(self, name: str) -> RolloutView:
        return self._client.send(rollout_calls.move_rollout(name, "pause"))

    def resume(self, name: str) -> RolloutView:
        return self._client.send(rollout_calls.move_rollout(name, "resume"))

    def promote(self, name: str, *, fully: bool = False) -> RolloutView:
        """End the present step, or ``fully`` all that are left."""
        return self._client.send(rollout_calls.move_rollout(name, "promote", {"fully": fully}))

    def abort(self, name: str) -> RolloutView:
        """Back to the revision that was stable before."""
        return self._client.send(rollout_calls.move_rollout(name, "abort"))

    def undo(self, name: str, *, revision: int | None = None) -> RolloutView:
        """Back to ``revision``, or to the good one before."""
        return self._client.send(rollout_calls.move_rollout(name, "undo", {"revision": revision}))

    def score(
        self,
        name: str,
        score: float,
        *,
        count: int = 1,
        revision: int | None = None,
        request_id: str | None = None,
    ) -> Revision:
        """Say how good ``count`` answers of a revision, or that to a request, were: 0 to 1."""
        given = Score(score, count, revision, request_id)
        return self._client.send(rollout_calls.add_score(name, given))

    def wait(
        self,
        name: str,
        *,
        timeout_s: float = 600.0,
        on_look: Callable[[RolloutView], None] | None = None,
    ) -> RolloutView:
        """Wait until no roll-out is under way. Raises UpstreamTimeout."""
        return self._client.run(rollout_calls.wait_rolled_out(name, timeout_s, on_look))
