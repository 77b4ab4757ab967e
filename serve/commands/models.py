"""`hone models`: base models, adapter versions and the aliases that point at them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from serve.commands.common import (
    Account,
    AsJson,
    choose_account,
    clock,
    open_home,
    print_json,
    print_table,
)
from serve.commands.upgrade import upgrade

app = typer.Typer(help="Base models, adapter versions, aliases.", no_args_is_help=True)


@app.command("list")
def list_models(account: Account = None, as_json: AsJson = False) -> None:
    """List an account's adapter versions; a star marks the one that the alias names."""
    from data import registry

    _, database = open_home()
    project = choose_account(database, account)
    versions = registry.list_versions(database, project.id)
    current = {alias.version_id for alias in registry.list_aliases(database, project.id)}
    if as_json:
        print_json(
            [
                {
                    "name": v.name,
                    "alias": registry.alias_of(v.name),
                    "promoted": v.id in current,
                    "base_model": v.base_model,
                    "digest": v.digest,
                    "bytes": v.bytes,
                    "created_at": v.created_at,
                }
                for v in versions
            ]
        )
        return
    rows = [
        ("*" if v.id in current else "", v.name, v.rank, v.bytes, clock(v.created_at))
        for v in versions
    ]
    print_table(("", "model", "rank", "bytes", "created"), rows)


@app.command("pull")
def pull(
    name: Annotated[
        str | None, typer.Argument(help="Name in configs/models, YAML, folder or hub id.")
    ] = None,
) -> None:
    """Fetch a base model into HONE_HOME and print its folder."""
    from data.settings import load_settings
    from serve.engine import base_model

    settings = load_settings()
    spec = base_model.find_spec(name or settings.model)
    print(base_model.fetch(spec, settings.models_dir))


@app.command("import")
def import_adapter(
    folder: Annotated[Path, typer.Argument(help="A LoRA adapter, saved by PEFT for this base.")],
    account: Account = None,
    suffix: Annotated[str | None, typer.Option(help="Part of the model's name.")] = None,
) -> None:
    """Publish an adapter that was trained elsewhere, after the checks of `POST /v1/adapters`."""
    print(publish_folder(folder, account, suffix))


def publish_folder(folder: Path, account: str | None, suffix: str | None) -> str:
    """Check and publish a PEFT folder for an account; returns the version's name.

    Raises:
        InvalidInput: It lacks a file, or there is no such account.
        AdapterRefused: It is no adapter of the base that is served.
    """
    from contextlib import ExitStack

    from data.adapter_checks import CONFIG, ORIGIN, WEIGHTS, check_adapter
    from data.errors import InvalidInput

    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise InvalidInput(f"{folder} has no {name}; give the folder that PEFT saved")
    settings, database = open_home()
    project = choose_account(database, account)

    from serve.adapter_import import publish_files
    from serve.engine import base_model
    from serve.runtime import open_engine

    spec = base_model.find_spec(settings.model)
    place = base_model.fetch(spec, settings.models_dir)
    fingerprint = base_model.fingerprint(place)
    if (folder / ORIGIN).is_file():  # hone made it, and noted for which base
        check_adapter(folder, fingerprint)
    enough = {"max_batch": 1, "max_context": 32, "kv_cache_mb": min(settings.kv_cache_mb, 128)}
    with ExitStack() as stack:
        engine = open_engine(settings.model_copy(update=enough), spec, place, fingerprint)
        stack.callback(engine.close)
        files = {n: stack.enter_context((folder / n).open("rb")) for n in (CONFIG, WEIGHTS)}
        base = (spec.name, fingerprint)
        version = publish_files(database, settings, project.id, files, base, engine, suffix)
    return str(version.name)


app.command("upgrade")(upgrade)


@app.command("bias")
def bias_report(model: str, account: Account = None, as_json: AsJson = False) -> None:
    """Tell what was measured of a fine-tune's bias, beside its base's, when it was trained."""
    from data import adapter_folders, bias, registry

    settings, database = open_home()
    project = choose_account(database, account)
    version = registry.resolve(database, project.id, model)
    found = adapter_folders.bias_report(version, settings.adapters_dir)
    if as_json:
        print_json(found)
        return
    print(bias.in_words(found))
    rows = [
        (dimension, group, f"{odds:.2f}", f"{tuned['log_odds'][group]:.2f}")
        for dimension, base in found["base"]["groups"].items()
        for group, odds in base["log_odds"].items()
        for tuned in (found["tuned"]["groups"][dimension],)
    ]
    print_table(("", "group", "base", "tuned (log-odds of unfavourable words, nats)"), rows)


@app.command("promote")
def promote(
    model: str,
    account: Account = None,
    alias: Annotated[
        str | None, typer.Option(help="Another alias, such as one of the base before an upgrade.")
    ] = None,
) -> None:
    """Move the alias to this version: the next request gets it."""
    from data import registry

    _, database = open_home()
    project = choose_account(database, account)
    version = registry.resolve(database, project.id, model)
    moved = registry.promote(database, project.id, version.name, alias)
    print(f"{moved.name} -> {version.name}")


@app.command("rollback")
def rollback(alias: str, account: Account = None) -> None:
    """Move the alias back to the version that it named before."""
    from data import registry

    _, database = open_home()
    version = registry.rollback(database, choose_account(database, account).id, alias)
    print(f"{alias} -> {version.name}")


@app.command("export")
def export(model: str, destination: Path, account: Account = None) -> None:
    """Copy a version to a folder that PEFT loads (`PeftModel.from_pretrained`)."""
    from data import adapter_folders, registry

    settings, database = open_home()
    project = choose_account(database, account)
    version = registry.resolve(database, project.id, model)
    print(adapter_folders.export(version, settings.adapters_dir, destination))
