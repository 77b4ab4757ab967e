"""The registry: what it refuses, what it names, and that a crash leaves nothing half-done."""

from __future__ import annotations

import json
import math
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_trainer import FINGERPRINT, write_adapter
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from data import accounts, adapter_folders, registry
from data.adapter_checks import WEIGHTS, check_adapter, digest_of, read_header
from data.db import Database
from data.errors import AdapterRefused, InvalidInput, ModelNotFound, StateConflict
from data.tables import AdapterVersion, Project

MODULE = "base_model.model.model.layers.0.mlp.up_proj"


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    database = Database(database_url)
    database.migrate()
    yield database
    database.close()


@pytest.fixture
def project(database: Database) -> Project:
    return accounts.create_account(database, "acme")[0]


@pytest.fixture
def adapters(tmp_path: Path) -> Path:
    return tmp_path / "adapters"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_adapter(tmp_path / "made")
    return tmp_path / "made"


def publish(
    database: Database, adapters: Path, project: Project, source: Path, suffix: str | None = "mail"
) -> AdapterVersion:
    return registry.publish(database, adapters, project, source, "tiny", FINGERPRINT, suffix=suffix)


def refusal(folder: Path, fingerprint: str | None = FINGERPRINT) -> str:
    with pytest.raises(AdapterRefused) as caught:
        check_adapter(folder, fingerprint)
    assert str(folder) in caught.value.message
    return str(caught.value.code)


def set_config(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def save(folder: Path, dtype: Any = np.float32, **shapes: tuple[int, ...]) -> None:
    tensors = {f"{MODULE}.lora_{side}.weight": np.ones(s, dtype) for side, s in shapes.items()}
    save_file(tensors, str(folder / WEIGHTS))


def test_publishing_names_and_promotes(
    database: Database, adapters: Path, project: Project, source: Path
) -> None:
    version = publish(database, adapters, project, source)
    *first, last = version.name.split(":")
    assert first == ["ft", "tiny", "acme", "mail"]
    assert len(last) == 8
    assert (version.rank, version.target_modules) == (4, ["q_proj"])
    assert registry.resolve(database, project.id, "ft:tiny:acme:mail").id == version.id
    assert registry.resolve(database, project.id, version.name).id == version.id
    assert digest_of(adapters / version.path) == version.digest == digest_of(source)
    assert version.bytes == sum(path.stat().st_size for path in source.iterdir())
    unnamed = publish(database, adapters, project, source, suffix=None)
    assert unnamed.name.startswith("ft:tiny:acme:default:")


def test_another_accounts_model_is_absent(
    database: Database, adapters: Path, project: Project, source: Path
) -> None:
    version = publish(database, adapters, project, source)
    other, _ = accounts.create_account(database, "other")
    messages = set()
    for name in (version.name, "ft:tiny:acme:mail"):
        with pytest.raises(ModelNotFound) as caught:
            registry.resolve(database, other.id, name)
        messages.add(caught.value.message.replace(name, "X"))
        for verb in (registry.delete, registry.promote, registry.rollback, registry.history):
            with pytest.raises(ModelNotFound):
                verb(database, other.id, name)
    with pytest.raises(ModelNotFound) as caught:
        registry.resolve(database, other.id, "ft:none")
    assert messages == {caught.value.message.replace("ft:none", "X")}
    assert registry.list_versions(database, other.id) == []


def test_rollback_walks_back_through_what_was_in_use(
    database: Database, adapters: Path, project: Project, source: Path
) -> None:
    first, second, third = (publish(database, adapters, project, source) for _ in range(3))
    alias = "ft:tiny:acme:mail"

    def current() -> str:
        return registry.resolve(database, project.id, alias).id

    assert current() == third.id
    assert registry.rollback(database, project.id, alias).id == second.id == current()
    assert registry.rollback(database, project.id, alias).id == first.id == current()
    with pytest.raises(StateConflict, match="no earlier version"):
        registry.rollback(database, project.id, alias)
    registry.promote(database, project.id, third.name)
    assert current() == third.id
    assert registry.rollback(database, project.id, alias).id == first.id
    moves = registry.history(database, project.id, alias)
    assert [move.action for move in moves] == [
        *["promote"] * 3,
        *["rollback"] * 2,
        "promote",
        "rollback",
    ]


def test_rollback_after_going_back_and_forth(
    database: Database, adapters: Path, project: Project, source: Path
) -> None:
    first, second = (publish(database, adapters, project, source) for _ in range(2))
    registry.promote(database, project.id, first.name)
    third = publish(database, adapters, project, source)
    alias = "ft:tiny:acme:mail"
    order = [registry.rollback(database, project.id, alias).id for _ in range(3)]
    assert order == [first.id, second.id, first.id]
    assert third.id not in order


def test_a_sweep_leaves_what_is_not_the_registrys(
    database: Database, adapters: Path, project: Project, source: Path
) -> None:
    publish(database, adapters, project, source)
    (adapters / "lost+found").mkdir()
    (adapters / "advr_orphan").mkdir()
    assert adapter_folders.sweep(database, adapters, min_age_s=0) == ["advr_orphan"]
    assert (adapters / "lost+found").is_dir()


def test_a_deleted_version_is_gone_and_never_rolled_back_to(
    database: Database, adapters: Path, project: Project, source: Path
) -> None:
    first, second, third = (publish(database, adapters, project, source) for _ in range(3))
    registry.delete(database, project.id, second.name)
    assert registry.rollback(database, project.id, "ft:tiny:acme:mail").id == first.id
    registry.delete(database, project.id, first.name)
    for name in (first.name, second.name, "ft:tiny:acme:mail"):
        with pytest.raises(ModelNotFound):
            registry.resolve(database, project.id, name)
    adapter_folders.sweep(database, adapters, min_age_s=0)
    assert [path.name for path in adapters.iterdir()] == [third.path]


def test_other_aliases_of_a_deleted_version_go_back_or_fall_away(
    database: Database, adapters: Path, project: Project, source: Path
) -> None:
    first, other = (publish(database, adapters, project, source, name) for name in ("mail", "x"))
    registry.promote(database, project.id, other.name, "ft:tiny:acme:mail")
    refused = registry.publish(
        *(database, adapters, project, source, "tiny", FINGERPRINT), suffix="mail", promoted=False
    )
    registry.delete(database, project.id, other.name)
    (alias,) = registry.list_aliases(database, project.id)
    assert (alias.name, alias.version_id) == ("ft:tiny:acme:mail", first.id)
    another = publish(database, adapters, project, source, "y")
    registry.promote(database, project.id, another.name, alias.name)
    assert registry.rollback(database, project.id, alias.name).id == first.id
    registry.promote(database, project.id, another.name, alias.name)
    registry.delete(database, project.id, first.name)
    registry.delete(database, project.id, another.name)
    assert registry.list_aliases(database, project.id) == []
    assert registry.resolve(database, project.id, refused.name).id == refused.id


def test_verification_finds_any_change(
    database: Database, adapters: Path, project: Project, source: Path, tmp_path: Path
) -> None:
    version = publish(database, adapters, project, source)
    adapter_folders.verify(version, adapters)
    folder = adapters / version.path
    rng = random.Random(0)
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        place = rng.randrange(len(content))
        changed = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
        path.write_bytes(changed)
        with pytest.raises(AdapterRefused) as caught:
            adapter_folders.verify(version, adapters)
        assert caught.value.code == "adapter_tampered"
        with pytest.raises(AdapterRefused):
            adapter_folders.export(version, adapters, tmp_path / "out")
        path.write_bytes(content)
    (folder / "extra").touch()
    with pytest.raises(AdapterRefused):
        adapter_folders.verify(version, adapters)
    shutil.rmtree(folder)
    with pytest.raises(AdapterRefused) as caught:
        adapter_folders.verify(version, adapters)
    assert caught.value.code == "adapter_missing"


def test_export_copies_and_never_overwrites(
    database: Database, adapters: Path, project: Project, source: Path, tmp_path: Path
) -> None:
    version = publish(database, adapters, project, source)
    out = adapter_folders.export(version, adapters, tmp_path / "deep" / "out")
    assert digest_of(out) == version.digest
    assert sorted(path.name for path in out.parent.iterdir()) == ["out"]
    with pytest.raises(InvalidInput, match="exists"):
        adapter_folders.export(version, adapters, out)


def test_wrong_base_is_refused(source: Path) -> None:
    assert refusal(source, "base-another") == "adapter_wrong_base"
    assert check_adapter(source, None).rank == 4
    (source / "hone.json").write_text("[]")
    assert refusal(source) == "adapter_wrong_base"
    (source / "hone.json").unlink()
    assert refusal(source) == "adapter_wrong_base"


@pytest.mark.parametrize("name", ["adapter_model.bin", "optimizer.pt", "deep/x.pkl"])
def test_pickles_are_refused(source: Path, name: str) -> None:
    (source / name).parent.mkdir(exist_ok=True)
    (source / name).write_bytes(b"\x80\x04.")
    assert refusal(source) == "adapter_pickle"


@pytest.mark.parametrize("name", [WEIGHTS, "adapter_config.json"])
def test_missing_files_are_refused(source: Path, name: str) -> None:
    (source / name).unlink()
    assert refusal(source) == "adapter_incomplete"


@pytest.mark.parametrize(
    ("values", "code"),
    [
        ({"peft_type": "IA3"}, "adapter_unsupported"),
        ({"r": 8}, "adapter_wrong_shape"),
        ({"r": "4"}, "adapter_wrong_shape"),
        ({"r": 0}, "adapter_wrong_shape"),
        ({"rank_pattern": {"q_proj": -1}}, "adapter_wrong_shape"),
        ({"rank_pattern": [4]}, "adapter_wrong_shape"),
    ],
)
def test_odd_configurations_are_refused(source: Path, values: dict[str, Any], code: str) -> None:
    set_config(source, **values)
    assert refusal(source) == code


@pytest.mark.parametrize(
    "shapes",
    [
        {"A": (4, 8)},
        {"B": (8, 4)},
        {"A": (4, 8), "B": (8, 3)},
        {"A": (3, 8), "B": (8, 3)},
        {"A": (4,), "B": (8, 4)},
        {"magnitude": (4,)},
    ],
)
def test_factors_that_do_not_agree_are_refused(source: Path, shapes: dict[str, Any]) -> None:
    save(source, **shapes)
    assert refusal(source) == "adapter_wrong_shape"


def test_ranks_of_the_pattern_are_allowed(source: Path) -> None:
    save(source, A=(2, 8), B=(8, 2))
    assert refusal(source) == "adapter_wrong_shape"
    set_config(source, rank_pattern={"up_proj": 2})
    assert check_adapter(source, FINGERPRINT).target_modules == ("up_proj",)


def test_other_types_of_number_are_refused(source: Path) -> None:
    save(source, np.int32, A=(4, 8), B=(8, 4))
    assert refusal(source) == "adapter_unsupported"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
def test_values_that_are_not_finite_are_refused(source: Path, dtype: str, value: float) -> None:
    codes = {"F64": "<d", "F32": "<f", "F16": "<e"}
    bits = struct.pack("<f", value)[2:] if dtype == "BF16" else struct.pack(codes[dtype], value)
    item = len(bits)
    largest = {"F64": "ffffffffffffef7f", "F32": "ffff7f7f", "F16": "ff7b", "BF16": "7f7f"}[dtype]
    data = bytearray(bytes.fromhex(largest) * 64)  # the largest finite number everywhere
    names = [f"{MODULE}.lora_{side}.weight" for side in "AB"]
    header = json.dumps(
        {
            name: {
                "dtype": dtype,
                "shape": shape,
                "data_offsets": [32 * item * n, 32 * item * (n + 1)],
            }
            for n, (name, shape) in enumerate(zip(names, ([4, 8], [8, 4]), strict=True))
        }
    ).encode()

    def write() -> None:
        (source / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + data)

    write()
    check_adapter(source, FINGERPRINT)
    for place in (0, 31, 63):
        before = data[place * item : (place + 1) * item]
        data[place * item : (place + 1) * item] = bits
        write()
        assert refusal(source) == "adapter_not_finite"
        data[place * item : (place + 1) * item] = before


def test_every_truncation_is_refused(source: Path) -> None:
    weights = source / WEIGHTS
    content = weights.read_bytes()
    for length in range(len(content)):
        weights.write_bytes(content[:length])
        assert refusal(source) == "adapter_truncated"
    weights.write_bytes(content + b"\0")
    assert refusal(source) == "adapter_truncated"


def test_damage_is_refused_wherever_safetensors_refuses_it(source: Path) -> None:
    """The reference reader is the judge: what it cannot read must not pass, nor crash us."""
    weights = source / WEIGHTS
    content = weights.read_bytes()
    rng = random.Random(1)
    header_end = 8 + int.from_bytes(content[:8], "little")
    agreed = {"refused": 0, "read": 0}
    for _ in range(1500):
        damaged = bytearray(content)
        for _ in range(rng.choice((1, 1, 2, 5))):
            place = rng.randrange(header_end)
            if rng.random() < 0.3:
                damaged[place : place + rng.randrange(3)] = rng.randbytes(rng.randrange(3))
            else:
                damaged[place] = rng.choice(b'0123456789[]{}",:ABF\x00\xff')
        weights.write_bytes(damaged)
        try:
            tensors, _ = read_header(weights)
        except AdapterRefused:
            agreed["refused"] += 1
            continue
        truth = load_file(str(weights))  # SafetensorError here: we accepted a broken file
        assert {name: tensor.shape for name, tensor in tensors.items()} == {
            name: value.shape for name, value in truth.items()
        }
        agreed["read"] += 1
    assert min(agreed.values()) > 20, agreed


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"null",
        b"[" * 200_000,
        b'{"a": 1}',
        b'{"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": ["1"], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},'
        b' "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
    ],
)
def test_hostile_headers_are_refused(source: Path, header: bytes) -> None:
    weights = source / WEIGHTS
    weights.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    assert refusal(source) == "adapter_truncated"
    with pytest.raises(SafetensorError):
        load_file(str(weights))


def test_a_name_given_twice_is_refused(source: Path) -> None:
    entry = b'"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
    header = b"{" + entry + b", " + entry + b"}"
    (source / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    assert refusal(source) == "adapter_truncated"


def test_a_refused_adapter_leaves_nothing(
    database: Database, adapters: Path, project: Project, source: Path
) -> None:
    (source / "hone.json").unlink()
    with pytest.raises(AdapterRefused):
        publish(database, adapters, project, source)
    assert list(adapters.iterdir()) == []
    assert registry.list_versions(database, project.id) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from data import accounts, adapter_folders, registry
from data.db import Database

place, name = sys.argv[1].split(":")
home = Path(sys.argv[2])
def die(*_, **__): os.kill(os.getpid(), signal.SIGKILL)
setattr({"registry": registry, "folders": adapter_folders, "os": os}[place], name, die)
database = Database(sys.argv[3])
(project,) = accounts.list_accounts(database)
registry.publish(database, home / "adapters", project, home / "made", "tiny", "base-fake")
"""


@pytest.mark.parametrize(
    "moment",
    ["folders:check_adapter", "os:rename", "registry:record", "registry:point_alias"],
)
def test_a_kill_while_publishing_leaves_no_half_adapter(
    database: Database, adapters: Path, project: Project, source: Path, tmp_path: Path, moment: str
) -> None:
    kept = publish(database, adapters, project, source)
    url = database.url.render_as_string()
    command = [sys.executable, "-c", KILLED, moment, str(tmp_path), url]
    assert subprocess.run(command, check=False).returncode == -9
    assert [version.id for version in registry.list_versions(database, project.id)] == [kept.id]
    assert len(list(adapters.iterdir())) == 2
    assert adapter_folders.sweep(database, adapters) == []  # too young to be an orphan for sure
    assert len(adapter_folders.sweep(database, adapters, min_age_s=0)) == 1
    assert [path.name for path in adapters.iterdir()] == [kept.path]
    adapter_folders.verify(kept, adapters)
