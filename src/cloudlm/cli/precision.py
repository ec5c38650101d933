"""The flag that says in which numbers a model's weights are held: checked, nothing loaded."""

from __future__ import annotations

from typing import Annotated

import typer

from cloudlm.core.errors import BadSetting, InvalidRequest
from cloudlm.core.settings import FLOATS, check_precision
from cloudlm.core.spec import VLLM

Precision = Annotated[
    str | None,
    typer.Option(
        "--precision",
        metavar="NAME",
        help="Numbers that weights are held in, such as bfloat16, int8 or int4; else the "
        "version's own.",
    ),
]


def precision_options(precision: str | None, engine: str) -> dict[str, str]:
    """The setting of ``engine`` that the flag stands for; nothing if it was not given. Raises
    InvalidRequest for a value that is not known, with the list of those that are."""
    if precision is None:
        return {}
    try:
        check_precision(precision, "--precision")
    except BadSetting as error:
        raise InvalidRequest(error.message, param="precision") from None
    if engine != VLLM:
        return {"precision": precision}
    if precision in ("auto", *FLOATS):
        return {"dtype": precision}
    raise InvalidRequest(
        f"--precision {precision} is for the engine cloudlm; vllm takes {', '.join(FLOATS)}, and "
        "files that are quantised already (--option quantization=…)",
        param="precision",
    )
