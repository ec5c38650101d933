"""``cloudlm plan`` and ``cloudlm catalogue``: nothing runs, nothing is rented."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cloudlm.core.errors import InvalidRequest, ModelNotFound, NotFound
from cloudlm.registry.bundled import bundled_folder

Ok = Callable[..., Any]
EXAMPLES = sorted((Path(__file__).parents[3] / "examples").glob("*.yaml"))
PLAN = """
name: helper
model: models:/helper@champion
placement:
  traffic: {requests_per_s: 2, prompt_tokens: 400, output_tokens: 100}
"""
LIST = (
    "InstanceType,AcceleratorName,AcceleratorCount,vCPUs,MemoryGiB,Price,SpotPrice,Region\n"
    "own.large,L4,1,4,16,0.10,0.02,eu-central-1\n"
    "own.small,,,4,16,0.01,0.01,eu-central-1\n"
)


@pytest.fixture
def file(tmp_path: Path) -> Callable[[str], str]:
    def write(text: str) -> str:
        path = tmp_path / "plan.yaml"
        path.write_text(text)
        return str(path)

    return write


class TestPlan:
    @pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
    def test_the_examples_run_as_they_stand(self, ok: Ok, example: Path) -> None:
        assert len(example.read_text().splitlines()) <= 40
        shown = ok("plan", "-f", str(example))
        assert "USD/H" in shown.stdout
        assert "per million tokens" in shown.stdout
        assert "LOST" in shown.stdout
        assert "estimates by the roofline" in shown.stderr
        (found,) = json.loads(ok("plan", "-f", str(example), "--json").stdout)
        best = found["best"]
        assert best["usd_per_h"] <= 80
        assert best["zones"] >= 3
        assert best["speed"] == "estimated"
        assert best["usd_per_h"] >= found["usd_per_h_at_least"]
        for part in best["parts"]:
            assert part["offer"]["source"].startswith("https://")
            assert part["offer"]["provider"] != "vast"

    @pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
    def test_no_name_and_no_number_is_broken_on_a_terminal(
        self, ok: Ok, wide: Callable[[int], io.StringIO], example: Path
    ) -> None:
        (found,) = json.loads(ok("plan", "-f", str(example), "--json").stdout)
        text = wide(100)
        notes = ok("plan", "-f", str(example)).stderr
        shown = text.getvalue()
        assert all(len(line) <= 100 for line in shown.splitlines())
        assert "hold at least 1" in shown
        assert "the oldest price in this plan is of 20" in notes
        for part in found["best"]["parts"]:
            offer = part["offer"]
            key = f"{offer['provider']}/{offer['region']}/{offer['instance']}"
            (row,) = [line for line in shown.splitlines() if line.startswith(f"{key} ")]
            rented = [str(sum(part[how].values())) for how in ("on_demand", "spot")]
            usd = f"{part['usd_per_h']:.2f}"
            assert row.split()[-7:-4] == [*rented, str(part["replicas"])]
            assert row.split()[-1] == usd
            for zone in (*part["on_demand"], *part["spot"]):
                assert f" in {zone}" in " ".join(shown.split())
        for choice in found["choices"][:8]:
            for machines in choice["name"].split(" + "):
                assert machines in shown

    def test_there_is_an_example(self) -> None:
        assert EXAMPLES

    def test_figures_come_from_the_registry(self, ok: Ok, file: Callable[[str], str]) -> None:
        ok("models", "import", str(bundled_folder()), "--name", "helper", "--alias", "champion")
        (found,) = json.loads(ok("plan", "-f", file(PLAN), "--json").stdout)
        assert found["figures"]["parameters"] > 1e6
        assert found["best"]["usd_per_h"] > 0
        assert found["need"]["sequence_tokens"] == 500
        quantised = PLAN + "options: {precision: int4}\n"
        (small,) = json.loads(ok("plan", "-f", file(quantised), "--json").stdout)
        assert small["need"]["weights_bytes"] < found["need"]["weights_bytes"]

    def test_all_shows_every_loss(self, ok: Ok, file: Callable[[str], str]) -> None:
        ok("models", "import", str(bundled_folder()), "--name", "helper", "--alias", "champion")
        text = PLAN + "  providers: [aws]\n"
        short = ok("plan", "-f", file(text)).stdout
        long = ok("plan", "-f", file(text), "--all").stdout
        assert long.count("provider not allowed") > short.count("provider not allowed") == 1

    def test_no_machine_will_do(self, ok: Ok, file: Callable[[str], str]) -> None:
        ok("models", "import", str(bundled_folder()), "--name", "helper", "--alias", "champion")
        shown = ok("plan", "-f", file(PLAN + "  providers: [nobody]\n"))
        assert "no machine in the catalogue will do" in shown.stderr
        assert "provider not allowed" in shown.stdout

    def test_what_is_missing_is_said(self, cli: Ok, file: Callable[[str], str]) -> None:
        def fault(text: str) -> BaseException | None:
            result = cli("plan", "-f", file(text))
            assert result.exit_code != 0
            return result.exception  # type: ignore[no-any-return]

        bare = fault("name: a\nmodel: models:/a/1\n")
        assert isinstance(bare, InvalidRequest)
        assert "placement.traffic is missing" in bare.message
        assert isinstance(fault(PLAN), ModelNotFound)
        outside = fault(PLAN.replace("models:/helper@champion", "org/name"))
        assert isinstance(outside, InvalidRequest)
        assert "placement.figures" in outside.message
        assert isinstance(fault(PLAN + "  budget: 3\n"), InvalidRequest)
        figured = (
            PLAN + "  figures: {parameters: 1000000, layers: 2, kv_heads: 2, head_dim: 32, "
            "hidden_size: 64, vocab_size: 1000, context_length: 256}\n"
        )
        long = fault(figured)
        assert isinstance(long, InvalidRequest)
        assert "500 tokens are longer than the model's 256" in long.message
        odd = fault(figured.replace("256", "512") + "options: {max_batch_sequences: many}\n")
        assert isinstance(odd, InvalidRequest)
        assert odd.param == "options.max_batch_sequences"
        nowhere = cli("plan", "-f", str(EXAMPLES[0]), "--catalogue", "/no/such/folder")
        assert isinstance(nowhere.exception, NotFound)


class TestCatalogue:
    def test_list_and_check(self, ok: Ok) -> None:
        listed = json.loads(ok("catalogue", "list", "--json").stdout)
        assert len(listed) >= 60
        aws = ok("catalogue", "list", "--provider", "aws", "--device", "L4").stdout
        assert "g6.xlarge" in aws
        assert "gcp" not in aws
        checked = json.loads(ok("catalogue", "check", "--json").stdout)
        assert checked["offers"] == len(listed)
        assert "offers" in ok("catalogue", "check").stdout

    def test_an_import_replaces_the_offers_of_its_provider(self, ok: Ok, tmp_path: Path) -> None:
        before = json.loads(ok("catalogue", "list", "--json").stdout)
        path = tmp_path / "vms.csv"
        path.write_text(LIST)
        said = ok("catalogue", "import", str(path), "--provider", "aws", "--source", "https://x/")
        assert "1 offers of aws" in said.stderr
        assert "1 lines passed over" in said.stderr
        after = json.loads(ok("catalogue", "list", "--json").stdout)
        (own,) = [offer for offer in after if offer["provider"] == "aws"]
        assert (own["instance"], own["source"]) == ("own.large", "https://x/")
        others = [offer for offer in before if offer["provider"] != "aws"]
        assert [offer for offer in after if offer["provider"] != "aws"] == others
        (found,) = json.loads(ok("plan", "-f", str(EXAMPLES[0]), "--json").stdout)
        assert any("own.large" in choice["name"] for choice in found["choices"]) or any(
            "own.large" in lost["name"] for lost in found["lost"]
        )

    def test_a_bad_file_changes_nothing(self, cli: Ok, ok: Ok, tmp_path: Path, home: Path) -> None:
        path = tmp_path / "vms.csv"
        for text, words in (
            (LIST, "--provider"),
            ("a,b\n", "the first line"),
            ("\0", "the first line"),
            (LIST.replace("0.10", "cheap"), "line 2: Price"),
            (LIST.replace("L4", "K80"), "no offer of a known device"),
        ):
            path.write_text(text)
            provider = () if text == LIST else ("--provider", "aws")
            result = cli("catalogue", "import", str(path), *provider)
            assert isinstance(result.exception, InvalidRequest), text
            assert words in result.exception.message
        assert isinstance(cli("catalogue", "import", "none.csv").exception, InvalidRequest)
        assert not (home / "catalogue").exists()
