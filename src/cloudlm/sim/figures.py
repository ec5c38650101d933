"""What a replica costs in time: figures measured on an engine, and the step time that they give.

A step of continuous batching takes ``base_s`` (the weights are read once), ``prefill_token_s`` for
each token of a prompt, ``sequence_s`` for each sequence that decodes and ``context_token_s`` for
each token of context that these attend to: the linear model that Vidur (Agrawal et al., MLSys
2024) and others find good enough for planning. ``sim.fit`` finds the four from measurements. Must
not simulate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from cloudlm.core.errors import InvalidRequest
from cloudlm.core.fields import Fields, shown
from cloudlm.core.yaml_text import NotYaml, parse_yaml
from cloudlm.sim.fit import Measurement, StepTime, fit, worst_error

_BUNDLED = "figures.yaml"


@dataclass(frozen=True, slots=True)
class Figures:
    """One engine with one model on one machine, as measured.

    ``slots`` sequences decode at once; a step computes at most ``batch_tokens``; ``cache_tokens``
    fit the key-value cache, which keeps beginnings in blocks of ``block_tokens`` (0: none);
    ``max_waiting`` requests may queue at a replica. ``start_s`` passes from the order to the first
    request. ``source`` says where the measurements were read, ``measured`` when they were made.
    """

    name: str
    step: StepTime
    slots: int = 64
    batch_tokens: int = 1024
    cache_tokens: int = 1 << 20
    max_waiting: int = 512
    start_s: float = 30.0
    prefix_cache: bool = True
    measured: str = ""
    source: str = ""
    rows: tuple[Measurement, ...] = ()

    def faster(self, speed: float) -> Figures:
        """The same on a machine that is ``speed`` times as fast."""
        one = self.step
        quick = StepTime(
            one.base_s / speed,
            one.prefill_token_s / speed,
            one.sequence_s / speed,
            one.context_token_s / speed,
            one.request_s / speed,
        )
        return replace(self, step=quick)


@cache
def bundled() -> Mapping[str, Figures]:
    """The figures that ship with this program, by name."""
    text = resources.files("cloudlm.sim").joinpath(_BUNDLED).read_text("utf-8")
    return _read_all(text, _BUNDLED)


def read_figures(path: Path) -> Mapping[str, Figures]:
    """Figures out of a file. Raises InvalidRequest naming what is wrong."""
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"figures {path} cannot be read: {error}") from None
    return _read_all(text, str(path))


def figures_body(one: Figures) -> dict[str, Any]:
    """Figures as YAML and JSON have them; ``read_figures`` reads a list of these back."""
    return {
        "name": one.name,
        "measured": one.measured,
        "source": one.source,
        "base_s": one.step.base_s,
        "prefill_token_s": one.step.prefill_token_s,
        "sequence_s": one.step.sequence_s,
        "context_token_s": one.step.context_token_s,
        "request_s": one.step.request_s,
        "worst_error": round(worst_error(one.step, one.rows, one.batch_tokens), 3),
        "slots": one.slots,
        "batch_tokens": one.batch_tokens,
        "cache_tokens": one.cache_tokens,
        "max_waiting": one.max_waiting,
        "start_s": one.start_s,
        "rows": [list(row) for row in one.rows],
    }


def fitted(name: str, rows: tuple[Measurement, ...], **more: Any) -> Figures:
    """Figures out of measurements. Raises InvalidRequest if they do not tell enough."""
    batch_tokens = more.get("batch_tokens", Figures.__dataclass_fields__["batch_tokens"].default)
    return Figures(name, fit(rows, batch_tokens), rows=rows, **more)


def _read_all(text: str, where: str) -> dict[str, Figures]:
    try:
        body = parse_yaml(text)
    except NotYaml as error:
        raise InvalidRequest(f"{where} is no YAML: {error}") from None
    top = Fields(body, where)
    found = [_read(one, f"{where}: figures") for one in top.items("figures")]
    top.end()
    return {one.name: one for one in found}


def _read(body: Any, what: str) -> Figures:
    fields = Fields(body, what)
    step = StepTime(
        fields.number("base_s", low=0.0),
        fields.number("prefill_token_s", low=0.0),
        fields.number("sequence_s", 0.0, low=0.0),
        fields.number("context_token_s", 0.0, low=0.0),
        fields.number("request_s", 0.0, low=0.0),
    )
    fields.raw("worst_error", None)
    figures = Figures(
        name=fields.text("name", low=1, max_length=80),
        step=step,
        slots=fields.integer("slots", 64, low=1),
        batch_tokens=fields.integer("batch_tokens", 1024, low=1),
        cache_tokens=fields.integer("cache_tokens", 1 << 20, low=1),
        max_waiting=fields.integer("max_waiting", 512, low=0),
        start_s=fields.number("start_s", 30.0, low=0.0),
        measured=str(fields.raw("measured", "")),
        source=fields.text("source", ""),
        rows=tuple(_measurement(row, what) for row in fields.items("rows", ())),
    )
    fields.end()
    if step.base_s + step.sequence_s <= 0:
        raise InvalidRequest(f"{what} {figures.name!r}: a step must take time (base_s above 0)")
    return figures


def _measurement(row: Any, what: str) -> Measurement:
    if not isinstance(row, list) or len(row) != len(Measurement._fields):
        raise InvalidRequest(
            f"{what}: a row must be [{', '.join(Measurement._fields)}], not {shown(row)}"
        )
    return Measurement.checked(row, what)
