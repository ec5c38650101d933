"""Roll-outs for ``AsyncClient``; what is asked is in ``rollout_calls``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from cloudlm.client import rollout_calls
from cloudlm.core.rollout import Revision
from cloudlm.core.wire_rollout import RolloutView, Score

if TYPE_CHECKING:
    from cloudlm.client.asynchronous import AsyncClient


class AsyncRollouts:
    """How new revisions of deployments take over."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def get(self, name: str) -> RolloutView:
        return await self._client.send(rollout_calls.get_rollout(name))

    async def history(self, name: str) -> list[Revision]:
        """Newest first."""
        return await self._client.send(rollout_calls.list_revisions(name))

    async def pause(self, name: str) -> RolloutView:
        return await self._client.send(rollout_calls.move_rollout(name, "pause"))

    async def resume(self, name: str) -> RolloutView:
        return await self._client.send(rollout_calls.move_rollout(name, "resume"))

    async def promote(self, name: str, *, fully: bool = False) -> RolloutView:
        """End the present step, or ``fully`` all that are left."""
        return await self._client.send(
            rollout_calls.move_rollout(name, "promote", {"fully": fully})
        )

    async def abort(self, name: str) -> RolloutView:
        """Back to the revision that was stable before."""
        return await self._client.send(rollout_calls.move_rollout(name, "abort"))

    async def undo(self, name: str, *, revision: int | None = None) -> RolloutView:
        """Back to ``revision``, or to the good one before."""
        return await self._client.send(
            rollout_calls.move_rollout(name, "undo", {"revision": revision})
        )

    async def score(
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
        return await self._client.send(rollout_calls.add_score(name, given))

    async def wait(
        self,
        name: str,
        *,
        timeout_s: float = 600.0,
        on_look: Callable[[RolloutView], None] | None = None,
    ) -> RolloutView:
        """Wait until no roll-out is under way. Raises UpstreamTimeout."""
        return await self._client.run(rollout_calls.wait_rolled_out(name, timeout_s, on_look))
