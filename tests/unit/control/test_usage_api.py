"""Usage over the API: only what the caller may read, summed as asked."""

from __future__ import annotations

import httpx2
import pytest

from cloudlm.control.api.app import build_api
from cloudlm.core.access import Project, Tenant
from cloudlm.core.tenant import LedgerRow, Outcome
from cloudlm.security.keys import mint


@pytest.fixture
async def ask(plane, pepper, services):
    state = plane.state
    rows = []
    for tenant in ("acme", "other"):
        await state.put_identity(Tenant(tenant))
        for project in ("default", "web"):
            await state.put_identity(Project(tenant, project))
            row_id, began = f"{tenant}-{project}", plane.clock.now() - 60
            rows.append(
                LedgerRow(
                    row_id, row_id, 1, tenant, f"k-{tenant}", "tiny", "r", Outcome.FINISHED, 200,
                    100, 10, 0, began, 1.0, project=project, cost=1500,
                )
            )  # fmt: skip
    await state.append_ledger(rows)

    async def ask(role, scope, of, **query):
        made = mint("k", role, pepper, 0.0, scope=scope, tenant=of)
        await state.put_key(made.record)
        async with httpx2.AsyncClient(
            transport=httpx2.ASGITransport(app=build_api(services)),
            base_url="http://control/api/v1",
            headers={"authorization": f"Bearer {made.text}"},
        ) as client:
            return await client.get("/usage", params=query)

    return ask


async def test_the_owner_sees_all(ask):
    answer = await ask("owner", "*", "default", group_by="tenant,model")
    assert [(r["tenant"], r["model"], r["attempts"], r["cost"]) for r in answer.json()["data"]] == [
        ("acme", "tiny", 2, "0.000003000"),
        ("other", "tiny", 2, "0.000003000"),
    ]


async def test_a_tenant_sees_its_own(ask):
    answer = await ask("viewer", "acme", "acme", group_by="tenant")
    assert [row["tenant"] for row in answer.json()["data"]] == ["acme"]
    foreign = await ask("viewer", "acme", "acme", tenant="other")
    assert foreign.status_code == 403


async def test_a_project_sees_its_own(ask):
    answer = await ask("viewer", "acme/web", "acme", group_by="project")
    assert [(row["project"], row["requests"]) for row in answer.json()["data"]] == [("web", 1)]
    assert (await ask("viewer", "acme/web", "acme", project="default")).status_code == 403
    assert (await ask("user", "acme", "acme")).status_code == 403


async def test_csv_and_bad_questions(ask):
    answer = await ask("owner", "*", "default", group_by="key", format="csv")
    assert answer.headers["content-type"].startswith("text/csv")
    head, *lines = answer.text.splitlines()
    assert head == "key,requests,attempts,prompt_tokens,cached_tokens,completion_tokens,cost"
    assert lines == ["k-acme,2,2,200,0,20,0.000003000", "k-other,2,2,200,0,20,0.000003000"]
    for query in ({"group_by": "colour"}, {"since": "x"}, {"format": "xml"}):
        assert (await ask("owner", "*", "default", **query)).status_code == 400
