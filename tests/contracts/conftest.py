"""What the contract suites share: throw-away PostgreSQL and Redis, where found."""

from __future__ import annotations

import ctypes
import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from redis_server import RedisServer

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


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """Skips, with the reason, where PostgreSQL or its driver is not installed."""
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


@pytest.fixture(scope="session")
def postgres_template(postgres_server: PostgresServer) -> str:
    """A database with our tables, to copy from."""
    import asyncio

    from cloudlm.state.open import open_state

    async def make(url: str) -> None:
        await (await open_state(url)).close()

    name = postgres_server.new_database()
    asyncio.run(make(postgres_server.url(name)))
    return name


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with our tables, to copy from."""
    import asyncio

    from cloudlm.state.open import open_state

    async def make(url: str) -> None:
        await (await open_state(url)).close()

    path = tmp_path_factory.mktemp("template") / "state.db"
    asyncio.run(make(f"sqlite:///{path}"))
    return path


@pytest.fixture(params=["memory", "sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def state_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The address of a fresh, empty state of each kind."""
    if request.param == "memory":
        return "memory://"
    return str(request.getfixturevalue("shared_state_url_of")(request.param))


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def shared_state_url(request: pytest.FixtureRequest) -> str:
    """The address of a fresh state that several processes can open."""
    return str(request.getfixturevalue("shared_state_url_of")(request.param))


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def empty_database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The address of a database that was never opened."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'new.db'}"
    server: PostgresServer = request.getfixturevalue("postgres_server")
    return server.url(server.new_database())


@pytest.fixture
def shared_state_url_of(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], str]:
    """Make a fresh state with tables, of the kind asked for."""

    def make(kind: str) -> str:
        if kind == "sqlite":
            shutil.copy(request.getfixturevalue("sqlite_template"), tmp_path / "state.db")
            return f"sqlite:///{tmp_path / 'state.db'}"
        server: PostgresServer = request.getfixturevalue("postgres_server")
        return server.url(server.new_database(request.getfixturevalue("postgres_template")))

    return make


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """Skips where neither Redis nor Valkey is installed."""
    binary = shutil.which("redis-server") or shutil.which("valkey-server")
    if binary is None:
        pytest.skip("neither redis-server nor valkey-server is installed")
    server = RedisServer(binary, tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.stop()
