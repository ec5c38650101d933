"""Rules over claims: what fits, what follows, what is refused when the file is read."""

from __future__ import annotations

import pytest

from cloudlm.core.access import Grant
from cloudlm.core.errors import BadSetting
from cloudlm.security.claims import map_claims, name_of, read_rules, subject_of

RULES = read_rules(
    [
        {"claims": {"groups": "admins"}, "tenant": "acme", "role": "admin", "scope": "acme"},
        {
            "claims": {"groups": "devs", "mfa": True},
            "tenant": "acme",
            "project": "web",
            "role": "developer",
        },
        {"claims": {"email": "boss@acme.example"}, "role": "auditor", "scope": "*"},
    ],
    "rules.yaml",
)


def test_all_fitting_rules_give_and_the_first_says_where() -> None:
    found = map_claims(RULES, {"groups": ["x", "devs", "admins"], "mfa": True})
    assert found is not None
    assert (found.tenant, found.project) == ("acme", "default")
    assert found.grants == (Grant("admin", "acme"), Grant("developer", "acme/web"))


def test_who_fits_nothing_is_nobody() -> None:
    for said in (
        {},
        {"groups": "admin"},
        {"groups": ["devs"]},
        {"groups": ["devs"], "mfa": "true"},
        {"groups": ["devs"], "mfa": 1},
        {"groups": [["admins"]]},
        {"groups": {"admins": True}},
        {"groups": None},
    ):
        assert map_claims(RULES, said) is None, said


def test_an_email_counts_only_if_it_was_verified() -> None:
    said = {"email": "boss@acme.example"}
    assert map_claims(RULES, said) is None
    assert map_claims(RULES, {**said, "email_verified": "true"}) is None
    assert map_claims(RULES, {**said, "email_verified": True}) is not None


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({}, "a list"),
        (None, "a list"),
        ([7], "rule 1: a rule must be"),
        ([{"claims": {}, "role": "user"}], "fit everybody"),
        ([{"role": "user"}], "claims"),
        ([{"claims": {"a": "b"}}], "role"),
        ([{"claims": {"a": ["b"]}, "role": "user"}], "claim 'a'"),
        ([{"claims": {"a": "b"}, "role": "user", "roles": "x"}], "'roles'"),
        ([{"claims": {"a": "b"}, "role": "user", "scope": "a/b/c"}], "scope"),
        ([{"claims": {"a": "b"}, "role": "u", "tenant": "Not A Name"}], "tenant"),
    ],
)
def test_a_bad_file_is_refused_and_says_where(tree, message) -> None:
    with pytest.raises(BadSetting, match=r"rules\.yaml") as caught:
        read_rules(tree, "rules.yaml")
    assert message in caught.value.message


def test_names_and_subjects() -> None:
    said = {"iss": "https://i", "sub": "7", "email": "a\x1b[31m@x", "name": "Ann"}
    assert subject_of(said) == "https://i#7"
    assert name_of(said) == "a[31m@x"
    assert name_of({"sub": "7" * 200}) == "7" * 64
    assert name_of({"email": "\n\t", "sub": "s"}) == "s"
