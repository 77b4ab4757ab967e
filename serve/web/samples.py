"""Tasks drawn from models, by a form of a project's page."""

from __future__ import annotations

from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from data.errors import InvalidInput, ToolkitError
from serve.api.label_samples import SampleTasks, sample
from serve.web.admin import project_page
from serve.web.models import act_for_account
from serve.web.view import Visit, go, page, whole_number


@page("admin")
async def sample_tasks(visit: Visit) -> Response:
    """Have models answer prompts, one a line, and add the answers as tasks."""
    await act_for_account(visit)
    project = visit.path("label_project_id")
    try:
        await sample(visit.runtime, visit.request, visit.account, project, _read(visit))
    except ToolkitError as error:
        return await run_in_threadpool(project_page, visit, 400, error.public)
    return go(f"/web/projects/{project}", "saved")


def _read(visit: Visit) -> SampleTasks:
    lines = visit.text("prompts").splitlines()
    chosen = [name for name in visit.form.getlist("models") if isinstance(name, str)]
    if not chosen:
        raise InvalidInput("Choose at least one model.", param="models")
    try:
        return SampleTasks(
            prompts=[line for line in lines if line.strip()],
            models=chosen,
            count=whole_number(visit.form, "count") or 0,
            max_tokens=whole_number(visit.form, "max_tokens") or 0,
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidInput(f"'{first['loc'][0]}': {first['msg']}") from error
