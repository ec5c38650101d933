"""The perplexity of a model at several precisions, one engine after the other in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cloudlm.core.clock import SystemClock
from cloudlm.core.errors import BadSetting
from cloudlm.engine.perplexity import score_text
from cloudlm.worker.config import WorkerConfig
from cloudlm.worker.loading import Tell, find_model, load_found

if TYPE_CHECKING:
    from cloudlm.engine.engine import LocalEngine


@dataclass(frozen=True, slots=True)
class Measured:
    """One precision's result; ``precision`` is what was asked for, ``held_in`` what the engine
    says. ``elapsed_s`` is the time of scoring, seconds. ``refused`` is why there is none."""

    precision: str
    held_in: str = ""
    perplexity: float = 0.0
    tokens: int = 0
    elapsed_s: float = 0.0
    refused: str = ""


def measure_precisions(
    config: WorkerConfig, text: str, precisions: Sequence[str], tell: Tell
) -> Iterator[Measured]:
    """A result for each of ``precisions`` as it is there. A precision that this model or machine
    cannot have gives its reason. Raises what loading raises, InvalidRequest for too short a text.
    """
    found = find_model(config, tell)
    for precision in precisions:
        options = {**config.options, "precision": precision}
        try:
            engine = load_found(found, replace(config, options=options), tell)
        except BadSetting as error:
            yield Measured(precision, refused=error.message)
            continue
        yield asyncio.run(_score(engine, text, precision, tell))


async def _score(engine: LocalEngine, text: str, precision: str, tell: Tell) -> Measured:
    """Score the text, then close the engine."""
    clock = SystemClock()
    begin = clock.monotonic()
    tokenizer = engine.tokenizer
    try:
        found = await score_text(
            engine,
            tokenizer.encode(text),
            tokenizer.bos_token_id,
            progress=lambda share: tell(share, f"scoring at {precision}"),
        )
    finally:
        elapsed_s = clock.monotonic() - begin
        await engine.close()
    return Measured(precision, engine.info.dtype, found.perplexity, found.tokens, elapsed_s)
