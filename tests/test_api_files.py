"""Files through the official client: what goes in comes out, and only for its own account."""

from __future__ import annotations

import json
from collections.abc import Iterator

import openai
import pytest
from api_server import Server, running, tiny_settings
from openai.types import FileObject

ROWS = b"".join(
    json.dumps({"prompt": f"question {i}", "completion": f" answer {i}"}).encode() + b"\n"
    for i in range(12)
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tiny_settings(tmp_path_factory.mktemp("files"), max_upload_mb=1)) as found:
        yield found


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return server.client()


def upload(client: openai.OpenAI, name: str = "rows.jsonl", content: bytes = ROWS) -> FileObject:
    return client.files.create(file=(name, content), purpose="fine-tune")


def test_round_trip(client: openai.OpenAI) -> None:
    created = upload(client)
    FileObject.model_validate(created.model_dump(), strict=True)
    assert (created.bytes, created.filename, created.purpose) == (
        len(ROWS),
        "rows.jsonl",
        "fine-tune",
    )
    assert created.status == "processed"
    assert created.id.startswith("file-")
    assert client.files.retrieve(created.id) == created
    assert client.files.wait_for_processing(created.id) == created
    assert client.files.content(created.id).content == ROWS
    assert client.files.delete(created.id).deleted is True
    with pytest.raises(openai.NotFoundError, match=f"No such File object: {created.id}"):
        client.files.retrieve(created.id)
    with pytest.raises(openai.NotFoundError):
        client.files.content(created.id)


def test_large_files_stream_both_ways(client: openai.OpenAI) -> None:
    line = json.dumps({"prompt": "x" * 900, "completion": " y"}).encode() + b"\n"
    content = line * 1100
    assert client.files.content(upload(client, "large.jsonl", content).id).content == content
    with pytest.raises(openai.APIStatusError) as caught:
        upload(client, "larger.jsonl", line * 1200)
    assert caught.value.status_code == 413
    assert caught.value.code == "file_too_large"


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("rows.zip", b"PK\x03\x04" + bytes(40), "a zip archive"),
        ("rows.jsonl.gz", b"\x1f\x8b\x08" + bytes(40), "a gzip file"),
        ("rows.tar", bytes(257) + b"ustar\x0000", "a tar archive"),
        ("rows.parquet", b"PAR1" + bytes(40), "a Parquet file"),
    ],
)
def test_archives_and_tables_are_named_and_refused(
    client: openai.OpenAI, name: str, content: bytes, kind: str
) -> None:
    before = client.files.list().data
    with pytest.raises(openai.APIStatusError, match=kind) as caught:
        upload(client, name, content)
    assert (caught.value.status_code, caught.value.code) == (415, "unsupported_file")
    assert client.files.list().data == before


def test_list_pages(server: Server) -> None:
    _, key = server.new_account("pages")
    client = server.client(key)
    assert client.files.list().data == []
    ids = {upload(client, f"{i}.jsonl").id for i in range(5)}
    listed = [record.id for record in client.files.list(limit=2)]  # follows every page
    assert sorted(listed) == sorted(ids)
    assert [f.id for f in client.files.list(order="asc")] == listed[::-1]
    page = server.http(key).get("/v1/files", params={"limit": 2}).json()
    assert (page["object"], page["has_more"]) == ("list", True)
    assert (page["first_id"], page["last_id"]) == (listed[0], listed[1])
    assert client.files.list(purpose="batch").data == []
    with pytest.raises(openai.BadRequestError) as caught:
        client.files.list(after="file-none")
    assert caught.value.param == "after"


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ({"limit": "many"}, "limit"),
        ({"limit": 0}, "limit"),
        ({"order": "up"}, "order"),
        ({"x": 1}, "x"),
    ],
)
def test_list_refusals(server: Server, query: dict[str, object], param: str) -> None:
    response = server.http().get("/v1/files", params=query)  # type: ignore[arg-type]
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_bad_lines_are_told_at_upload(server: Server) -> None:
    content = b'{"prompt": "a", "completion": "b"}\n[1]\nnot json\n'
    response = server.http().post(
        "/v1/files", files={"file": ("bad.jsonl", content)}, data={"purpose": "fine-tune"}
    )
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("invalid_file_format", "file")
    assert "every line is a JSON dictionary" in error["message"]
    assert [entry["line"] for entry in error["lines"]] == [2, 3]


def test_upload_refusals(server: Server) -> None:
    with server.http() as http:
        file = {"file": ("a.jsonl", ROWS)}
        for files, data, param in [
            (file, {}, "purpose"),
            ({}, {"purpose": "fine-tune"}, "file"),
            (file, {"purpose": "fun"}, "purpose"),
            (file, {"purpose": "fine-tune", "color": "red"}, "color"),
            (
                file,
                {"purpose": "fine-tune", "expires_after[seconds]": "60"},
                "expires_after.anchor",
            ),
            (
                file,
                {
                    "purpose": "fine-tune",
                    "expires_after[anchor]": "created_at",
                    "expires_after[seconds]": "60",
                },
                "expires_after.seconds",
            ),
        ]:
            response = http.post("/v1/files", files=files, data=data)
            assert response.status_code == 400, response.text
            assert response.json()["error"]["param"] == param
        for body in (b"", b"--b", b"--b\r\n\r\n", b"--b\r\nContent-Disposition: x\r\n\r\nabc"):
            headers = {"content-type": "multipart/form-data; boundary=b"}
            response = http.post("/v1/files", content=body, headers=headers)
            assert response.status_code == 400, body
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        response = http.post("/v1/files", json={"purpose": "fine-tune"})
        assert response.status_code == 400


def test_expiry(client: openai.OpenAI) -> None:
    created = client.files.create(
        file=("a.jsonl", ROWS),
        purpose="fine-tune",
        expires_after={"anchor": "created_at", "seconds": 3600},
    )
    assert created.expires_at is not None
    assert 3590 <= created.expires_at - created.created_at <= 3610


def test_report(server: Server, client: openai.OpenAI) -> None:
    content = ROWS + b'{"prompt": "no completion"}\n'
    created = upload(client, content=content)
    report = server.http().get(f"/v1/files/{created.id}/report").json()
    assert report["file_id"] == created.id
    assert report["num_lines"] == 13
    assert report["problems"][0]["line"] == 13


def test_another_accounts_file_is_as_absent(server: Server, client: openai.OpenAI) -> None:
    created = upload(client)
    _, key = server.new_account("stranger")
    with server.http(key) as http:
        for method, path in [
            ("GET", "/v1/files/{}"),
            ("DELETE", "/v1/files/{}"),
            ("GET", "/v1/files/{}/content"),
            ("GET", "/v1/files/{}/report"),
        ]:
            absent = "file-" + "0" * 24
            foreign, missing = (
                http.request(method, path.format(file_id)) for file_id in (created.id, absent)
            )
            assert foreign.status_code == missing.status_code == 404
            assert foreign.text == missing.text.replace(absent, created.id)
        assert http.get("/v1/files").json()["data"] == []
    assert client.files.retrieve(created.id) == created
