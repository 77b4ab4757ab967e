"""Files: what goes in comes out, foreign files are absent, and no crash loses or half-keeps one."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from data import accounts, jobs
from data.db import Database
from data.errors import DataError, InvalidInput, NotFound, StateConflict
from data.files import FileStore, safe_name
from data.job_spec import JobSpec
from data.tables import File, Project, now

LINES = b'{"prompt": "p", "completion": "c"}\n' * 12


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    database = Database(database_url)
    database.migrate()
    yield database
    database.close()


@pytest.fixture
def project(database: Database) -> Project:
    return accounts.create_account(database, "acme")[0]


@pytest.fixture(params=["file", "memory"])
def store(request: pytest.FixtureRequest, database: Database, tmp_path: Path) -> FileStore:
    urls = {"file": f"file://{tmp_path}/files", "memory": f"memory://{tmp_path.name}"}
    return FileStore(database, urls[request.param], max_bytes=10_000)


def local(database: Database, tmp_path: Path) -> FileStore:
    return FileStore(database, f"file://{tmp_path}/files", max_bytes=10_000)


def content(store: FileStore, file: File) -> bytes:
    with store.open(file.project_id, file.id) as stream:
        return stream.read()


def test_bytes_come_back_as_they_went_in(store: FileStore, project: Project) -> None:
    file = store.create(project.id, io.BytesIO(LINES), "Train set.jsonl", "fine-tune")
    assert content(store, file) == LINES
    assert (file.bytes, file.sha256) == (len(LINES), hashlib.sha256(LINES).hexdigest())
    assert (file.filename, file.purpose, file.status) == (
        "Train set.jsonl",
        "fine-tune",
        "processed",
    )
    chunks = store.create(project.id, iter([LINES[:7], LINES[7:]]), "b.jsonl", "fine-tune")
    assert chunks.sha256 == file.sha256
    with store.local_path(project.id, file.id) as path:
        assert path.read_bytes() == LINES


def test_placing_a_file_keeps_it_when_the_original_goes(
    store: FileStore, project: Project, tmp_path: Path
) -> None:
    file = store.create(project.id, [LINES], "train.jsonl", "fine-tune")
    for _ in range(2):
        path = store.place(project.id, file.id, tmp_path / "run")
    store.delete(project.id, file.id)
    assert path == tmp_path / "run" / "train.jsonl"
    assert path.read_bytes() == LINES
    assert os.listdir(tmp_path / "run") == ["train.jsonl"]


def test_pages_are_exact(store: FileStore, project: Project) -> None:
    made = [store.create(project.id, [b"x"], f"{n}.txt", "user_data").id for n in range(7)]
    for order in ("asc", "desc"):
        seen: list[str] = []
        after, more = None, True
        while more:
            page, more = store.list(project.id, limit=3, order=order, after=after)  # type: ignore[arg-type]
            seen += [file.id for file in page]
            after = seen[-1]
        assert sorted(seen) == sorted(made)
        assert len(seen) == 7
    up, _ = store.list(project.id, order="asc")
    down, _ = store.list(project.id, order="desc")
    assert [file.id for file in up] == [file.id for file in down][::-1]
    assert store.list(project.id, purpose="fine-tune") == ([], False)
    with pytest.raises(InvalidInput, match="Invalid 'after'"):
        store.list(project.id, after="file-absent")


def test_another_accounts_file_is_absent(
    store: FileStore, project: Project, database: Database
) -> None:
    file = store.create(project.id, [LINES], "train.jsonl", "fine-tune")
    other, _ = accounts.create_account(database, "other")
    for file_id in (file.id, "file-absent"):
        for verb in (store.get, store.delete, store.open, store.report):
            with pytest.raises(NotFound) as caught:
                verb(other.id, file_id)
            assert caught.value.message == f"No such File object: {file_id}"
    assert store.list(other.id) == ([], False)
    with pytest.raises(InvalidInput):
        store.list(other.id, after=file.id)
    assert content(store, file) == LINES


def test_broken_lines_are_told_at_upload(store: FileStore, project: Project) -> None:
    text = LINES + b"not json\n" + LINES + b"[1]\n"
    with pytest.raises(DataError) as caught:
        store.create(project.id, [text], "train.jsonl", "fine-tune")
    assert caught.value.param == "file"
    assert caught.value.message.startswith(
        "Expected file to have JSONL format, where every line is a JSON dictionary. Line 13, 26 "
    )
    assert [line["line"] for line in caught.value.lines] == [13, 26]
    assert {"line", "column", "code", "message"} == set(caught.value.lines[0])
    assert store.sweep(min_age_s=0) == []
    assert store.create(project.id, [text], "notes.txt", "user_data").bytes == len(text)


@pytest.mark.parametrize("text", [b"", b"\n \n"])
def test_empty_datasets_are_refused(store: FileStore, project: Project, text: bytes) -> None:
    with pytest.raises(DataError, match="no lines"):
        store.create(project.id, [text], "train.jsonl", "fine-tune")


def test_too_large_files_are_refused_while_they_come(store: FileStore, project: Project) -> None:
    def endless() -> Iterator[bytes]:
        while True:
            yield b"x" * 1000

    with pytest.raises(InvalidInput) as caught:
        store.create(project.id, endless(), "big.txt", "user_data")
    assert caught.value.code == "file_too_large"
    assert store.create(project.id, [b"x" * 10_000], "fits.txt", "user_data").bytes == 10_000
    assert store.sweep(min_age_s=0) == []


@pytest.mark.parametrize(
    ("purpose", "expires_after_s", "param"),
    [
        ("tuning", None, "purpose"),
        ("user_data", 3599, "expires_after.seconds"),
        ("user_data", 2_592_001, "expires_after.seconds"),
    ],
)
def test_wrong_requests_name_the_field(
    store: FileStore, project: Project, purpose: str, expires_after_s: int | None, param: str
) -> None:
    with pytest.raises(InvalidInput) as caught:
        store.create(project.id, [LINES], "x", purpose, expires_after_s)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("../../etc/passwd", "passwd"),
        ("/absolute.jsonl", "absolute.jsonl"),
        ("..\\..\\windows.jsonl", "windows.jsonl"),
        ("..", "file"),
        (".hidden", "hidden"),
        ("", "file"),
        ("a\0b\n.jsonl", "a_b_.jsonl"),
        ("Größe 漢字.jsonl", "Größe 漢字.jsonl"),
        ("x" * 300, "x" * 200),
        ("漢" * 100, "漢" * 66),  # 200 bytes, and no character cut in two
    ],
)
def test_filenames_cannot_lead_elsewhere(given: str, kept: str) -> None:
    assert safe_name(given) == kept


def test_hostile_filenames_stay_in_the_store(
    database: Database, project: Project, tmp_path: Path
) -> None:
    store = local(database, tmp_path)
    file = store.create(project.id, [LINES], "../../../escape.jsonl", "fine-tune")
    found = [path for path in tmp_path.rglob("*") if path.is_file() and "hone.db" not in path.name]
    assert found == [tmp_path / "files" / project.id / file.id]


def test_a_file_in_use_cannot_be_deleted(
    store: FileStore, project: Project, database: Database
) -> None:
    file = store.create(project.id, [LINES], "train.jsonl", "fine-tune")
    valid = store.create(project.id, [LINES], "valid.jsonl", "fine-tune")
    spec = JobSpec("tiny", file.id, valid.id)
    job = jobs.create(database, project.id, spec, ["tiny"])
    for used in (file, valid):
        with pytest.raises(StateConflict, match=job.id):
            store.delete(project.id, used.id)
        assert content(store, used) == LINES
    jobs.request_cancel(database, project.id, job.id)
    store.delete(project.id, file.id)
    with pytest.raises(NotFound):
        store.get(project.id, file.id)
    assert len(store.list(project.id)[0]) == 1


def test_expired_files_are_absent_and_swept(
    store: FileStore, project: Project, database: Database
) -> None:
    file = store.create(project.id, [LINES], "a.jsonl", "fine-tune", expires_after_s=3600)
    kept = store.create(project.id, [LINES], "b.jsonl", "fine-tune", expires_after_s=3600)
    job = jobs.create(database, project.id, JobSpec("tiny", kept.id), ["tiny"])
    assert file.expires_at is not None
    assert 3598 <= file.expires_at - now() <= 3600
    with database.write() as session:
        session.get_one(File, file.id).expires_at = now()
        session.get_one(File, kept.id).expires_at = now()
    with pytest.raises(NotFound):
        store.get(project.id, file.id)
    with pytest.raises(InvalidInput, match="No such File"):
        jobs.create(database, project.id, JobSpec("tiny", file.id), ["tiny"])
    assert store.sweep(min_age_s=0) == [file.blob]
    jobs.request_cancel(database, project.id, job.id)
    assert store.sweep(min_age_s=0) == [kept.blob]


def test_reports_are_made_once(store: FileStore, project: Project, tmp_path: Path) -> None:
    file = store.create(project.id, [LINES, b'{"prompt": "p"}\n'], "train.jsonl", "fine-tune")
    report = store.report(project.id, file.id)
    assert report["counts"] == {"missing_key": 1}
    assert report["problems"][0]["line"] == 13
    assert report["sha256"] == file.sha256
    store._blobs.remove(file.blob)
    assert store.report(project.id, file.id) == report


def test_young_orphans_are_left(store: FileStore, project: Project) -> None:
    file = store.stage(project.id, [LINES], "train.jsonl", "fine-tune")
    assert store.sweep() == []
    with pytest.raises(NotFound):
        store.get(project.id, file.id)
    assert store.sweep(min_age_s=0) == [file.blob]


def test_a_sweep_leaves_what_is_not_the_stores(
    database: Database, project: Project, tmp_path: Path
) -> None:
    store = local(database, tmp_path)
    (tmp_path / "files" / project.id).mkdir(parents=True)
    for name in ("README", f"{project.id}/notes.txt"):
        (tmp_path / "files" / name).write_text("keep me")
    assert store.sweep(min_age_s=0) == []
    assert (tmp_path / "files" / "README").exists()


@pytest.mark.parametrize("url", ["", "nosuch://bucket/x"])
def test_unusable_places_are_refused(database: Database, url: str) -> None:
    with pytest.raises(InvalidInput, match="cannot be used") as caught:
        FileStore(database, url)
    assert caught.value.param == "blob_url"


KILLED = """
import os, signal, sys
from data import accounts, files
from data.db import Database

def die(*_, **__): os.kill(os.getpid(), signal.SIGKILL)
home, moment, url = sys.argv[1:]
database = Database(url)
store = files.FileStore(database, f"file://{home}/files")
(project,) = accounts.list_accounts(database)
if moment == "half received":
    def chunks():
        yield b'{"a": 1}'
        die()
else:
    chunks = lambda: [b'{"a": 1}']
if moment == "received": files._check_lines = die
if moment == "checked": os.rename = die
if moment == "published": database.write = die
store.create(project.id, chunks(), "x.jsonl", "fine-tune")
"""


@pytest.mark.parametrize("moment", ["half received", "received", "checked", "published"])
def test_a_kill_while_uploading_leaves_no_row_without_bytes(
    database: Database, project: Project, tmp_path: Path, moment: str
) -> None:
    store = local(database, tmp_path)
    kept = store.create(project.id, [LINES], "kept.jsonl", "fine-tune")
    url = database.url.render_as_string()
    command = [sys.executable, "-c", KILLED, str(tmp_path), moment, url]
    assert subprocess.run(command, check=False).returncode == -9
    assert [file.id for file in store.list(project.id)[0]] == [kept.id]
    assert len(store.sweep(min_age_s=0)) == 1
    found = [path.name for path in (tmp_path / "files").rglob("*") if path.is_file()]
    assert found == [kept.id]
    assert content(store, kept) == LINES


def test_a_kill_while_deleting_leaves_no_row_without_bytes(
    database: Database, project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = local(database, tmp_path)
    file = store.create(project.id, [LINES], "train.jsonl", "fine-tune")
    filesystem = fsspec.filesystem("file")

    def crash(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(filesystem), "rm", crash)
        with pytest.raises(KeyboardInterrupt):
            store.delete(project.id, file.id)
    assert store.list(project.id) == ([], False)
    assert store.sweep(min_age_s=0) == [file.blob]


def test_a_file_deleted_between_its_row_and_its_bytes_is_not_found(
    store: FileStore, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = store.create(project.id, io.BytesIO(LINES), "a.jsonl", "fine-tune")
    find = store.get

    def get(project_id: str, file_id: str) -> File:
        found = find(project_id, file_id)
        store.delete(project_id, file_id)
        return found

    monkeypatch.setattr(store, "get", get)
    with pytest.raises(NotFound):
        store.open(project.id, record.id)
