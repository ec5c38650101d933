"""``cloudlm serve``: one worker without a control plane, as ``vllm serve`` is used."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Annotated, NoReturn

import typer

from cloudlm.cli.connect import local_url
from cloudlm.cli.options import Json
from cloudlm.cli.partition import PipelineParallel, TensorParallel, partition_options
from cloudlm.cli.precision import Precision, precision_options
from cloudlm.cli.screen import print_json, print_text, share_bar
from cloudlm.cli.specs import ENGINE_HELP, read_options
from cloudlm.core.model import AddressKind, address_kind, parse_ref
from cloudlm.core.spec import CLOUDLM
from cloudlm.state.home import Home, load_settings
from cloudlm.telemetry.logs import setup_logging


def serve(
    model: Annotated[str, typer.Argument(help="A folder, models:/name/3, name, org/name…")],
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="Port to listen on.")] = 8000,
    served_model_name: Annotated[
        str | None, typer.Option("--served-model-name", help="Name in the API.")
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key",
            envvar="CLOUDLM_SERVE_API_KEY",
            help="Key that callers must send; required on addresses other than loopback.",
        ),
    ] = None,
    engine: Annotated[str, typer.Option("--engine", help=ENGINE_HELP)] = CLOUDLM,
    option: Annotated[
        list[str] | None, typer.Option("--option", metavar="KEY=VALUE", help="Engine setting.")
    ] = None,
    tls_cert: Annotated[
        str | None,
        typer.Option("--tls-cert", "--ssl-certfile", help="PEM file of a certificate, for TLS."),
    ] = None,
    tls_key: Annotated[
        str | None, typer.Option("--tls-key", "--ssl-keyfile", help="PEM file of its private key.")
    ] = None,
    tls_client_ca: Annotated[
        str | None,
        typer.Option(
            "--tls-client-ca",
            "--ssl-ca-certs",
            help="PEM file of authorities whose clients alone are let in.",
        ),
    ] = None,
    precision: Precision = None,
    tensor_parallel: TensorParallel = None,
    pipeline_parallel: PipelineParallel = None,
    json_output: Json = False,
) -> None:
    """Serve one model over the OpenAI API until Ctrl-C. No control plane."""
    from cloudlm.worker.app import run_worker
    from cloudlm.worker.config import WorkerConfig

    name = served_model_name or default_name(model)
    options = {
        **read_options(option or []),
        **precision_options(precision, engine),
        **partition_options(tensor_parallel, pipeline_parallel),
    }
    settings, _ = load_settings(
        {
            "worker.tls_cert": tls_cert,
            "worker.tls_key": tls_key,
            "worker.tls_client_ca": tls_client_ca,
        }
    )
    setup_logging(settings.log, "serve")
    home = Home(settings.home).ensure()

    with contextlib.ExitStack() as while_loading:
        update = while_loading.enter_context(share_bar(f"loading {name}"))

        def on_ready(url: str) -> None:
            while_loading.close()
            address = url or local_url(host, port, tls=bool(settings.worker.tls_cert))
            if json_output:
                print_json({"openai_base_url": f"{address}/v1", "model": name})
            else:
                print_text(f"{name} is ready at {address}/v1  (Ctrl-C stops it)")

        config = WorkerConfig(
            model=model,
            served_model_name=name,
            host=host,
            port=port,
            home=home.path,
            token=api_key,
            registry_url=home.registry_url(settings),
            engine_name=engine,
            options=options,
            settings=settings,
            on_ready=on_ready,
            on_progress=update,
        )
        code = run_worker(config)
    end_process(code)


def end_process(code: int) -> NoReturn:
    """End at once: a thread that still loads or computes must not hold the process up."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def default_name(model: str) -> str:
    """What the model is called in the API if the caller does not say."""
    if address_kind(model) is AddressKind.REGISTRY:
        return parse_ref(model).name
    return model.rstrip("/").rpartition("/")[2] or "model"
