"""What the memory leaves of a plan: each rule by an example, and what holds for any plan."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from cloudlm.control.plan import Apply, Delete, Plan, size_of_group
from cloudlm.control.residency import Claim, Verdict
from cloudlm.control.room import Room
from cloudlm.core.deployment import (
    Deployment,
    DeploymentSpec,
    GroupObservation,
    GroupSpec,
    Replica,
    ReplicaState,
    Residence,
)


def group(number, replicas, present=None):
    name = f"bank-r{number}"
    spec = GroupSpec(name, "bank", number, f"models:/bank/{number}", replicas)
    count = replicas if present is None else present
    found = tuple(Replica(f"{name}-{n}", ReplicaState.READY) for n in range(count))
    return GroupObservation(name, spec, found)


def sized(one, replicas):
    return Apply(replace(one.spec, replicas=replicas))


def room(replicas, *groups, wished=2, near=None, stable=1, target=2):
    near = {1, 2} if near is None else near
    staying = sum(size_of_group(one) for one in groups)
    return Room(
        wished,
        Verdict(replicas, Residence.RESIDENT if replicas else Residence.LEAVING),
        Claim("bank", 1, wished + 1, present=staying, held_bytes=staying),
        groups,
        frozenset(f"bank-r{number}" for number in near),
        f"bank-r{target}",
        f"bank-r{stable}",
    )


def test_without_a_budget_a_plan_stays_as_it_is():
    step = Plan((sized(group(1, 0), 5),))
    assert Room(3).fit(step) is step
    assert (Room(3).wanted, Room(3).shown, Room(3).no_room, Room(3).patient) == (3, 3, False, False)


def test_what_runs_elsewhere_takes_no_room():
    there, new = group(1, 3), group(2, 0)
    found = room(2, there, new, near={2}).fit(Plan((sized(new, 2),)))
    assert found == Plan((sized(new, 2),))


def test_nothing_elsewhere_is_given_up_before_all_that_are_wished_have_room():
    there, new = group(1, 3), group(2, 1)
    step = Plan((sized(new, 2), Delete("bank-r1", frozenset({"bank-r1-0"}))))
    assert room(1, there, new, near={2}).fit(step) == Plan()
    shrinks = Plan((sized(there, 1),))
    assert room(1, there, new, near={2}).fit(shrinks) == Plan()
    assert room(2, there, new, near={2}).fit(step) == step


def test_the_target_goes_first_and_the_stable_revision_last():
    stable, target = group(1, 2), group(2, 1)
    found = room(2, stable, target).fit(Plan())
    assert found == Plan((Apply(replace(target.spec, replicas=0), frozenset({"bank-r2-0"})),))
    found = room(1, stable, target).fit(Plan((sized(target, 3),)))
    assert [(one.spec.name, one.spec.replicas, one.leaving) for one in found.actions] == [
        ("bank-r2", 0, {"bank-r2-0"}),
        ("bank-r1", 1, {"bank-r1-1"}),
    ]
    given_up = group(3, 1)
    found = room(3, stable, target, given_up, near={1, 2, 3}).fit(Plan())
    assert [one.spec.name for one in found.actions] == ["bank-r3"]


def test_unloading_takes_all_that_is_here_and_nothing_else():
    there, stable, target = group(4, 1), group(1, 1), group(2, 1)
    found = room(0, there, stable, target).fit(Plan())
    assert found.leaving == {"bank-r1-0", "bank-r2-0"}


def test_what_would_change_nothing_is_not_done():
    new = group(2, 0)
    assert room(0, new).fit(Plan((sized(new, 2),))) == Plan()


def test_beside_others_one_is_planned_for_at_least():
    assert [room(count, group(1, 1)).wanted for count in (0, 1, 2, 3)] == [1, 1, 2, 2]
    assert room(0, group(1, 1), wished=0).wanted == 0
    assert room(0, group(2, 1)).wanted == 0, "it takes the place of nobody"
    assert room(0, group(1, 1), near={2}).wanted == 2, "what is elsewhere serves all"


def test_there_is_a_surge_only_where_there_is_room_for_it():
    asked = Deployment(DeploymentSpec("bank", "models:/bank/2", max_surge=2))
    surges = [room(count, group(1, 2)).fitted(asked).spec.max_surge for count in (1, 2, 3, 4, 5)]
    assert surges == [0, 0, 1, 2, 2]
    assert room(0, group(1, 2), near={2}).fitted(asked) == asked


def test_what_goes_for_others_may_take_its_time():
    assert room(1, group(1, 2)).patient
    assert not room(2, group(1, 2)).patient
    assert room(2, group(1, 2), group(2, 1)).patient, "the target goes"
    leaving = replace(room(0, group(1, 2)), claim=Claim("bank", 1, 0, present=2, held_bytes=2))
    assert not leaving.patient, "none is wanted: it goes for nobody else"


@st.composite
def situations(draw):
    groups = [
        group(number, draw(st.integers(0, 3)), draw(st.integers(0, 3)))
        for number in draw(st.sets(st.integers(1, 4)))
    ]
    actions = []
    for one in groups:
        kind = draw(st.sampled_from(["size", "delete", "nothing"]))
        if kind == "size":
            actions.append(sized(one, draw(st.integers(0, 5))))
        elif kind == "delete":
            actions.append(Delete(one.name, frozenset(r.id for r in one.replicas)))
    near = draw(st.sets(st.integers(1, 4)))
    made = room(draw(st.integers(0, 6)), *groups, wished=draw(st.integers(0, 4)), near=near)
    return made, Plan(tuple(actions))


@given(situations())
def test_no_more_stay_and_no_more_start_than_the_verdict_says(situation):
    made, step = situation
    found = made.fit(step)
    sizes = {one.name: one.spec.replicas for one in made.groups}
    held = {one.name: size_of_group(one) for one in made.groups}
    for action in found.actions:
        if isinstance(action, Apply):
            sizes[action.spec.name] = action.spec.replicas
        else:
            sizes[action.name] = 0
    after = {name: sizes[name] for name in sizes if name in made.near}
    assert sum(after.values()) <= made.verdict.replicas
    started = sum(max(sizes[name] - held[name], 0) for name in after)
    here = sum(held[name] for name in after)
    assert not started or here + started <= made.verdict.replicas


@given(situations())
def test_a_plan_that_fits_is_not_fitted_again(situation):
    made, step = situation
    once = made.fit(step)
    assert made.fit(once) == once


@given(situations())
def test_what_is_elsewhere_only_ever_keeps_more(situation):
    made, step = situation
    planned = [one for one in step.actions if _name(one) not in made.near]
    found = [one for one in made.fit(step).actions if _name(one) not in made.near]
    assert all(one in planned for one in found)
    if made.verdict.replicas >= made.wished:
        assert found == planned


def _name(action):
    return action.spec.name if isinstance(action, Apply) else action.name
