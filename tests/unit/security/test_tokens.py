"""Tokens of an issuer: what is good, and every known way to make a bad one look good."""

from __future__ import annotations

import hashlib
import hmac
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from joserfc import jwk
from signing_issuer import CLIENT, ISSUER, NOW, SigningIssuer, forged

from cloudlm.core.errors import AuthenticationFailed, BadSetting, UpstreamFailed
from cloudlm.security.tokens import (
    Expectation,
    UnknownKey,
    looks_signed,
    read_algorithms,
    read_keys,
    verify_token,
)

ISSUED = SigningIssuer()
KEYS = read_keys(ISSUED.jwks())
EXPECTED = Expectation(
    ISSUER, CLIENT, frozenset((CLIENT, "api")), read_algorithms("RS256, ES256"), leeway_s=30.0
)


def check(text: str, keys=KEYS, expected=EXPECTED, now: float = NOW):
    return verify_token(text, keys, expected, now)


def refusal(text: str, **how) -> str:
    with pytest.raises(AuthenticationFailed) as caught:
        check(text, **how)
    return str(caught.value.__cause__)


def test_a_good_token_is_good() -> None:
    for changes in (
        {},
        {"aud": "api"},
        {"aud": [CLIENT, "other"], "azp": CLIENT},
        {"nbf": NOW},
        {"iat": NOW + 29},
        {"exp": NOW - 29},
    ):
        assert check(ISSUED.token(**changes))["sub"] == "ann"


@pytest.mark.parametrize(
    ("kind", "size", "algorithm"),
    [("RSA", 2048, "PS256"), ("EC", "P-256", "ES256"), ("OKP", "Ed25519", "Ed25519")],
)
def test_every_allowed_kind_of_key_works(kind, size, algorithm) -> None:
    issuer = SigningIssuer(kind, size, algorithm)
    expected = Expectation(ISSUER, CLIENT, frozenset((CLIENT,)), read_algorithms(algorithm))
    assert check(issuer.token(), read_keys(issuer.jwks()), expected)["sub"] == "ann"
    if algorithm != "ES256":  # which EXPECTED allows
        assert "not allowed" in refusal(issuer.token(), keys=read_keys(issuer.jwks()))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"aud": "somebody-else"}, "another audience"),
        ({"aud": None}, "another audience"),
        ({"aud": {CLIENT: 1}}, "another audience"),
        ({"aud": [CLIENT, "other"]}, "whom it was made for"),
        ({"azp": "other"}, "another client"),
        ({"iss": "https://login.example/"}, "another issuer"),
        ({"iss": "https://evil.example"}, "another issuer"),
        ({"exp": NOW - 30}, "is over"),
        ({"exp": None}, "has no exp"),
        ({"exp": True}, "has no exp"),
        ({"exp": "9999999999"}, "has no exp"),
        ({"iat": None}, "has no iat"),
        ({"iat": NOW + 31}, "of the future"),
        ({"iat": NOW - 90_000, "exp": NOW + 10**9}, "too old"),
        ({"nbf": NOW + 31}, "not good yet"),
        ({"sub": None}, "who signed in"),
        ({"sub": ""}, "who signed in"),
        ({"sub": "a" * 256}, "who signed in"),
        ({"sub": "a\0b"}, "who signed in"),
        ({"sub": 7}, "who signed in"),
    ],
)
def test_claims_that_are_not_good(changes, why) -> None:
    assert why in refusal(ISSUED.token(**changes))


def test_no_signature_is_no_signature() -> None:
    """``alg: none`` in every spelling, and a good token whose signature was cut."""
    for name in ("none", "None", "NONE", "nOnE", ""):
        assert "not allowed" in refusal(forged({"alg": name}, ISSUED.claims()))
    head, body, _ = ISSUED.token().split(".")
    assert "does not fit" in refusal(f"{head}.{body}.")


def test_a_public_key_is_no_shared_secret() -> None:
    """Key confusion: HMAC with the public key, as PEM, DER and JWK."""
    for secret in (
        ISSUED.key.as_pem(private=False),
        ISSUED.key.as_der(private=False),
        json.dumps(ISSUED.jwks()["keys"][0]).encode(),
    ):
        for header in ({"alg": "HS256", "kid": "k1"}, {"alg": "HS256"}):
            text = forged(header, ISSUED.claims()).rpartition(".")[0]
            mac = hmac.new(secret, text.encode(), hashlib.sha256).digest()
            assert "not allowed" in refusal(forged(header, ISSUED.claims(), mac))
            claimed = forged({**header, "alg": "RS256"}, ISSUED.claims(), mac)
            assert "does not fit" in refusal(claimed)


def test_hmac_cannot_be_allowed_by_mistake() -> None:
    for text in ("HS256", "RS256, HS512", "none", "RS256,none", "", " , "):
        with pytest.raises(BadSetting, match=r"oidc\.algorithms"):
            read_algorithms(text)


@pytest.mark.promise(15)
def test_keys_inside_a_token_are_not_looked_at() -> None:
    """A token that brings its own key, or says where to fetch it."""
    own = jwk.generate_key("RSA", 2048, {"kid": "k1"})
    public = own.as_dict(private=False)
    for more in (
        {"jwk": public},
        {"jku": "https://evil.example/keys"},
        {"x5u": "https://evil.example/cert"},
    ):
        assert "does not fit" in refusal(ISSUED.token(key=own, header=more))


def test_another_kind_of_token_is_not_a_sign_in() -> None:
    for header in ({"typ": "logout+jwt"}, {"typ": "dpop+jwt"}, {"kid": 3}):
        head = {"alg": "RS256", **header}
        assert "another kind" in refusal(forged(head, ISSUED.claims()))
    for header in ({"crit": ["b64"]}, {"b64": False}):
        head = {"alg": "RS256", "kid": "k1", **header}
        assert "extension" in refusal(forged(head, ISSUED.claims()))


def test_a_key_of_another_type_or_use_signs_nothing() -> None:
    curve = SigningIssuer("EC", "P-256", "ES256")
    with pytest.raises(UnknownKey):
        check(curve.token())  # the issuer's k1 is an RSA key
    entry = dict(ISSUED.jwks()["keys"][0])
    for change in ({"use": "enc"}, {"alg": "PS256"}, {"kid": "other"}):
        with pytest.raises(UnknownKey):
            check(ISSUED.token(), read_keys({"keys": [{**entry, **change}]}))


def test_only_usable_keys_are_read() -> None:
    secret = jwk.generate_key("oct", 256, {"kid": "s"}).as_dict()
    weak = {**ISSUED.jwks()["keys"][0], "n": "wQ", "kid": "weak"}
    assert read_keys({"keys": [secret, weak, {"kty": "RSA"}, 7, {}]}).entries == ()
    for body in (None, [], {"keys": {}}, {"keys": None}, "x"):
        with pytest.raises(UpstreamFailed):
            read_keys(body)


def test_without_a_key_id_only_one_key_can_be_meant() -> None:
    text = ISSUED.token(header={"kid": ""})
    assert check(text)["sub"] == "ann"
    two = SigningIssuer()
    two.turn()
    both = read_keys({"keys": [*ISSUED.jwks()["keys"], *two.jwks()["keys"]]})
    assert "which key" in refusal(text, keys=both)


def test_every_bad_token_gets_one_answer() -> None:
    answers = set()
    for text in (ISSUED.token(aud="x"), ISSUED.token(exp=1), "e.y.z", ISSUED.token()[:-4]):
        with pytest.raises(AuthenticationFailed) as caught:
            check(text)
        answers.add(caught.value.message)
    assert len(answers) == 1


@given(st.text(max_size=200), st.integers(0, 3))
def test_garbage_is_refused_and_nothing_worse(garbage: str, place: int) -> None:
    parts = ISSUED.token().split(".")
    parts.insert(place, garbage)
    for text in (garbage, "ey" + garbage, ".".join(parts), ".".join(parts[:3])):
        if text != ISSUED.token():
            with pytest.raises(AuthenticationFailed):
                check(text)


def test_a_key_of_ours_never_looks_signed() -> None:
    assert looks_signed(ISSUED.token())
    assert not looks_signed("clm_live_abcdefghijkl_" + "0" * 32 + "_00000000")
