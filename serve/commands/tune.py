"""`hone tune`: a small sweep of settings on a file, by `train.tune` in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from serve.commands.common import AsJson, choose_account, open_home, print_json

if TYPE_CHECKING:
    from data.db import Database
    from data.settings import Settings
    from data.tables import Project

OWN = {"train_file": "FILE", "validation_file": "--validation", "output_dir": "--output"}


def tune(
    file: Annotated[Path, typer.Argument(help="JSONL with the training rows.")],
    words: Annotated[
        list[str] | None,
        typer.Argument(
            help="Settings of train.sft as key=value; key=a,b,c tries each value. Default: "
            "learning_rate_multiplier=0.3,1,3 lora.r=8,32",
            show_default=False,
        ),
    ] = None,
    validation: Annotated[
        Path | None, typer.Option(help="JSONL to compare by; default: a tenth of the rows.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the sweep; default: HOME/runs/tune-FILE.")
    ] = None,
    trials: Annotated[
        int | None, typer.Option(min=1, help="Try so many combinations at random, not all.")
    ] = None,
    publish: Annotated[
        bool, typer.Option("--publish", help="Publish the best adapter for the account.")
    ] = False,
    account: Annotated[
        str | None, typer.Option("--account", "-a", help="Whose model it becomes; see --publish.")
    ] = None,
    suffix: Annotated[str | None, typer.Option(help="Part of the published model's name.")] = None,
    as_json: AsJson = False,
) -> None:
    """Try several settings on a file at once, on one loaded base, and keep the best adapter.

    A published adapter is promoted as that of a job is: not if it is worse on the validation rows
    than what it was compared with, nor beyond the server's bias limits.
    """
    from data.errors import InvalidInput
    from data.job_spec import check_suffix

    for name, path in (("FILE", file), ("--validation", validation)):
        if path is not None and not path.is_file():
            raise InvalidInput(f"{name} {path} is not a file; give the path of a JSONL file")
    for key, instead in OWN.items():
        if any(word.startswith(f"{key}=") for word in words or []):
            raise InvalidInput(f"{key} is given by {instead}, not as a word")
    if (account or suffix) and not publish:
        raise InvalidInput("--account and --suffix belong to --publish; add it, or leave them out")
    if publish and any(word.startswith("base_model=") for word in words or []):
        raise InvalidInput("--publish is for the base that is served; set HONE_MODEL instead")
    if suffix is not None:
        check_suffix(suffix)
    settings, database = open_home()
    project = choose_account(database, account) if publish else None  # before hours of training
    folder = output or settings.runs_dir / f"tune-{file.stem}"
    asked = [
        f"base_model={settings.model}",
        f"models_dir={settings.models_dir}",
        f"device={settings.device}",
        f"min_examples={settings.min_examples}",
        f"max_auto_rank={settings.max_lora_rows}",
        *(["bias_report=true"] if _has_limits(settings) else []),
        f"train_file={file}",
        f"output_dir={folder}",
        *([f"validation_file={validation}"] if validation else []),
        *(words or []),
    ]
    command = [
        *(sys.executable, "-m", "train.tune", *asked),
        *(["--trials", str(trials)] if trials else []),
    ]
    done = subprocess.run(command, stdout=subprocess.DEVNULL if as_json else None, check=False)
    if done.returncode:
        raise typer.Exit(done.returncode)
    found = json.loads((folder / "tune.json").read_text("utf-8"))
    published = None
    if project is not None:
        published = _publish(settings, database, project, folder, found["best"], suffix)
    if as_json:
        print_json({**found, "model": None, **(published or {})})
    elif project is not None and published:
        gate = published["gate"]
        print(f"published: {published['model']}")
        print(f"{'Promoted' if gate['promote'] else 'Not promoted'}: {'; '.join(gate['reasons'])}")
        if not gate["promote"]:
            print(f"overrule: hone models promote {published['model']} --account {project.slug}")


def _has_limits(settings: Settings) -> bool:
    """Tell whether a model's bias decides if it is promoted."""
    return settings.bias_reports and any(
        limit is not None for limit in settings.bias_limits.model_dump().values()
    )


def _publish(
    settings: Settings,
    database: Database,
    project: Project,
    folder: Path,
    best: dict[str, Any],
    suffix: str | None,
) -> dict[str, Any]:
    """Publish the best adapter of a sweep's folder, and promote it if its gate allows.

    Args:
        best: Of `tune.json`.

    Returns:
        `model`, the version's name, and `gate`: `promote` and `reasons`.

    Raises:
        AdapterRefused: It failed a check.
        QuotaExceeded: The account may not store so much.
    """
    from data import bias, caps, registry
    from serve.engine import base_model

    spec = base_model.find_spec(settings.model)
    fingerprint = base_model.fingerprint(base_model.fetch(spec, settings.models_dir))
    adapter = folder / "adapter"
    result, resolved = (
        json.loads((Path(best["run"]) / name).read_text("utf-8"))
        for name in ("result.json", "resolved_config.json")
    )
    told = adapter / bias.FILE
    report = json.loads(told.read_text("utf-8")) if told.is_file() else None
    limits = settings.bias_limits.model_dump()
    gate = dict(bias.limited(result["gate"], report, limits) or result["gate"])
    alias = registry.alias_name(spec.name, project.slug, suffix)
    used = {one.name for one in registry.list_aliases(database, project.id)}
    if gate["promote"] and alias in used and resolved["config"]["compare_with"] is None:
        reason = f"{alias} names a model already, and the sweep was compared with the base only"
        gate = {**gate, "promote": False, "reasons": [*gate["reasons"], reason]}
    size = sum(path.stat().st_size for path in adapter.rglob("*") if path.is_file())
    with database.read() as session:
        caps.check_stored_bytes(session, project.id, settings.limits, size)
    lineage = {"kind": "supervised", "result": result, "resolved": resolved, "gate": gate}
    version = registry.publish(
        *(database, settings.adapters_dir, project, adapter, spec.name, fingerprint),
        suffix=suffix,
        lineage=lineage,
        promoted=gate["promote"],
    )
    return {"model": version.name, "gate": gate}
