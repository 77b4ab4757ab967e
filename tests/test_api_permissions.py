"""Sharing a version with another account, through the official client."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from api_server import MODEL, Server, running, tiny_settings
from test_api_adapters import complete, publish

from data import accounts, registry
from data.tables import AdapterVersion


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tiny_settings(tmp_path_factory.mktemp("shared"))) as found:
        yield found


@pytest.fixture(scope="module")
def version(server: Server, tmp_path_factory: pytest.TempPathFactory) -> AdapterVersion:
    return publish(server, tmp_path_factory.mktemp("adapter"), 1, "shared")


def permissions(client: openai.OpenAI) -> Any:
    return client.fine_tuning.checkpoints.permissions


def test_a_shared_version_is_used_by_its_full_name_only(
    server: Server, version: AdapterVersion
) -> None:
    owner = server.client()
    guest_project, key = server.new_account("guest")
    guest = server.client(key)
    with pytest.raises(openai.NotFoundError):
        complete(guest, version.name)
    [made] = permissions(owner).create(version.name, project_ids=[guest_project.id]).data
    assert (made.object, made.project_id) == ("checkpoint.permission", guest_project.id)
    again = permissions(owner).create(version.name, project_ids=[guest_project.id])
    assert [found.id for found in again.data] == [made.id]
    assert complete(guest, version.name).model == version.name
    assert complete(guest, version.name).choices == complete(owner, version.name).choices
    assert guest.models.retrieve(version.name).owned_by == "acme"
    alias = registry.alias_of(version.name)
    refused: list[Any] = [
        lambda: complete(guest, alias),
        lambda: guest.models.delete(version.name),
        lambda: permissions(guest).create(version.name, project_ids=[server.project.id]),
        lambda: list(permissions(guest).list(version.name)),
        lambda: permissions(guest).delete(made.id, fine_tuned_model_checkpoint=version.name),
    ]
    for call in refused:
        with pytest.raises(openai.NotFoundError) as caught:
            call()
        assert caught.value.code == "model_not_found"
    deleted = permissions(owner).delete(made.id, fine_tuned_model_checkpoint=version.name)
    assert (deleted.id, deleted.deleted) == (made.id, True)
    with pytest.raises(openai.NotFoundError):
        complete(guest, version.name)
    with pytest.raises(openai.NotFoundError):
        permissions(owner).delete(made.id, fine_tuned_model_checkpoint=version.name)


def test_prefixes_stay_with_their_account(server: Server, version: AdapterVersion) -> None:
    guest_project, key = server.new_account("prefixes")
    owner, guest = server.client(), server.client(key)
    permissions(owner).create(version.name, project_ids=[guest_project.id])
    prompt = "one prefix of many words, " * 8

    def reused(client: openai.OpenAI) -> float:
        before = server.runtime.engine.stats()["prompt_tokens_reused_total"]
        complete(client, version.name, prompt=prompt, max_tokens=2)
        return server.runtime.engine.stats()["prompt_tokens_reused_total"] - before

    assert reused(owner) == 0
    assert reused(owner) > 100
    assert reused(guest) == 0
    assert reused(guest) > 100


def test_an_admin_key_shares_anything_and_pages(server: Server, version: AdapterVersion) -> None:
    _, key = accounts.create_admin_key(server.runtime.database)
    admin = server.client(key)
    ids = [server.new_account(f"many {n}")[0].id for n in range(3)]
    permissions(admin).create(version.name, project_ids=ids)
    listed = [p.project_id for p in permissions(admin).list(version.name, limit=2)]
    assert set(ids) <= set(listed)
    assert len(listed) == len(set(listed))
    rising = [p.id for p in permissions(server.client()).list(version.name, order="ascending")]
    falling = [p.id for p in permissions(admin).list(version.name)]
    assert rising == falling[::-1]
    [one] = permissions(admin).list(version.name, project_id=ids[0]).data
    assert one.project_id == ids[0]
    with pytest.raises(openai.NotFoundError):
        permissions(admin).create(f"ft:{MODEL}:acme:none:12345678", project_ids=ids)


@pytest.mark.parametrize("case", ["none", "absent", "owner", "alias"])
def test_refusals(server: Server, version: AdapterVersion, case: str) -> None:
    owner = server.client()
    project, _ = server.new_account(f"refused {case}")
    ids = {"none": [], "absent": ["proj_0"], "owner": [server.project.id]}.get(case, [project.id])
    name = registry.alias_of(version.name) if case == "alias" else version.name
    with pytest.raises(openai.BadRequestError) as caught:
        permissions(owner).create(name, project_ids=ids)
    wanted = {"none": "project_ids", "alias": "fine_tuned_model_checkpoint"}
    assert caught.value.param == wanted.get(case, "project_ids[0]")


def test_a_base_with_slashes_in_its_name(server: Server, tmp_path: Path) -> None:
    path = "/v1/fine_tuning/checkpoints/ft:org%2Fbase:acct:sfx:id/permissions"
    answer = server.http().get(path)
    assert answer.status_code == 404
    assert "ft:org/base:acct:sfx:id" in answer.json()["error"]["message"]
