"""The ``cloudlm`` command: assembles the nouns and turns errors into plain words.

Exit codes: 0 done, 1 failed, 2 misuse, 130 interrupted.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import Annotated

import typer

from cloudlm import __version__
from cloudlm.cli.nouns import Root
from cloudlm.core.errors import CloudlmError

app = typer.Typer(
    name="cloudlm",
    cls=Root,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="From a language model file to a secured, elastic service.",
)


# Troubles of the machine, not faults of ours, wherever they show.
_OF_THIS_MACHINE = frozenset(
    (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.EMFILE)
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"cloudlm {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
    home: Annotated[
        str | None,
        typer.Option("--home", help="Folder of this installation (CLOUDLM_HOME)."),
    ] = None,
) -> None:
    """Options of every command."""
    if home:
        os.environ["CLOUDLM_HOME"] = home


def _fail(message: str) -> None:
    """Say why nothing was done; what draws on screens is read only where something is said."""
    from cloudlm.cli.screen import fail

    fail(message)


def main() -> None:
    """The console script: runs the command line and ends the process with its exit code."""
    try:
        app()
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):
            # The reader of our output went away (``cloudlm logs NAME | head``): not our failure.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.exit(0)
        raise
    except CloudlmError as error:
        _fail(error.message)
        sys.exit(1)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _OF_THIS_MACHINE:
            from cloudlm.registry.stores.failures import storage_failure

            _fail(storage_failure(error, error.filename or "this machine's disk", "use").message)
            sys.exit(1)
        if os.environ.get("CLOUDLM_DEBUG"):
            raise
        _fail(
            f"unexpected {type(error).__name__}: {error}\n"
            "This is a fault of cloudlm; set CLOUDLM_DEBUG=1 to see where it happened."
        )
        sys.exit(1)


if __name__ == "__main__":
    main()
