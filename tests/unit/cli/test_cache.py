"""``cloudlm cache``: a calibration out of pairs, kept in home and shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cloudlm.cli import cache
from cloudlm.gateway.semantic import calibration


def test_calibrate_keeps_what_show_shows(cli: Any, home: Path) -> None:
    nothing = cli("cache", "show")
    assert nothing.exit_code != 0
    made = cli("cache", "calibrate", "--json")
    assert made.exit_code == 0, made.output
    facts = json.loads(made.stdout)
    assert facts["false_hit_high"] <= facts["budget"] == 0.01
    assert json.loads(cli("cache", "show", "--json").stdout) == facts
    assert "95 % interval" in cli("cache", "show").output
    known = calibration.load(home)
    assert known is not None and known.rules == calibration.rules()


def test_what_cannot_be_calibrated_keeps_nothing(cli: Any, home: Path, tmp_path: Path) -> None:
    few = tmp_path / "few.txt"
    few.write_text("= a thing\n= the thing\nnumber 2 things\n")
    for arguments in (["--pairs", str(few)], ["--budget", "0"], ["--budget", "0.0001"]):
        assert cli("cache", "calibrate", *arguments).exit_code != 0
    assert calibration.load(home) is None


def test_a_deployment_as_the_embedder(
    cli: Any, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cloudlm.gateway.semantic.meaning import read
    from cloudlm.gateway.semantic.vectors import built_in

    asked: list[str] = []

    def embedded(name: str, texts: list[str]) -> list[list[float]]:
        assert name == "vectors"
        asked.extend(texts)
        return [list(map(float, 3 * built_in(read(text)))) for text in texts]

    monkeypatch.setattr(cache, "_embedded", embedded)
    made = cli("cache", "calibrate", "--embedder", "vectors", "--json")
    assert made.exit_code == 0, made.output
    known = calibration.load(home)
    assert known is not None
    assert known.embedder == "vectors"
    assert sum(value**2 for value in known.fingerprint) == pytest.approx(1.0, abs=1e-3)
    assert len(asked) == len(set(asked))
