"""``python strict_issuer.py PORT``: an issuer made of authlib's server classes, which demands PKCE
(S256), knows device codes, turns refresh tokens and revokes them. For tests alone.

Whoever asks ``/authorize?…&sub=ann`` has signed in as ann; ``/approve?user_code=…&sub=ann``
approves a device; ``/state`` tells what is alive.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from dataclasses import dataclass, field
from typing import Any

import flask
from authlib.integrations.flask_oauth2 import AuthorizationServer
from authlib.oauth2.rfc6749 import ClientMixin, grants
from authlib.oauth2.rfc7009 import RevocationEndpoint
from authlib.oauth2.rfc7636 import CodeChallenge
from authlib.oauth2.rfc8628 import DeviceAuthorizationEndpoint, DeviceCodeGrant
from authlib.oidc.core import OpenIDCode
from authlib.oidc.core.grants.code import OpenIDToken
from joserfc import jwk

CLIENT_ID = "cloudlm-cli"
KEY = jwk.generate_key("EC", "P-256", {"kid": "e1", "use": "sig"})
CODES: dict[str, Any] = {}
TOKENS: dict[str, Any] = {}
DEVICES: dict[str, Any] = {}
APPROVED: dict[str, str] = {}
ISSUER = ""


class Client(ClientMixin):
    """The one public client: loopback addresses of any port."""

    def get_client_id(self) -> str:
        return CLIENT_ID

    def get_default_redirect_uri(self) -> None:
        return None

    def get_allowed_scope(self, scope: str) -> str:
        return scope

    def check_redirect_uri(self, uri: str) -> bool:
        return uri.startswith("http://127.0.0.1:") and uri.endswith("/callback")

    def check_client_secret(self, secret: str) -> bool:
        return False

    def check_endpoint_auth_method(self, method: str, endpoint: str) -> bool:
        return method == "none"

    def check_response_type(self, kind: str) -> bool:
        return kind == "code"

    def check_grant_type(self, kind: str) -> bool:
        return True


@dataclass
class Thing:
    """A code, a token or a device, by its attributes."""

    facts: dict[str, Any] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("get_"):
            return lambda: self.facts.get(name[4:], "")
        if name in ("is_expired", "is_revoked"):
            return lambda: bool(self.facts.get("revoked"))
        if name == "check_client":
            return lambda client: True
        try:
            return self.facts[name]
        except KeyError:
            raise AttributeError(name) from None


class Code(grants.AuthorizationCodeGrant):
    """Codes that are good once."""

    TOKEN_ENDPOINT_AUTH_METHODS = ("none",)

    def save_authorization_code(self, code: str, request: Any) -> None:
        asked = request.payload
        CODES[code] = Thing(
            {
                "code": code,
                "user": request.user,
                "redirect_uri": asked.redirect_uri,
                "scope": asked.scope,
                "nonce": asked.data.get("nonce"),
                "code_challenge": asked.data.get("code_challenge"),
                "code_challenge_method": asked.data.get("code_challenge_method"),
            }
        )

    def query_authorization_code(self, code: str, client: Any) -> Any:
        return CODES.get(code)

    def delete_authorization_code(self, code: Any) -> None:
        del CODES[code.code]

    def authenticate_user(self, code: Any) -> Any:
        return code.user


class Refresh(grants.RefreshTokenGrant):
    """Refresh tokens that are good once."""

    TOKEN_ENDPOINT_AUTH_METHODS = ("none",)
    INCLUDE_NEW_REFRESH_TOKEN = True

    def authenticate_refresh_token(self, token: str) -> Any:
        found = TOKENS.get(token)
        return None if found is None or found.facts.get("revoked") else found

    def authenticate_user(self, token: Any) -> Any:
        return token.user

    def revoke_old_credential(self, token: Any) -> None:
        token.facts["revoked"] = True


class Device(DeviceCodeGrant):
    """Device codes."""

    def query_device_credential(self, code: str) -> Any:
        return DEVICES.get(code)

    def query_user_grant(self, user_code: str) -> Any:
        sub = APPROVED.get(user_code)
        return None if sub is None else (sub, sub != "nobody")

    def should_slow_down(self, credential: Any) -> bool:
        return False


class DeviceEndpoint(DeviceAuthorizationEndpoint):
    """Where devices ask."""

    INTERVAL = 0
    CLIENT_AUTH_METHODS = ("none",)

    def get_verification_uri(self) -> str:
        return f"{ISSUER}/device"

    def save_device_credential(self, client_id: str, scope: str, data: Any) -> None:
        DEVICES[data["device_code"]] = Thing({"client_id": client_id, "scope": scope, **data})


class Revocation(RevocationEndpoint):
    """Where refresh tokens end."""

    CLIENT_AUTH_METHODS = ("none",)

    def query_token(self, token: str, hint: str) -> Any:
        return TOKENS.get(token)

    def revoke_token(self, token: Any, request: Any) -> None:
        token.facts["revoked"] = True


class _Ids:
    """How ID tokens are made."""

    def resolve_client_private_key(self, client: Any) -> Any:
        return KEY.as_dict(private=True)

    def get_client_algorithm(self, client: Any) -> str:
        return "ES256"

    def get_encode_header(self, client: Any) -> dict[str, str]:
        return {"alg": "ES256", "kid": "e1"}

    def get_client_claims(self, client: Any) -> dict[str, Any]:
        return {"iss": ISSUER, "aud": [CLIENT_ID]}

    def get_compatible_claims(self, request: Any) -> dict[str, Any]:
        now = int(time.time())
        return {"iss": ISSUER, "aud": [CLIENT_ID], "iat": now, "exp": now + 300}

    def generate_user_info(self, user: Any, scope: str) -> dict[str, Any]:
        return {"sub": user, "groups": ["admins"]}

    def exists_nonce(self, nonce: str, request: Any) -> bool:
        return False


class Ids(_Ids, OpenIDToken):
    """ID tokens of devices and refreshes."""


class CodeIds(_Ids, OpenIDCode):
    """ID tokens of codes."""


def save_token(token: Any, request: Any) -> None:
    if "refresh_token" in token:
        facts = {"user": request.user, "scope": token.get("scope", ""), "client_id": CLIENT_ID}
        TOKENS[token["refresh_token"]] = Thing(facts)


def make_app() -> flask.Flask:
    app = flask.Flask(__name__)
    app.config["OAUTH2_REFRESH_TOKEN_GENERATOR"] = True
    server = AuthorizationServer(app, query_client=lambda _: Client(), save_token=save_token)
    server.register_grant(Code, [CodeIds(require_nonce=True), CodeChallenge(required=True)])
    server.register_grant(Refresh, [Ids()])
    server.register_grant(Device, [Ids()])
    server.register_endpoint(DeviceEndpoint)
    server.register_endpoint(Revocation)

    @app.get("/.well-known/openid-configuration")
    def document() -> Any:
        paths = {
            "authorization_endpoint": "/authorize",
            "token_endpoint": "/token",
            "jwks_uri": "/keys",
            "device_authorization_endpoint": "/device_authorization",
            "revocation_endpoint": "/revoke",
        }
        return {"issuer": ISSUER} | {name: ISSUER + path for name, path in paths.items()}

    @app.get("/keys")
    def keys() -> Any:
        return {"keys": [KEY.as_dict(private=False)]}

    @app.get("/authorize")
    def authorize() -> Any:
        return server.create_authorization_response(grant_user=flask.request.args["sub"])

    @app.post("/token")
    def token() -> Any:
        return server.create_token_response()

    @app.post("/device_authorization")
    def device() -> Any:
        return server.create_endpoint_response("device_authorization")

    @app.post("/revoke")
    def revoke() -> Any:
        return server.create_endpoint_response("revocation")

    @app.get("/approve")
    def approve() -> Any:
        APPROVED[flask.request.args["user_code"]] = flask.request.args["sub"]
        return ""

    @app.get("/state")
    def state() -> Any:
        alive = [name for name, one in TOKENS.items() if not one.facts.get("revoked")]
        return {"refresh_tokens": len(alive), "codes": len(CODES)}

    return app


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    os.environ["AUTHLIB_INSECURE_TRANSPORT"] = "1"
    ISSUER = f"http://127.0.0.1:{sys.argv[1]}"
    make_app().run(port=int(sys.argv[1]), threaded=True)
