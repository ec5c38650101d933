"""The flags by which a model is spread over processes, under vLLM's names too."""

from __future__ import annotations

from typing import Annotated

import typer

TensorParallel = Annotated[
    int | None,
    typer.Option(
        "--tensor-parallel",
        "--tensor-parallel-size",
        "-tp",
        metavar="N",
        help="Processes that share every layer of the model.",
    ),
]
PipelineParallel = Annotated[
    int | None,
    typer.Option(
        "--pipeline-parallel",
        "--pipeline-parallel-size",
        "-pp",
        metavar="N",
        help="Stages of layers in processes of their own.",
    ),
]


def partition_options(tensor_parallel: int | None, pipeline_parallel: int | None) -> dict[str, int]:
    """The engine settings that the flags stand for; nothing for flags that were not given."""
    given = {"tensor_parallel": tensor_parallel, "pipeline_parallel": pipeline_parallel}
    return {name: value for name, value in given.items() if value is not None}
