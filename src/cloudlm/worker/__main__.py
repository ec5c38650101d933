"""``python -m cloudlm.worker``: flags and environment to a WorkerConfig, then ``run_worker``.

Reads CLOUDLM_HOME, CLOUDLM_WORKER_TOKEN, CLOUDLM_REGISTRY_URL and the settings' own variables.
Must not decide anything else.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from cloudlm.core.errors import CloudlmError
from cloudlm.core.settings import read_settings
from cloudlm.core.spec import CLOUDLM, ENGINES
from cloudlm.telemetry.logs import setup_logging
from cloudlm.worker.app import EXIT_FAILED, run_worker
from cloudlm.worker.config import WorkerConfig
from cloudlm.worker.options import named_adapters, split_options

TLS_OPTIONS = ("tls_cert", "tls_key", "tls_client_ca")


def read_config(arguments: Sequence[str], environment: Mapping[str, str]) -> WorkerConfig:
    """Flags over environment over defaults. Raises BadSetting; argparse exits on misuse."""
    given = _parser().parse_args(arguments)
    settings, _ = read_settings(environment=environment, flags=_tls(given))
    return WorkerConfig(
        model=given.model,
        served_model_name=given.served_model_name or given.model,
        home=Path(settings.home).expanduser(),
        host=given.host or settings.worker.host,
        port=settings.worker.first_port if given.port is None else given.port,
        token=given.api_key or environment.get("CLOUDLM_WORKER_TOKEN") or None,
        registry_url=settings.registry.url,
        engine_name=given.engine,
        options={**split_options(given.option), **_flags(given)},
        adapters=[pair for one in given.adapter for pair in named_adapters(one, "--adapter")],
        settings=settings,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cloudlm.worker", description="Serve one model over the OpenAI API."
    )
    parser.add_argument("--model", required=True, help="models:/name/3, a folder, or a hub id")
    parser.add_argument("--served-model-name", help="name in the API (default: the address)")
    parser.add_argument("--engine", choices=ENGINES, default=CLOUDLM, help="what generates")
    parser.add_argument("--host", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, help="port to listen on; 0 takes a free one")
    parser.add_argument("--api-key", help="Bearer token that callers must send")
    for name, other, what in (
        ("--tls-cert", "--ssl-certfile", "PEM file of the certificate to serve TLS with"),
        ("--tls-key", "--ssl-keyfile", "its private key, if the certificate's file has none"),
        ("--tls-client-ca", "--ssl-ca-certs", "let in only clients with these authorities' word"),
    ):
        parser.add_argument(name, other, metavar="FILE", help=what)
    parser.add_argument(
        "--precision", metavar="NAME", help="numbers that weights are held in (default: its own)"
    )
    for short, kind, what in (
        ("-tp", "tensor", "processes that share every layer"),
        ("-pp", "pipeline", "stages of layers in processes of their own"),
    ):
        name = f"--{kind}-parallel"
        parser.add_argument(
            name, f"{name}-size", short, dest=f"{kind}_parallel", metavar="N", help=what
        )
    parser.add_argument(
        "--option", action="append", default=[], metavar="KEY=VALUE", help="engine setting"
    )
    parser.add_argument(
        "--adapter", action="append", default=[], metavar="NAME=ADDRESS", help="LoRA adapter"
    )
    return parser


def _flags(given: argparse.Namespace) -> dict[str, str]:
    """The engine's settings that have flags of their own."""
    names = ("precision", "tensor_parallel", "pipeline_parallel")
    return {name: value for name in names if (value := getattr(given, name)) is not None}


def _tls(given: argparse.Namespace) -> dict[str, str | None]:
    return {f"worker.{name}": getattr(given, name) for name in TLS_OPTIONS}


def main() -> int:
    try:
        config = read_config(sys.argv[1:], os.environ)
    except CloudlmError as error:
        sys.stderr.write(f"cloudlm worker: {error.message}\n")
        return EXIT_FAILED
    setup_logging(config.settings.log, "worker")
    return run_worker(config)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # threads that load or compute must not hold the process up
