"""Settings of the gateway: its address and TLS, waits, queue, caches, limits, prices.

Declarations alone; ``reading`` parses, the gateway acts.
"""

from __future__ import annotations

from dataclasses import dataclass

from cloudlm.core.settings.declare import setting


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
