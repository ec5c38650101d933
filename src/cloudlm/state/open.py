"""Opens the state that an address names. The one place that knows which stores exist.

SQLAlchemy is imported only when a database is asked for.
"""

from __future__ import annotations

import sys

from cloudlm.core.clock import Clock
from cloudlm.core.errors import BadSetting
from cloudlm.state.base import State
from cloudlm.state.memory import MemoryState
from cloudlm.state.news import FileNews, News, PolledNews

_EXPECTED = (
    "expected sqlite:////folder/state.db, postgresql+psycopg://user@host/database or memory://"
)


async def open_state(url: str, *, busy_timeout_s: float = 5.0) -> State:
    """Open the store, creating it or migrating its tables to this cloudlm's form if needed.

    ``memory://`` is one process's memory; ``sqlite:////absolute/path`` (three slashes: relative)
    a file, made if its folder exists; ``postgresql+psycopg://`` a server's database.
    ``busy_timeout_s`` is the longest wait for another process's write. Raises BadSetting for
    another address, StorageFailed if the file cannot be read or written or was made by a newer
    cloudlm, Unavailable if the server cannot be reached, MissingExtra without its driver.
    """
    if url == "memory://":
        return MemoryState()
    scheme = url.partition(":")[0].partition("+")[0]
    if scheme not in ("sqlite", "postgresql", "postgres"):
        raise BadSetting(
            f"state.url has the scheme {scheme[:40]!r}; {_EXPECTED}", param="state.url"
        )
    from cloudlm.state.database import Database
    from cloudlm.state.sql import SqlState

    return SqlState(await Database.open(url, busy_timeout_s=busy_timeout_s))


def open_news(url: str, clock: Clock) -> News:
    """What tells when to look again into the open state of this address."""
    if sys.platform != "linux" or not url.startswith("sqlite"):
        return PolledNews(clock)
    from cloudlm.state.database import log_of

    return FileNews(log_of(url), clock)
