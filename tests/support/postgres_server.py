"""A throw-away PostgreSQL on a unix socket, where its binaries are found."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

_PR_SET_PDEATHSIG = 1
_START_TIMEOUT_S = 180


class PostgresServer:
    """A running cluster that only this machine's unix socket reaches."""

    def __init__(self, binaries: Path, socket_folder: Path) -> None:
        self.binaries = binaries
        self.socket_folder = socket_folder
        self._numbers = itertools.count()

    def url(self, database: str) -> str:
        return f"postgresql+psycopg://cloudlm@/{database}?host={self.socket_folder}"

    def run(self, sql: str, database: str = "postgres") -> None:
        """Run a statement outside a transaction."""
        import psycopg

        dsn = f"host={self.socket_folder} user=cloudlm dbname={database}"
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute(sql.encode())

    def new_database(self, template: str = "template0") -> str:
        """Make a database and return its name."""
        name = f"test_{next(self._numbers)}"
        self.run(f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
        return name


def _find_binaries() -> Path | None:
    folders = [Path(folder) for folder in os.environ.get("PATH", "").split(os.pathsep)]
    installed = Path("/usr/lib/postgresql")
    if installed.is_dir():
        folders += sorted(installed.glob("*/bin"), reverse=True)
    for folder in folders:
        if (folder / "initdb").exists() and (folder / "postgres").exists():
            return (folder / "initdb").resolve().parent
    return None


def _unprivileged() -> dict[str, object]:
    """Arguments of subprocess: PostgreSQL refuses to run as root."""
    if os.geteuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
    pytest.skip("PostgreSQL cannot run as root, and there is no other user")


def _die_with_us() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGINT)


def _initialise(binaries: Path, data: Path, who: dict[str, object]) -> None:
    # A collation of people, where there is one: sorting must not depend on the server's.
    plain = [str(binaries / "initdb"), "-D", str(data), "-U", "cloudlm", "-A", "trust", "-N"]
    plain += ["-E", "UTF8", "--locale=C"]
    for extra in (["--locale-provider=icu", "--icu-locale=en-US"], []):
        made = subprocess.run(
            plain + extra, capture_output=True, text=True, cwd="/", timeout=120, **who
        )  # type: ignore[call-overload]
        if made.returncode == 0:
            return
    pytest.fail(f"initdb failed: {made.stderr}")


@contextlib.contextmanager
def running_postgres() -> Iterator[PostgresServer]:
    """A throw-away cluster. Skips, with the reason, where PostgreSQL or its driver is missing."""
    pytest.importorskip("psycopg", reason="psycopg is not installed (extra 'postgres')")
    binaries = _find_binaries()
    if binaries is None:
        pytest.skip("PostgreSQL's initdb and postgres were not found")
    who = _unprivileged()
    folder = Path(tempfile.mkdtemp(prefix="cloudlm-pg-"))  # short: a socket's path is limited
    if who:
        os.chown(folder, int(str(who["user"])), int(str(who["group"])))
    try:
        _initialise(binaries, folder / "data", who)
        options = {"listen_addresses": "", "unix_socket_directories": str(folder)}
        options |= {"fsync": "off", "full_page_writes": "off", "synchronous_commit": "off"}
        command = [str(binaries / "postgres"), "-D", str(folder / "data")]
        command += [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=log, cwd="/", preexec_fn=_die_with_us, **who
            )  # type: ignore[call-overload]
        server = PostgresServer(binaries, folder)
        try:
            _wait_until_ready(server, process, folder / "log")
            yield server
        finally:
            process.send_signal(signal.SIGQUIT)  # at once: nobody will read these files again
            process.wait(timeout=30)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _wait_until_ready(server: PostgresServer, process: subprocess.Popen[bytes], log: Path) -> None:
    import psycopg

    deadline = time.monotonic() + _START_TIMEOUT_S
    while True:
        try:
            server.run("SELECT 1")
            return
        except psycopg.OperationalError:
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"PostgreSQL did not start: {log.read_text()}")
            time.sleep(0.05)
