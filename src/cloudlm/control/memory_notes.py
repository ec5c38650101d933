"""What people are told of a deployment's place in this machine's memory. Pure; must not judge."""

from __future__ import annotations

from collections.abc import Mapping

from cloudlm.control.footprint import amount_text
from cloudlm.control.residency import Claim, Verdict, held_by
from cloudlm.control.room import Wish
from cloudlm.core.deployment import Residence


def memory_note(
    wish: Wish,
    verdict: Verdict,
    claims: Mapping[str, Claim],
    budget_bytes: int,
    other_bytes: int,
    unknown: str = "",
    leaving: str = "",
) -> str:
    """What there is to say, empty if nothing. ``other_bytes`` belong to no deployment, ``unknown``
    is why its size cannot be told, ``leaving`` names who makes room (``leaving_text``)."""
    claim = claims[wish.name]
    need, size = amount_text(claim.need_bytes), amount_text(budget_bytes)
    if verdict.residence is Residence.TOO_LARGE:
        need = amount_text(claim.need_bytes * (claim.least if claim.pinned else 1))
        return (
            f"it needs {need} of memory, more than the budget of {size} "
            "(control.memory_budget) has beside what is pinned: raise it, or make the model "
            "smaller (precision, kv_cache_mb)"
        )
    if unknown:
        return f"nothing is started while it is not known what memory it takes: {unknown}"
    if verdict.residence is Residence.WAITING:
        held = other_bytes + sum(one.held_bytes for one in claims.values())
        free = amount_text(max(budget_bytes - held, 0))
        return f"waits for {need} of memory; {free} of {size} are free{leaving}"
    if verdict.unload:
        return "others wait for its memory: it finishes its requests and is unloaded"
    if verdict.residence is Residence.UNLOADED and claim.asleep:
        return "put to sleep, and no longer in memory"
    if verdict.residence is Residence.UNLOADED:
        return f"not in memory; a request loads it ({need})"
    return ""


def leaving_text(wish: Wish, wishes: Mapping[str, Wish], verdicts: Mapping[str, Verdict]) -> str:
    """Who makes room; only those of the same tenant are named."""
    leaving = held_by(verdicts, Residence.LEAVING)
    tenant = wish.deployment.spec.tenant
    said = [name for name in leaving if wishes[name].deployment.spec.tenant == tenant]
    if others := len(leaving) - len(said):
        said.append(f"{others} of other tenants")
    return f"; leaving: {', '.join(said)}" if said else ""
