"""Names that several models stand behind: shares, priorities, fallbacks, and larger windows.

Pure: reads the routes out of their setting, and says in which order a request tries models. The
spillover between priorities is that of service meshes: a level's health is the share of its
replicas that are available, times 1.4, and what it cannot take goes to the next
(Envoy, docs/root/intro/arch_overview/upstream/load_balancing/priority). Must not send or book.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from cloudlm.core.errors import BadSetting, InvalidRequest
from cloudlm.core.model import check_name

OVERPROVISIONING = 1.4
"""What a level can still take in all while replicas are missing: spilling begins below 71.4 %."""
MAX_WEIGHT = 1e6


@dataclass(frozen=True, slots=True)
class Target:
    """A model that takes a share of a route's requests."""

    model: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class ModelRoute:
    """A name that clients may ask for. ``levels`` share its requests, the first as far as its
    health allows; ``fallbacks`` are for failures alone, ``longer`` for prompts that are too long
    for the model before."""

    name: str
    levels: tuple[tuple[Target, ...], ...]
    fallbacks: tuple[str, ...] = ()
    longer: tuple[str, ...] = ()

    @property
    def models(self) -> tuple[str, ...]:
        """All models behind the name, each once."""
        targets = (target.model for level in self.levels for target in level)
        return tuple(dict.fromkeys((*targets, *self.fallbacks, *self.longer)))

    def only(self, may: Callable[[str], bool]) -> ModelRoute:
        """The route with the models that ``may`` be used."""
        levels = (tuple(one for one in level if may(one.model)) for level in self.levels)
        return replace(
            self,
            levels=tuple(level for level in levels if level),
            fallbacks=tuple(filter(may, self.fallbacks)),
            longer=tuple(filter(may, self.longer)),
        )


def level_shares(healths: Sequence[float]) -> list[float]:
    """The share of requests of each level, out of the share of it that is available (0 to 1). The
    shares sum to 1; the first takes all if nothing is available anywhere."""
    able = [min(OVERPROVISIONING * health, 1.0) for health in healths]
    normal = min(math.fsum(able), 1.0)
    if normal <= 0.0:
        return [1.0] + [0.0] * (len(able) - 1)
    left, shares = 1.0, []
    for one in able:
        shares.append(min(left, one / normal))
        left = max(left - shares[-1], 0.0)
    return shares


def order(route: ModelRoute, health: Callable[[str], float], draw: float) -> tuple[str, ...]:
    """The models to try, the one that shall answer first. ``health`` is the share of a model's
    replicas that is available, 0 to 1; ``draw`` is even from 0 to below 1. Models that are not
    available at all come last."""
    able = {model: min(OVERPROVISIONING * health(model), 1.0) for model in route.models}
    shares = level_shares([_health(level, health) for level in route.levels])
    number, rest = drawn(shares, draw)
    levels = [*route.levels[number:], *route.levels[:number]] if route.levels else []
    found: list[str] = []
    for position, level in enumerate(levels):
        weights = [target.weight * able[target.model] for target in level]
        if not any(weights):
            weights = [target.weight for target in level]
        first = drawn(weights, rest)[0] if position == 0 else weights.index(max(weights))
        found.append(level[first].model)
        others = sorted(range(len(level)), key=lambda one: -weights[one])
        found.extend(level[one].model for one in others if one != first)
    found.extend(route.fallbacks)
    once = dict.fromkeys(found)
    return tuple(sorted(once, key=lambda model: not able[model]))


def _health(level: Sequence[Target], health: Callable[[str], float]) -> float:
    whole = math.fsum(target.weight for target in level)
    return min(math.fsum(one.weight * health(one.model) for one in level) / whole, 1.0)


def drawn(weights: Sequence[float], draw: float) -> tuple[int, float]:
    """Which of ``weights`` an even draw hits, and where in it, again from 0 to below 1."""
    point = draw * math.fsum(weights)
    last = 0
    for number, weight in enumerate(weights):
        if weight > 0.0:
            if point < weight:
                return number, point / weight
            last = number
        point -= weight
    return last, 0.0  # rounding: the point lies at the end of the last


# The setting --------------------------------------------------------------------------------------


def read_routes(text: str) -> dict[str, ModelRoute]:
    """Routes by name out of ``name = model:weight + model | next level > fallback ^ longer``, apart
    by ``;`` or on lines of their own. Raises BadSetting."""
    routes: dict[str, ModelRoute] = {}
    for part in filter(None, (part.strip() for part in text.replace("\n", ";").split(";"))):
        try:
            route = _route(part)
        except InvalidRequest as error:
            raise _bad(part, error.message) from None
        if route.name in routes:
            raise _bad(part, f"{route.name!r} is named twice")
        routes[route.name] = route
    return routes


def _route(part: str) -> ModelRoute:
    name, equals, rest = part.partition("=")
    if not equals:
        raise InvalidRequest("there is no '='")
    rest, *longer = rest.split("^")
    rest, *fallbacks = rest.split(">")
    levels = tuple(tuple(_targets(level)) for level in rest.split("|"))
    route = ModelRoute(check_name(name.strip()), levels, _names(fallbacks), _names(longer))
    shared = [target.model for level in levels for target in level]
    if len(set(shared)) < len(shared):
        raise InvalidRequest("a model has two shares")
    return route


def _names(texts: Sequence[str]) -> tuple[str, ...]:
    return tuple(check_name(text.strip(), "model") for text in texts)


def _targets(level: str) -> Iterator[Target]:
    for text in level.split("+"):
        model, colon, number = text.partition(":")
        weight = _weight(number) if colon else 1.0
        yield Target(check_name(model.strip(), "model"), weight)


def _weight(text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = 0.0
    if not 0.0 < weight <= MAX_WEIGHT:
        raise InvalidRequest(f"the weight {text.strip()[:20]!r} must be a number above 0")
    return weight


def _bad(part: str, why: str) -> BadSetting:
    return BadSetting(
        f"gateway.routes: {part!r:.120}: {why}; expected name = model:weight + model:weight "
        "| models of the next priority > fallback ^ model with a larger window, such as "
        "chat = small:9 + large:1 > backup",
        param="gateway.routes",
    )
