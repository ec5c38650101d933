"""Flags, options and the rules that refuse a bad start."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cloudlm.core.errors import BadSetting
from cloudlm.core.settings import EngineSettings
from cloudlm.worker.__main__ import read_config
from cloudlm.worker.config import WorkerConfig, check, is_loopback
from cloudlm.worker.options import engine_settings, split_options


def test_flags_go_over_environment_and_defaults() -> None:
    environment = {
        "CLOUDLM_HOME": "/h",
        "CLOUDLM_WORKER_TOKEN": "secret-token",
        "CLOUDLM_REGISTRY_URL": "s3://b/p",
        "CLOUDLM_ENGINE_BLOCK_SIZE": "8",
        "CLOUDLM_WORKER_MAX_WAITING_REQUESTS": "9",
    }
    arguments = ["--model", "models:/m/3", "--served-model-name", "m", "--port", "0"]
    config = read_config([*arguments, "--option", "dtype=float32"], environment)
    assert config.model == "models:/m/3"
    assert config.home == Path("/h")
    assert config.token == "secret-token"
    assert "secret-token" not in repr(config)
    assert config.registry_url == "s3://b/p"
    assert config.host == "127.0.0.1"
    assert config.port == 0
    assert config.engine == EngineSettings(dtype="float32", block_size=8)
    assert config.settings.worker.max_waiting_requests == 9
    assert read_config([*arguments, "--api-key", "k"], environment).token == "k"
    for names in (("-tp", "-pp"), ("--tensor-parallel-size", "--pipeline-parallel")):
        parted = read_config([*arguments, names[0], "2", names[1], "3"], environment).engine
        assert (parted.tensor_parallel, parted.pipeline_parallel) == (2, 3)
    theirs = engine_settings({"tensor_parallel_size": 4}, EngineSettings())  # vLLM's name
    assert theirs == EngineSettings(tensor_parallel=4)
    bare = read_config(["--model", "./m"], {})
    assert (bare.served_model_name, bare.port, bare.token) == ("./m", 8100, None)


@pytest.mark.parametrize(
    ("pair", "says"),
    [
        ("dtype", "key=value"),
        ("=3", "key=value"),
        ("dtpe=float32", "did you mean 'dtype'"),
        ("dtype=int8", "not one of auto, float32"),
        ("block_size=0", "from 1 to 256"),
        ("kv_cache_mb=many", "not a whole number"),
    ],
)
def test_a_bad_option_says_what_is_expected(pair: str, says: str) -> None:
    with pytest.raises(BadSetting, match=says):
        engine_settings(split_options([pair]), EngineSettings())


def test_an_address_that_others_reach_needs_a_token(config: WorkerConfig) -> None:
    assert check(config) is config
    with pytest.raises(BadSetting, match="CLOUDLM_WORKER_TOKEN"):
        check(replace(config, host="0.0.0.0"))
    assert check(replace(config, host="0.0.0.0", token="t")).token == "t"
    assert [is_loopback(h) for h in ("127.0.0.9", "::1", "localhost", "::", "example.org")] == [
        True,
        True,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize(
    "wrong",
    [
        {"model": ""},
        {"served_model_name": ""},
        {"port": 70000},
        {"options": {"x": 1}},
        {"token": "schlüssel"},  # in a header it would never be equal to itself
        {"token": " t"},
    ],
)
def test_other_bad_starts(config: WorkerConfig, wrong: dict[str, object]) -> None:
    with pytest.raises(BadSetting):
        check(replace(config, **wrong))  # type: ignore[arg-type]
