"""What the documentation promises: settings, commands and files that it names exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer
import yaml

from data.settings import Settings, load_settings
from serve.cli import app

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


def commands() -> list[str]:
    found = []

    def walk(group: object, prefix: str) -> None:
        for name, command in getattr(group, "commands", {}).items():
            found.append(f"{prefix} {name}")
            walk(command, f"{prefix} {name}")

    walk(typer.main.get_command(app), "hone")
    return found


def test_every_setting_is_documented() -> None:
    text = (ROOT / "docs/settings.md").read_text("utf-8")
    missing = [name for name in Settings.model_fields if f"`{name}`" not in text]
    assert missing == []


def test_every_command_is_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    for command in commands():
        words = command.split()
        assert f"hone {words[1]}" in text, command
        assert re.search(rf"\b{words[-1]}\b", text), command


def test_readme_starts_with_the_two_commands() -> None:
    head = (ROOT / "README.md").read_text("utf-8")[:800]
    assert "make demo" in head
    assert "make test" in head


def test_files_named_in_the_readme_exist() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    named = re.findall(
        r"\b(?:configs|examples|docs|benchmarks)/[\w./-]+\.(?:ya?ml|jsonl|md|py)", text
    )
    assert named
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_config_says_its_purpose(path: Path) -> None:
    text = path.read_text("utf-8")
    assert text.startswith("# "), f"{path} must open with what it is for"
    assert isinstance(yaml.safe_load(text), dict)


@pytest.mark.parametrize("path", sorted((ROOT / "configs/serve").glob("*.yaml")), ids=str)
def test_serving_configs_are_valid(path: Path) -> None:
    assert load_settings(path, environ={})


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.md")) + sorted((ROOT / "docs").rglob("*.md")))
def test_relative_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text("utf-8")):
        assert (path.parent / target).exists(), f"{path}: {target}"
