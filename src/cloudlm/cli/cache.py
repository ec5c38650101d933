"""``cloudlm cache``: measure how often the semantic cache would be wrong, and keep its threshold.

``calibrate`` writes ``semantic.json`` in home, which gateways read at their start; ``show`` prints
what stands there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cloudlm.cli.connect import control_client
from cloudlm.cli.options import Json
from cloudlm.cli.screen import out, print_json
from cloudlm.core.errors import (
    CloudlmError,
    InvalidRequest,
    NotFound,
    StorageFailed,
    UpstreamFailed,
)

if TYPE_CHECKING:
    from cloudlm.gateway.semantic.calibration import Calibration
    from cloudlm.gateway.semantic.pairs import Pair

app = typer.Typer(no_args_is_help=True, help="The semantic cache: calibrate, show.")
BUILT_IN = "built-in"
_AT_ONCE = 64


@app.command("calibrate")
def calibrate(
    pairs: Annotated[
        Path | None,
        typer.Option("--pairs", help="Labelled questions; those that cloudlm brings if not given."),
    ] = None,
    budget: Annotated[
        float,
        typer.Option("--budget", help="Largest part of hard pairs that may be answered wrongly."),
    ] = 0.01,
    embedder: Annotated[
        str, typer.Option("--embedder", help="built-in, or a deployment that serves embeddings.")
    ] = BUILT_IN,
    json_output: Json = False,
) -> None:
    """Choose the threshold for a budget of false hits."""
    from cloudlm.gateway.semantic import calibration
    from cloudlm.gateway.semantic.pairs import SHIPPED_APART, SHIPPED_PAIRS, read_pairs
    from cloudlm.state.home import Home, load_settings

    if not 0 < budget < 1:
        raise InvalidRequest("--budget must be between 0 and 1, such as 0.01", param="budget")
    labelled = read_pairs(pairs or SHIPPED_PAIRS)
    apart = [] if pairs else read_pairs(SHIPPED_APART)
    likeness, fingerprint = _likeness(embedder, [*labelled, *apart])
    found = calibration.calibrate(labelled, likeness, budget, embedder, fingerprint, apart)
    settings, _ = load_settings()
    home = Home(settings.home).ensure()
    try:
        path = calibration.write(found, home.path)
    except OSError as error:
        raise StorageFailed(f"the calibration cannot be kept: {error.strerror}") from None
    _show(found, json_output)
    if not json_output:
        out.print(f"kept in {path}; gateways read it when they start")


@app.command("show")
def show(json_output: Json = False) -> None:
    """Show the calibration that gateways of this home use."""
    from cloudlm.gateway.semantic import calibration
    from cloudlm.state.home import Home, load_settings

    settings, _ = load_settings()
    found = calibration.load(Home(settings.home).path)
    if found is None:
        raise NotFound("nothing was calibrated yet: run 'cloudlm cache calibrate'")
    _show(found, json_output)


def _show(found: Calibration, json_output: bool) -> None:
    from cloudlm.gateway.semantic import calibration

    if json_output:
        print_json(calibration.facts(found))
        return
    words = "the same words" if found.same_words else "other words too"
    out.print(f"embedder {found.embedder}, threshold {found.threshold:.4f}, {words}")
    out.print(
        f"false hits {found.false_hits} of {found.different_pairs} hard pairs: "
        f"{found.false_hit_rate:.2%}, 95 % interval {found.false_hit_low:.2%} to "
        f"{found.false_hit_high:.2%} (budget {found.budget:.2%}; {found.groups} groups)"
    )
    share = found.hits / max(found.same_pairs, 1)
    out.print(f"hits {found.hits} of {found.same_pairs} pairs that mean the same: {share:.0%}")


def _likeness(
    embedder: str, pairs: Sequence[Pair]
) -> tuple[Callable[[str, str], float], tuple[float, ...]]:
    """How alike two texts of ``pairs`` are, and the embedder's fingerprint."""
    from cloudlm.gateway.semantic.meaning import read
    from cloudlm.gateway.semantic.vectors import built_in, unit

    texts = sorted({text for pair in pairs for text in (pair.one, pair.other)})
    fingerprint: tuple[float, ...] = ()
    if embedder == BUILT_IN:
        vectors = {text: built_in(read(text)) for text in texts}
    else:
        from cloudlm.gateway.semantic.deployed import PROBE

        found = _embedded(embedder, [PROBE, *texts])
        try:
            units = [unit(one) for one in found]
        except (TypeError, ValueError):
            raise UpstreamFailed(f"{embedder!r} sent something that is no vector") from None
        fingerprint = tuple(round(float(value), 6) for value in units[0])
        vectors = dict(zip(texts, units[1:], strict=True))
    return lambda one, other: float(vectors[one] @ vectors[other]), fingerprint


def _embedded(embedder: str, texts: Sequence[str]) -> list[Any]:
    import openai

    found: list[Any] = []
    with control_client() as client, client.openai() as gateway:
        try:
            for begin in range(0, len(texts), _AT_ONCE):
                batch = list(texts[begin : begin + _AT_ONCE])
                said = gateway.embeddings.create(
                    model=embedder, input=batch, encoding_format="float"
                )
                found += [one.embedding for one in said.data]
        except openai.OpenAIError as error:
            raise CloudlmError(f"{embedder!r} gave no embeddings: {error}") from None
    if len(found) != len(texts):
        raise UpstreamFailed(f"{embedder!r} sent {len(found)} vectors for {len(texts)} texts")
    return found
