"""vLLM's options: an allow-list, and how they are written."""

from __future__ import annotations

import pytest

from cloudlm.core.deployment import DeploymentSpec
from cloudlm.core.errors import InvalidRequest
from cloudlm.core.spec import check_spec
from cloudlm.core.vllm import VLLM_OPTIONS, read_vllm_options, vllm_flags


def test_options_become_flags() -> None:
    options = {
        "max_model_len": 4096,
        "dtype": "bfloat16",
        "tensor_parallel_size": "2",
        "gpu_memory_utilization": 0.85,
        "enable_prefix_caching": False,
        "enforce_eager": "true",
        "disable_custom_all_reduce": False,
        "quantization": "fp8",
        "tool_call_parser": "hermes",
    }
    assert vllm_flags(read_vllm_options(options)) == [
        *("--dtype", "bfloat16", "--no-enable-prefix-caching", "--enforce-eager"),
        *("--gpu-memory-utilization", "0.85", "--max-model-len", "4096"),
        *("--quantization", "fp8", "--tensor-parallel-size", "2"),
        *("--tool-call-parser", "hermes", "--enable-auto-tool-choice"),
    ]


def test_an_unknown_option_is_refused_with_the_list() -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_vllm_options({"max_model_length": 7})
    message = caught.value.message
    assert "did you mean 'max_model_len'" in message
    assert all(name in message for name in VLLM_OPTIONS)


@pytest.mark.parametrize(
    "name",
    ["trust_remote_code", "model", "uds", "tool_parser_plugin", "chat_template", "hf_overrides"],
)
def test_what_names_code_or_a_file_is_not_on_the_list(name: str) -> None:
    with pytest.raises(InvalidRequest):
        read_vllm_options({name: "true"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_model_len", "many"),
        ("max_model_len", 0),
        ("max_model_len", "9" * 30),
        ("gpu_memory_utilization", 1.5),
        ("gpu_memory_utilization", "nan"),
        ("enforce_eager", "perhaps"),
        ("dtype", "int3"),
        ("quantization", "--trust-remote-code"),
        ("quantization", "a b"),
        ("tool_call_parser", "../x"),
    ],
)
def test_a_value_that_does_not_fit_is_named(name: str, value: object) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_vllm_options({name: value})
    assert caught.value.param == f"options.{name}"


def test_a_deployment_is_checked_before_it_is_accepted() -> None:
    spec = DeploymentSpec("m", "models:/m/1", engine="vllm", options={"kv_cache_mb": 64})
    with pytest.raises(InvalidRequest, match="no option 'kv_cache_mb'"):
        check_spec(spec)
    check_spec(DeploymentSpec("m", "models:/m/1", engine="vllm", options={"max_num_seqs": 4}))
