"""The control API's JSON: what is read back, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudlm.core import wire
from cloudlm.core.deployment import (
    Deployment,
    DeploymentPhase,
    DeploymentSpec,
    DeploymentStatus,
    Replica,
    ReplicaState,
    Residence,
)
from cloudlm.core.errors import CloudlmError, InvalidRequest, UnprocessableRequest
from cloudlm.core.job import Job, JobState
from cloudlm.core.model import Manifest, ModelFile
from cloudlm.core.placement import Placement, Traffic, Users
from cloudlm.core.routing import Policy, Routing

SPEC = DeploymentSpec(
    name="bank",
    model="models:/starter/3",
    min_replicas=0,
    max_replicas=4,
    target_ongoing_requests=2.5,
    options={"dtype": "float32", "kv_cache_mb": 64, "eager": True, "share": 0.5},
    env={"TZ": "UTC"},
    routing=Routing(Policy.SESSION_AFFINITY, "x-user-id", 0.25),
    placement=Placement(Traffic(2.0, 800, 200), regions=("eu",), users=(Users(48.1, 11.6),)),
    memory_mb=900,
)
STATUS = DeploymentStatus(
    name="bank",
    phase=DeploymentPhase.DEGRADED,
    observed_generation=2,
    wanted_replicas=2,
    ready_replicas=1,
    replicas=(
        Replica("bank-r1-0", ReplicaState.READY, "http://127.0.0.1:8100", 77, 1, "", 5.0),
        Replica("bank-r1-1", ReplicaState.BACKOFF, message="exit code 1"),
    ),
    message="one replica restarts",
    updated_at=6.5,
    residence=Residence.RESIDENT,
    memory_bytes=2**31,
)
MINIMAL = {"name": "bank", "model": "models:/starter/3"}


def over_the_wire(body: Any) -> Any:
    return json.loads(json.dumps(body, allow_nan=False))


class TestSpec:
    def test_it_is_read_back(self) -> None:
        assert wire.spec_from_body(over_the_wire(wire.spec_body(SPEC))) == SPEC

    def test_what_is_left_out_takes_its_default(self) -> None:
        assert wire.spec_from_body(MINIMAL) == DeploymentSpec("bank", "models:/starter/3")

    def test_the_name_may_come_from_the_path_alone(self) -> None:
        assert wire.spec_from_body({"model": "models:/a/1"}, name="bank").name == "bank"
        assert wire.spec_from_body(MINIMAL, name="bank").name == "bank"
        with pytest.raises(InvalidRequest, match="another deployment than the path"):
            wire.spec_from_body(MINIMAL, name="other")

    @pytest.mark.parametrize("field", ["generation", "revision", "status", "Name", "owner", ""])
    def test_no_other_field_can_be_assigned(self, field: str) -> None:
        with pytest.raises(UnprocessableRequest, match="has no field") as caught:
            wire.spec_from_body({**MINIMAL, field: 1})
        assert caught.value.param == field

    @pytest.mark.parametrize(
        ("change", "param"),
        [
            ({"name": "Bank"}, "name"),
            ({"name": 7}, "name"),
            ({"name": "a" * 65}, "name"),
            ({"name": "a/../b"}, "name"),
            ({"model": ""}, "model"),
            ({"model": None}, "model"),
            ({"model": "ftp://x/y"}, "model"),
            ({"model": "models:/starter/0"}, "model"),
            ({"model": "/" + "x" * 600}, "model"),
            ({"model": "/a\0b"}, "model"),
            ({"driver": "../x"}, "driver"),
            ({"engine": ""}, "engine"),
            ({"min_replicas": -1}, "min_replicas"),
            ({"min_replicas": 2}, "min_replicas"),
            ({"min_replicas": 1.0}, "min_replicas"),
            ({"min_replicas": True}, "min_replicas"),
            ({"min_replicas": "1"}, "min_replicas"),
            ({"max_replicas": 0, "min_replicas": 0}, "max_replicas"),
            ({"max_replicas": 1001}, "max_replicas"),
            ({"max_replicas": 10**400}, "max_replicas"),
            ({"target_ongoing_requests": 0}, "target_ongoing_requests"),
            ({"target_ongoing_requests": -1.5}, "target_ongoing_requests"),
            ({"target_ongoing_requests": float("nan")}, "target_ongoing_requests"),
            ({"target_ongoing_requests": float("inf")}, "target_ongoing_requests"),
            ({"target_ongoing_requests": 10**400}, "target_ongoing_requests"),
            ({"max_surge": -1}, "max_surge"),
            ({"max_surge": 1001}, "max_surge"),
            ({"memory_mb": -1}, "memory_mb"),
            ({"memory_mb": 1.5}, "memory_mb"),
            ({"memory_mb": 2**40}, "memory_mb"),
            ({"pinned": 1}, "pinned"),
            ({"pinned": True, "min_replicas": 0}, "pinned"),
            ({"options": []}, "options"),
            ({"options": {"Bad-Name": 1}}, "options"),
            ({"options": {"dtype": None}}, "options.dtype"),
            ({"options": {"dtype": ["a"]}}, "options.dtype"),
            ({"options": {"dtype": "x" * 1025}}, "options.dtype"),
            ({"options": {"precision": "int3"}}, "options.precision"),
            ({"options": {"precision": 8}}, "options.precision"),
            ({"options": {"share": float("nan")}}, "options.share"),
            ({"options": {"share": 10**400}}, "options.share"),
            ({"options": {f"o{n}": 1 for n in range(65)}}, "options"),
            ({"placement": []}, "placement"),
            ({"placement": {"min_zones": 0}}, "placement.min_zones"),
            ({"routing": []}, "routing"),
            ({"routing": {"policy": "random"}}, "routing.policy"),
            ({"routing": {"session_header": "X-Session"}}, "routing.session_header"),
            ({"routing": {"session_header": "authorization"}}, "routing.session_header"),
            ({"routing": {"hedge_after_s": -1}}, "routing.hedge_after_s"),
            ({"routing": {"hedge_after_s": float("nan")}}, "routing.hedge_after_s"),
            ({"routing": {"hedge_after_s": True}}, "routing.hedge_after_s"),
            ({"env": {"A=B": "x"}}, "env"),
            ({"env": {"A": 1}}, "env.A"),
            ({"env": {"A": "x\0"}}, "env.A"),
            ({"env": {"A": "\ud800"}}, "env.A"),
            ({"env": {"A": "x" * 4097}}, "env.A"),
            ({"env": {"LD_PRELOAD": "/tmp/x.so"}}, "env.LD_PRELOAD"),
            ({"env": {"CLOUDLM_WORKER_TOKEN": "x"}}, "env.CLOUDLM_WORKER_TOKEN"),
            ({"env": {f"E{n}": "x" for n in range(65)}}, "env"),
        ],
    )
    def test_a_bad_value_names_its_field(self, change: dict[str, Any], param: str) -> None:
        with pytest.raises(InvalidRequest) as caught:
            wire.spec_from_body({**MINIMAL, **change})
        assert caught.value.param == param
        assert param.partition(".")[0] in caught.value.message
        assert len(caught.value.message) < 400
        assert caught.value.status == 400

    @pytest.mark.parametrize("body", [None, [], "x", 1, True])
    def test_a_body_must_be_an_object(self, body: Any) -> None:
        with pytest.raises(InvalidRequest, match="must be a JSON object, not"):
            wire.spec_from_body(body)

    @pytest.mark.parametrize("missing", ["name", "model"])
    def test_what_is_required_is_named(self, missing: str) -> None:
        body = {key: value for key, value in MINIMAL.items() if key != missing}
        with pytest.raises(InvalidRequest, match=f"needs the field '{missing}'"):
            wire.spec_from_body(body)

    def test_one_replica_may_be_stopped_before_another_starts(self) -> None:
        assert wire.spec_from_body({**MINIMAL, "max_surge": 0}).max_surge == 0

    @given(
        st.dictionaries(
            st.sampled_from(list(wire.spec_body(SPEC))) | st.text(max_size=5),
            st.recursive(
                st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner),
                max_leaves=5,
            ),
        )
    )
    def test_anything_gives_a_spec_or_our_error(self, body: dict[str, Any]) -> None:
        try:
            spec = wire.spec_from_body({**MINIMAL, **body})
        except InvalidRequest as error:
            json.dumps(error.body())
        else:
            assert wire.spec_from_body(over_the_wire(wire.spec_body(spec))) == spec


class TestOtherRequests:
    def test_scale(self) -> None:
        assert wire.scale_from_body(wire.scale_body(0, 3)) == (0, 3)
        for body in ({"min_replicas": 2, "max_replicas": 1}, {"min_replicas": 1}, {}, None):
            with pytest.raises(InvalidRequest):
                wire.scale_from_body(body)
        with pytest.raises(UnprocessableRequest):
            wire.scale_from_body({"min_replicas": 1, "max_replicas": 1, "model": "x"})

    def test_import(self) -> None:
        assert wire.import_from_body({"source": "/m", "name": None}) == {"source": "/m"}
        full = {"source": "org/name", "name": "n", "alias": "champion"}
        assert wire.import_from_body(full) == full
        for wrong in ({"source": "gopher://x"}, {"source": "/m", "name": "A"}, {"name": "n"}):
            with pytest.raises(InvalidRequest):
                wire.import_from_body(wrong)
        with pytest.raises(UnprocessableRequest):
            wire.import_from_body({**full, "trust_remote_code": True})

    def test_alias(self) -> None:
        assert wire.alias_from_body({"version": 3}) == 3
        for version in (0, -1, "3", 1.5, None, 10**12):
            with pytest.raises(InvalidRequest):
                wire.alias_from_body({"version": version})

    def test_job(self) -> None:
        assert wire.job_request_from_body({"kind": "import"}) == ("import", {})
        with pytest.raises(InvalidRequest, match="larger than 65536 bytes"):
            wire.job_request_from_body({"kind": "import", "arguments": {"a": "x" * 70_000}})
        with pytest.raises(UnprocessableRequest):
            wire.job_request_from_body({"kind": "import", "state": "succeeded"})


class TestAnswers:
    @pytest.mark.parametrize("status", [None, STATUS])
    def test_deployments(self, status: DeploymentStatus | None) -> None:
        deployment = Deployment(SPEC, 2, 1, True, 3.0, 4.5)
        body = over_the_wire(wire.deployment_body(deployment, status))
        view = wire.deployment_from_body(body)
        assert view == (deployment, status)
        assert (view.name, view.spec, view.generation) == ("bank", SPEC, 2)

    def test_a_view_says_where_the_deployment_stands(self) -> None:
        new = Deployment(SPEC, generation=3)
        assert wire.DeploymentView(new).phase is DeploymentPhase.PENDING
        assert not wire.DeploymentView(new).settled
        assert not wire.DeploymentView(new, STATUS).settled
        assert wire.DeploymentView(new, replace(STATUS, observed_generation=3)).settled

    def test_jobs(self) -> None:
        job = Job(
            "j", "import", {"a": [1]}, JobState.FAILED, 0.5, "m", {}, {"code": None}, 1.0, 2.0
        )
        assert wire.job_from_body(over_the_wire(wire.job_body(job))) == job

    def test_models_and_drivers(self) -> None:
        files = (ModelFile("config.json", 3, "0" * 64),)
        manifest = Manifest("starter", 3, files, "generate", "llama", "float32", 10, 256)
        entry = wire.ModelEntry("starter", (manifest,), {"champion": 3})
        assert wire.model_from_body(over_the_wire(wire.model_body(entry))) == entry
        driver = wire.DriverEntry("process", "cloudlm", ("only_here", "replica_logs"))
        assert wire.driver_from_body(over_the_wire(wire.driver_body(driver))) == driver

    def test_fields_of_a_newer_server_are_passed_over(self) -> None:
        body = wire.deployment_body(Deployment(SPEC), STATUS)
        body["canary"] = body["spec"]["weight"] = body["status"]["cost"] = 1
        assert wire.deployment_from_body(body) == (Deployment(SPEC), STATUS)

    @given(st.data())
    def test_a_broken_answer_is_our_error(self, data: st.DataObject) -> None:
        body = over_the_wire(wire.deployment_body(Deployment(SPEC), STATUS))
        part = data.draw(st.sampled_from([body, body["spec"], body["status"]]))
        field = data.draw(st.sampled_from(sorted(part)))
        part[field] = data.draw(st.none() | st.integers() | st.text() | st.just([None]))
        try:
            wire.deployment_from_body(body)
        except CloudlmError as error:
            assert error.message
