"""``/api/v1/deployments/{name}/rollout``, its history and scores: watching and steering roll-outs.

What is asked is written beside what control keeps of the roll-out; the loop does it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from cloudlm.control.api.caller import caller_of
from cloudlm.control.api.deployments import check_can_run, deployment_of
from cloudlm.control.api.schemas import PROMOTION, SCORE, UNDO
from cloudlm.control.api.services import Services, body_of, read_object
from cloudlm.control.plan import revision_of
from cloudlm.control.rollout import aligned, is_staged
from cloudlm.control.rollout_view import view_of
from cloudlm.core.access import Verb
from cloudlm.core.deployment import Deployment, DeploymentSpec, running
from cloudlm.core.errors import Conflict, NotFound
from cloudlm.core.rollout import Order, Outcome, Revision, Rollout
from cloudlm.core.wire_rollout import (
    Score,
    promotion_from_body,
    revision_body,
    rollout_body,
    score_from_body,
    undo_from_body,
)

_TRIES = 5
"""Control's loop writes too; whoever comes second looks again."""


def routes(services: Services) -> APIRouter:
    """The routes of this noun."""
    router = APIRouter(prefix="/deployments/{name}", tags=["rollouts"])
    state, clock = services.state, services.clock

    async def found(name: str, request: Request, verb: Verb = Verb.UPDATE) -> Deployment:
        deployment = await deployment_of(services, request, name, verb)
        if verb is not Verb.READ and deployment.deleting:
            raise Conflict(f"deployment {name!r} is being deleted")
        return deployment

    async def answer(name: str, status_code: int = 202) -> Response:
        if status_code == 202:
            services.reconciler.nudge()
        deployment = await state.get_deployment(name)
        if deployment is None:
            raise NotFound(f"deployment {name!r} does not exist")
        view = await view_of(state, deployment, clock.now())
        return JSONResponse(rollout_body(view), status_code=status_code)

    async def move(deployment: Deployment, change: Callable[[Rollout], Rollout]) -> Response:
        """Write what was asked of the roll-out under way. Raises Conflict if there is none."""
        name = deployment.spec.name
        for _ in range(_TRIES):
            stored = await state.get_rollout(name)
            outcomes = {one.number: one.outcome for one in await state.list_revisions(name)}
            begun = aligned(deployment, stored, outcomes, clock.now())
            if not begun.under_way:
                raise Conflict(f"no roll-out of {name!r} is under way")
            wanted = change(begun)
            try:
                await state.put_rollout(wanted, replaces=stored)
            except Conflict:
                continue
            return await answer(name)
        raise Conflict(f"the roll-out of {name!r} moves all the time; try again")

    @router.get("/rollout", summary="Where the roll-out stands")
    async def status(name: str, request: Request) -> Response:
        await found(name, request, Verb.READ)
        return await answer(name, 200)

    @router.get("/revisions", summary="The deployment's history")
    async def history(name: str, request: Request) -> Response:
        await found(name, request, Verb.READ)
        return JSONResponse({"data": [revision_body(r) for r in await state.list_revisions(name)]})

    @router.post("/rollout/pause", status_code=202, summary="Stay where it is")
    async def pause(name: str, request: Request) -> Response:
        now = clock.now()
        return await move(
            await found(name, request), lambda one: replace(one, paused_at=one.paused_at or now)
        )

    @router.post("/rollout/resume", status_code=202, summary="Go on after a pause")
    async def resume(name: str, request: Request) -> Response:
        now = clock.now()
        return await move(await found(name, request), lambda one: resumed(one, now))

    @router.post(
        "/rollout/promote",
        status_code=202,
        summary="End a step before its time",
        openapi_extra=body_of(PROMOTION),
    )
    async def promote(name: str, request: Request) -> Response:
        deployment = await found(name, request)
        order = Order.PROMOTE
        if promotion_from_body(await read_object(request)):
            order = Order.PROMOTE_FULLY

        def change(one: Rollout) -> Rollout:
            if not is_staged(deployment.spec.rollout, one):
                raise Conflict(f"the roll-out of {name!r} has no steps left to promote")
            return replace(resumed(one, clock.now()), order=order)

        return await move(deployment, change)

    @router.post("/rollout/abort", status_code=202, summary="Back to the stable revision")
    async def abort(name: str, request: Request) -> Response:
        def change(one: Rollout) -> Rollout:
            if not one.stable:
                raise Conflict(f"no revision of {name!r} was ever ready: there is no way back")
            return replace(one, order=Order.ABORT)

        return await move(await found(name, request), change)

    @router.post(
        "/rollout/undo",
        status_code=202,
        summary="Back to an earlier revision",
        openapi_extra=body_of(UNDO),
    )
    async def undo(name: str, request: Request) -> Response:
        deployment = await found(name, request)
        wanted = undo_from_body(await read_object(request))
        revisions = await state.list_revisions(name)
        kept = await state.get_rollout(name)
        chosen = earlier(deployment, revisions, 0 if kept is None else kept.stable, wanted)
        await check_can_run(services, _as_it_ran(chosen, deployment))
        by = caller_of(request).key.principal
        await state.return_to(
            name,
            chosen.number,
            reason=f"undone by {by}",
            now=clock.now(),
            expected_generation=deployment.generation,
        )
        return await answer(name)

    @router.post("/score", summary="How good answers were", openapi_extra=body_of(SCORE))
    async def score(name: str, request: Request) -> Response:
        await found(name, request)
        given = score_from_body(await read_object(request))
        number = given.revision or await answered_by(name, given)
        noted = await state.add_scores(
            name, number, count=given.count, total=given.score * given.count
        )
        if noted is None:
            raise NotFound(f"deployment {name!r} has no revision {number} in its history")
        return JSONResponse(revision_body(noted))

    async def answered_by(name: str, given: Score) -> int:
        """The revision whose replica finished a request."""
        for row in reversed(await state.list_ledger(request_id=given.request_id)):
            number = revision_of(name, row.replica)
            if number is not None and row.attempt > 0:
                return number
        raise NotFound(f"no replica of {name!r} is known to have answered {given.request_id!r}")

    return router


def resumed(rollout: Rollout, now: float) -> Rollout:
    """The roll-out after its pause, which counts for no time limit."""
    if not rollout.paused_at:
        return rollout
    rested_s = max(now - rollout.paused_at, 0.0)  # the clock may have gone back
    return replace(
        rollout,
        paused_at=0.0,
        began_at=rollout.began_at + rested_s,
        since=rollout.since + rested_s if rollout.since else 0.0,
    )


def earlier(
    deployment: Deployment, revisions: list[Revision], stable: int, wanted: int | None
) -> Revision:
    """Where an undo goes: to ``wanted``; else to the stable revision if another is on its way,
    else to the one that was promoted before it. Raises NotFound, Conflict."""
    name, current = deployment.spec.name, deployment.revision
    see = f"'cloudlm rollout history {name}' shows those that it has"
    if wanted is None and stable not in (0, current):
        wanted = stable
    if wanted is None:
        good = [r for r in revisions if r.outcome is Outcome.PROMOTED and r.number != current]
        if not good:
            raise NotFound(f"deployment {name!r} has no earlier revision that was promoted; {see}")
        return max(good, key=lambda one: (one.ended_at, one.number))
    if wanted == current:
        raise Conflict(f"revision {wanted} of {name!r} is what is asked for already")
    for one in revisions:
        if one.number == wanted:
            return one
    raise NotFound(f"deployment {name!r} has no revision {wanted} in its history; {see}")


def _as_it_ran(revision: Revision, deployment: Deployment) -> DeploymentSpec:
    """What would run after an undo, at the fixed versions that it ran then."""
    spec = running(revision.spec, over=deployment.spec)
    if not revision.model:
        return spec
    return replace(spec, model=revision.model, adapters=dict(revision.adapters))
