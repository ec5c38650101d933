"""People at the gateway: whose session a sign-in token is.

Nobody becomes known here: control makes or changes a person's principal when they sign in, and the
gateway reads it as it reads keys. Must not decide what anybody may do.
"""

from __future__ import annotations

from cloudlm.core.tenant import KeyRecord
from cloudlm.gateway.view import View
from cloudlm.security.access import session_of
from cloudlm.security.claims import subject_of
from cloudlm.security.issuer import Issuer
from cloudlm.security.tokens import bad_token


class People:
    """Finds the sessions of signed-in people."""

    def __init__(self, issuer: Issuer, view: View) -> None:
        self._issuer = issuer
        self._view = view

    async def session(self, text: str) -> KeyRecord:
        """The session of whoever this token speaks of. Raises AuthenticationFailed, Unavailable,
        MissingExtra."""
        claims = await self._issuer.claims(text)
        subject = subject_of(claims)
        view = self._view.snapshot()
        if view.directory.of_subject(subject) is None:
            view = await self._view.look_again()  # whoever signed in a moment ago is not unknown
        principal = view.directory.of_subject(subject)
        if principal is None:
            raise bad_token()
        session = session_of(principal, claims["exp"])
        if not view.directory.stands(session):
            raise bad_token()
        return session
