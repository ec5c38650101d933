"""An OpenID Connect issuer in memory: keys, tokens signed with them, and its two documents."""

from __future__ import annotations

import base64
import json
from typing import Any

from joserfc import jwk, jwt

ISSUER = "https://login.example"
CLIENT = "cloudlm-test"
NOW = 1_700_000_000.0


class SigningIssuer:
    """Signs what it is told. ``fetched`` notes every address asked for; ``away`` refuses all."""

    def __init__(self, kind: str = "RSA", size: Any = 2048, algorithm: str = "RS256") -> None:
        self.algorithm = algorithm
        self._made = (kind, size)
        self.keys: list[Any] = []
        self.fetched: list[str] = []
        self.away: Exception | None = None
        self.turn()

    def turn(self) -> None:
        """Make another key, which signs from now on; those before stay published."""
        key_id = f"k{len(self.keys) + 1}"
        self.keys.append(jwk.generate_key(*self._made, {"kid": key_id, "use": "sig"}))

    @property
    def key(self) -> Any:
        return self.keys[-1]

    def claims(self, **changes: Any) -> dict[str, Any]:
        said = {"iss": ISSUER, "aud": CLIENT, "sub": "ann", "iat": NOW, "exp": NOW + 600}
        return {name: value for name, value in {**said, **changes}.items() if value is not None}

    def token(self, *, key: Any = None, header: Any = None, **changes: Any) -> str:
        key = key or self.key
        head = {"alg": self.algorithm, "kid": key.kid, **(header or {})}
        return str(jwt.encode(head, self.claims(**changes), key, algorithms=[head["alg"]]))

    def jwks(self) -> dict[str, Any]:
        return {"keys": [key.as_dict(private=False) for key in self.keys]}

    async def fetch(self, address: str) -> Any:
        self.fetched.append(address)
        if self.away is not None:
            raise self.away
        if address.endswith("/.well-known/openid-configuration"):
            return {"issuer": ISSUER, "jwks_uri": f"{ISSUER}/keys"}
        return self.jwks()


def forged(header: dict[str, Any], claims: dict[str, Any], signature: bytes = b"") -> str:
    """A token put together by hand."""

    def part(value: bytes) -> str:
        return base64.urlsafe_b64encode(value).rstrip(b"=").decode()

    head, body = (part(json.dumps(one).encode()) for one in (header, claims))
    return f"{head}.{body}.{part(signature)}"
