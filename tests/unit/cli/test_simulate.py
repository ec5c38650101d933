"""``cloudlm simulate``: table, JSON, page; figures out of measurements; the ledger as CSV."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from cloudlm.cli.connect import open_local_state
from cloudlm.core.tenant import LedgerRow, Outcome
from cloudlm.sim.report import COLUMNS, MEASURES, seconds
from cloudlm.sim.report_machines import MEASURES as MACHINE_MEASURES
from cloudlm.sim.report_rollouts import MEASURES as ROLLOUT_MEASURES

Ok = Callable[..., Any]

SCENARIO = """
name: small
traffic: {source: poisson, rate: 2, duration_s: 30}
replica: {speed: 20, start_s: 5}
policies: [{name: one}, {name: two, deployment: {routing: {policy: least_load}}}]
"""


def scenario(folder: Path, text: str = SCENARIO) -> str:
    path = folder / "scenario.yaml"
    path.write_text(text)
    return str(path)


def test_policies_are_compared_in_a_table(ok: Ok, tmp_path: Path) -> None:
    path = scenario(tmp_path)
    head, *rows = ok("simulate", path).stdout.splitlines()
    assert head.split() == ["MEASURE", "one", "two"]
    numbers = {row.rsplit(maxsplit=2)[0]: row.split()[-2:] for row in rows}
    assert len(numbers) == len(MEASURES)
    body = json.loads(ok("simulate", path, "--json").stdout)["policies"]
    assert numbers["TTFT p99, s"] == [seconds(one["ttft_s"]["p99"]) for one in body]
    assert numbers["late, %"] == [f"{100 * one['late_share']:.1f}" for one in body]


def test_policies_on_machines_of_the_catalogue_say_which_and_what_they_cost(
    ok: Ok, cli: Ok, tmp_path: Path
) -> None:
    wishes = {
        "traffic": {"requests_per_s": 2, "prompt_tokens": 200, "output_tokens": 20},
        "regions": ["aws/us-east-2"],
        "spot": {"share": 1},
        "figures": {
            "parameters": 10**9,
            "layers": 16,
            "kv_heads": 8,
            "head_dim": 128,
            "hidden_size": 2048,
            "vocab_size": 32_000,
        },
    }
    body = yaml.safe_load(SCENARIO)
    body["deployment"] = {"placement": wishes}
    body["policies"] = [{"name": "one"}, {"name": "two", "placement": "catalogue"}]
    path = scenario(tmp_path, yaml.safe_dump(body))
    done = ok("simulate", path)
    assert "two: placed on " in done.stderr
    _, shown = done.stdout.split("MACHINES")
    head, *rows = shown.splitlines()
    assert head.split() == ["two"]
    assert [row.rsplit(maxsplit=1)[0] for row in rows] == list(MACHINE_MEASURES)
    one, two = json.loads(ok("simulate", path, "--json").stdout)["policies"]
    assert one["machines"] is None
    assert two["cost"] == two["machines"]["spot_usd"] + two["machines"]["on_demand_usd"] > 0
    assert two["machines"]["chosen"][0]["offer"].startswith("aws/us-east-2/")
    dear = tmp_path / "catalogue"
    dear.mkdir()
    columns = "provider,instance,device,count,vcpus,ram_gib,region,on_demand_usd_per_h,"
    columns += "spot_usd_per_h,source,as_of,read_on,note\n"
    (dear / "offers.csv").write_text(
        columns + "aws,own,L4,1,4,16,us-east-2,9.5,,https://a.example,,2025-01-01,\n"
    )
    (mine,) = json.loads(ok("simulate", path, "--json", "--catalogue", str(dear)).stdout)[
        "policies"
    ][1:]
    assert mine["machines"]["chosen"][0]["offer"] == "aws/us-east-2/own"
    missing = cli("simulate", path, "--catalogue", str(tmp_path / "no"))
    assert missing.exit_code != 0
    assert "is no folder" in str(missing.exception)


def test_every_column_has_its_measure_and_no_number_is_broken(
    ok: Ok, tmp_path: Path, wide: Callable[[int], io.StringIO]
) -> None:
    assert len(MEASURES) == len(COLUMNS) - 1
    names = [f"policy number {number}" for number in range(6)]
    policies = ", ".join(f"{{name: {name}}}" for name in names)
    path = scenario(tmp_path, SCENARIO.split("policies:")[0] + f"policies: [{policies}]\n")
    text = wide(100)
    ok("simulate", path)
    shown = text.getvalue()
    assert all(len(line) <= 100 for line in shown.splitlines())
    assert all(name in shown for name in names)
    assert shown.count("TTFT p99, s") == 2  # two blocks, one below the other


def test_json_is_the_same_for_the_same_seed(ok: Ok, tmp_path: Path) -> None:
    path = scenario(tmp_path)
    first, second = (ok("simulate", path, "--json", "--seed", "4").stdout for _ in range(2))
    assert first == second
    body = json.loads(first)
    assert body["seed"] == 4
    assert body["policies"][0]["outcomes"] == {"finished": body["policies"][0]["requests"]}
    assert ok("simulate", path, "--json", "--seed", "5").stdout != first


def test_roll_outs_have_a_table_of_their_own(ok: Ok, tmp_path: Path) -> None:
    text = SCENARIO + "rollouts: [{at: 5, name: B, starts: false}]\n"
    text += "deployment: {rollout: {strategy: canary}}\n"
    path = scenario(tmp_path, text)
    done = ok("simulate", path)
    rows = {row.split("  ")[0]: row for row in done.stdout.splitlines()}
    assert rows["ROLL-OUT"].split("  ")[-1].strip() == "two: B"
    assert rows["outcome"].count("rolled back") == 2
    assert len([name for name in rows if name in ROLLOUT_MEASURES]) == len(ROLLOUT_MEASURES)
    assert "one: B rolled back: m-r2-0: it ends" in done.stdout.replace("simulated-", "m-")
    assert "revision_rolled_back" not in done.stderr
    body = json.loads(ok("simulate", path, "--json").stdout)["policies"]
    assert [one["rollouts"][0]["outcome"] for one in body] == ["rolled_back", "rolled_back"]


def test_a_page_is_written(ok: Ok, cli: Ok, tmp_path: Path) -> None:
    path = scenario(tmp_path)
    page = tmp_path / "page.html"
    ok("simulate", path, "--html", str(page))
    assert page.read_text().startswith("<!doctype html>")
    failed = cli("simulate", path, "--html", str(tmp_path / "no" / "page.html"))
    assert failed.exit_code == 1


def test_a_broken_scenario_is_a_plain_error(cli: Ok, tmp_path: Path) -> None:
    done = cli("simulate", scenario(tmp_path, "traffic: {source: radio}"))
    assert done.exit_code == 1


def test_one_thing_at_a_time(cli: Ok, tmp_path: Path) -> None:
    assert cli("simulate").exit_code == 2
    assert cli("simulate", scenario(tmp_path), "--fit", "x.csv").exit_code == 2


def test_measurements_become_figures_that_a_scenario_uses(ok: Ok, tmp_path: Path) -> None:
    measured = tmp_path / "measured.csv"
    measured.write_text(
        "requests,prompt_tokens,cached_tokens,output_tokens,seconds\n"
        "1,2048,0,1,0.5\n1,128,0,128,1.5\n16,256,0,128,3.2\n1,128,0,1,0.05\n"
    )
    text = ok("simulate", "--fit", str(measured), "--name", "ours").stdout
    (figures,) = yaml.safe_load(text)["figures"]
    assert figures["name"] == "ours"
    (tmp_path / "ours.yaml").write_text(text)
    body = SCENARIO.replace("{speed: 20, start_s: 5}", "{file: ours.yaml, figures: ours}")
    ok("simulate", scenario(tmp_path, body))


def test_the_ledger_is_exported_and_replayed(ok: Ok, tmp_path: Path) -> None:
    async def write() -> None:
        state, _ = await open_local_state()
        rows = [
            LedgerRow(
                id=str(n),
                request_id=str(n),
                attempt=1,
                tenant="acme",
                key_id="secret-key",
                model="m",
                replica="r",
                outcome=Outcome.FINISHED,
                status=200,
                prompt_tokens=100,
                completion_tokens=10,
                cached_tokens=0,
                started_at=4e9 + n,
                duration_s=1.0,
            )
            for n in range(20)
        ]
        await state.append_ledger(rows)
        await state.close()

    asyncio.run(write())
    assert "secret-key" not in ok("simulate", "--export-ledger", "-").stdout
    ok("simulate", "--export-ledger", str(tmp_path / "ledger.csv"))
    body = SCENARIO.replace(
        "{source: poisson, rate: 2, duration_s: 30}", "{source: ledger, file: ledger.csv}"
    )
    report = json.loads(ok("simulate", scenario(tmp_path, body), "--json").stdout)
    assert report["policies"][0]["requests"] == 20
