"""Who may do what: default deny, deny beats allow, and no child exceeds its maker."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloudlm.core.access import (
    FIRST_IDENTITIES,
    CustomRole,
    Effect,
    Grant,
    Identities,
    Principal,
    PrincipalKind,
    Project,
    Resource,
    Rule,
    Tenant,
    Verb,
)
from cloudlm.core.tenant import KeyRecord, Role
from cloudlm.security.access import (
    Ask,
    Directory,
    covers,
    covers_name,
    covers_scope,
    permits,
    shared,
    spell_out,
)
from cloudlm.security.roles import BUILT_IN

names = st.sampled_from(["", "a", "ab", "abc", "b"])
patterns = names | st.sampled_from(["*", "a*", "ab*", "b*"])
scopes = st.sampled_from(["*", "acme", "acme/web", "acme/app", "other", "other/web"])
verbs = st.sampled_from([verb.value for verb in Verb])
kinds = st.sampled_from(["keys", "inference", "roles"])
resources = st.builds(
    lambda kind, name: f"{kind}:{name}" if name else kind, kinds, patterns
) | st.sampled_from(["*", "keys:@self"])
rules = st.builds(
    Rule,
    st.lists(verbs | st.just("*"), min_size=1, max_size=2).map(tuple),
    st.lists(resources, min_size=1, max_size=2).map(tuple),
    st.sampled_from(Effect),
)
rule_sets = st.lists(rules, max_size=4).map(tuple)
asks = st.builds(Ask, verbs, kinds, names, scopes)
asks_of_many = st.builds(Ask, verbs, kinds, patterns, scopes)


def key(**changes):
    usual = {"role": "owner", "scope": "*", "principal": "root"}
    return KeyRecord(**{"id": "k", "name": "", "digest": "", "last4": "", **usual, **changes})


def directory(*principals, roles=(), keys=(), tenants=("acme", "other")):
    first = FIRST_IDENTITIES
    facts = Identities(
        tenants=(*first.tenants, *(Tenant(name) for name in tenants)),
        projects=(*first.projects, Project("acme", "web")),
        principals=(*first.principals, *principals),
        roles=roles,
    )
    return Directory(facts, keys)


def service(name, *grants, **changes):
    usual = {"kind": PrincipalKind.SERVICE, "tenant": "acme", "grants": grants}
    return Principal(name, name, **{**usual, **changes})


# Names and scopes ---------------------------------------------------------------------------------


@given(patterns, patterns, names)
def test_a_pattern_covers_what_it_says_it_covers(outer, inner, name):
    if covers_name(outer, inner) and covers_name(inner, name):
        assert covers_name(outer, name)


@given(asks_of_many, asks_of_many, asks)
def test_what_two_share_is_in_both_and_nothing_is_missed(one, other, ask):
    part = shared(one, other)
    in_both = covers(one, ask) and covers(other, ask)
    assert in_both == (part is not None and covers(part, ask))


def test_a_scope_holds_itself_and_what_is_inside():
    assert covers_scope("*", "acme/web")
    assert covers_scope("acme", "acme/web")
    assert not covers_scope("acme", "acme-2/web")
    assert not covers_scope("acme/web", "acme")
    assert not covers_scope("acme/web", "*")


# Rules --------------------------------------------------------------------------------------------


@given(rule_sets, asks)
def test_deny_beats_allow(some, ask):
    denying = Rule((ask.verb,), (f"{ask.resource}:{ask.name}",), Effect.DENY)
    for order in ((*some, denying), (denying, *some)):
        powers = spell_out(order, "*", "me")
        if ask.name:
            assert not permits(powers, ask)
        everything = spell_out((*order, Rule(("*",), ("*",))), "*", "me")
        assert not permits(everything, ask) or not ask.name


@pytest.mark.promise(34)
@given(rule_sets, asks)
def test_what_no_rule_allows_is_denied(some, ask):
    powers = spell_out(some, "acme", "me")
    if permits(powers, ask):
        assert any(covers(one, ask) for one in powers.allowed)
        assert covers_scope("acme", ask.scope)


@given(rule_sets, asks_of_many, asks)
def test_who_may_do_all_of_a_pattern_may_do_each_of_it(some, many, ask):
    powers = spell_out(some, "*", "me")
    if permits(powers, many) and covers(many, ask):
        assert permits(powers, ask)


@pytest.mark.parametrize("verb", ["root", "", "*", "READ", "read ", "admin"])
def test_an_unknown_verb_is_denied_to_the_owner(verb):
    known = directory()
    assert known.allows(key(), Ask("read", "keys", "x", "*"))
    assert not known.allows(key(), Ask(verb, "keys", "x", "*"))
    assert not known.allows(key(), Ask("read", verb, "x", "*"))


def test_an_unknown_role_gives_nothing():
    assert not directory().allows(key(role="nosuch"), Ask("read", "keys", "x", "*"))


def test_built_in_roles_say_what_their_names_say():
    def may(role, verb, kind, name="x"):
        return permits(spell_out(BUILT_IN[role], "acme", "me"), Ask(verb, kind, name, "acme"))

    assert set(BUILT_IN) == set(Role)
    assert may("user", "use", "inference")
    everything = [(v.value, k.value) for v in Verb for k in Resource]
    assert [one for one in everything if may("user", *one)] == [("use", "inference")]
    assert [v for v, k in everything if may("viewer", v, k) and v != "read"] == []
    assert not may("viewer", "use", "inference")
    assert not may("viewer", "read", "keys")
    assert all(v == "read" for v, k in everything if may("auditor", v, k))
    assert may("auditor", "read", "audit")
    assert not may("operator", "create", "keys")
    assert may("operator", "lead", "inference")
    assert not may("developer", "lead", "inference")
    assert may("developer", "create", "keys", "me")
    assert not may("developer", "create", "keys", "another")
    assert not may("admin", "create", "tenants")
    assert may("admin", "update", "principals")
    assert all(may("owner", v, k) for v, k in everything)


# Chains -------------------------------------------------------------------------------------------


def test_a_key_is_no_more_than_its_principal():
    plain = service("p", Grant("user", "acme"))
    known = directory(plain)
    wide = key(principal="p", role="owner", scope="*")
    assert known.allows(wide, Ask("use", "inference", "m", "acme/web"))
    assert not known.allows(wide, Ask("read", "keys", "p", "acme"))
    assert not known.allows(wide, Ask("use", "inference", "m", "other/web"))


@pytest.mark.promise(5)
def test_a_grant_is_no_more_than_its_giver_has_now():
    boss = service("boss", Grant("admin", "acme"))
    child = service("child", Grant("admin", "acme", "boss"))
    ask = Ask("delete", "keys", "x", "acme")
    holder = key(principal="child", scope="acme", role="admin")
    assert directory(boss, child).allows(holder, ask)
    demoted = replace(boss, grants=(Grant("user", "acme"),))
    assert not directory(demoted, child).allows(holder, ask)
    disabled = replace(boss, disabled_at=1.0)
    assert not directory(disabled, child).allows(holder, ask)
    assert not directory(child).allows(holder, ask)


def test_two_who_grant_each_other_hold_nothing():
    one = service("one", Grant("owner", "*", "two"))
    two = service("two", Grant("owner", "*", "one"), Grant("owner", "*", "two"))
    known = directory(one, two)
    for name in ("one", "two"):
        assert not known.allows(key(principal=name), Ask("read", "keys", "x", "acme"))


@pytest.mark.promise(5)
def test_a_key_is_no_more_than_the_key_that_made_it():
    narrow = key(id="narrow", role="user", scope="acme", models=("bank",))
    child = key(id="child", made_with="narrow")
    known = directory(keys=(narrow, child))
    assert known.allows(child, Ask("use", "inference", "bank", "acme/web"))
    assert not known.allows(child, Ask("use", "inference", "other", "acme/web"))
    assert not known.allows(child, Ask("read", "keys", "x", "acme"))
    assert not known.allows(key(made_with="gone"), Ask("read", "keys", "x", "acme"))
    loop = key(id="loop", made_with="loop")
    assert not directory(keys=(loop,)).allows(loop, Ask("read", "keys", "x", "acme"))


def test_a_key_stands_on_its_tenant_and_principal():
    p = service("p", Grant("user", "acme"))
    mine = key(principal="p", tenant="acme", expires_at=10.0)
    assert directory(p).alive(mine, 9.0)
    assert not directory(p).alive(mine, 10.0)
    assert not directory(replace(p, disabled_at=1.0)).alive(mine, 1.0)
    assert not directory().alive(mine, 1.0)
    assert not directory(p, tenants=()).alive(mine, 1.0)
    facts = directory(p).identities
    stopped = replace(facts, tenants=tuple(replace(one, disabled_at=1.0) for one in facts.tenants))
    assert not Directory(stopped).alive(mine, 1.0)


def test_a_tenants_own_role_wins_and_holds_there_only():
    own = CustomRole("acme", "helper", (Rule(("read",), ("usage",)),))
    shared_role = CustomRole("*", "helper", (Rule(("read",), ("keys",)),))
    known = directory(roles=(own, shared_role))
    there, elsewhere = (key(role="helper", scope=scope) for scope in ("acme", "other"))
    assert known.allows(there, Ask("read", "usage", "", "acme"))
    assert not known.allows(there, Ask("read", "keys", "x", "acme"))
    assert known.allows(replace(elsewhere, id="k2"), Ask("read", "keys", "x", "other"))


custom = st.sampled_from(["r0", "r1", "r2", "user", "developer", "admin"])
model_lists = st.lists(patterns, min_size=1, max_size=2).map(tuple)


@pytest.mark.promise(5)
@settings(max_examples=400, deadline=None)
@given(
    st.tuples(rule_sets, rule_sets, rule_sets),
    st.lists(st.builds(Grant, custom, scopes, st.sampled_from(["", "p1", "p2"])), max_size=3),
    st.lists(st.builds(Grant, custom, scopes, st.sampled_from(["", "p1", "p2"])), max_size=3),
    st.tuples(custom, scopes, model_lists),
    st.tuples(custom, scopes, model_lists),
    st.lists(asks, min_size=1, max_size=8),
)
def test_no_child_exceeds_its_maker(rule_sets, grants1, grants2, maker_has, child_has, questions):
    """At issue: what passes ``excess`` may do nothing that its maker may not. At use: neither may
    a child that was never checked."""
    roles = tuple(CustomRole("*", f"r{n}", some) for n, some in enumerate(rule_sets))
    people = service("p1", *grants1), service("p2", *grants2)
    role, scope, models = maker_has
    maker = key(id="maker", role=role, scope=scope, principal="p1", models=models)
    role, scope, models = child_has
    unchecked = key(id="child", role=role, scope=scope, models=models)
    child = replace(unchecked, made_with="maker")
    known = directory(*people, roles=roles, keys=(maker, child))
    passes = known.excess(maker, role, scope, "root", models) is None
    for ask in questions:
        if known.allows(child, ask):
            assert known.allows(maker, ask)
        if passes and known.allows(replace(unchecked, id="free"), ask):
            assert known.allows(maker, ask)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(list(Role)), scopes)
def test_everybody_may_hand_on_what_they_have(role, scope):
    known = directory()
    maker = key(role=role.value, scope=scope)
    assert known.excess(maker, role.value, scope, "root") is None
    if role is not Role.OWNER:
        assert known.excess(maker, "owner", "*", "root") is not None
