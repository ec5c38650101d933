"""Cedar policies beside roles: forbid beats all, permit is a grant, silence leaves it to roles."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from cloudlm.core.access import Grant, Identities, Principal, PrincipalKind, Project, Tenant
from cloudlm.core.errors import BadSetting, MissingExtra
from cloudlm.core.tenant import KeyRecord
from cloudlm.security.access import Ask, Directory, session_of
from cloudlm.security.policies import check_policies, load_policies

pytest.importorskip("cedarpy")

POLICIES = """
@id("no-secrets")
forbid(principal, action == Action::"use", resource is Inference)
when { resource.name like "secret-*" && principal.project != "vault" };

permit(principal in Tenant::"acme", action == Action::"use", resource == Inference::"gift");
permit(
    principal in Project::"acme/web", action == Action::"read",
    resource in Project::"acme/web"
) when { resource is Usage && principal.grants.contains("user@acme") };
"""


def principal(name: str, project: str = "default", *roles: str, by: str = "") -> Principal:
    grants = tuple(Grant(role, "acme", by) for role in roles)
    return Principal(name, name, PrincipalKind.PERSON, "acme", project, grants)


ANN = principal("ann", "web", "user")
BOB = principal("bob")
EVE = principal("eve", "vault", "owner")
SUB = principal("sub", "web", "user", by="eve")
ALL = Identities(
    tenants=(Tenant("acme"),),
    projects=tuple(Project("acme", name) for name in ("default", "web", "vault")),
    principals=(ANN, BOB, EVE, SUB),
)


def key(holder: Principal, role: str = "owner", scope: str = "*", **more: Any) -> KeyRecord:
    facts = {"digest": "", "last4": "", "tenant": "acme", "project": holder.project, **more}
    name = "-".join((holder.id, role, scope, *more.get("models", ())))
    return KeyRecord(name, "k", role, principal=holder.id, scope=scope, **facts)


def load(tmp_path: Path, *texts: str) -> Any:
    paths = []
    for number, text in enumerate(texts):
        paths.append(tmp_path / f"{number}.cedar")
        paths[-1].write_text(text)
    return load_policies(" , ".join(map(str, paths)))


@pytest.fixture
def directory(tmp_path: Path) -> Directory:
    return Directory(ALL, (), load(tmp_path, POLICIES))


def may(directory: Directory, record: KeyRecord, model: str) -> bool:
    return directory.may_infer(record, model)


def test_forbid_beats_every_role(directory: Directory) -> None:
    assert may(directory, key(ANN), "bank")
    assert not may(directory, key(ANN), "secret-1")
    assert may(directory, key(EVE), "secret-1")  # the policy excepts the project vault
    assert may(Directory(ALL), key(ANN), "secret-1")  # and without it the role decides


def test_permit_is_a_grant_and_keys_stay_narrowed(directory: Directory) -> None:
    assert may(directory, key(BOB), "gift")
    assert may(directory, session_of(BOB), "gift")
    assert not may(directory, key(BOB), "bank")
    assert not may(directory, key(BOB, "viewer"), "gift")
    assert not may(directory, key(BOB, models=("bank",)), "gift")
    assert not may(directory, key(BOB, scope="other"), "gift")


def test_a_permit_does_not_undo_a_denying_role_of_the_key(tmp_path: Path) -> None:
    directory = Directory(ALL, (), load(tmp_path, "permit(principal, action, resource);"))
    assert directory.allows(key(BOB), Ask("delete", "tenants", "acme", "acme"))
    assert not directory.allows(key(BOB, "admin"), Ask("delete", "tenants", "acme", "acme"))


def test_policies_see_places_and_grants(directory: Directory) -> None:
    asked = Ask("read", "usage", "", "acme/web")
    assert directory.allows(key(ANN), asked)
    assert not directory.allows(key(BOB), asked)
    assert not directory.allows(key(ANN), asked._replace(scope="acme"))
    assert not directory.allows(key(ANN), asked._replace(scope="acme/vault"))


def test_who_granted_is_asked_too(tmp_path: Path) -> None:
    """What a policy forbids the giver, the taker loses."""
    assert may(Directory(ALL), key(SUB), "bank")
    stop = 'forbid(principal == Principal::"eve", action, resource is Inference);'
    directory = Directory(ALL, (), load(tmp_path, stop))
    assert not may(directory, key(SUB), "bank")


@pytest.mark.promise(5)
def test_what_only_a_policy_permits_cannot_be_handed_on(directory: Directory) -> None:
    excess = directory.excess(key(BOB), "user", "acme", "bob", ("gift",))
    assert excess is not None
    assert excess.name == "gift"


def test_disabled_people_get_nothing_from_policies(tmp_path: Path) -> None:
    from dataclasses import replace

    stopped = replace(ALL, principals=(replace(BOB, disabled_at=1.0),))
    directory = Directory(stopped, (), load(tmp_path, "permit(principal, action, resource);"))
    assert not may(directory, key(BOB), "gift")


def test_hostile_names_are_names(directory: Directory) -> None:
    for name in ('"', 'gift" || true', "\n", "gift\\", "Inference::gift", ""):
        assert not may(directory, key(BOB), name)


def test_several_files_hold_together(tmp_path: Path) -> None:
    stop = 'forbid(principal, action, resource == Inference::"gift");'
    directory = Directory(ALL, (), load(tmp_path, POLICIES, stop))
    assert not may(directory, key(BOB), "gift")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("permit(principal", "parse error"),
        ("permit(principal, action, resource) when { resource.owner == 1 };", "owner"),
        ('permit(principal == User::"x", action, resource);', "User"),
        ('permit(principal, action == Action::"fly", resource);', "fly"),
        ("forbid(principal, action, resource) when { principal.name > 3 };", ""),
        ("// nothing", "no policy"),
        ("", "no policy"),
    ],
)
def test_policies_that_are_not_good_refuse_to_start(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(BadSetting, match=r"1\.cedar") as caught:
        load(tmp_path, POLICIES, text)
    assert said in caught.value.message


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for content in (None, b"\xff\xfe", b" " * 1_000_001):
        path = tmp_path / "bad.cedar"
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(BadSetting, match=r"bad\.cedar"):
            load_policies(str(path))
    assert load_policies(" , ") is None
    assert check_policies(POLICIES, "x") == 3


def test_without_the_library_the_extra_is_named(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "cedarpy", None)
    with pytest.raises(MissingExtra, match=r"cloudlm\[cedar\]"):
        load(tmp_path, POLICIES)
