"""The import arrows of docs/architecture.md, held by walking every module's syntax tree."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("data", "serve", "train", "rlhf")

# For each part of the house: the parts of ours that it may import.
ALLOWED = {
    "data": {"data"},
    "serve.engine": {"serve.engine", "data.errors"},
    "serve": {"data", "serve"},
    "train": {"data", "serve.engine", "train"},
    "rlhf": {"data", "serve.engine", "train", "rlhf"},
}
FORBIDDEN_LIBRARIES = {
    "data": {"torch", "transformers", "peft", "trl", "accelerate", "fastapi"},
    "serve.engine": {"peft", "trl", "accelerate", "fastapi", "sqlalchemy"},
    "serve": {"peft", "trl", "accelerate"},
    "train": {"fastapi", "uvicorn"},
    "rlhf": {"fastapi", "uvicorn"},
}


def part_of(module: str) -> str:
    return "serve.engine" if module.startswith("serve.engine") else module.split(".")[0]


def modules() -> list[tuple[str, Path]]:
    found = []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            found.append((".".join(path.relative_to(ROOT).with_suffix("").parts), path))
    return found


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def within(name: str, allowed: str) -> bool:
    return name == allowed or name.startswith(allowed + ".")


@pytest.mark.parametrize(("module", "path"), modules(), ids=lambda value: str(value)[-40:])
def test_imports_follow_the_arrows(module: str, path: Path) -> None:
    part = part_of(module)
    for name in imports(path):
        if name.split(".")[0] in PACKAGES:
            assert any(within(name, allowed) for allowed in ALLOWED[part]), f"{module}: {name}"
        assert name.split(".")[0] not in FORBIDDEN_LIBRARIES[part], f"{module}: {name}"


def test_init_files_are_empty() -> None:
    filled = [p for name in PACKAGES for p in (ROOT / name).rglob("__init__.py") if p.read_text()]
    assert filled == []


def test_no_module_shadows_a_library() -> None:
    taken = sys.stdlib_module_names | {"datasets", "peft", "trl", "torch", "transformers", "wandb"}
    for name, _ in modules():
        if "." not in name:
            assert name not in taken
        elif name.count(".") == 1:  # next to a script that may be started by its path
            assert name.split(".")[1] not in taken, name


def test_command_line_starts_without_heavy_imports() -> None:
    heavy = ["torch", "sqlalchemy", "fastapi", "pydantic"]
    code = f"import serve.cli, sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_data_never_imports_torch_at_run_time() -> None:
    names = [name for name, _ in modules() if part_of(name) == "data" and ".migrations" not in name]
    load = f"import importlib, sys; [importlib.import_module(n) for n in {names}]"
    code = f"{load}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
