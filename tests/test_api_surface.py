"""Uploads in parts and stored chat completions, through the official client."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from api_server import MODEL, Server, running, tiny_settings
from openai.types import Upload
from openai.types.chat import ChatCompletion
from sqlalchemy import update

from data import caps
from data import tables_surface as tables
from data.settings import Limits

ROWS = b"".join(
    json.dumps({"prompt": f"q {i}", "completion": 40 * "x"}).encode() + b"\n" for i in range(60)
)
MESSAGES: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tiny_settings(tmp_path_factory.mktemp("surface"))) as found:
        yield found


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return server.client()


# ---- uploads in parts ----


def begin(client: openai.OpenAI, num_bytes: int = len(ROWS), **fields: Any) -> Upload:
    options = {"filename": "rows.jsonl", "mime_type": "text/jsonl", "purpose": "fine-tune"} | fields
    return client.uploads.create(bytes=num_bytes, **options)  # type: ignore[arg-type]


def parts_left(server: Server) -> list[str]:
    return server.runtime.files.parts.uploads()


def test_a_part_has_at_most_64_mib(server: Server, client: openai.OpenAI) -> None:
    most = 64 * 1024 * 1024
    upload = begin(client, most)
    for content in (bytes(most + 1), bytes(most + (2 << 20))):  # told by the part, or by the body
        with pytest.raises(openai.APIStatusError, match="larger than") as caught:
            client.uploads.parts.create(upload.id, data=content)
        assert caught.value.status_code == 413
        assert caught.value.code == "file_too_large"
    largest = client.uploads.parts.create(upload.id, data=bytes(most))  # the upload goes on
    folder = server.runtime.settings.home
    stored = [path for path in folder.rglob(f"{upload.id}/*") if path.is_file()]
    assert [(path.name, path.stat().st_size) for path in stored] == [(largest.id, most)]
    client.uploads.cancel(upload.id)


def test_a_file_in_chunks(server: Server, client: openai.OpenAI) -> None:
    done = client.uploads.upload_file_chunked(
        file=ROWS,
        filename="rows.jsonl",
        bytes=len(ROWS),
        mime_type="text/jsonl",
        purpose="fine-tune",
        part_size=1000,
        md5=hashlib.md5(ROWS).hexdigest(),
    )
    Upload.model_validate(done.model_dump(), strict=True)
    assert done.status == "completed"
    assert done.file is not None
    assert done.file.status == "processed"
    assert client.files.content(done.file.id).read() == ROWS
    assert done.id not in parts_left(server)
    job = client.fine_tuning.jobs.create(model=MODEL, training_file=done.file.id)
    assert job.training_file == done.file.id


def test_the_order_is_that_of_completion(client: openai.OpenAI) -> None:
    upload = begin(client)
    half = ROWS.index(b"\n", 1000) + 1
    second = client.uploads.parts.create(upload.id, data=ROWS[half:])
    first = client.uploads.parts.create(upload.id, data=ROWS[:half])
    done = client.uploads.complete(upload.id, part_ids=[first.id, second.id])
    assert done.file is not None
    assert client.files.content(done.file.id).read() == ROWS


def test_what_a_completion_must_name(client: openai.OpenAI) -> None:
    upload, other = begin(client), begin(client)
    part = client.uploads.parts.create(upload.id, data=ROWS[:1000])
    rest = client.uploads.parts.create(upload.id, data=ROWS[1000:])
    foreign = client.uploads.parts.create(other.id, data=ROWS)
    wrong: list[dict[str, Any]] = [
        {"part_ids": [part.id]},
        {"part_ids": [part.id, part.id]},
        {"part_ids": [foreign.id]},
        {"part_ids": [part.id, rest.id], "md5": "0" * 32},
    ]
    for fields in wrong:
        with pytest.raises(openai.BadRequestError) as caught:
            client.uploads.complete(upload.id, **fields)
        assert caught.value.param is not None
        assert caught.value.param.partition("[")[0] in ("part_ids", "md5")
    done = client.uploads.complete(upload.id, part_ids=[part.id, rest.id])  # nothing was lost
    assert done.status == "completed"
    with pytest.raises(openai.BadRequestError) as caught:
        client.uploads.complete(upload.id, part_ids=[part.id, rest.id])
    assert caught.value.code == "invalid_state"


def test_uploads_keep_to_what_was_announced_and_to_the_cap(server: Server) -> None:
    project, key = server.new_account("capped")
    client, database, limits = server.client(key), server.runtime.database, Limits()
    held = {"stored_bytes": 2 * len(ROWS) - 1}
    caps.set_caps(database, project.id, limits, held)
    upload = begin(client)
    with pytest.raises(openai.RateLimitError, match="exceeded your current quota"):
        begin(client)  # what is pending counts
    part = client.uploads.parts.create(upload.id, data=ROWS[:1000])
    with pytest.raises(openai.BadRequestError, match="announced"):
        client.uploads.parts.create(upload.id, data=ROWS)
    rest = client.uploads.parts.create(upload.id, data=ROWS[1000:])
    with pytest.raises(openai.BadRequestError, match="announced"):
        client.uploads.parts.create(upload.id, data=b"x")

    ids = [part.id, rest.id]
    caps.set_caps(database, project.id, limits, {"stored_bytes": 10})  # less than when it began
    with pytest.raises(openai.RateLimitError):
        client.uploads.complete(upload.id, part_ids=ids)
    blobs = server.runtime.settings.files_dir / project.id
    assert list(blobs.iterdir()) == []
    caps.set_caps(database, project.id, limits, held)
    assert client.uploads.complete(upload.id, part_ids=ids).status == "completed"


@pytest.mark.parametrize("when", ["before the parts are read", "after"])
def test_an_upload_that_ends_while_it_is_completed(
    server: Server, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    project, key = server.new_account(f"ends {when}")
    client, uploads, stage = server.client(key), server.runtime.uploads, server.runtime.files.stage
    upload = begin(client)
    part = client.uploads.parts.create(upload.id, data=ROWS)

    def end_meanwhile(*words: Any, **options: Any) -> Any:
        early = when != "after"
        if early:
            uploads.cancel(project.id, upload.id)
        staged = stage(*words, **options)
        uploads.cancel(project.id, upload.id)
        return staged

    monkeypatch.setattr(server.runtime.files, "stage", end_meanwhile)
    with pytest.raises(openai.BadRequestError) as caught:
        client.uploads.complete(upload.id, part_ids=[part.id])
    assert caught.value.code == "invalid_state"
    blobs = server.runtime.settings.files_dir / project.id
    assert not blobs.exists() or list(blobs.iterdir()) == []


def test_a_cancelled_upload_leaves_nothing(server: Server, client: openai.OpenAI) -> None:
    upload = begin(client)
    client.uploads.parts.create(upload.id, data=ROWS[:100])
    assert upload.id in parts_left(server)
    assert client.uploads.cancel(upload.id).status == "cancelled"
    assert upload.id not in parts_left(server)
    with pytest.raises(openai.BadRequestError) as caught:
        client.uploads.parts.create(upload.id, data=b"x")
    assert caught.value.code == "invalid_state"


def test_a_late_upload_expires(server: Server, client: openai.OpenAI) -> None:
    upload = begin(client)
    client.uploads.parts.create(upload.id, data=ROWS[:100])
    with server.runtime.database.write() as session:
        late = update(tables.Upload).where(tables.Upload.id == upload.id)
        session.execute(late.values(expires_at=1))
    with pytest.raises(openai.BadRequestError, match="expired"):
        client.uploads.parts.create(upload.id, data=b"x")
    assert server.runtime.uploads.sweep() == [upload.id]
    assert upload.id not in parts_left(server)


def test_bad_lines_are_told_and_the_upload_stays(client: openai.OpenAI) -> None:
    rows = b'{"a": 1}\nnot json\n'
    upload = begin(client, len(rows))
    part = client.uploads.parts.create(upload.id, data=rows)
    with pytest.raises(openai.BadRequestError) as caught:
        client.uploads.complete(upload.id, part_ids=[part.id])
    assert caught.value.code == "invalid_file_format"
    assert client.uploads.cancel(upload.id).status == "cancelled"


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"purpose": "x"}, "purpose"), ({"num_bytes": 0}, "bytes"), ({"num_bytes": 2**40}, "bytes")],
)
def test_refused_uploads(client: openai.OpenAI, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        begin(client, **fields)
    assert caught.value.param == param


def test_an_empty_part_is_refused(client: openai.OpenAI) -> None:
    upload = begin(client)
    with pytest.raises(openai.BadRequestError, match="empty"):
        client.uploads.parts.create(upload.id, data=b"")


# ---- stored chat completions ----


def ask(client: openai.OpenAI, **fields: Any) -> ChatCompletion:
    options = {"model": MODEL, "messages": MESSAGES, "max_tokens": 5, "temperature": 0} | fields
    return client.chat.completions.create(**options)


def test_only_what_was_asked_for_is_stored(client: openai.OpenAI) -> None:
    kept, gone = ask(client, store=True), ask(client)
    found = client.chat.completions.retrieve(kept.id)
    assert found.choices == kept.choices
    assert found.usage == kept.usage
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.retrieve(gone.id)


def test_feedback_by_metadata(client: openai.OpenAI) -> None:
    kept = ask(client, store=True, metadata={"topic": "grüße"})
    changed = client.chat.completions.update(kept.id, metadata={"topic": "grüße", "rating": "1"})
    assert changed.metadata == {"topic": "grüße", "rating": "1"}
    listed = client.chat.completions.list(metadata={"rating": "1"})
    assert [chat.id for chat in listed] == [kept.id]
    assert list(client.chat.completions.list(metadata={"rating": "2"})) == []


def test_the_conversation_can_be_read_again(client: openai.OpenAI) -> None:
    kept = ask(client, store=True)
    messages = list(client.chat.completions.messages.list(kept.id, limit=1))
    assert [(m.role, m.content) for m in messages] == [(m["role"], m["content"]) for m in MESSAGES]
    backwards = list(client.chat.completions.messages.list(kept.id, order="desc"))
    assert [m.id for m in backwards] == [m.id for m in messages][::-1]


def test_a_stream_is_stored_whole(client: openai.OpenAI) -> None:
    chunks = list(ask(client, store=True, stream=True, n=2, temperature=1, seed=5))
    found = client.chat.completions.retrieve(chunks[0].id)  # type: ignore[attr-defined]
    for choice in found.choices:
        pieces = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]  # type: ignore[attr-defined]
        assert "".join(c.delta.content or "" for c in pieces) == choice.message.content
    assert found.usage is not None
    assert found.usage.completion_tokens > 0


def test_pages(server: Server) -> None:
    _, key = server.new_account("pages")
    client = server.client(key)
    made = [ask(client, store=True).id for _ in range(5)]
    ascending = [chat.id for chat in client.chat.completions.list(limit=2)]
    assert sorted(ascending) == sorted(made)
    descending = [chat.id for chat in client.chat.completions.list(limit=2, order="desc")]
    assert descending == ascending[::-1]
    assert list(client.chat.completions.list(model="another")) == []
    deleted = client.chat.completions.delete(made[0])
    assert (deleted.id, deleted.deleted) == (made[0], True)
    assert made[0] not in [chat.id for chat in client.chat.completions.list()]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"metadata": {"a": "b"}}, "metadata"),
        ({"store": True, "metadata": {"a": 513 * "b"}}, "metadata"),
        ({"store": True, "metadata": {str(n): "b" for n in range(17)}}, "metadata"),
    ],
)
def test_refused_metadata(client: openai.OpenAI, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, **fields)
    assert caught.value.param == param
