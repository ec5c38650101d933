"""The memory budget: how it is written, what a replica needs of it, what is refused at once."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudlm.control.budget import KNOWN_S, MemoryBudget, machine_bytes
from cloudlm.control.footprint import MIB, PROCESS_BYTES, amount_text, budget_of, replica_bytes
from cloudlm.core.deployment import Deployment, DeploymentSpec
from cloudlm.core.errors import BadSetting, CorruptModel, StorageFailed, UnprocessableRequest
from cloudlm.core.model import Manifest, ModelFile
from cloudlm.core.settings import EngineSettings

GIB = 2**30
CONFIG = {
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "num_hidden_layers": 16,
    "intermediate_size": 8192,
    "vocab_size": 128_000,
}
BIG = Manifest(
    name="big",
    version=1,
    files=(ModelFile("model.safetensors", 2_000_000_000, "0" * 64),),
    task="generate",
    architecture="LlamaForCausalLM",
    precision="bfloat16",
    parameters=1_000_000_000,
    context_length=4096,
)


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("", 0),
        (" off ", 0),
        ("24GiB", 24 * GIB),
        ("24 gib", 24 * GIB),
        ("1.5G", 1_500_000_000),
        ("512MB", 512_000_000),
        ("4194304", 4194304),
        ("75%", 75 * GIB // 100),
        ("100 %", GIB),
    ],
)
def test_a_budget_is_an_amount_or_a_share(text, size_bytes):
    assert budget_of(text, GIB) == size_bytes


@pytest.mark.parametrize(
    "text", ["lots", "0", "24", "101%", "-1GiB", "50%GiB", "1PiB", "١GiB", "9" * 400]
)
def test_what_is_neither_is_refused_with_an_example(text):
    with pytest.raises(BadSetting, match="24GiB"):
        budget_of(text, GIB)


@given(st.integers(1, 10**6))
def test_the_same_amount_in_any_unit_is_the_same(count):
    assert budget_of(f"{count}GiB", 0) == budget_of(f"{count * 1024}MiB", 0) == count * GIB


def test_this_machine_has_memory():
    assert machine_bytes() > 64 * MIB


def test_amounts_for_people():
    assert (amount_text(3.5 * GIB), amount_text(100 * MIB)) == ("3.5 GiB", "100 MiB")


def needed(options=None, manifest=BIG, config=CONFIG):
    spec = DeploymentSpec("big", "models:/big/1", options=options or {})
    return replica_bytes(spec, manifest, config, EngineSettings())


def test_a_replica_needs_weights_cache_step_and_process():
    step = 64 * 128_000 * 48 + 1024 * 16_384 * 24
    assert needed() == PROCESS_BYTES + 512 * MIB + 2_000_000_000 + step


def test_options_change_what_it_needs():
    usual = needed()
    assert usual - needed({"kv_cache_mb": 128}) == 384 * MIB
    assert needed({"precision": "int8"}) < usual
    assert needed({"dtype": "float32"}) - usual == 2_000_000_000
    assert needed({"max_batch_tokens": 256}) < usual
    two = needed({"tensor_parallel": 2})
    assert two > usual + PROCESS_BYTES + 512 * MIB - 1


def test_a_small_model_is_computed_in_float32():
    small = Manifest(**{**_fields(BIG), "parameters": 10_000_000, "files": ()})
    assert needed(manifest=small) - needed({"dtype": "bfloat16"}, small) == 20_000_000


def test_what_has_no_configuration_needs_its_files():
    assert needed(config={}) == PROCESS_BYTES + 512 * MIB + 2_000_000_000


def _fields(manifest):
    return {name: getattr(manifest, name) for name in manifest.__dataclass_fields__}


def asked(name, memory_mb, **changes):
    return DeploymentSpec(name, "models:/bank/1", memory_mb=memory_mb, **changes)


async def test_what_can_never_be_loaded_is_refused_when_it_is_asked(plane):
    budget = MemoryBudget(plane.registry, 1000 * MIB)
    await budget.check(asked("fits", 1000), [], plane.drivers)
    with pytest.raises(UnprocessableRequest, match=r"'huge' needs 1001 MiB.* 1000 MiB") as caught:
        await budget.check(asked("huge", 1001), [], plane.drivers)
    assert caught.value.param == "memory_mb"
    kept = [Deployment(asked("kept", 600, pinned=True))]
    with pytest.raises(UnprocessableRequest, match="pinned deployments keep 600 MiB"):
        await budget.check(asked("late", 500), kept, plane.drivers)
    with pytest.raises(UnprocessableRequest, match=r"needs 1\.2 GiB"):
        two = asked("two", 600, pinned=True, min_replicas=2, max_replicas=2)
        await budget.check(two, [], plane.drivers)


async def test_pinning_does_not_shut_out_what_is_deployed(plane):
    budget = MemoryBudget(plane.registry, 1000 * MIB)
    others = [Deployment(asked("large", 900))]
    with pytest.raises(UnprocessableRequest, match="'large' ever to be loaded") as caught:
        await budget.check(asked("kept", 200, pinned=True), others, plane.drivers)
    assert caught.value.param == "pinned"
    await budget.check(asked("kept", 100, pinned=True), others, plane.drivers)
    leaving = [Deployment(asked("large", 900), deleting=True)]
    await budget.check(asked("kept", 200, pinned=True), leaving, plane.drivers)


async def test_no_budget_and_other_machines_refuse_nothing(plane):
    await MemoryBudget(plane.registry).check(asked("huge", 10**6), [], plane.drivers)
    elsewhere = DeploymentSpec("huge", "gpt", driver="external", memory_mb=10**6)
    await MemoryBudget(plane.registry, MIB).check(elsewhere, [], plane.drivers)


async def test_what_stands_is_not_refused_again_after_the_budget_was_lowered(plane):
    budget = MemoryBudget(plane.registry, 500 * MIB)
    before = Deployment(asked("big", 900, min_replicas=2, max_replicas=2))
    await budget.check(replace(before.spec, asleep=True), [before], plane.drivers)
    await budget.check(replace(before.spec, min_replicas=1), [before], plane.drivers)
    for grown in (replace(before.spec, memory_mb=901), replace(before.spec, pinned=True)):
        with pytest.raises(UnprocessableRequest):
            await budget.check(grown, [before], plane.drivers)
    kept = Deployment(replace(before.spec, pinned=True))
    with pytest.raises(UnprocessableRequest):
        more = replace(kept.spec, min_replicas=3, max_replicas=3)
        await budget.check(more, [kept], plane.drivers)


async def test_other_tenants_deployments_are_not_named(plane):
    budget = MemoryBudget(plane.registry, 1000 * MIB)
    others = [Deployment(asked("secret", 900, tenant="rivals"))]
    with pytest.raises(UnprocessableRequest, match="for another deployment ever") as caught:
        await budget.check(asked("kept", 200, pinned=True, tenant="ours"), others, plane.drivers)
    assert "secret" not in caught.value.message


class Registry:
    """The plane's registry, which counts what it is asked and fails while ``fault`` says so."""

    def __init__(self, kept):
        self.kept = kept
        self.fault = None
        self.asked = 0

    def resolve(self, ref):
        self.asked += 1
        if self.fault is not None:
            raise self.fault
        return self.kept.resolve(ref)

    def configuration(self, ref):
        return self.kept.configuration(ref)


async def test_a_registry_that_fails_is_no_small_model(plane):
    registry = Registry(plane.registry)
    budget = MemoryBudget(registry, 10**9, clock=plane.clock)
    known = DeploymentSpec("bank", "models:/bank/1")
    need = await budget.need(known)
    registry.fault = StorageFailed("the disk is gone")
    assert await budget.need(known) == need
    for _ in range(5):
        with pytest.raises(StorageFailed, match="disk"):
            await budget.need(DeploymentSpec("bank", "models:/bank/2"))
    assert registry.asked == 2, "what failed is not tried in every pass"
    registry.fault = CorruptModel("its bytes are others")
    await plane.clock.advance(KNOWN_S)
    with pytest.raises(CorruptModel):
        await budget.need(DeploymentSpec("bank", "models:/bank/2"))
    registry.fault = None
    await plane.clock.advance(KNOWN_S)
    assert await budget.need(DeploymentSpec("bank", "models:/bank/2")) == need


async def test_an_alias_needs_what_it_means_now(plane):
    small, large = plane.registry.versions["bank"]
    files = (ModelFile("model.safetensors", 10**9, "0" * 64),)
    plane.registry.versions["bank"] = [small, replace(large, files=files)]
    registry = Registry(plane.registry)
    budget = MemoryBudget(registry, 10**10, clock=plane.clock)
    spec = DeploymentSpec("bank", "models:/bank@champion")
    need = await budget.need(spec)
    plane.registry.set_alias("bank", "champion", 2)
    await plane.clock.advance(KNOWN_S)
    assert await budget.need(spec) == need + 10**9 - 10
    registry.fault = StorageFailed("the disk is gone")
    await plane.clock.advance(KNOWN_S)
    assert await budget.need(spec) == need + 10**9 - 10, "as it was last known"


async def test_an_alias_that_was_moved_for_a_wish_counts_at_once(plane):
    small, large = plane.registry.versions["bank"]
    files = (ModelFile("model.safetensors", 10**10, "0" * 64),)
    plane.registry.versions["bank"] = [replace(small, files=files), large]
    budget = MemoryBudget(plane.registry, 10**10, clock=plane.clock)
    spec = DeploymentSpec("bank", "models:/bank@champion")
    with pytest.raises(UnprocessableRequest):
        await budget.check(spec, [], plane.drivers)
    plane.registry.set_alias("bank", "champion", 2)
    await budget.check(spec, [], plane.drivers)


async def test_an_unknown_version_needs_a_process_at_least(plane):
    budget = MemoryBudget(plane.registry, 10**9)
    spec = DeploymentSpec("gone", "models:/gone/1")
    assert await budget.need(spec) == PROCESS_BYTES
    known = DeploymentSpec("bank", "models:/bank/1")
    assert await budget.need(known) == PROCESS_BYTES + 512 * MIB + 10
