"""People who sign in at control: made, kept as their claims say, stopped at once."""

from __future__ import annotations

from dataclasses import replace

import httpx2
import pytest
from signing_issuer import CLIENT, ISSUER, NOW, SigningIssuer

from cloudlm.control.api.app import build_api
from cloudlm.control.api.caller import Callers
from cloudlm.control.people import People, open_people
from cloudlm.core.access import Grant, Principal, PrincipalKind, Project, Tenant
from cloudlm.core.errors import BadSetting
from cloudlm.core.settings import OidcSettings
from cloudlm.security.access import Ask, Directory
from cloudlm.security.claims import read_rules
from cloudlm.security.issuer import Issuer, expectation_of
from cloudlm.security.keys import mint

OIDC = OidcSettings(issuer=ISSUER, client_id=CLIENT)
RULES = [
    {"claims": {"groups": "admins"}, "tenant": "acme", "role": "admin", "scope": "acme"},
    {"claims": {"groups": "users"}, "tenant": "acme", "role": "developer", "scope": "acme"},
    {"claims": {"groups": "lost"}, "tenant": "nowhere", "role": "user"},
]


@pytest.fixture
def signing() -> SigningIssuer:
    return SigningIssuer()


@pytest.fixture
async def control(plane, pepper, services, signing):
    """A control API with sign-in; returns a way to ask it."""
    for fact in (Tenant("acme"), Project("acme", "default")):
        await plane.state.put_identity(fact)
    issuer = Issuer(expectation_of(OIDC), plane.clock, signing.fetch)
    people = People(issuer, read_rules(RULES, "rules"), plane.state, plane.clock)
    callers = Callers(plane.state, pepper, plane.clock, people)
    services = replace(services, callers=callers, oidc=OIDC)
    transport = httpx2.ASGITransport(app=build_api(services))
    async with httpx2.AsyncClient(transport=transport, base_url="http://control/api/v1") as client:

        async def ask(text, method="GET", path="/whoami", **more):
            headers = {"authorization": f"Bearer {text}"}
            return await client.request(method, path, headers=headers, **more)

        yield ask


async def person(plane, subject="ann"):
    found = (await plane.state.list_identities()).principals
    return next(one for one in found if one.subject == f"{ISSUER}#{subject}")


async def test_a_person_becomes_a_principal_once(control, plane, signing) -> None:
    text = signing.token(groups=["admins"], name="Ann")
    for _ in range(2):
        answer = await control(text)
        assert answer.status_code == 200
    body = answer.json()
    made = await person(plane)
    assert body["principal"]["id"] == made.id
    assert body["key"]["id"] == f"@{made.id}"
    assert (made.name, made.kind, made.tenant) == ("Ann", PrincipalKind.PERSON, "acme")
    assert made.grants == (Grant("admin", "acme"),)


async def test_nobody_is_let_in_without_a_rule(control, plane, signing) -> None:
    before = await plane.state.list_identities()
    for groups in ([], ["other"], "admin"):
        answer = await control(signing.token(groups=groups))
        assert answer.status_code == 403
        assert "oidc.mapping" in answer.json()["error"]["message"]
    assert (await control(signing.token(groups=["lost"]))).status_code == 403
    assert await plane.state.list_identities() == before


async def test_bad_tokens_are_401_and_make_nobody(control, plane, signing) -> None:
    before = await plane.state.list_identities()
    for text in (
        signing.token(groups=["admins"], aud="other"),
        signing.token(groups=["admins"], exp=NOW - 60),
        SigningIssuer().token(groups=["admins"]),
        "eyJ.x.y",
    ):
        answer = await control(text)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
    assert await plane.state.list_identities() == before


async def test_grants_follow_claims_and_an_older_token_undoes_nothing(
    control, plane, signing
) -> None:
    old = signing.token(groups=["admins"])
    await control(old)
    made = await person(plane)
    given = replace(made, grants=(*made.grants, Grant("auditor", "acme", "root")))
    await plane.state.put_identity(given, replaces=made)
    await control(signing.token(groups=["users"], iat=NOW + 5))
    wanted = (Grant("developer", "acme"), Grant("auditor", "acme", "root"))
    assert (await person(plane)).grants == wanted
    await control(old)
    assert (await person(plane)).grants == wanted
    await control(signing.token(groups=[], iat=NOW + 6))
    assert (await person(plane)).grants == wanted[1:]


async def test_who_was_made_beforehand_needs_no_rule(control, plane, signing) -> None:
    grants = (Grant("viewer", "default", "root"),)
    subject = f"{ISSUER}#bob"
    known = Principal("p-bob", "Bob", PrincipalKind.PERSON, grants=grants, subject=subject)
    await plane.state.put_identity(known)
    assert (await control(signing.token(sub="bob"))).json()["principal"]["id"] == "p-bob"
    assert (await control(signing.token(sub="bob"), path="/deployments")).status_code == 200
    assert (
        await control(signing.token(sub="bob"), "POST", "/keys", json={"name": "k"})
    ).status_code == 403


@pytest.mark.promise(33)
async def test_a_disabled_person_is_refused_by_the_next_request(control, plane, signing) -> None:
    """For people as for keys."""
    text = signing.token(groups=["admins"])
    assert (await control(text)).status_code == 200
    made = await person(plane)
    stopped = replace(made, disabled_at=1.0)
    await plane.state.put_identity(stopped, replaces=made)
    assert (await control(text)).status_code == 401
    newer = signing.token(groups=["users"], iat=NOW + 5)
    assert (await control(newer)).status_code == 401  # a new token does not bring them back
    assert (await person(plane)).disabled_at == 1.0


async def test_a_person_may_do_what_the_principal_may_and_no_more(control, signing) -> None:
    text = signing.token(groups=["users"])
    assert (await control(text, path="/models")).status_code == 403  # of the installation
    made = await control(text, "POST", "/keys", json={"name": "mine", "role": "user"})
    assert made.status_code == 201
    for role, scope in (("admin", "acme"), ("user", "*"), ("owner", "*")):
        wanted = {"name": "more", "role": role, "scope": scope}
        assert (await control(text, "POST", "/keys", json=wanted)).status_code == 403


@pytest.mark.promise(5)
async def test_keys_of_a_person_end_with_what_the_person_may(control, plane, signing) -> None:
    """What was made with a session never exceeds the person, at use too."""
    other = Principal(
        "p-shop", "shop", PrincipalKind.SERVICE, "acme", grants=(Grant("user", "acme", "root"),)
    )
    await plane.state.put_identity(other)
    admin = signing.token(groups=["admins"])
    wanted = {"name": "shop", "role": "user", "principal": "p-shop"}
    body = (await control(admin, "POST", "/keys", json=wanted)).json()["record"]
    made = await person(plane)

    async def may():
        keys = await plane.state.list_keys()
        directory = Directory(await plane.state.list_identities(), keys)
        record = directory.key(body["id"])
        return directory.allows(record, Ask("use", "inference", "m", "acme/default"))

    assert body["made_with"] == f"@{made.id}"
    assert await may()
    await control(signing.token(groups=[], iat=NOW + 9))
    assert not await may()


async def test_an_heir_takes_over_what_a_session_made(control, plane, signing, pepper) -> None:
    admin = signing.token(groups=["admins"])
    await control(admin)
    heir = signing.token(groups=["admins"], sub="eve")
    await control(heir)
    gone, new = await person(plane), await person(plane, "eve")
    minted = mint(
        "k", "user", pepper, NOW, tenant="acme", principal=new.id, made_with=f"@{gone.id}"
    )
    await plane.state.put_key(minted.record)
    assert (await control(heir, "DELETE", f"/principals/{gone.id}")).status_code == 200
    assert (await plane.state.get_key(minted.record.id)).made_with == f"@{new.id}"


async def test_a_session_is_no_key_that_can_be_touched(control, plane, signing) -> None:
    text = signing.token(groups=["admins"])
    own = f"@{(await control(text)).json()['principal']['id']}"
    assert (await control(text, "DELETE", f"/keys/{own}")).status_code == 404
    assert (await control(text, "POST", f"/keys/{own}/rotate", json={})).status_code == 404
    assert (await control(own)).status_code == 401


@pytest.mark.promise(32)
async def test_the_audit_log_names_the_person_and_never_the_token(control, plane, signing) -> None:
    text = signing.token(groups=["admins"])
    await control(text, "POST", "/projects", json={"name": "new"})
    made = await person(plane)
    records = await plane.state.list_audit(after=0, limit=100)
    assert {one.event.actor for one in records} == {made.id}
    assert text not in str(records)
    assert text.split(".")[1] not in str(records)


async def test_where_to_sign_in_is_told_to_everybody(control) -> None:
    answer = await control("nothing", path="/signin")
    assert answer.json() == {
        "issuer": ISSUER,
        "client_id": CLIENT,
        "scopes": "openid email profile",
    }


async def test_a_mapping_that_cannot_be_read_refuses_to_start(plane, tmp_path) -> None:
    for text, said in (("[", "is not YAML"), ("{}", "list of at most"), (None, "cannot be read")):
        path = tmp_path / "rules.yaml"
        path.unlink(missing_ok=True)
        if text is not None:
            path.write_text(text)
        with pytest.raises(BadSetting, match=r"rules\.yaml") as caught:
            open_people(replace(OIDC, mapping=str(path)), plane.state, plane.clock)
        assert said in caught.value.message
    assert open_people(OidcSettings(), plane.state, plane.clock) is None


async def test_no_tenant_claims_a_person_for_itself(control, plane, signing) -> None:
    """A subject is given by whoever may make principals everywhere; and rules for one tenant give
    nothing to a principal of another."""
    admin = signing.token(groups=["admins"])
    wanted = {"name": "boss", "subject": f"{ISSUER}#boss", "kind": "person"}
    assert (await control(admin, "POST", "/principals", json=wanted)).status_code == 403
    del wanted["subject"]
    assert (await control(admin, "POST", "/principals", json=wanted)).status_code == 201
    other = Principal("p-b", "b", PrincipalKind.PERSON, subject=f"{ISSUER}#boss")
    await plane.state.put_identity(other)
    assert (await control(signing.token(sub="boss", groups=["admins"]))).status_code == 200
    assert (await person(plane, "boss")).grants == ()
