"""``deploy``, ``apply``, ``status``, ``logs``, ``scale``, ``sleep``, ``wake``, ``delete``: what is
asked, what runs."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cloudlm.cli.connect import control_client, gateway_log, gateway_notes
from cloudlm.cli.deployments_text import memory_text, print_replicas, status_row
from cloudlm.cli.log_lines import event_of, readable
from cloudlm.cli.options import Json
from cloudlm.cli.partition import PipelineParallel, TensorParallel, partition_options
from cloudlm.cli.precision import Precision, precision_options
from cloudlm.cli.screen import (
    print_json,
    print_json_line,
    print_table,
    print_text,
    say,
    share_bar,
    spinner,
)
from cloudlm.cli.specs import (
    ENGINE_HELP,
    read_adapters,
    read_options,
    read_replicas,
    read_specs,
    read_strategy,
)
from cloudlm.core.deployment import DeploymentSpec, DeploymentStatus
from cloudlm.core.errors import (
    InvalidRequest,
    NotFound,
    Unavailable,
    error_from_body,
)
from cloudlm.core.external import EXTERNAL, ExternalEndpoint
from cloudlm.core.job import JobState
from cloudlm.core.model import AddressKind, address_kind
from cloudlm.core.rollout import Kind, longest_s
from cloudlm.core.routing import Policy, Routing
from cloudlm.core.scaling import IDLE_S, Algorithm, Scaling
from cloudlm.core.spec import CLOUDLM
from cloudlm.core.wire import deployment_body

if TYPE_CHECKING:
    from cloudlm.client import Client

Name = Annotated[str, typer.Argument(metavar="NAME", help="A deployment.")]
Wait = Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until it is ready.")]
WAIT_S = 600.0


def deploy(
    model: Annotated[
        str, typer.Argument(help="models:/name/3, name@alias, a folder, org/name, s3://…")
    ],
    name: Annotated[str, typer.Option("--name", help="Name of the deployment and of the model.")],
    replicas: Annotated[
        str, typer.Option("--replicas", metavar="MIN:MAX", help="How many replicas.")
    ] = "1:1",
    driver: Annotated[str, typer.Option("--driver", help="Where replicas run.")] = "process",
    endpoint: Annotated[
        list[str] | None,
        typer.Option(
            "--endpoint",
            metavar="URL",
            help="A service that answers, such as https://api.example.com/v1; MODEL is its name "
            "for the model, and nothing is started. Repeatable.",
        ),
    ] = None,
    secret: Annotated[
        str, typer.Option("--secret", help="The endpoints' key: a name of 'cloudlm secrets'.")
    ] = "",
    engine: Annotated[str, typer.Option("--engine", help=ENGINE_HELP)] = CLOUDLM,
    option: Annotated[
        list[str] | None, typer.Option("--option", metavar="KEY=VALUE", help="Engine setting.")
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", metavar="NAME=ADDRESS", help="LoRA adapter to serve as NAME."),
    ] = None,
    precision: Precision = None,
    policy: Annotated[
        Policy | None,
        typer.Option("--policy", help="How requests are spread (least_cost; endpoints: weighted)."),
    ] = None,
    strategy: Annotated[
        Kind, typer.Option("--strategy", help="How a new revision takes over.")
    ] = Kind.ROLLING,
    canary: Annotated[
        str | None,
        typer.Option("--canary", metavar="%:S,…", help="A canary's steps, such as 5:300,50:600."),
    ] = None,
    algorithm: Annotated[
        Algorithm, typer.Option("--autoscaler", help="What decides how many replicas there are.")
    ] = Algorithm.TOKENS,
    target_ongoing: Annotated[
        float,
        typer.Option("--target-ongoing-requests", help="Requests at once that fill a replica."),
    ] = 8.0,
    target_ttft_ms: Annotated[
        float,
        typer.Option("--target-ttft-ms", min=0.0, help="Mean time to the first token; 0: any."),
    ] = 0.0,
    target_tpot_ms: Annotated[
        float,
        typer.Option("--target-tpot-ms", min=0.0, help="Mean time per further token; 0: any."),
    ] = 0.0,
    idle_s: Annotated[
        float, typer.Option("--idle-s", min=0.0, help="Idle seconds before MIN 0 is reached.")
    ] = IDLE_S,
    tensor_parallel: TensorParallel = None,
    pipeline_parallel: PipelineParallel = None,
    pinned: Annotated[
        bool, typer.Option("--pinned", help="Never unload it for others (control.memory_budget).")
    ] = False,
    memory_mb: Annotated[
        int,
        typer.Option("--memory-mb", min=0, help="Memory of a replica, MiB; 0: as estimated."),
    ] = 0,
    wait: Wait = True,
    json_output: Json = False,
) -> None:
    """Deploy a model under a name. A model from outside is imported first."""
    low, high = read_replicas(replicas)
    endpoints = [url.rstrip("/") for url in endpoint or []]
    usual = Policy.WEIGHTED if endpoints else Policy.LEAST_COST
    with control_client() as client:
        ref = model if endpoints else _registered(client, model, name)
        spec = DeploymentSpec(
            name=name,
            model=ref,
            driver=EXTERNAL if endpoints else driver,
            engine=engine,
            min_replicas=low,
            max_replicas=high,
            target_ongoing_requests=target_ongoing,
            options={
                **read_options(option or []),
                **precision_options(precision, engine),
                **partition_options(tensor_parallel, pipeline_parallel),
            },
            adapters=read_adapters(adapter or []),
            routing=Routing(policy or usual),
            rollout=read_strategy(strategy, canary),
            scaling=Scaling(algorithm, target_ttft_ms, target_tpot_ms, idle_s=idle_s),
            endpoints=tuple(ExternalEndpoint(url, model, secret) for url in endpoints),
            pinned=pinned,
            memory_mb=memory_mb,
        )
        client.deployments.apply(spec)
        _finish(client, [name], wait, json_output, WAIT_S + longest_s(spec.rollout))


def apply(
    file: Annotated[
        Path, typer.Option("-f", "--file", help="YAML, a deployment per document; - is stdin.")
    ],
    wait: Wait = True,
    json_output: Json = False,
) -> None:
    """Make the deployments in a file exist as they stand there."""
    specs = read_specs(file)
    with control_client() as client:
        ready = [
            spec
            if spec.endpoints
            else replace(spec, model=_registered(client, spec.model, spec.name))
            for spec in specs
        ]
        for spec in ready:
            client.deployments.apply(spec)
        wait_s = WAIT_S + max(longest_s(spec.rollout) for spec in ready)
        _finish(client, [spec.name for spec in ready], wait, json_output, wait_s)


def status(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Only this one.")] = None,
    json_output: Json = False,
) -> None:
    """Show deployments and their replicas."""
    with control_client() as client:
        found = [client.deployments.get(name)] if name else client.deployments.list()
        leading = "" if name or json_output else _leading(client)
        notes = [] if name or json_output else gateway_notes(client.connection)
        within = any(view.status and view.status.residence for view in found)
        budget = client.deployments.memory_budget() if within and not json_output else 0
    if json_output:
        print_json([deployment_body(view.deployment, view.status) for view in found])
        return
    rows = [status_row(view, within, time.time()) for view in found]
    memory = ("MEMORY",) if within else ()
    columns = ("NAME", "PHASE", "READY", "BOUNDS", *memory, "MODEL", "REVISION", "MESSAGE")
    print_table(columns, rows, "no deployments; 'cloudlm deploy MODEL --name NAME' makes one")
    if leading:
        print_text(leading)
    for note in notes:
        print_text(f"gateway: {note}")
    if notes and (log := gateway_log(client.connection.gateway_url)):
        print_text(f"gateway: its log is {log}")
    if budget and not name:
        print_text(memory_text(found, budget))
    if name and found[0].status and found[0].status.replicas:
        print_text("")
        print_replicas(found[0].status)


def _leading(client: Client) -> str:
    """Who leads, if that is another control than the one that answers; empty if it is that."""
    try:
        leader = client.leader()
    except (NotFound, Unavailable):  # older than this client, or just started
        return ""
    if leader.here:
        return ""
    if not leader.holder:
        return "no control leads at this moment: what was asked waits"
    return f"led by {leader.holder} (token {leader.token}); this control stands by"


def logs(
    name: Name,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on as lines come.")] = False,
    tail: Annotated[int, typer.Option("--tail", min=0, help="Lines from the end.")] = 100,
    replica: Annotated[str | None, typer.Option("--replica", help="Only this one.")] = None,
    json_output: Json = False,
) -> None:
    """Print what a deployment's replicas said.

    Their events are shown as time, level, event and fields; --json prints each as the object that
    it is, one a line, and a line that is no event as {"line": …}.
    """
    with control_client() as client:
        for line in client.deployments.logs(name, tail=tail, follow=follow, replica=replica):
            if json_output:
                print_json_line(event_of(line) or {"line": line})
            else:
                print_text(readable(line))


def scale(
    name: Name,
    replicas: Annotated[str, typer.Argument(metavar="MIN[:MAX]", help="How many replicas.")],
    wait: Wait = True,
    json_output: Json = False,
) -> None:
    """Change how many replicas a deployment may have. Nothing restarts.

    0:1 (or 0:MAX) lets the last one go when nobody asks; the next request starts one and waits.
    """
    low, high = read_replicas(replicas)
    with control_client() as client:
        client.deployments.scale(name, low, high)
        _finish(client, [name], wait, json_output)


def sleep(name: Name, wait: Wait = True, json_output: Json = False) -> None:
    """Give the memory of a deployment's replicas back. Their processes stay; requests get 503."""
    with control_client() as client:
        client.deployments.sleep(name)
        _finish(client, [name], wait, json_output)


def wake(name: Name, wait: Wait = True, json_output: Json = False) -> None:
    """Load the model of a sleeping deployment again."""
    with control_client() as client:
        client.deployments.wake(name)
        _finish(client, [name], wait, json_output)


def delete(
    name: Name,
    wait: Wait = True,
    json_output: Json = False,
) -> None:
    """Stop a deployment's replicas and forget it."""
    with control_client() as client:
        client.deployments.delete(name)
        if wait:
            with spinner(f"stopping {name}"):
                client.deployments.wait_gone(name, timeout_s=WAIT_S)
    if json_output:
        print_json({"deleted": name})
    else:
        say(f"deleted {name}" if wait else f"deleting {name}")


def _registered(client: Client, model: str, name: str) -> str:
    """A registry address for ``model``; one from outside is imported by control, with a bar."""
    kind = address_kind(model)
    if kind is AddressKind.REGISTRY:
        return model if model.startswith("models:/") else f"models:/{model}"
    if kind is AddressKind.FOLDER:
        model = str(Path(model.removeprefix("file://")).expanduser().resolve())
    job = client.models.pull(model, name=name)
    with share_bar(f"importing {model}") as update:
        job = client.jobs.wait(job.id, on_progress=lambda now: update(now.progress, now.message))
    if job.state is not JobState.SUCCEEDED:
        message = error_from_body(500, job.error).message if job.error else job.message
        raise InvalidRequest(f"import of {model} {job.state}: {message}")
    return str(job.result["model"])


def _finish(
    client: Client, names: list[str], wait: bool, json_output: bool, wait_s: float = WAIT_S
) -> None:
    """Wait until the deployments are ready, telling their state, then print them."""
    if wait:
        for name in names:
            with spinner(f"waiting for {name}") as update:
                client.deployments.wait_ready(
                    name, timeout_s=wait_s, on_status=lambda now: update(_progress_text(now))
                )
    found = [client.deployments.get(name) for name in names]
    if json_output:
        print_json([deployment_body(view.deployment, view.status) for view in found])
        return
    for view in found:
        if view.settled:
            say(f"{view.name} is {view.phase} ({view.spec.model})")
        else:  # its phase is of the time before
            say(f"{view.name} is asked for ({view.spec.model}); see: cloudlm status {view.name}")


def _progress_text(state: DeploymentStatus) -> str:
    ready = f"{state.phase}, {state.ready_replicas}/{state.wanted_replicas} ready"
    return f"{ready}: {state.message}" if state.message else ready
