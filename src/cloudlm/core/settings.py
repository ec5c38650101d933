"""Settings: read once into frozen dataclasses, file < environment < flag.

Every value knows its source. A value that cannot be read refuses to start the process with an
error that names the value, what was expected, and where it came from. This module does the
parsing; ``state.home`` hands in the file's content and the environment, so that nothing here
touches a disk.
"""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from cloudlm.core.errors import BadSetting

S = TypeVar("S")
FLOATS = ("float32", "bfloat16", "float16")
PRECISIONS = ("auto", *FLOATS, "int8", "int8-a8", "int4", "int4-a8")


def setting(
    default: Any,
    doc: str,
    *,
    secret: bool = False,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
) -> Any:
    """A dataclass field with its documentation (unit and reason) and its bounds."""
    metadata = {"doc": doc, "secret": secret, "low": low, "high": high, "choices": choices}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class GatewaySettings:
    """The process that answers requests."""

    host: str = setting("127.0.0.1", "Address the gateway listens on.")
    port: int = setting(8000, "Port of the gateway; 0 picks a free one.", low=0, high=65535)
    allowed_origins: str = setting(
        "",
        "Web pages that may ask a gateway on this machine besides its own, as "
        "'https://chat.example, http://10.0.0.5:3000'; others are refused with 403.",
    )
    workers: int = setting(
        1,
        "Processes that answer on this port; a dead one is replaced, limits hold for all together.",
        low=1,
        high=256,
    )
    tls: str = setting(
        "auto",
        "auto: TLS if tls_cert is set; self-signed: with a certificate for development, made in "
        "home/tls; off: plain HTTP.",
        choices=("auto", "self-signed", "off"),
    )
    tls_cert: str = setting(
        "", "PEM file of the gateway's certificate, those of its issuers after it."
    )
    tls_key: str = setting("", "PEM file of its private key; empty if tls_cert holds it too.")
    tls_min_version: str = setting(
        "1.2", "Oldest TLS version that clients may speak.", choices=("1.2", "1.3")
    )
    upstream_ca: str = setting(
        "", "PEM file of authorities that https replicas may have, besides the system's."
    )
    upstream_cert: str = setting(
        "",
        "PEM file of the certificate shown to replicas that ask for one; empty for that of the "
        "installation, if it has one.",
    )
    upstream_key: str = setting("", "Its private key; empty if upstream_cert holds it too.")
    upstream_plaintext: str = setting(
        "loopback",
        "Where replicas may be reached without TLS; anywhere trusts the network with prompts and "
        "with the workers' token.",
        choices=("loopback", "anywhere"),
    )
    compress_min_bytes: int = setting(
        16_384,
        "Whole answers of at least this size are compressed for clients that accept gzip, bytes; "
        "0 compresses none. Streams never are.",
        low=0,
    )
    max_body_bytes: int = setting(4_000_000, "Largest request body, bytes.", low=1024, high=1 << 30)
    connect_timeout_s: float = setting(
        2.0, "Longest wait for a replica to accept, seconds.", low=0.01
    )
    first_token_timeout_s: float = setting(
        300.0, "Longest wait for a replica's first content, seconds.", low=0.1
    )
    idle_timeout_s: float = setting(
        60.0, "Longest silence between two chunks of a stream, seconds.", low=0.1
    )
    heartbeat_s: float = setting(
        15.0,
        "Silence in a stream of events after which its client is sent a comment, ': ping', so that "
        "nothing between takes it for dead, seconds; 0 sends none. Not before the first content.",
        low=0.0,
    )
    max_attempts: int = setting(
        3, "Replicas tried for one request while nothing was sent.", low=1, high=10
    )
    max_resumes: int = setting(
        3,
        "Replicas that may go on with one stream after its replica was lost; 0 never resumes.",
        low=0,
        high=100,
    )
    max_ongoing_requests: int = setting(
        4096, "Requests in the gateway at once, waiting ones too; more are refused with 503.", low=1
    )
    replica_capacity: int = setting(
        1024, "Requests sent to one replica at once; more wait in the gateway's queue.", low=1
    )
    max_queued_requests: int = setting(
        1024,
        "Requests that wait for one model; beyond, those to be served last are refused with 503.",
        low=0,
    )
    queue_timeout_s: float = setting(
        30.0, "Longest wait in the gateway's queue, seconds.", low=0.01
    )
    hold_timeout_s: float = setting(
        300.0,
        "Longest wait for the first replica of a model that was scaled to zero, seconds; a "
        "request's own deadline may be shorter.",
        low=0.01,
    )
    drain_timeout_s: float = setting(
        30.0, "Longest wait for running requests when stopping, seconds.", low=0.0
    )
    tenant_weights: str = setting(
        "",
        "Tenants' shares of a replica under load, 'name=weight, …'; 1 for those not named.",
    )
    cache_models: str = setting(
        "",
        "Models whose deterministic answers are used again within a tenant, 'name, begin*, …'; "
        "empty for none.",
    )
    cache_mb: int = setting(64, "Memory for such answers, MiB.", low=1, high=1 << 20)
    cache_ttl_s: float = setting(3600.0, "How long such an answer is used, seconds.", low=0.001)
    cache_url: str = setting(
        "",
        "Redis or Valkey that keeps such answers for several gateways, encrypted, redis://…; empty "
        "keeps them in each.",
        secret=True,
    )
    semantic_models: str = setting(
        "",
        "Models whose answers may also serve questions that mean the same, 'name, begin*, …'; "
        "needs 'cloudlm cache calibrate'.",
    )
    semantic_embedder: str = setting(
        "built-in", "What compares questions: built-in, or a deployment that serves embeddings."
    )
    semantic_threshold: float = setting(
        0.0, "Least likeness; only what is above the calibrated one counts.", low=0.0, high=1.0
    )
    semantic_timeout_s: float = setting(
        0.25, "Longest wait for a deployment's embedding of a question, seconds.", low=0.001
    )
    semantic_mb: int = setting(64, "Memory for questions to compare with, MiB.", low=1, high=65536)
    cache_max_age_s: float = setting(
        0.0,
        "How long HTTP caches may use an answer to a GET without asking the gateway, seconds; 0: "
        "they must ask each time.",
        low=0.0,
    )
    routes: str = setting(
        "",
        "Names that several models stand behind, 'name = model:weight + model | next priority "
        "> fallback ^ larger window; …'.",
    )
    prices: str = setting(
        "",
        "Prices per million tokens, 'model=prompt/cached/completion, …'; '*' for models not named, "
        "'model@tenant' for one tenant alone.",
    )
    limits_url: str = setting(
        "",
        "Redis or Valkey that counts limits for several gateways, redis://…; empty counts in each.",
        secret=True,
    )
    limits_share: float = setting(
        1.0,
        "Share of each limit that this gateway may give out while limits_url is away.",
        low=0.0,
        high=1.0,
    )
    limits_outage_s: float = setting(
        300.0, "How long it may do so, seconds; then limits_after_outage holds.", low=0.0
    )
    limits_after_outage: str = setting(
        "refuse",
        "What then happens to requests under limits.",
        choices=("refuse", "allow"),
    )
    guardrails: str = setting(
        "",
        "YAML file of guardrails: personal data, blocklists, sizes, injection, moderation; a "
        "relative path begins in home. Empty for none.",
    )
    reserved_answer_tokens: int = setting(
        1024,
        "Tokens reserved from limits for an answer whose request sets no max_tokens.",
        low=1,
    )


@dataclass(frozen=True)
class ControlSettings:
    """The process that makes what runs equal what was asked."""

    host: str = setting("127.0.0.1", "Address the control API listens on.")
    port: int = setting(8001, "Port of the control API; 0 picks a free one.", low=0, high=65535)
    allowed_origins: str = setting("", "The same as gateway.allowed_origins, for the control API.")
    tls: str = setting(
        "auto",
        "auto: TLS if tls_cert is set; self-signed: with a certificate for development, made in "
        "home/tls; off: plain HTTP.",
        choices=("auto", "self-signed", "off"),
    )
    tls_cert: str = setting(
        "", "PEM file of the control API's certificate, those of its issuers after it."
    )
    tls_key: str = setting("", "PEM file of its private key; empty if tls_cert holds it too.")
    tls_min_version: str = setting(
        "1.2", "Oldest TLS version that clients may speak.", choices=("1.2", "1.3")
    )
    reconcile_interval_s: float = setting(
        0.5, "Pause between two reconciliations, seconds.", low=0.05
    )
    probe_timeout_s: float = setting(
        2.0, "Longest wait for a replica's health answer, seconds.", low=0.05
    )
    stall_timeout_s: float = setting(
        20.0,
        "A replica with work whose step counter stands still for this long is restarted, seconds.",
        low=1.0,
    )
    drain_timeout_s: float = setting(
        30.0,
        "Longest wait for a replica's running requests before it is stopped, seconds.",
        low=0.0,
    )
    memory_budget: str = setting(
        "",
        "Memory for the models of this machine together, as '24GiB' or '75%' of it: those that do "
        "not fit are loaded when asked, in place of the least recently used; empty: no budget.",
    )
    min_residency_s: float = setting(
        5.0,
        "Under a memory budget a model that was loaded and is used stays at least this long, "
        "seconds; one that is asked all the time four times as long while others wait.",
        low=0.0,
    )
    lease_s: float = setting(
        10.0,
        "Of several controls on one state another leads when the leader was silent for so long, "
        "seconds.",
        low=0.5,
    )


@dataclass(frozen=True)
class WorkerSettings:
    """A replica's server."""

    host: str = setting("127.0.0.1", "Address workers listen on.")
    first_port: int = setting(8100, "Workers take free ports from here upward.", low=1, high=65535)
    tls: str = setting(
        "off",
        "mutual: replicas that control starts speak TLS and demand this installation's "
        "certificate, which control makes and renews in home/tls.",
        choices=("off", "mutual"),
    )
    tls_cert: str = setting("", "PEM file of the worker's certificate; empty serves plain HTTP.")
    tls_key: str = setting("", "PEM file of its private key; empty if tls_cert holds it too.")
    tls_client_ca: str = setting(
        "",
        "PEM file of the authorities whose clients alone are let in (mTLS); empty asks for none.",
    )
    max_waiting_requests: int = setting(
        512, "Requests queued in a worker; more are refused with 503.", low=1
    )


@dataclass(frozen=True)
class EngineSettings:
    """Defaults of the engine; a deployment's ``options`` override them."""

    dtype: str = setting(
        "auto",
        "Precision of the weights in memory.",
        choices=("auto", *FLOATS),
    )
    precision: str = setting(
        "auto",
        "Numbers that the weights are held in; auto is dtype's, and if that is auto too the "
        "version's own. a8, on CPUs: inputs in 8 bits too.",
        choices=PRECISIONS,
    )
    kernels: str = setting(
        "auto",
        "What computes; auto is our own kernels (C++ on a CPU, Triton on a GPU) where they are "
        "quicker and can be had.",
        choices=("auto", "native", "torch"),
    )
    device: str = setting("auto", "Where the model runs.", choices=("auto", "cpu", "cuda"))
    max_model_len: int = setting(
        0, "Longest prompt plus answer, tokens; 0 takes the model's own context.", low=0
    )
    kv_cache_mb: int = setting(
        0,
        "Memory for keys and values in each process, MiB; 0 takes 512 on a CPU, and on a GPU what "
        "gpu_memory_utilization leaves.",
        low=0,
    )
    gpu_memory_utilization: float = setting(
        0.9, "Share of a GPU's memory for weights, cache and work.", low=0.05, high=1.0
    )
    cuda_graphs: bool = setting(
        True, "Record decoding steps as CUDA graphs at the start; they begin quicker afterwards."
    )
    block_size: int = setting(16, "Tokens in one cache block.", low=1, high=256)
    max_batch_tokens: int = setting(
        1024, "Tokens computed in one step, prefill chunks included.", low=16
    )
    max_batch_sequences: int = setting(64, "Sequences in one step.", low=1, high=4096)
    deterministic: bool = setting(
        False,
        "Make a request's tokens independent of what else is in the batch, at some cost in speed.",
    )
    speculative: str = setting(
        "off",
        "Guess tokens that repeat what stands before and check several in one step; the answer "
        "is the same.",
        choices=("off", "ngram"),
    )
    num_speculative_tokens: int = setting(8, "Tokens guessed at a time, at most.", low=1, high=64)
    prompt_lookup_max: int = setting(
        5, "Last tokens, at most, by which the place to copy from is chosen.", low=1, high=64
    )
    prompt_lookup_min: int = setting(
        2, "Last tokens that must stand before for a guess to be made.", low=1, high=64
    )
    tool_parser: str = setting(
        "auto",
        "Form in which the model writes tool calls; auto reads it off the chat template.",
        choices=("auto", "none", "hermes", "llama3", "mistral"),
    )
    reasoning_parser: str = setting(
        "auto",
        "Whether the reasoning between think tags is split off; auto reads it off the chat "
        "template.",
        choices=("auto", "none", "think"),
    )
    tensor_parallel: int = setting(
        1,
        "Processes that share every layer of the model, each with a part of its heads and columns.",
        low=1,
        high=64,
    )
    pipeline_parallel: int = setting(
        1, "Stages of layers, in processes of their own, that follow each other.", low=1, high=64
    )
    threads: int = setting(
        0,
        "CPU threads of the engine, all its processes together; 0 takes all cores, one for a very "
        "small model.",
        low=0,
        high=1024,
    )
    packed_cache_mb: int = setting(
        16384,
        "Disk for weights in the CPU kernels' order, MiB, in cache/packed of home: the next start "
        "maps them, and replicas share their memory; 0 keeps none.",
        low=0,
    )
    pooling: str = setting(
        "last",
        "What becomes of a text's hidden states in /v1/embeddings: the last one, or their mean.",
        choices=("last", "mean"),
    )
    adapters: str = setting(
        "", "LoRA adapters to load at start: name=address, several separated by commas."
    )


@dataclass(frozen=True)
class VllmSettings:
    """vLLM as the engine of a replica (``engine: vllm`` in a deployment)."""

    python: str = setting(
        "", "The Python of an environment in which vLLM is installed, such as /opt/vllm/bin/python."
    )
    start_timeout_s: float = setting(
        900.0, "Longest wait for vLLM to load a model, seconds.", low=1.0
    )


@dataclass(frozen=True)
class ExternalSettings:
    """Endpoints of services that are not this installation's (``driver: external``)."""

    networks: str = setting(
        "",
        "Where such endpoints may be besides the public internet, '127.0.0.0/8, 10.2.0.0/16, …'; "
        "link-local and metadata addresses never are.",
    )
    plaintext: str = setting(
        "loopback",
        "Where they may be reached without TLS, of what networks allows; networks trusts all of "
        "it with prompts and keys.",
        choices=("loopback", "networks"),
    )
    ca: str = setting("", "PEM file of authorities that they may have, besides the system's.")
    probe_interval_s: float = setting(
        30.0, "Pause between two looks at GET /models of such an endpoint, seconds.", low=1.0
    )


@dataclass(frozen=True)
class RegistrySettings:
    """Model versions and their local copies."""

    url: str = setting(
        "",
        "Where versions are kept; empty is the folder 'registry' in home. "
        "s3://, gs://, az:// for an object store.",
    )
    cache_mb: int = setting(
        51_200, "Largest local copy of versions fetched from a store, MiB.", low=1
    )


@dataclass(frozen=True)
class AccessSettings:
    """Who may do what, besides the roles that are granted."""

    policies: str = setting(
        "", "Files of Cedar policies that hold beside roles, separated by commas."
    )


@dataclass(frozen=True)
class OidcSettings:
    """People who sign in through an OpenID Connect issuer."""

    issuer: str = setting(
        "", "The issuer, exactly as its discovery document calls itself; empty: no sign-in."
    )
    client_id: str = setting("", "The id of this installation at the issuer.")
    client_secret: str = setting(
        "",
        "What 'cloudlm login' sends besides, for issuers that demand it of programs too.",
        secret=True,
    )
    audiences: str = setting("", "Audiences of good tokens besides client_id, separated by commas.")
    algorithms: str = setting(
        "RS256, ES256, PS256, Ed25519", "Algorithms of good tokens, separated by commas."
    )
    scopes: str = setting("openid email profile", "What 'cloudlm login' asks the issuer for.")
    mapping: str = setting(
        "",
        "YAML file of rules: which claims give which role where. Without one nobody is let in "
        "who was not made with 'cloudlm principals create --subject'.",
    )
    leeway_s: float = setting(
        30.0, "How far the issuer's clock may be off, seconds.", low=0.0, high=600.0
    )
    max_token_age_s: float = setting(
        86_400.0, "Tokens older than this are refused, whatever they say, seconds.", low=60.0
    )


@dataclass(frozen=True)
class StateSettings:
    """Facts: what is asked and what runs."""

    url: str = setting(
        "",
        "SQLAlchemy address; empty is SQLite in home. postgresql+psycopg://… for several nodes.",
        secret=True,
    )


@dataclass(frozen=True)
class LogSettings:
    """What the processes say."""

    level: str = setting(
        "info", "Least level that is logged.", choices=("debug", "info", "warning", "error")
    )
    format: str = setting(
        "auto", "auto is text on a terminal and JSON otherwise.", choices=("auto", "json", "text")
    )


@dataclass(frozen=True)
class Settings:
    """All settings. ``home`` is the folder that holds everything of this installation."""

    home: str = setting("~/.cloudlm", "Folder of state, registry, logs and secrets.")
    gateway: GatewaySettings = field(default_factory=GatewaySettings)
    control: ControlSettings = field(default_factory=ControlSettings)
    worker: WorkerSettings = field(default_factory=WorkerSettings)
    engine: EngineSettings = field(default_factory=EngineSettings)
    vllm: VllmSettings = field(default_factory=VllmSettings)
    external: ExternalSettings = field(default_factory=ExternalSettings)
    registry: RegistrySettings = field(default_factory=RegistrySettings)
    access: AccessSettings = field(default_factory=AccessSettings)
    oidc: OidcSettings = field(default_factory=OidcSettings)
    state: StateSettings = field(default_factory=StateSettings)
    log: LogSettings = field(default_factory=LogSettings)


@dataclass(frozen=True, slots=True)
class SettingRow:
    """One value with its source, for ``cloudlm config`` and the generated reference."""

    name: str
    value: Any
    source: str
    environment: str
    doc: str
    secret: bool


def check_precision(value: Any, source: str) -> None:
    """Raise BadSetting, naming the known ones, unless ``value`` is an engine's ``precision``."""
    if value not in PRECISIONS:
        shown = repr(value)[:80]
        raise BadSetting(
            f"{source} = {shown} is not known; there is: {', '.join(PRECISIONS)}", param="precision"
        )


def environment_name(name: str) -> str:
    """``gateway.port`` is ``CLOUDLM_GATEWAY_PORT``."""
    return "CLOUDLM_" + name.replace(".", "_").upper()


def read_settings(
    file: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
    flags: Mapping[str, Any] | None = None,
    *,
    file_name: str = "config.yaml",
) -> tuple[Settings, list[SettingRow]]:
    """Merge the three sources. ``file`` is nested as in YAML, ``flags`` has dotted names.

    Returns the settings and one row per value. Raises BadSetting for an unknown name in file or
    flags, and for a value that does not fit.
    """
    given: dict[str, tuple[Any, str]] = {}
    for name, value in _flatten(file or {}, file_name).items():
        given[name] = (value, file_name)
    for name in _names():
        variable = environment_name(name)
        if environment and environment.get(variable):
            given[name] = (environment[variable], variable)
    for name, value in (flags or {}).items():
        if value is not None:
            given[name] = (value, "--" + name.replace(".", "-").replace("_", "-"))
    unknown = sorted(set(given) - set(_names()))
    if unknown:
        name = unknown[0]
        raise BadSetting(
            f"unknown setting {name!r} in {given[name][1]}; 'cloudlm config' lists all"
        )
    rows: list[SettingRow] = []
    settings = _build(Settings, "", given, rows)
    return settings, rows


def _names(cls: type[Any] = Settings, prefix: str = "") -> list[str]:
    hints = get_type_hints(cls)
    names: list[str] = []
    for one in fields(cls):
        if "doc" in one.metadata:
            names.append(prefix + one.name)
        else:
            names.extend(_names(hints[one.name], f"{prefix}{one.name}."))
    return names


def _flatten(tree: Mapping[str, Any], source: str, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat.update(_flatten(value, source, f"{name}."))
        else:
            flat[name] = value
    return flat


def _build(
    cls: type[S], prefix: str, given: Mapping[str, tuple[Any, str]], rows: list[SettingRow]
) -> S:
    hints = get_type_hints(cls)
    values: dict[str, Any] = {}
    for one in fields(cls):  # type: ignore[arg-type]
        name = prefix + one.name
        if "doc" not in one.metadata:
            values[one.name] = _build(hints[one.name], f"{name}.", given, rows)
            continue
        raw, source = given.get(name, (one.default, "default"))
        secret = one.metadata["secret"]
        if source == "default":
            value = raw
        else:
            value = _parse(name, raw, hints[one.name], source, shown="***" if secret else repr(raw))
        _check_bounds(name, value, one.metadata, source)
        values[one.name] = value
        rows.append(
            SettingRow(
                name,
                value,
                source,
                environment_name(name),
                one.metadata["doc"],
                secret,
            )
        )
    return cls(**values)


def _parse(name: str, raw: Any, kind: Any, source: str, *, shown: str) -> Any:
    if get_origin(kind) in (Union, types.UnionType):
        kind = next(k for k in get_args(kind) if k is not type(None))
    try:
        if kind is bool:
            return _parse_bool(raw)
        if kind is int and (isinstance(raw, bool) or (isinstance(raw, float) and raw != int(raw))):
            raise ValueError
        if kind is str and not isinstance(raw, str):
            raise ValueError
        return kind(raw)
    except (TypeError, ValueError, OverflowError):
        wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
        raise BadSetting(
            f"{name} = {shown} (from {source}) is not {wanted.get(kind, kind)}", param=name
        ) from None


def _parse_bool(raw: Any) -> bool:
    text = str(raw).lower()
    if text in ("1", "true", "yes", "on"):
        return True
    if text in ("0", "false", "no", "off"):
        return False
    raise ValueError(raw)


def _check_bounds(name: str, value: Any, metadata: Mapping[str, Any], source: str) -> None:
    low, high, choices = metadata["low"], metadata["high"], metadata["choices"]
    if choices and value not in choices:
        raise BadSetting(
            f"{name} = {value!r} (from {source}) is not one of {', '.join(choices)}", param=name
        )
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    too_low = low is not None and value < low
    too_high = high is not None and value > high
    if not math.isfinite(value) or too_low or too_high:
        span = f"a number of at least {low}" if high is None else f"from {low} to {high}"
        raise BadSetting(f"{name} = {value!r} (from {source}) must be {span}", param=name)
