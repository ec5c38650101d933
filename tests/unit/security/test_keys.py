"""API keys: form, checksum, digest, verification without a hint."""

from dataclasses import replace

import pytest

from cloudlm.core.errors import AuthenticationFailed
from cloudlm.core.tenant import Role
from cloudlm.security.keys import (
    bearer,
    cache_salt,
    key_id,
    mint,
    successor,
    verify,
    without_keys,
)

PEPPER = b"p" * 32
OTHER = b"q" * 32


def test_a_key_verifies() -> None:
    key = mint("mine", Role.USER, PEPPER, now=7.0)
    assert key_id(key.text) == key.record.id
    assert verify(key.text, key.record, PEPPER, 8.0) is key.record
    assert key.text not in repr(key.record)
    assert key.text[-13:-9] == key.record.last4


def test_a_key_expires_at_its_moment_and_not_before() -> None:
    key = mint("mine", Role.USER, PEPPER, now=0.0, expires_at=10.0)
    assert verify(key.text, key.record, PEPPER, 9.999) is key.record
    with pytest.raises(AuthenticationFailed):
        verify(key.text, key.record, PEPPER, 10.0)


def test_a_successor_has_the_same_rights_and_another_secret() -> None:
    old = mint("n", "developer", PEPPER, 1.0, scope="acme/web", models=("bank",), made_with="k")
    new = successor(replace(old.record, revoked_at=3.0, last_used_at=2.0), PEPPER, 5.0)
    assert verify(new.text, new.record, PEPPER, 6.0)
    same = ("name", "role", "scope", "models", "principal", "tenant", "project", "made_with")
    assert all(getattr(new.record, f) == getattr(old.record, f) for f in same)
    assert new.record.id != old.record.id
    assert new.text != old.text
    assert (new.record.created_at, new.record.last_used_at) == (5.0, None)


@pytest.mark.promise(32)
def test_what_is_kept_holds_no_key() -> None:
    text = mint("k", Role.USER, PEPPER, now=0.0).text
    kept = without_keys(f"/api/v1/keys/{text}?x={text}")
    secret = text.split("_")[3]
    assert secret not in kept
    assert secret[:8] not in kept
    assert text.split("_")[2] in kept


def test_keys_differ() -> None:
    keys = {mint("k", Role.USER, PEPPER, now=0.0).text for _ in range(50)}
    assert len(keys) == 50


@pytest.mark.promise(6)
def test_every_fault_has_the_same_answer() -> None:
    key = mint("mine", Role.USER, PEPPER, now=0.0)
    other = mint("other", Role.USER, PEPPER, now=0.0)
    revoked = replace(key.record, revoked_at=1.0)
    expired = replace(key.record, expires_at=2.0)
    answers = set()
    for text, record, pepper in (
        (key.text, None, PEPPER),
        (key.text, other.record, PEPPER),
        (key.text, revoked, PEPPER),
        (key.text, expired, PEPPER),
        (key.text, key.record, OTHER),
        ("nonsense", key.record, PEPPER),
        ("\udcff", key.record, PEPPER),
    ):
        with pytest.raises(AuthenticationFailed) as caught:
            verify(text, record, pepper, 2.0)
        answers.add(caught.value.message)
    assert len(answers) == 1


@pytest.mark.parametrize(
    "text",
    ["", "sk-1234", "clm_live_x_y_z", "clm_live_" + "a" * 12 + "_" + "b" * 32 + "_00000000", "clm"],
)
def test_a_malformed_key_has_no_id(text: str) -> None:
    assert key_id(text) is None


def test_one_changed_letter_fails_the_checksum() -> None:
    text = mint("k", Role.USER, PEPPER, now=0.0).text
    for place in range(9, len(text) - 9):
        if text[place] != "_":
            changed = text[:place] + ("a" if text[place] != "a" else "b") + text[place + 1 :]
            assert key_id(changed) is None


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer  ", "Basic abc", "abc"])
def test_no_key_in_the_headers(header: str | None) -> None:
    with pytest.raises(AuthenticationFailed):
        bearer(header)


def test_both_headers_are_read() -> None:
    assert bearer("Bearer abc") == "abc"
    assert bearer("bearer abc ") == "abc"
    assert bearer(None, "xyz") == "xyz"


@pytest.mark.promise(7)
@pytest.mark.known_failure("CVE-2025-46570")
def test_cache_salts_keep_tenants_and_installations_apart() -> None:
    salts = {
        cache_salt("a", PEPPER),
        cache_salt("b", PEPPER),
        cache_salt("a", OTHER),
        cache_salt("a", PEPPER, "own"),
        cache_salt("", PEPPER, "a"),
    }
    assert len(salts) == 5
    assert cache_salt("a", PEPPER) == cache_salt("a", PEPPER)
