"""`hone tune`: a small sweep of settings on a file, by `train.tune` in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from serve.commands.common import AsJson, choose_account, open_home, print_json

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
    """Try several settings on a file at once, on one loaded base, and keep the best adapter."""
    from data.errors import InvalidInput

    for name, path in (("FILE", file), ("--validation", validation)):
        if path is not None and not path.is_file():
            raise InvalidInput(f"{name} {path} is not a file; give the path of a JSONL file")
    for key, instead in OWN.items():
        if any(word.startswith(f"{key}=") for word in words or []):
            raise InvalidInput(f"{key} is given by {instead}, not as a word")
    if (account or suffix) and not publish:
        raise InvalidInput("--account and --suffix belong to --publish; add it, or leave them out")
    settings, database = open_home()
    project = choose_account(database, account) if publish else None  # before hours of training
    folder = output or settings.runs_dir / f"tune-{file.stem}"
    asked = [
        f"base_model={settings.model}",
        f"models_dir={settings.models_dir}",
        f"device={settings.device}",
        f"min_examples={settings.min_examples}",
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
    model = None
    if project is not None:
        from serve.commands.models import publish_folder

        model = publish_folder(folder / "adapter", project.id, suffix)
    if as_json:
        print_json({**json.loads((folder / "tune.json").read_text("utf-8")), "model": model})
    elif model:
        print(f"published: {model}")
