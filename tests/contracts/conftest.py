"""What the contract suites share: throw-away PostgreSQL and Redis, where found."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from postgres_server import PostgresServer, running_postgres
from redis_server import RedisServer


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """Skips, with the reason, where PostgreSQL or its driver is not installed."""
    with running_postgres() as server:
        yield server


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
