"""What a job starts from: its files, and a base model or the adapter of an earlier job."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from data import registry
from data.checkpoints import PREFIX, find_name
from data.errors import InvalidInput, ModelNotFound
from data.job_methods import REWARD_MODEL, score_models
from data.job_spec import JobSpec
from data.tables import AdapterVersion, File, now

TRAINING_PURPOSE = "fine-tune"
SHAPE = ("r", "alpha", "target_modules", "use_rslora")
OF_JUDGES = ("input", "range", "sampling_params")  # of models that are asked in words for a score


def find_start(
    session: Session, project_id: str, spec: JobSpec, base_models: Sequence[str]
) -> AdapterVersion | None:
    """Return the version whose adapter a job goes on from; None when it starts from the base.

    That is `from_checkpoint`, or `model` where that is the account's own fine-tune or checkpoint.

    Raises:
        InvalidInput: There is no such model of this account, it belongs to a base that is not
            served here, it scores and the job trains one that writes, or the job asks for another
            shape than the adapter has.
    """
    given = spec.options.get("from_checkpoint")
    start = None
    if spec.model not in base_models:
        start = _find(session, project_id, spec.model)
        if start is None or start.base_model not in base_models:
            raise InvalidInput(
                f"The model `{spec.model}` cannot be fine-tuned here. Available: "
                f"{', '.join(f'`{name}`' for name in base_models)}, and your own fine-tuned "
                "models of them.",
                param="model",
                code="model_not_available",
            )
    if given is not None:
        found = _find(session, project_id, given)
        if found is None:
            raise InvalidInput(
                f"Invalid 'from_checkpoint': you have no model or checkpoint `{given}`; "
                "`GET /v1/fine_tuning/jobs/JOB/checkpoints` lists a job's.",
                param="from_checkpoint",
                code="model_not_available",
            )
        wanted = start.id if start else spec.model
        if wanted not in (found.id, found.base_model):
            raise InvalidInput(
                f"Invalid 'from_checkpoint': `{given}` is not of the model `{spec.model}`; give "
                f"its base `{found.base_model}` as `model`.",
                param="from_checkpoint",
            )
        start = found
    if start is not None:
        if start.lineage.get("kind") == REWARD_MODEL and spec.method_type != REWARD_MODEL:
            param = "model" if given is None else "from_checkpoint"
            raise InvalidInput(
                f"Invalid '{param}': `{start.name}` is a reward model, which scores text and never "
                f"learned to write it; the method '{spec.method_type}' starts from the base "
                f"`{start.base_model}` or a model that answers.",
                param=param,
            )
        _check_shape(spec)
    return start


def pin_grader(session: Session, project_id: str, spec: JobSpec, base_model: str) -> dict[str, Any]:
    """Return a job's grader with the reward model that it names as a version; {} without one.

    Raises:
        InvalidInput: It names a model that is no reward model of this account and base, or two,
            or gives a reward model what only models take that are asked in words.
    """
    grader = spec.grader
    if grader is None:
        return {}
    grader = copy.deepcopy(grader)
    param = f"method.{spec.method_type}.grader"
    names = set()
    for part in score_models(grader):
        name = _pin(session, project_id, part["model"], f"{param}.model", base_model)
        given = [name for name in OF_JUDGES if part.get(name) is not None]
        if given:
            raise InvalidInput(
                f"Unsupported parameter: '{param}.{given[0]}': `{part['model']}` is a reward "
                "model, which scores prompt and answer as they are. Leave it out.",
                param=f"{param}.{given[0]}",
                code="unsupported_parameter",
            )
        part["model"] = name
        names.add(name)
    if len(names) > 1:
        raise InvalidInput(
            f"Invalid '{param}': it names {len(names)} reward models; a job uses one.", param=param
        )
    return {"grader": grader}


def pin_reward_model(
    session: Session, project_id: str, spec: JobSpec, base_model: str
) -> dict[str, Any]:
    """Return a job's option `reward_model` as the name of a version; {} where it has none.

    Raises:
        InvalidInput: It is no reward model of this account and base.
    """
    given = spec.options.get("reward_model")
    if given is None:
        return {}
    return {"reward_model": _pin(session, project_id, given, "reward_model", base_model)}


def _pin(session: Session, project_id: str, name: str, param: str, base_model: str) -> str:
    version = _find(session, project_id, name)
    if version is None or version.lineage.get("kind") != REWARD_MODEL:
        raise InvalidInput(
            f"Invalid '{param}': `{name}` is no reward model of yours; train one by a job of the "
            f"method '{REWARD_MODEL}'.",
            param=param,
            code="model_not_available",
        )
    if version.base_model != base_model:
        raise InvalidInput(
            f"Invalid '{param}': `{name}` was trained on `{version.base_model}`, the job is for "
            f"`{base_model}`.",
            param=param,
        )
    return version.name


def check_rank(options: Mapping[str, Any], largest: int) -> None:
    """Refuse an adapter that would be trained and then could not be served.

    Args:
        options: Of a job.
        largest: The setting `max_lora_rows`; a rank by `auto` stays below it.

    Raises:
        InvalidInput: `lora.r` is above it.
    """
    rank = options.get("lora", {}).get("r")
    if isinstance(rank, int) and rank > largest:
        raise InvalidInput(
            f"Invalid 'lora.r': {rank} is above the largest rank that this server serves, "
            f"{largest}; its operator sets `max_lora_rows`.",
            param="lora.r",
        )


def check_file(session: Session, project_id: str, name: str, file_id: str) -> None:
    """Check that a job may use one of an account's files as its `name`.

    Raises:
        InvalidInput: It is absent, or was uploaded for another purpose.
    """
    file = session.scalar(
        select(File).where(
            File.id == file_id, File.project_id == project_id, File.deleted_at.is_(None)
        )
    )
    if file is None or (file.expires_at is not None and file.expires_at <= now()):
        raise InvalidInput(f"No such File object: {file_id}", param=name)
    if file.purpose != TRAINING_PURPOSE:
        raise InvalidInput(
            f"The file {file_id} has the purpose '{file.purpose}'; a {name} must be uploaded with "
            f"the purpose '{TRAINING_PURPOSE}'.",
            param=name,
        )


def _find(session: Session, project_id: str, name: str) -> AdapterVersion | None:
    try:
        known = find_name(session, project_id, name) if name.startswith(PREFIX) else name
        return registry.find_own(session, project_id, known) if known else None
    except ModelNotFound:
        return None


def _check_shape(spec: JobSpec) -> None:
    for name in SHAPE:
        if name in (spec.options.get("lora") or {}):
            raise InvalidInput(
                f"Invalid 'lora.{name}': the job goes on from an adapter, whose shape it keeps. "
                "Leave it out, or start from the base model.",
                param=f"lora.{name}",
            )
