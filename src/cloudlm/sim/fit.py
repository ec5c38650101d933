"""Finds what a step costs out of measured runs: least squares with no part below nothing.

A run is so many alike requests begun at once on an idle replica, and the seconds until the last one
ended; with one token of output that is the time to the first token. Its time is linear in the
unknowns, so that four runs or more that differ in prompt, output and number tell those of a step,
and six or more tell besides what a request takes on its way. Relative errors are weighed, because a
long run is no truer than a short one. Pure.
"""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cloudlm.core.errors import InvalidRequest


class StepTime(NamedTuple):
    """Seconds of one step: fixed, for each prompt token, each decoding sequence, and each token of
    their contexts. ``request_s`` passes once for each request outside of all steps: connections,
    checks, tokenising; that of several requests passes at the same time."""

    base_s: float
    prefill_token_s: float
    sequence_s: float
    context_token_s: float
    request_s: float = 0.0


class Measurement(NamedTuple):
    """``requests`` alike, at once, each with a prompt of which ``cached_tokens`` were cached, took
    ``seconds`` together."""

    requests: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    seconds: float

    @classmethod
    def checked(cls, values: Sequence[Any], where: str) -> Measurement:
        """A measurement out of numbers or texts. Raises InvalidRequest."""
        try:
            *counts, seconds = values
            requests, prompt, cached, output = (int(value) for value in counts)
            found = cls(requests, prompt, cached, output, float(seconds))
        except (TypeError, ValueError):
            found = cls(0, 0, 0, 0, 0.0)
        usable = (
            found.requests > 0
            and 0 <= found.cached_tokens < found.prompt_tokens
            and found.output_tokens > 0
            and 0 < found.seconds < math.inf
        )
        if not usable:
            raise InvalidRequest(
                f"{where}: {list(values)!r:.80} is no measurement; {', '.join(cls._fields)} must be"
                " above 0, and cached_tokens from 0 to below prompt_tokens"
            )
        return found


def read_measurements(path: Path) -> tuple[Measurement, ...]:
    """Measurements out of a CSV file whose first line names the columns. Raises InvalidRequest."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            missing = set(Measurement._fields) - set(reader.fieldnames or ())
            if missing:
                raise InvalidRequest(
                    f"{path} has no column {', '.join(sorted(missing))}; its first line must name "
                    f"{', '.join(Measurement._fields)}"
                )
            return tuple(
                Measurement.checked(
                    [row[name] for name in Measurement._fields], f"{path}, line {reader.line_num}"
                )
                for row in reader
            )
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"measurements {path} cannot be read: {error}") from None


def parts(row: Measurement, batch_tokens: int) -> StepTime:
    """How often a run pays each of these."""
    computed = row.requests * (row.prompt_tokens - row.cached_tokens)
    decoding = row.output_tokens - 1
    context = row.prompt_tokens + row.output_tokens / 2
    return StepTime(
        math.ceil(computed / batch_tokens) + decoding,
        computed,
        row.requests * decoding,
        row.requests * decoding * context,
        1,
    )


def predicted_s(step: StepTime, row: Measurement, batch_tokens: int) -> float:
    """Seconds that a run takes at these step times."""
    return sum(a * b for a, b in zip(step, parts(row, batch_tokens), strict=True))


def worst_error(step: StepTime, rows: Sequence[Measurement], batch_tokens: int) -> float:
    """The largest relative error over these runs."""
    errors = [abs(predicted_s(step, row, batch_tokens) / row.seconds - 1.0) for row in rows]
    return max(errors, default=0.0)


def fit(rows: Sequence[Measurement], batch_tokens: int) -> StepTime:
    """The step times that explain ``rows`` best. Raises InvalidRequest if they do not tell enough.

    With so few unknowns every set of those above 0 is tried; the best of the feasible solutions is
    that of non-negative least squares (Lawson and Hanson, "Solving Least Squares Problems", 1974).
    ``request_s`` is sought only where more runs than unknowns keep it from explaining errors.
    """
    table = [[part / row.seconds for part in parts(row, batch_tokens)] for row in rows]
    best: tuple[float, list[float]] | None = None
    unknowns = len(StepTime._fields)
    names = range(unknowns if len(rows) > unknowns else unknowns - 1)
    for count in range(1, len(names) + 1):
        for chosen in itertools.combinations(names, count):
            found = _solve([[line[n] for n in chosen] for line in table])
            if found is None or min(found) <= 0:
                continue
            step = [0.0] * len(StepTime._fields)
            for name, value in zip(chosen, found, strict=True):
                step[name] = value
            error = sum((sum(map(_product, line, step)) - 1.0) ** 2 for line in table)
            if best is None or error < best[0] - 1e-12:
                best = error, step
    if best is None or best[1][1] <= 0 or best[1][0] + best[1][2] <= 0:
        raise InvalidRequest(
            "these measurements do not tell what a prompt and what a decoding step cost: measure "
            "at least a long prompt with 1 token of output, and 1 and several requests at once "
            "with 100 tokens of output"
        )
    return StepTime(*(float(f"{value:.6g}") for value in best[1]))


def _product(a: float, b: float) -> float:
    return a * b


def _solve(table: list[list[float]]) -> list[float] | None:
    """The least squares solution of ``table @ x = 1``, None if there is no single one."""
    size = len(table[0])
    scale = [max(abs(line[n]) for line in table) or 1.0 for n in range(size)]
    scaled = [[value / scale[n] for n, value in enumerate(line)] for line in table]
    rows = [
        [sum(line[i] * line[j] for line in scaled) for j in range(size)]
        + [sum(line[i] for line in scaled)]
        for i in range(size)
    ]
    for i in range(size):
        pivot = max(range(i, size), key=lambda n: abs(rows[n][i]))
        rows[i], rows[pivot] = rows[pivot], rows[i]
        if abs(rows[i][i]) < 1e-10:
            return None
        for n in range(size):
            if n != i:
                share = rows[n][i] / rows[i][i]
                rows[n] = [a - share * b for a, b in zip(rows[n], rows[i], strict=True)]
    return [rows[i][size] / rows[i][i] / scale[i] for i in range(size)]
