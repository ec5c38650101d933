"""Where a deployment should run: what a user may say of its traffic, its service level and its
bounds.

Words and bounds alone, all optional: a deployment without them is placed as ever. Must not choose a
machine: ``control.place`` does. Money is in US dollars, as the catalogue of offers is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cloudlm.core.errors import InvalidRequest
from cloudlm.core.fields import Fields, check_integer, check_number, check_text
from cloudlm.core.figures import ModelFigures, figures_body, figures_from_body

MAX_ENTRIES = 64
MAX_ZONES = 64
MAX_SPARE = 100


@dataclass(frozen=True, slots=True)
class Traffic:
    """The load at its busiest: requests per second, tokens of a request and of its answer, and the
    share of prompt tokens (0 to below 1) that a prefix cache already holds."""

    requests_per_s: float
    prompt_tokens: int
    output_tokens: int
    cached_share: float = 0.0


@dataclass(frozen=True, slots=True)
class ServiceLevel:
    """How quick an answer must be: milliseconds until its first token and between tokens, means
    over requests; 0 asks nothing. ``headroom`` is the share of a machine's capacity that is
    planned with, so that bursts find room."""

    ttft_ms: float = 0.0
    tpot_ms: float = 0.0
    headroom: float = 0.8


@dataclass(frozen=True, slots=True)
class Users:
    """Where a ``share`` of the requests comes from, degrees."""

    latitude: float
    longitude: float
    share: float = 1.0


@dataclass(frozen=True, slots=True)
class Latency:
    """Milliseconds there and back that users measured to a ``region``, named as in ``regions``."""

    region: str
    ms: float


@dataclass(frozen=True, slots=True)
class Measured:
    """How quick this version was on ``count`` pieces of a device: prompt tokens per second, and
    milliseconds of a decoding step, alone and for each sequence more."""

    device: str
    count: int
    prefill_tokens_per_s: float
    step_ms: float
    step_ms_per_sequence: float = 0.0


@dataclass(frozen=True, slots=True)
class Spot:
    """How much of the capacity may be on machines that the provider may take back: its largest
    ``share`` (0: none), and how many machines more than needed stand by for one that is lost."""

    share: float = 0.0
    spare: int = 1


@dataclass(frozen=True, slots=True)
class Placement:
    """A deployment's wishes. ``figures`` describe the model if no registry is to be asked.

    ``concurrency`` sequences of ``context_tokens`` must fit on a replica at least (0: what the
    traffic needs). ``regions`` are areas (``eu``, ``eu/de``), regions (``eu-central-1``) or a
    provider's (``aws/eu-central-1``); ``providers`` and ``forbidden_providers`` name providers;
    empty allows all. ``budget_usd_per_h`` and ``max_latency_ms`` bound nothing if 0. Of
    ``latencies`` the first that names an offer's region counts before its distance to ``users``.
    """

    traffic: Traffic | None = None
    level: ServiceLevel = ServiceLevel()
    spot: Spot = Spot()
    budget_usd_per_h: float = 0.0
    regions: tuple[str, ...] = ()
    providers: tuple[str, ...] = ()
    forbidden_providers: tuple[str, ...] = ()
    users: tuple[Users, ...] = ()
    latencies: tuple[Latency, ...] = ()
    max_latency_ms: float = 0.0
    min_zones: int = 1
    max_kinds: int = 2
    concurrency: int = 0
    context_tokens: int = 0
    figures: ModelFigures | None = None
    measured: tuple[Measured, ...] = ()


def placement_body(placement: Placement) -> dict[str, Any]:
    """A placement as JSON; ``placement_from_body`` reads it back."""
    figures = placement.figures
    return {
        "traffic": None if placement.traffic is None else _plain(placement.traffic),
        "level": _plain(placement.level),
        "spot": _plain(placement.spot),
        "budget_usd_per_h": placement.budget_usd_per_h,
        "regions": list(placement.regions),
        "providers": list(placement.providers),
        "forbidden_providers": list(placement.forbidden_providers),
        "users": [_plain(one) for one in placement.users],
        "latencies": [_plain(one) for one in placement.latencies],
        "max_latency_ms": placement.max_latency_ms,
        "min_zones": placement.min_zones,
        "max_kinds": placement.max_kinds,
        "concurrency": placement.concurrency,
        "context_tokens": placement.context_tokens,
        "figures": None if figures is None else figures_body(figures),
        "measured": [_plain(one) for one in placement.measured],
    }


def placement_from_body(body: Any) -> Placement:
    """Read and check a placement. Raises InvalidRequest and UnprocessableRequest naming the
    field."""
    fields = Fields(body, "placement", path="placement.")
    figures = fields.raw("figures", None)
    found = Placement(
        traffic=_traffic(fields.raw("traffic", None)),
        level=_level(fields.raw("level", {})),
        spot=_spot(fields.raw("spot", {})),
        budget_usd_per_h=fields.number("budget_usd_per_h", 0.0, low=0.0),
        regions=_words(fields, "regions"),
        providers=_words(fields, "providers"),
        forbidden_providers=_words(fields, "forbidden_providers"),
        users=tuple(_users(one) for one in _entries(fields, "users")),
        latencies=tuple(_latency(one) for one in _entries(fields, "latencies")),
        max_latency_ms=fields.number("max_latency_ms", 0.0, low=0.0),
        min_zones=fields.integer("min_zones", 1, low=1, high=MAX_ZONES),
        max_kinds=fields.integer("max_kinds", 2, low=1, high=2),
        concurrency=fields.integer("concurrency", 0, high=4096),
        context_tokens=fields.integer("context_tokens", 0, high=2**31),
        figures=None if figures is None else figures_from_body(figures, "placement.figures."),
        measured=tuple(_measured(one) for one in _entries(fields, "measured")),
    )
    fields.end()
    return _consistent(found)


def _consistent(found: Placement) -> Placement:
    if found.max_latency_ms and not found.users and not found.latencies:
        raise InvalidRequest(
            "placement.max_latency_ms needs placement.users, where the requests come from, or "
            "placement.latencies",
            param="placement.users",
        )
    both = set(found.providers) & set(found.forbidden_providers)
    if both:
        raise InvalidRequest(
            f"placement allows and forbids {', '.join(sorted(both))}; name a provider once",
            param="placement.forbidden_providers",
        )
    return found


def _traffic(body: Any) -> Traffic | None:
    """Requests with lengths, or rates of tokens with the answer's length."""
    if body is None:
        return None
    fields = Fields(body, "traffic", path="placement.traffic.")
    cached = fields.number("cached_share", 0.0)
    check_number(cached, "placement.traffic.cached_share", 0.0, 0.99)
    output = fields.integer("output_tokens", low=1, high=2**24)
    if "decode_tokens_per_s" in fields:
        decode = _above(fields, "decode_tokens_per_s")
        prefill = _above(fields, "prefill_tokens_per_s")
        requests = decode / output
        prompt = max(1, round(prefill / requests))
    else:
        requests = _above(fields, "requests_per_s")
        prompt = fields.integer("prompt_tokens", low=1, high=2**24)
    fields.end()
    return Traffic(requests, prompt, output, cached)


def _level(body: Any) -> ServiceLevel:
    fields = Fields(body, "level", path="placement.level.")
    found = ServiceLevel(
        ttft_ms=fields.number("ttft_ms", 0.0, low=0.0),
        tpot_ms=fields.number("tpot_ms", 0.0, low=0.0),
        headroom=fields.number("headroom", 0.8),
    )
    check_number(found.headroom, "placement.level.headroom", 0.05, 1.0)
    fields.end()
    return found


def _spot(body: Any) -> Spot:
    fields = Fields(body, "spot", path="placement.spot.")
    found = Spot(
        share=fields.number("share", 0.0, low=0.0, high=1.0),
        spare=fields.integer("spare", 1, high=MAX_SPARE),
    )
    fields.end()
    return found


def _users(body: Any) -> Users:
    fields = Fields(body, "users", path="placement.users.")
    found = Users(
        latitude=fields.number("latitude", low=-90.0, high=90.0),
        longitude=fields.number("longitude", low=-180.0, high=180.0),
        share=fields.number("share", 1.0),
    )
    check_number(found.share, "placement.users.share", 0.0, 1e9, above=True)
    fields.end()
    return found


def _latency(body: Any) -> Latency:
    fields = Fields(body, "latencies", path="placement.latencies.")
    found = Latency(
        fields.text("region", low=1, max_length=64), fields.number("ms", low=0.0, high=1e6)
    )
    fields.end()
    return found


def _measured(body: Any) -> Measured:
    fields = Fields(body, "measured", path="placement.measured.")
    found = Measured(
        device=fields.text("device", low=1, max_length=64),
        count=fields.integer("count", 1, low=1, high=4096),
        prefill_tokens_per_s=_above(fields, "prefill_tokens_per_s"),
        step_ms=_above(fields, "step_ms"),
        step_ms_per_sequence=fields.number("step_ms_per_sequence", 0.0, low=0.0),
    )
    fields.end()
    return found


def _above(fields: Fields, name: str) -> float:
    return check_number(fields.number(name), fields.param(name), 0.0, 1e12, above=True)


def _words(fields: Fields, name: str) -> tuple[str, ...]:
    found = _entries(fields, name)
    return tuple(check_text(one, fields.param(name), low=1, max_length=64) for one in found)


def _entries(fields: Fields, name: str) -> list[Any]:
    found = fields.items(name, ())
    check_integer(len(found), f"the number of {fields.param(name)}", 0, MAX_ENTRIES)
    return found


def _plain(value: Any) -> dict[str, Any]:
    return {name: getattr(value, name) for name in value.__dataclass_fields__}
