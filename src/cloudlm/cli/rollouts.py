"""``cloudlm rollout``: where a roll-out stands, steering it, and the revisions behind it."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from cloudlm.cli.connect import control_client
from cloudlm.cli.options import Json
from cloudlm.cli.screen import age_text, print_json, print_table, say, spinner
from cloudlm.core.rollout import Outcome, Revision
from cloudlm.core.wire_rollout import RolloutView, SideView, revision_body, rollout_body

WAIT_S = 3600.0
app = typer.Typer(
    no_args_is_help=True,
    help="Roll-outs: status, history, pause, promote, undo, score.",
)
Name = Annotated[str, typer.Argument(metavar="NAME", help="A deployment.")]


@app.command("status")
def status(
    name: Name,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until it is over.")] = False,
    timeout: Annotated[
        float, typer.Option("--timeout", min=0.0, metavar="S", help="Seconds to wait at most.")
    ] = WAIT_S,
    json_output: Json = False,
) -> None:
    """Show where a roll-out stands."""
    with control_client() as client:
        if wait:
            with spinner(f"rolling out {name}") as update:
                view = client.rollouts.wait(
                    name, timeout_s=timeout, on_look=lambda now: update(_text(now))
                )
        else:
            view = client.rollouts.get(name)
    _show(view, json_output)


@app.command("pause")
def pause(name: Name, json_output: Json = False) -> None:
    """Stay at this step until 'resume'."""
    with control_client() as client:
        _show(client.rollouts.pause(name), json_output)


@app.command("resume")
def resume(name: Name, json_output: Json = False) -> None:
    """Go on after a pause."""
    with control_client() as client:
        _show(client.rollouts.resume(name), json_output)


@app.command("promote")
def promote(
    name: Name,
    full: Annotated[bool, typer.Option("--full", help="Pass over all steps left.")] = False,
    json_output: Json = False,
) -> None:
    """End the present step now."""
    with control_client() as client:
        _show(client.rollouts.promote(name, fully=full), json_output)


@app.command("abort")
def abort(name: Name, json_output: Json = False) -> None:
    """Go back to the stable revision."""
    with control_client() as client:
        _show(client.rollouts.abort(name), json_output)


@app.command("undo")
def undo(
    name: Name,
    to_revision: Annotated[
        int | None,
        typer.Option(
            "--to-revision", min=1, help="This one of the history; else the last good one before."
        ),
    ] = None,
    json_output: Json = False,
) -> None:
    """Run again what an earlier revision ran."""
    with control_client() as client:
        _show(client.rollouts.undo(name, revision=to_revision), json_output)


@app.command("history")
def history(name: Name, json_output: Json = False) -> None:
    """List the revisions and what became of them."""
    with control_client() as client:
        found = client.rollouts.history(name)
        if json_output:
            print_json([revision_body(one) for one in found])
            return
        view = client.rollouts.get(name)
    now = time.time()
    columns = ("REVISION", "STATUS", "MODEL", "AGE", "BY", "SCORE", "REASON")
    print_table(columns, [_row(one, view, now) for one in found], "no revisions")


@app.command("score")
def score(
    name: Name,
    value: Annotated[
        float, typer.Argument(metavar="SCORE", min=0.0, max=1.0, help="How good, 0 to 1.")
    ],
    revision: Annotated[int | None, typer.Option("--revision", min=1, help="Whose it is.")] = None,
    request_id: Annotated[
        str | None, typer.Option("--request-id", help="Or the answer's x-request-id.")
    ] = None,
    count: Annotated[int, typer.Option("--count", min=1, help="Of how many it is the mean.")] = 1,
    json_output: Json = False,
) -> None:
    """Say how good answers were."""
    with control_client() as client:
        noted = client.rollouts.score(
            name, value, count=count, revision=revision, request_id=request_id
        )
    if json_output:
        print_json(revision_body(noted))
    else:
        say(f"revision {noted.number} of {name} has {noted.scores} scores, mean {_mean(noted)}")


def _show(view: RolloutView, json_output: bool) -> None:
    if json_output:
        print_json(rollout_body(view))
        return
    stable = "" if view.stable == view.target or not view.stable else view.stable
    state = "paused" if view.paused else "under way" if view.under_way else "done"
    step = f"{view.step}/{view.steps}" if view.steps else ""
    columns = ("NAME", "STRATEGY", "STATE", "FROM", "TO", "STEP", "MESSAGE")
    row = (view.name, view.kind, state, stable, view.target, step, _text(view))
    print_table(columns, [row], "")
    if view.sides:
        say("")
        columns = ("REVISION", "ATTEMPTS", "FAILED", "TTFT P95", "LATENCY P95", "SCORES", "SCORE")
        print_table(columns, [_side(one) for one in view.sides], "")


def _text(view: RolloutView) -> str:
    return f"{view.note}; waits for: {view.waits}" if view.waits else view.note


def _side(side: SideView) -> tuple[Any, ...]:
    rate = f"{side.failed} ({side.failed / side.attempts:.1%})" if side.attempts else "0"
    times = (_seconds(side.ttft_s), _seconds(side.latency_s))
    mean = "" if side.score is None else f"{side.score:.3f}"
    return (side.revision, side.attempts, rate, *times, side.scores, mean)


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.3f} s"


def _row(one: Revision, view: RolloutView, now: float) -> tuple[Any, ...]:
    model = one.model or one.spec.model
    age = age_text(now - one.created_at) if one.created_at else ""
    return (one.number, _standing(one, view), model, age, one.by, _mean(one), one.reason)


def _standing(one: Revision, view: RolloutView) -> str:
    """Where a revision stands now: the one that answers is ``current``, and of the others what
    became of them."""
    if one.number == view.stable:
        return "current"
    if one.number == view.target:
        return "paused" if view.paused else "rolling out"
    return {Outcome.PROMOTED: "replaced", Outcome.PENDING: "never ready"}.get(
        one.outcome, one.outcome.replace("_", " ")
    )


def _mean(one: Revision) -> str:
    return f"{one.score_total / one.scores:.3f}" if one.scores else ""
