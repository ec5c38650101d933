"""How ``cloudlm plan`` shows a decision: tables for people, JSON for machines. Must not decide."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from cloudlm.cli.folding import unbroken
from cloudlm.cli.screen import print_folded, print_table, print_text, say
from cloudlm.core.deployment import DeploymentSpec

if TYPE_CHECKING:
    from cloudlm.control.offers import Asked
    from cloudlm.control.place import Choice, Decision, Part

SHOWN = 8
_GIB = 2**30


def print_decision(
    spec: DeploymentSpec, asked: Asked, decision: Decision, *, everything: bool
) -> None:
    """The need, the best choice, the next ones, and why the others lost."""
    print_text(f"{spec.name}: {spec.model}")
    print_folded(_need_text(asked))
    best = decision.best
    if best is None:
        say(f"{spec.name}: no machine in the catalogue will do; the reasons are below")
    else:
        print_text("")
        _print_parts(best, asked, decision)
        print_text("")
        _print_choices(decision.choices if everything else decision.choices[:SHOWN], asked)
    print_text("")
    _print_lost(decision, everything=everything)


def _need_text(asked: Asked) -> str:
    need, traffic, level = asked.need, asked.traffic, asked.placement.level
    lines = [
        f"traffic: {traffic.requests_per_s:g} requests/s of {traffic.prompt_tokens} tokens, "
        f"answers of {traffic.output_tokens}",
        f"needs: {need.weights_bytes / _GIB:.1f} GiB of weights, "
        f"{need.sequence_tokens * need.cache_bytes_per_token / _GIB:.2f} GiB of keys and values "
        f"per sequence ({need.sequence_tokens} tokens); "
        f"a replica must hold at least {need.least}",
        f"asked: first token within {_ms(level.ttft_ms)}, {_ms(level.tpot_ms)} between tokens, "
        f"{level.headroom:.0%} of capacity used at most",
    ]
    return "\n".join(lines)


def _ms(value: float) -> str:
    return f"{value:g} ms" if value else "any time"


def _print_parts(best: Choice, asked: Asked, decision: Decision) -> None:
    columns = (
        "MACHINE", "DEVICES", "ON DEMAND", "SPOT", "REPLICAS", "REQUESTS /S", "TTFT MS",
        "TPOT MS", "USD/H",
    )  # fmt: skip
    print_table(columns, [_part_row(part) for part in best.parts], "", whole={"MACHINE"})
    for part in best.parts:
        print_folded(_zones_line(part))
    print_text("")
    million = _per_million(best, asked)
    print_folded(
        f"${best.usd_per_h:.2f} per hour, ${million:.3f} per million tokens at this traffic\n"
        f"no mix of machines costs less than ${decision.usd_per_h_at_least:.2f} per hour: a bound "
        "that counts parts of machines and leaves out zones, spares and min_replicas"
    )
    if best.usd_per_h_at_most > best.usd_per_h:
        print_folded(f"${best.usd_per_h_at_most:.2f} per hour while all spot machines are missing")


def _part_row(part: Part) -> tuple[Any, ...]:
    machine, offer = part.machine, part.machine.offer
    limit = machine.at_limit
    return (
        offer.key,
        f"{offer.count} x {offer.device}",
        sum(part.on_demand.values()),
        sum(part.spot.values()),
        part.count * machine.replicas,
        f"{part.count * machine.requests_per_s:.2f}",
        f"{limit.ttft_ms:.0f}",
        f"{limit.tpot_ms:.1f}",
        f"{part.usd_per_h:.2f}",
    )


def _zones_line(part: Part) -> str:
    machine = part.machine
    return (
        f"{machine.offer.key}: on demand {_zones_text(part.on_demand)}; "
        f"spot {_zones_text(part.spot)}; devices of a replica: {machine.pieces}"
    )


def _zones_text(zones: Mapping[str, int]) -> str:
    return ", ".join(f"{number} in {zone}" for zone, number in sorted(zones.items())) or "none"


def _print_choices(choices: Sequence[Choice], asked: Asked) -> None:
    rows = [
        (
            number,
            " + ".join(unbroken(one) for one in choice.name.split(" + ")),
            f"{choice.usd_per_h:.2f}",
            f"{_per_million(choice, asked):.3f}",
            f"{choice.requests_per_s:.2f}",
            choice.zones,
            "estimated" if choice.estimated else "measured",
        )
        for number, choice in enumerate(choices, 1)
    ]
    columns = ("RANK", "CHOICE", "USD/H", "USD/M TOKENS", "REQUESTS/S", "ZONES", "SPEED")
    print_table(columns, rows, "")


def _print_lost(decision: Decision, *, everything: bool) -> None:
    """How many lost for each reason with one of them, or all of them."""
    if everything:
        rows: list[tuple[Any, ...]] = [
            (one.reason, 1, f"{one.name}: {one.detail}") for one in decision.lost
        ]
    else:
        counts = Counter(one.reason for one in decision.lost)
        first = {one.reason: one for one in reversed(decision.lost)}
        rows = [
            (reason, count, f"{first[reason].name}: {first[reason].detail}")
            for reason, count in counts.most_common()
        ]
    print_table(("LOST", "COUNT", "SUCH AS"), rows, "no offer lost")


def decision_body(spec: DeploymentSpec, asked: Asked, decision: Decision) -> dict[str, Any]:
    """A decision as JSON."""
    need = asked.need
    return {
        "name": spec.name,
        "model": spec.model,
        "figures": asdict(asked.figures),
        "need": {
            "weights_bytes": need.weights_bytes,
            "cache_bytes_per_sequence": need.sequence_tokens * need.cache_bytes_per_token,
            "sequence_tokens": need.sequence_tokens,
            "sequences": need.least,
        },
        "best": None if decision.best is None else _choice_body(decision.best, asked),
        "choices": [_choice_body(choice, asked) for choice in decision.choices],
        "lost": [asdict(one) for one in decision.lost],
        "usd_per_h_at_least": decision.usd_per_h_at_least,
    }


def _choice_body(choice: Choice, asked: Asked) -> dict[str, Any]:
    return {
        "name": choice.name,
        "usd_per_h": choice.usd_per_h,
        "usd_per_h_at_most": choice.usd_per_h_at_most,
        "usd_per_million_tokens": _per_million(choice, asked),
        "requests_per_s": choice.requests_per_s,
        "replicas": choice.replicas,
        "zones": choice.zones,
        "speed": "estimated" if choice.estimated else "measured",
        "parts": [_part_body(part) for part in choice.parts],
    }


def _part_body(part: Part) -> dict[str, Any]:
    machine = part.machine
    return {
        "offer": asdict(replace(machine.offer, spot=dict(machine.offer.spot))),
        "count": part.count,
        "on_demand": dict(part.on_demand),
        "spot": dict(part.spot),
        "devices_per_replica": machine.pieces,
        "replicas": part.count * machine.replicas,
        "sequences_per_replica": machine.sequences,
        "requests_per_s": part.count * machine.requests_per_s,
        "ttft_ms_at_limit": machine.at_limit.ttft_ms,
        "tpot_ms_at_limit": machine.at_limit.tpot_ms,
        "network_ms": machine.network_ms,
        "usd_per_h": part.usd_per_h,
    }


def _per_million(choice: Choice, asked: Asked) -> float:
    from cloudlm.control.place import usd_per_million_tokens

    return usd_per_million_tokens(choice.usd_per_h, asked)
