"""`hone feedback`: labeling projects and what users say, from the command line."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from serve.commands import rounds
from serve.commands.common import (
    Account,
    AsJson,
    choose_account,
    clock,
    open_home,
    print_json,
    print_table,
)

app = typer.Typer(
    help="Human feedback: labeling projects, and users' judgements.", no_args_is_help=True
)

app.add_typer(rounds.app, name="round")

ProjectId = Annotated[str, typer.Argument(help="Of the labeling project: lproj-...")]
USERS = "users"
PROMPTS_AT_ONCE = 16  # of one request


@app.command("list")
def list_projects(account: Account = None, as_json: AsJson = False) -> None:
    """List an account's labeling projects."""
    from data.feedback import projects, reports

    _, database = open_home()
    project = choose_account(database, account)
    found = projects.list_all(database, project.id)
    told = [(one, reports.progress(database, project.id, one.id)) for one in found]
    if as_json:
        names = ("id", "name", "kind", "status", "created_at")
        print_json([{n: getattr(one, n) for n in names} | asdict(p) for one, p in told])
        return
    rows = [
        (
            one.id,
            one.name,
            one.kind,
            one.status,
            f"{p.done} of {p.tasks}",
            p.judgements,
            clock(one.created_at),
        )
        for one, p in told
    ]
    print_table(("id", "name", "kind", "status", "tasks done", "judgements", "created"), rows)


@app.command("import")
def import_tasks(
    file: Annotated[Path, typer.Argument(help="JSONL: candidates, preferences or transcripts.")],
    account: Account = None,
    into: Annotated[str | None, typer.Option(help="A project that exists: lproj-...")] = None,
    name: Annotated[str | None, typer.Option(help="Of a new project; default: the file's.")] = None,
    kind: Annotated[
        str | None,
        typer.Option(help="Of a new project: pairwise, ranking, likert, thumbs, edit."),
    ] = None,
    overlap: Annotated[int, typer.Option(min=1, help="Judgements a task, of a new project.")] = 1,
    gold_rate: Annotated[float, typer.Option(help="Share of gold tasks given out.")] = 0.0,
    as_gold: Annotated[
        bool, typer.Option("--as-gold", help="The file's preferences are the right answers.")
    ] = False,
    guidelines: Annotated[Path | None, typer.Option(help="Markdown for the labelers.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make tasks of a file, in a new labeling project or one that exists."""
    from data.errors import InvalidInput
    from data.feedback import imports, projects, tasks
    from data.feedback.projects import ProjectSpec

    if not file.is_file():
        raise InvalidInput(f"{file} is not a file")
    if into is not None and (name or kind or guidelines):
        raise InvalidInput(
            "--into takes a project as it is; leave --name, --kind, --guidelines out"
        )
    _, database = open_home()
    project = choose_account(database, account)
    found = imports.read_tasks(file, as_gold=as_gold)
    if into is None:
        count = len(found[0].candidates)
        spec = ProjectSpec(
            name=name or file.stem,
            kind=kind or ("thumbs" if count == 1 else "pairwise" if count == 2 else "ranking"),
            overlap=overlap,
            gold_rate=gold_rate,
            guidelines=guidelines.read_text("utf-8") if guidelines else "",
        )
        into = projects.create(database, project.id, spec).id
    added = tasks.add(database, project.id, into, found)
    if as_json:
        print_json({"label_project": into, "added": added})
    else:
        print(f"{added} tasks added to {into}")


@app.command("sample")
def sample_tasks(
    project_id: ProjectId,
    file: Annotated[Path, typer.Argument(help='JSONL: {"prompt": text or messages} a line.')],
    model: Annotated[list[str], typer.Option(help="That answers; may be given several times.")],
    key: Annotated[str, typer.Option(envvar="HONE_API_KEY", help="API key of the account.")],
    count: Annotated[int, typer.Option(min=1, help="Answers of each model to a prompt.")] = 2,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 256,
    temperature: Annotated[float, typer.Option(help="Of sampling.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Draws the same answers again.")] = None,
    url: Annotated[
        str | None,
        typer.Option(
            envvar="HONE_BASE_URL", help="Of the running server; default: the settings' host, port."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Have models of a running server answer prompts, and add the answers as tasks."""
    import httpx

    from data.errors import ToolkitError
    from data.feedback.imports import read_prompts
    from data.settings import load_settings

    prompts = read_prompts(file)
    settings = load_settings()
    base = (url or f"http://{settings.host}:{settings.port}").rstrip("/").removesuffix("/v1")
    fields = {"models": model, "count": count, "max_tokens": max_tokens, "seed": seed}
    told: dict[str, Any] = {"added": 0, "left_out": {"same": 0, "empty": 0}}
    headers = {"authorization": f"Bearer {key}"}
    with httpx.Client(base_url=base, headers=headers, timeout=None) as http:
        for at in range(0, len(prompts), PROMPTS_AT_ONCE):
            part = prompts[at : at + PROMPTS_AT_ONCE]
            body = {**fields, "temperature": temperature, "prompts": part}
            try:
                answer = http.post(f"/v1/label_projects/{project_id}/sample", json=body)
            except httpx.TransportError as error:
                raise ToolkitError(
                    f"No server answers at {base} ({error}); start `hone serve`, or give --url"
                ) from error
            if answer.status_code != 200:
                why = answer.json()["error"]["message"]
                raise ToolkitError(f"after {told['added']} tasks, prompt {at + 1} on: {why}")
            found = answer.json()
            told["added"] += found["added"]
            for name, number in found["left_out"].items():
                told["left_out"][name] += number
    if as_json:
        print_json({"label_project": project_id, **told})
        return
    missing = ", ".join(f"{number} {what}" for what, number in told["left_out"].items() if number)
    left = f"; left out: {missing}" if missing else ""
    print(f"{told['added']} tasks added to {project_id}{left}")


@app.command("export")
def export_rows(
    source: Annotated[str, typer.Argument(help="A labeling project lproj-..., or 'users'.")],
    account: Account = None,
    kind: Annotated[str, typer.Option(help="preference, unpaired, sft or raw.")] = "preference",
    votes: Annotated[str, typer.Option(help="Of several labelers: majority or each.")] = "majority",
    out: Annotated[
        Path | None, typer.Option(help="Write here; by default a file of the account.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write judgements as rows to train on."""
    from data.errors import InvalidInput
    from data.feedback import export, users
    from data.files import FileStore

    settings, database = open_home()
    project = choose_account(database, account)
    left: dict[str, int] = {}
    if source == USERS:
        rows: list[dict[str, Any]] = users.rows(database, project.id, kind)
    else:
        exported = export.rows(database, project.id, source, kind, votes)
        rows, left = exported.rows, exported.left_out
    if not rows:
        raise InvalidInput(f"{source} has nothing to export as {kind}")
    told: dict[str, Any] = {"rows": len(rows), "left_out": left}
    if out is not None:
        with out.open("wb") as stream:
            stream.writelines(export.lines(rows))
        told["path"] = str(out)
    else:
        files = FileStore(database, settings.effective_blob_url, limits=settings.limits)
        if source == USERS:
            purpose = "feedback" if kind == "raw" else "fine-tune"
            name = f"feedback-{kind}.jsonl"
            record = files.create(project.id, export.lines(rows), name, purpose)
        else:
            record = export.freeze(database, files, project.id, source, kind, votes)
        told["file"] = record.id
    if as_json:
        print_json(told)
        return
    where = told.get("path") or told["file"]
    missing = ", ".join(f"{count} {what}" for what, count in left.items() if count)
    print(f"{len(rows)} rows in {where}" + (f"; left out: {missing}" if missing else ""))


@app.command("report")
def report(project_id: ProjectId, account: Account = None, as_json: AsJson = False) -> None:
    """Tell agreement, gold accuracy, biases, labelers, and strengths of the models."""
    from data.feedback import reports

    _, database = open_home()
    project = choose_account(database, account)
    found = reports.report(database, project.id, project_id)
    if as_json:
        print_json(asdict(found))
        return
    p = found.progress
    print(f"{p.done} of {p.tasks} tasks done, {p.judgements} judgements, {p.wanted} wanted")
    measures = [(f"alpha, {name}", measure) for name, measure in found.alpha.items()]
    measures.append(("raw agreement", found.raw_agreement))
    rows: list[tuple[Any, ...]] = []
    for name, measure in measures:
        value = measure.reason if measure.value is None else f"{measure.value:.3f}"
        rows.append((name, value, _interval(measure.interval), measure.count))
    rows.append(("gold accuracy", _share(found.gold_accuracy), _interval(found.gold_interval), ""))
    rows.append(("first shown chosen", _share(found.first_share), "", ""))
    rows.append(("longer chosen", _share(found.longer_share), "", ""))
    print_table(("measure", "value", "95 % interval", "tasks"), rows)
    people = [
        (
            one.labeler,
            one.answers,
            one.skips,
            _share(one.gold_accuracy),
            _share(one.first_share),
            _share(one.majority_agreement),
            one.reason if one.paused else "",
        )
        for one in found.labelers
    ]
    print_table(("labeler", "answers", "skips", "gold", "first", "majority", "paused"), people)
    if found.no_models is None:
        strengths = [
            (one.model, f"{one.value:+.3f}", _interval(one.interval), one.comparisons)
            for one in found.models
        ]
        print_table(("model", "log-strength", "95 % interval", "comparisons"), strengths)


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _interval(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"
