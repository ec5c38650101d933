"""``/api/v1/jobs``: long work, its progress and its end."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from cloudlm.control.api.schemas import JOB
from cloudlm.control.api.services import Services, body_of, read_object
from cloudlm.core.wire import job_body, job_request_from_body


def routes(services: Services) -> APIRouter:
    """The routes of this noun."""
    router = APIRouter(prefix="/jobs", tags=["jobs"])

    @router.get("", summary="List jobs, newest first")
    async def list_jobs() -> Response:
        return JSONResponse({"data": [job_body(job) for job in await services.state.list_jobs()]})

    @router.post("", status_code=202, summary="Start a job", openapi_extra=body_of(JOB))
    async def create_job(request: Request) -> Response:
        kind, arguments = job_request_from_body(await read_object(request))
        job = await services.jobs.submit(kind, arguments)
        return JSONResponse({"job": job_body(job)}, status_code=202)

    @router.get("/{job_id}", summary="Show a job")
    async def get_job(job_id: str) -> Response:
        return JSONResponse(job_body(await services.jobs.get(job_id)))

    @router.delete("/{job_id}", status_code=202, summary="Cancel a job")
    async def cancel_job(job_id: str) -> Response:
        return JSONResponse(job_body(await services.jobs.cancel(job_id)), status_code=202)

    return router
