"""The sign-ins kept on this machine: one file of mode 0600 in home, by control address.

A token is read only for the address that it was made for, so that no other server is ever sent
it. Must not show tokens.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cloudlm.core.errors import StorageFailed
from cloudlm.core.settings import Settings
from cloudlm.security.locks import alone_with
from cloudlm.state.drafts import draft_of

if TYPE_CHECKING:
    from cloudlm.client.access_calls import Place
    from cloudlm.client.signin import Tokens

FRESH_FOR_S = 60.0


@dataclass(frozen=True, slots=True)
class Session:
    """Somebody's sign-in at one control address."""

    place: Place
    tokens: Tokens


class Sessions:
    """The file of sign-ins."""

    def __init__(self, home: Path) -> None:
        self._path = home / "login.json"

    def find(self, control_url: str) -> Session | None:
        """The sign-in at this address, None if there is none."""
        from cloudlm.client.access_calls import Place
        from cloudlm.client.signin import Tokens

        body = self._read().get(control_url)
        if body is None:
            return None
        try:
            return Session(Place(**body["place"]), Tokens(**body["tokens"]))
        except (TypeError, KeyError):
            raise self._damaged() from None

    def keep(self, control_url: str, session: Session | None) -> None:
        """Keep a sign-in, or forget it (None). Raises StorageFailed."""
        everything = self._read()
        everything.pop(control_url, None)
        if session is not None:
            everything[control_url] = {
                "place": asdict(session.place),
                "tokens": asdict(session.tokens),
            }
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with draft_of(self._path, json.dumps(everything).encode()) as draft:
                draft.replace(self._path)
        except OSError as error:
            raise StorageFailed(f"cannot write {self._path}: {error.strerror}") from None

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Be the only command that changes the file: a refresh token is good once."""
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(alone_with(self._path.with_name("login.lock")))
            except OSError as error:
                raise StorageFailed(f"cannot write {self._path}: {error.strerror}") from None
            yield

    def _read(self) -> dict[str, Any]:
        try:
            descriptor = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW)
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise StorageFailed(f"cannot read {self._path}: {error.strerror}") from None
        with os.fdopen(descriptor, encoding="utf-8") as file:
            found = os.fstat(file.fileno())
            if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
                raise StorageFailed(
                    f"{self._path} holds sign-ins and can be read or written by others: "
                    f"'chmod 600 {self._path}', and sign in again if they may have read it"
                )
            try:
                body = json.load(file)
            except ValueError:
                raise self._damaged() from None
        if not isinstance(body, dict):
            raise self._damaged()
        return body

    def _damaged(self) -> StorageFailed:
        return StorageFailed(f"{self._path} is damaged: remove it and run 'cloudlm login'")


def token_for(control_url: str, home: Path, settings: Settings) -> str | None:
    """The token to send to this control address, refreshed if it is nearly over; None if nobody
    signed in there. Raises AuthenticationFailed, UpstreamFailed, StorageFailed, MissingExtra."""
    sessions = Sessions(home)
    session = sessions.find(control_url)
    if session is None or _fresh(session):
        return session.tokens.id_token if session is not None else None
    from cloudlm.client.signin import SignIn

    with sessions.locked():
        session = sessions.find(control_url)  # another command may have refreshed it meanwhile
        if session is None or _fresh(session):
            return session.tokens.id_token if session is not None else None
        with SignIn(session.place, client_secret=settings.oidc.client_secret) as signin:
            session = Session(session.place, signin.refresh(session.tokens))
        sessions.keep(control_url, session)
    return session.tokens.id_token


def _fresh(session: Session) -> bool:
    return time.time() < session.tokens.expires_at - FRESH_FOR_S
