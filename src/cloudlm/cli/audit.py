"""``cloudlm audit``: read the audit log, and prove that nobody changed it.

``list`` and ``export`` ask the control API; ``verify``, ``checkpoint`` and ``key`` work on this
machine's state, where the log and the signing key are.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cloudlm.cli import screen
from cloudlm.cli.connect import control_client, open_local_state
from cloudlm.cli.options import Json, date_text
from cloudlm.cli.screen import out, print_folded, print_json, print_json_line, print_table
from cloudlm.core.audit import Checkpoint
from cloudlm.core.errors import InvalidRequest, StorageFailed

if TYPE_CHECKING:
    from cloudlm.client import Client

app = typer.Typer(no_args_is_help=True, help="The audit log: list, export, verify.")
_PAGE = 1000
_WHOLE = {"SEQ", "WHAT"}
Tenant = Annotated[str | None, typer.Option("--tenant", help="Only this tenant's records.")]


@app.command("list")
def list_audit(
    after: Annotated[
        int | None,
        typer.Option("--after", min=0, help="The first records after this number, to page on."),
    ] = None,
    limit: Annotated[
        int, typer.Option("--limit", min=1, max=_PAGE, help="At most so many; the newest.")
    ] = 100,
    tenant: Tenant = None,
    json_output: Json = False,
) -> None:
    """List what was done or refused, the newest last.

    Each record's key, too, is in --json.
    """
    with control_client() as client:
        if after is None:
            records = list(deque(_pages(client, tenant), maxlen=limit))
        else:
            records = client.audit(after=after, limit=limit, tenant=tenant)
    if json_output:
        print_json(records)
        return
    columns = ("SEQ", "AT", "ACTOR", "WHAT", "OUTCOME", "FROM")
    if not screen.out.is_terminal:  # one line per action, for grep and awk
        rows = [(*_row(one), one["detail"]) for one in records]
        print_table((*columns, "DETAIL"), rows, "no records")
        return
    print_table(columns, [_row(one) for one in records], "no records", whole=_WHOLE)
    for one in records:
        if one["detail"]:
            print_folded(f"{one['seq']}: {one['detail']}")


def _row(record: dict[str, Any]) -> tuple[Any, ...]:
    return (
        record["seq"],
        date_text(record["at"]),
        record["actor"],
        record["target"],
        f"{record['outcome']} {record['status'] or ''}".rstrip(),
        record["source"],
    )


@app.command("export")
def export(tenant: Tenant = None, json_output: Json = True) -> None:
    """Print all records, one JSON document a line."""
    with control_client() as client:
        for one in _pages(client, tenant):
            print_json_line(one)


def _pages(client: Client, tenant: str | None) -> Iterator[dict[str, Any]]:
    """All records from the first to the last."""
    after = 0
    while records := client.audit(after=after, limit=_PAGE, tenant=tenant):
        yield from records
        after = int(records[-1]["seq"])


@app.command("verify")
def verify(
    checkpoint: Annotated[
        list[Path] | None,
        typer.Option("--checkpoint", help="A file of checkpoints kept elsewhere; repeatable."),
    ] = None,
    public_key: Annotated[
        str | None,
        typer.Option("--public-key", help="The key to trust; this installation's if not given."),
    ] = None,
    json_output: Json = False,
) -> None:
    """Check the whole log; name the first bad record."""
    checked, problem = asyncio.run(_verify(checkpoint or [], public_key))
    if json_output:
        print_json({"ok": problem is None, "records": checked, "problem": problem})
    elif problem is None:
        out.print(f"the audit log is whole: {checked} records")
    else:
        out.print(f"record {problem['seq']}: {problem['problem']}")
    if problem is not None:
        raise typer.Exit(1)


@app.command("checkpoint")
def checkpoint_now(json_output: Json = True) -> None:
    """Print a signed checkpoint, to be kept elsewhere."""
    from cloudlm.security.audit import checkpoint_line

    out.print(checkpoint_line(asyncio.run(_sign())))


@app.command("key")
def key(json_output: Json = False) -> None:
    """Print the public key that checkpoints are verified with."""
    from cloudlm.security.audit import public_key
    from cloudlm.state.home import Home, load_settings

    settings, _ = load_settings()
    text = public_key(Home(settings.home).ensure().audit_seed())
    if json_output:
        print_json({"public_key": text})
    else:
        out.print(text)


async def _sign() -> Checkpoint:
    import time

    from cloudlm.security.audit import sign

    state, home = await open_local_state()
    try:
        return sign(await state.audit_head(), time.time(), home.audit_seed())
    finally:
        await state.close()


async def _verify(files: list[Path], public: str | None) -> tuple[int, dict[str, Any] | None]:
    from cloudlm.security.audit import Checker, public_key

    state, home = await open_local_state()
    try:
        known = await state.list_checkpoints()
        if home.audit_checkpoints.exists():
            known += _read(home.audit_checkpoints)
        for file in files:
            known += _read(file)
        # The end is read first: what is appended meanwhile is no fault.
        head = await state.audit_head()
        checker = Checker(known, public or public_key(home.audit_seed()))
        while records := await state.list_audit(after=checker.head.seq, limit=_PAGE):
            if not checker.see(records):
                break
        if checker.head.seq > head.seq:
            head = await state.audit_head()
        finding = checker.end(head)
        problem = None if finding is None else {"seq": finding.seq, "problem": finding.problem}
        return checker.checked, problem
    finally:
        await state.close()


def _read(file: Path) -> list[Checkpoint]:
    from cloudlm.security.audit import read_checkpoint

    try:
        lines = file.read_text("utf-8").splitlines()
    except OSError as error:
        raise StorageFailed(f"{file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InvalidRequest(f"{file} holds no checkpoints") from None
    return [read_checkpoint(line) for line in lines if line.strip()]
