"""A SQLite state that is quick to make: copied from one that was migrated once."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest

from cloudlm.state.open import open_state


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    async def make(url: str) -> None:
        await (await open_state(url)).close()

    path = tmp_path_factory.mktemp("template") / "state.db"
    asyncio.run(make(f"sqlite:///{path}"))
    return path


@pytest.fixture
def sqlite_file(sqlite_template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(sqlite_template, tmp_path / "state.db"))
