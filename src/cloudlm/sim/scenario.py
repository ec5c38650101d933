"""Reads a scenario: a YAML file of traffic, replicas, zones, faults, roll-outs and the policies to
compare.

Every fault of the file names its field, what was expected and what to do. Paths in it are relative
to the file. Must not simulate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from random import Random
from typing import Any

from cloudlm.control.catalogue.files import load_catalogue
from cloudlm.core.errors import InvalidRequest
from cloudlm.core.fields import Fields
from cloudlm.core.settings import ControlSettings, GatewaySettings
from cloudlm.core.wire import spec_from_body
from cloudlm.core.yaml_text import NotYaml, parse_yaml
from cloudlm.sim.control import AUTOSCALERS, scaled
from cloudlm.sim.faults import Fault, FaultKind, check_fault, drawn_faults
from cloudlm.sim.figures import Figures, bundled, read_figures
from cloudlm.sim.ground import Zone
from cloudlm.sim.measure import ServiceLevel
from cloudlm.sim.scenario_placing import (
    Market,
    Placer,
    market_of,
    placer_of,
    wishes_over,
    zone_names,
)
from cloudlm.sim.scenario_rollouts import read_rollouts
from cloudlm.sim.scenario_traffic import named, read_traffic
from cloudlm.sim.simulation import Policy, Setting
from cloudlm.sim.traffic import Arrival
from cloudlm.sim.versions import Release

MAX_SCENARIO_BYTES = 1_000_000
DEPLOYMENT = {"name": "simulated", "model": "models:/simulated/1"}
"""What a policy's deployment may leave out: it is never really run."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """``arrivals`` gives the same requests each time it is called."""

    name: str
    setting: Setting
    policies: tuple[Policy, ...]
    arrivals: Callable[[], Iterator[Arrival]]


def read_scenario(
    path: Path, *, seed: int | None = None, market: Market = load_catalogue
) -> Scenario:
    """A scenario out of a file; ``seed`` instead of its own. ``market`` reads the catalogue where
    it names none. Raises InvalidRequest."""
    try:
        if path.stat().st_size > MAX_SCENARIO_BYTES:
            raise InvalidRequest(f"{path} is too large for a scenario")
        body = parse_yaml(path.read_bytes())
    except OSError as error:
        raise InvalidRequest(f"the scenario {path} cannot be read: {error.strerror}") from None
    except NotYaml as error:
        raise InvalidRequest(f"{path} is no YAML: {error}") from None
    try:
        return _scenario(body, path, seed, market)
    except InvalidRequest as error:
        raise type(error)(f"{path}: {error.message}", param=error.param) from None


def _scenario(body: Any, path: Path, seed: int | None, market: Market) -> Scenario:
    top = Fields(body, "a scenario")
    own_seed = top.integer("seed", 0)
    seed = own_seed if seed is None else seed
    zones = tuple(_zone(one) for one in top.items("zones", [{"name": "zone"}]))
    if not zones:
        raise InvalidRequest("zones must name at least one", param="zones")
    traffic = top.mapping("traffic")
    duration_s = Fields(traffic, "traffic").number("duration_s", 3600.0, low=0.0)
    replica = top.mapping("replica", {})

    def figures(body: dict[str, Any]) -> Figures:
        return _figures(body, path.parent)

    usual = figures(replica)
    common = top.mapping("deployment", {})
    rollouts = top.items("rollouts", ())

    def releases(entries: Sequence[Any]) -> tuple[Release, ...]:
        return read_rollouts(entries, replica, figures)

    place = placer_of(usual, market_of(top, path.parent, market))
    policies = tuple(
        _policy(one, common, rollouts, releases, place)
        for one in top.items("policies", [{"name": "default"}])
    )
    names = [one.name for one in policies]
    if not names or len(set(names)) < len(names):
        raise InvalidRequest("policies must be at least one, each with its own name")
    setting = Setting(
        figures=usual,
        zones=zones,
        level=_level(top.mapping("service_level", {})),
        faults=_faults(top, seed, duration_s, zone_names(zones, policies)),
        gateway=_settings(GatewaySettings, top.mapping("gateway", {}), "gateway"),
        control=_settings(ControlSettings, top.mapping("control", {}), "control"),
        gateways=top.integer("gateways", 1, low=1, high=256),
        warm=top.flag("warm", True),
        begin_with=top.integer("begin_with", 0, low=0, high=100_000),
        seed=seed,
    )
    name = top.text("name", path.stem)
    top.end()
    return Scenario(name, setting, policies, read_traffic(traffic, path.parent, seed))


# The parts ---------------------------------------------------------------------------------------


def _zone(body: Any) -> Zone:
    given = Fields(body, "a zone", path="zones.")
    zone = Zone(
        given.text("name", low=1, max_length=64),
        given.number("price_per_hour", 0.0, low=0.0, high=1e6),
        given.integer("most", 0, low=0),
    )
    given.end()
    return zone


def _figures(body: dict[str, Any], folder: Path) -> Figures:
    given = Fields(body, "replica", path="replica.")
    file = given.optional_text("file")
    known = read_figures(folder / file) if file else bundled()
    name = given.text("figures", next(iter(known), ""))
    if name not in known:
        raise InvalidRequest(
            f"replica.figures {name[:80]!r} is unknown; there are {', '.join(known)}",
            param="replica.figures",
        )
    found = known[name]
    speed = given.number("speed", 1.0, low=1e-6, high=1e6)
    changed = replace(
        found.faster(speed),
        slots=given.integer("slots", found.slots, low=1, high=100_000),
        batch_tokens=given.integer("batch_tokens", found.batch_tokens, low=1),
        cache_tokens=given.integer("cache_tokens", found.cache_tokens, low=1),
        max_waiting=given.integer("max_waiting", found.max_waiting, low=0),
        start_s=given.number("start_s", found.start_s, low=0.0, high=86_400.0),
        prefix_cache=given.flag("prefix_cache", True),
    )
    given.end()
    return changed


def _level(body: dict[str, Any]) -> ServiceLevel:
    given = Fields(body, "service_level", path="service_level.")
    usual = ServiceLevel()
    level = ServiceLevel(
        **{
            one.name: given.number(one.name, getattr(usual, one.name), low=0.0)
            for one in fields(ServiceLevel)
        }
    )
    given.end()
    return level


def _settings(kind: type[Any], body: dict[str, Any], what: str) -> Any:
    """Settings of a process, as its own file would have them."""
    given = Fields(body, what, path=f"{what}.")
    found: dict[str, Any] = {}
    for one in fields(kind):
        if one.name not in given:
            continue
        value = given.raw(one.name)
        low, high = one.metadata.get("low"), one.metadata.get("high")
        if isinstance(one.default, bool) or not isinstance(one.default, int | float):
            raise InvalidRequest(
                f"{what}.{one.name} makes no difference to a simulation; leave it out",
                param=f"{what}.{one.name}",
            )
        low, high = -1e15 if low is None else low, 1e15 if high is None else high
        value = given.number(one.name, low=low, high=high)
        found[one.name] = int(value) if isinstance(one.default, int) else value
    for one in fields(kind):
        given.raw(one.name, None)
    given.end()
    return kind(**found)


def _policy(
    body: Any,
    common: dict[str, Any],
    rollouts: Sequence[Any],
    releases: Callable[[Sequence[Any]], tuple[Release, ...]],
    place: Placer,
) -> Policy:
    given = Fields(body, "a policy", path="policies.")
    own = given.mapping("deployment", {})
    name = given.text("name", low=1, max_length=64)
    spec = spec_from_body({**DEPLOYMENT, **wishes_over(common, own)})
    algorithm = spec.scaling.algorithm.value
    autoscaler = named(given, "autoscaler", algorithm, AUTOSCALERS)
    scaling = {**common, **own}.get("scaling") or {}
    if scaling.get("algorithm", autoscaler) != autoscaler:
        raise InvalidRequest(
            f"the policy {name!r} has autoscaler {autoscaler} and scaling.algorithm {algorithm}; "
            "leave one of them out",
            param="policies.autoscaler",
        )
    scaled(spec, autoscaler)  # raises for settings that do not go with it
    policy = Policy(
        name,
        spec,
        autoscaler,
        place(given, spec),
        releases(given.items("rollouts", rollouts)),
    )
    given.end()
    return policy


# Faults ------------------------------------------------------------------------------------------


def _faults(top: Fields, seed: int, duration_s: float, zones: list[str]) -> tuple[Fault, ...]:
    scripted = [check_fault(_fault(one), zones) for one in top.items("faults", ())]
    rates = top.mapping("faults_per_hour", {})
    per_hour: dict[FaultKind, float] = {}
    given = Fields(rates, "faults_per_hour", path="faults_per_hour.")
    for kind in FaultKind:
        if kind.value in given:
            per_hour[kind] = given.number(kind.value, low=0.0, high=3600.0)
    given.end()
    found = drawn_faults(Random(f"{seed} faults"), per_hour, duration_s, zones)
    return tuple(sorted([*scripted, *found], key=lambda one: one.at))


def _fault(body: Any) -> Fault:
    given = Fields(body, "a fault", path="faults.")
    kind = given.choice("kind", FaultKind)
    usual = Fault(kind, 0.0)
    found: dict[str, Any] = {"at": given.number("at", low=0.0)}
    for one in fields(Fault):
        value = getattr(usual, one.name)
        if one.name in found or one.name == "kind" or one.name not in given:
            continue
        if isinstance(value, str):
            found[one.name] = given.text(one.name, max_length=64)
        elif isinstance(value, int):
            found[one.name] = given.integer(one.name, low=1)
        else:
            low = -1e9 if one.name == "jump_s" else 0.0
            high = 1.0 if one.name in ("lost", "late", "doubled") else 1e9
            found[one.name] = given.number(one.name, low=low, high=high)
    for one in fields(Fault):
        given.raw(one.name, None)
    given.end()
    return replace(usual, **found)
