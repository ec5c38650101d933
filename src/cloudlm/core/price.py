"""What tokens cost: a price per model, and what a request's tokens come to.

Money is counted in whole billionths of the currency, so that sums are exact. Which currency it is,
is for the operator to say; prices and budgets share it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cloudlm.core.chat import Usage
from cloudlm.core.errors import BadSetting, InvalidRequest
from cloudlm.core.fields import Fields

NANO = 1_000_000_000
MAX_PRICE = 1_000_000.0
ANY_MODEL = "*"


@dataclass(frozen=True, slots=True)
class Price:
    """Billionths of the currency per token. A price of one per million tokens is 1000 of them."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0

    def cost(self, usage: Usage) -> int:
        """What these tokens cost, billionths; prompt tokens out of the cache cost less."""
        if self is FREE:
            return 0
        prompt, cached = usage.prompt_tokens, usage.cached_tokens
        if cached > prompt:  # asked for every attempt: no call of min
            cached = prompt
        fresh = prompt - cached
        return (
            fresh * self.prompt + cached * self.cached + usage.completion_tokens * self.completion
        )

    def again(self, usage: Usage) -> int:
        """What an answer costs, billionths, that was not computed again: every token as cached."""
        return (usage.prompt_tokens + usage.completion_tokens) * self.cached

    def most(self, prompt_tokens: int, completion_tokens: int) -> int:
        """The most that so many tokens can cost, whether cached or not."""
        dearest = self.prompt if self.prompt > self.cached else self.cached
        return prompt_tokens * dearest + completion_tokens * self.completion


FREE = Price()


def read_prices(text: str) -> dict[str, Price]:
    """Prices out of ``model=prompt/cached/completion, …``, each per million tokens; ``*`` is for
    models not named, and ``model@tenant`` for one tenant alone. Raises BadSetting."""
    prices: dict[str, Price] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, numbers = (piece.strip() for piece in part.rpartition("="))
        rates = [_rate(number) for number in numbers.split("/")]
        model, at, tenant = name.partition("@")
        whole = model and (tenant or not at) and "@" not in tenant and name not in prices
        if not whole or len(rates) != 3 or None in rates:
            raise BadSetting(
                f"gateway.prices: {part!r:.80} must be model=prompt/cached/completion, or "
                "model@tenant=… for one tenant, each name once, and three "
                f"prices per million tokens from 0 to {MAX_PRICE:,.0f} with at most three decimals,"
                " such as tiny=0.5/0.1/1.5",
                param="gateway.prices",
            )
        prices[name] = Price(*(rate for rate in rates if rate is not None))
    return prices


def price_from_body(body: Any, param: str) -> Price:
    """A price out of ``{"prompt", "completion", "cached"?}``, each per million tokens; a cached
    token costs what others of a prompt do unless it is given. Raises InvalidRequest."""
    fields = Fields(body, param, path=f"{param}.")
    found = {}
    for name in ("prompt", "cached", "completion"):
        default = {"default": fields.raw("prompt")} if name == "cached" else {}
        given = fields.number(name, low=0.0, high=MAX_PRICE, **default)
        rate = _rate(given)
        if rate is None:
            raise InvalidRequest(
                f"{param}.{name} must have at most three decimals, not {given!r}",
                param=f"{param}.{name}",
            )
        found[name] = rate
    fields.end()
    return Price(**found)


def price_body(price: Price) -> dict[str, float]:
    """A price as JSON, per million tokens."""
    return {
        "prompt": price.prompt / 1000,
        "cached": price.cached / 1000,
        "completion": price.completion / 1000,
    }


def _rate(number: str | float) -> int | None:
    """Billionths per token of a price per million tokens, None if it is not one."""
    try:
        price = float(number)
    except ValueError:
        return None
    if not 0 <= price <= MAX_PRICE or not math.isclose(price * 1000, round(price * 1000)):
        return None
    return round(price * 1000)


def price_of(
    prices: Mapping[str, Price], model: str, tenant: str = "", own: Price | None = None
) -> Price:
    """The price of a model for a tenant; nothing if none is set. What the table has for the tenant
    goes first, then the deployment's ``own`` price, then what the table has for everybody."""
    if not prices:
        return own or FREE
    agreed = prices.get(f"{model}@{tenant}") or prices.get(f"{ANY_MODEL}@{tenant}")
    return agreed or own or prices.get(model) or prices.get(ANY_MODEL, FREE)
