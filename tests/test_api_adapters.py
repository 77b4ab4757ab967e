"""Adapters in the server: exact in one batch, published hot, promoted, damaged, kept apart."""

from __future__ import annotations

import io
import json
import threading
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import openai
import pytest
import torch
from api_server import MODEL, Server, running, tiny_settings
from openai.types import Model
from peft import PeftModel
from tiny_models import random_adapter, tiny_model, tiny_tokenizer

from data import registry
from data.tables import AdapterVersion, Project

PROMPT = "The cat sat on"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tiny_settings(tmp_path_factory.mktemp("adapters"))) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return server.client()


def publish(
    server: Server, folder: Path, seed: int, suffix: str, project: Project | None = None
) -> AdapterVersion:
    fingerprint = server.runtime.models.base_fingerprint
    random_adapter(tiny_model("llama"), folder, seed=seed)
    (folder / "hone.json").write_text(json.dumps({"base_fingerprint": fingerprint}))
    return registry.publish(
        server.runtime.database,
        server.runtime.settings.adapters_dir,
        project or server.project,
        folder,
        MODEL,
        fingerprint,
        suffix=suffix,
    )


def complete(client: openai.OpenAI, model: str, **fields: Any) -> Any:
    options = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0} | fields
    return client.completions.create(
        model=model, extra_body={"ignore_eos": True, "return_token_ids": True}, **options
    )


def truth(folder: Path | None) -> list[int]:
    """Greedy tokens of transformers with PEFT."""
    model: Any = tiny_model("llama")
    if folder is not None:
        model = PeftModel.from_pretrained(model, str(folder)).eval()
    ids = tiny_tokenizer()(PROMPT, return_tensors="pt").input_ids
    options = {"do_sample": False, "pad_token_id": 2, "eos_token_id": []}
    with torch.no_grad():
        out = model.generate(input_ids=ids, max_new_tokens=12, **options)
    return list(out[0, ids.shape[1] :].tolist())


def test_two_adapters_and_the_base_in_one_batch_equal_peft(
    server: Server, client: openai.OpenAI, tmp_path: Path
) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    versions = [publish(server, folder, i, f"batch{i}") for i, folder in enumerate(folders)]
    models = [versions[0].name, versions[1].name, MODEL] * 3
    expected = [truth(folders[0]), truth(folders[1]), truth(None)] * 3
    assert len({tuple(tokens) for tokens in expected}) == 3
    with ThreadPoolExecutor(len(models)) as pool:
        answers = list(pool.map(lambda model: complete(client, model), models))
    assert [answer.choices[0].token_ids for answer in answers] == expected
    assert [answer.model for answer in answers] == models
    assert len({answer.system_fingerprint for answer in answers}) == 3


def test_publication_needs_no_restart_and_disturbs_nobody(
    server: Server, client: openai.OpenAI, tmp_path: Path
) -> None:
    expected = truth(None)
    failures: list[Any] = []
    done = threading.Event()

    def keep_asking() -> None:
        while not done.is_set():
            try:
                tokens = complete(client, MODEL).choices[0].token_ids
                failures.extend([] if tokens == expected else [tokens])
            except openai.OpenAIError as error:
                failures.append(error)

    askers = [threading.Thread(target=keep_asking) for _ in range(2)]
    for asker in askers:
        asker.start()
    try:
        for seed in (10, 11):
            folder = tmp_path / str(seed)
            version = publish(server, folder, seed, "hot")
            for name in (version.name, registry.alias_of(version.name)):
                answer = complete(client, name)
                assert answer.choices[0].token_ids == truth(folder)
                assert answer.model == version.name
    finally:
        done.set()
        for asker in askers:
            asker.join()
    assert failures == []


def test_an_alias_moves_between_requests_not_within_them(
    server: Server, client: openai.OpenAI, tmp_path: Path
) -> None:
    first = publish(server, tmp_path / "1", 20, "moving")
    alias = registry.alias_of(first.name)
    before = truth(tmp_path / "1")
    stream = client.completions.create(
        model=alias,
        prompt=PROMPT,
        max_tokens=12,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    chunks: list[Any] = [next(stream)]
    publish(server, tmp_path / "2", 21, "moving")
    chunks += list(stream)
    assert [i for chunk in chunks for i in chunk.choices[0].token_ids] == before
    assert {chunk.model for chunk in chunks} == {first.name}
    assert complete(client, alias).choices[0].token_ids == truth(tmp_path / "2")
    registry.rollback(server.runtime.database, server.project.id, alias)
    assert complete(client, alias).choices[0].token_ids == before


def test_models_are_listed_described_and_deleted(
    server: Server, client: openai.OpenAI, tmp_path: Path
) -> None:
    version = publish(server, tmp_path / "a", 30, "listed")
    alias = registry.alias_of(version.name)
    listed = {model.id: model for model in client.models.list()}
    assert {MODEL, version.name, alias} <= set(listed)
    for name in (MODEL, version.name, alias):
        model = client.models.retrieve(name)
        Model.model_validate(model.model_dump(), strict=True)
        assert model == listed[name]
    assert listed[alias].root == version.name  # type: ignore[attr-defined]
    assert listed[alias].parent == MODEL  # type: ignore[attr-defined]
    assert listed[version.name].owned_by == "acme"
    escaped = server.http().get(f"/v1/models/{quote(version.name, safe='')}")
    assert escaped.json()["id"] == version.name
    assert client.models.delete(version.name).deleted is True
    for name in (version.name, alias):
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve(name)
        with pytest.raises(openai.NotFoundError):
            complete(client, name)
    with pytest.raises(openai.PermissionDeniedError):
        client.models.delete(MODEL)


def test_weights_are_downloaded_and_give_the_same_tokens(
    server: Server, client: openai.OpenAI, tmp_path: Path
) -> None:
    version = publish(server, tmp_path / "a", 40, "out")
    with server.http() as http:
        for name in (version.name, version.name.rpartition(":")[0]):  # the alias too
            got = http.get(f"/v1/models/{quote(name, safe='')}/download")
            assert got.status_code == 200
            assert "-out-" in got.headers["content-disposition"]
            with zipfile.ZipFile(io.BytesIO(got.content)) as archive:
                archive.extractall(tmp_path / name)
    answer = complete(client, version.name).choices[0].token_ids
    assert truth(tmp_path / version.name) == answer
    lineage = json.loads((tmp_path / version.name / "lineage.json").read_text())
    assert (lineage["name"], lineage["base_model"]) == (version.name, MODEL)
    _, key = server.new_account("downloads")
    with server.http(key) as http:
        foreign, missing = (
            http.get(f"/v1/models/{quote(name, safe='')}/download")
            for name in (version.name, "ft:none")
        )
        assert foreign.status_code == missing.status_code == 404
        assert foreign.text == missing.text.replace("ft:none", version.name)
        assert http.get(f"/v1/models/{MODEL}/download").status_code == 404


def test_another_accounts_model_is_as_absent(server: Server, tmp_path: Path) -> None:
    version = publish(server, tmp_path / "a", 40, "private")
    _, key = server.new_account("stranger")
    absent = f"ft:{MODEL}:acme:private:00000000"
    with server.http(key) as http:
        for name in (version.name, registry.alias_of(version.name)):
            calls: list[tuple[str, str, Any]] = [
                ("GET", "/v1/models/{}", None),
                ("DELETE", "/v1/models/{}", None),
                ("POST", "/v1/completions", {"prompt": "x"}),
                ("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
            ]
            for method, path, body in calls:
                foreign, missing = (
                    http.request(method, path.format(model), json=body and {**body, "model": model})
                    for model in (name, absent)
                )
                assert foreign.status_code == missing.status_code == 404
                assert foreign.text == missing.text.replace(absent, name)
                assert set(foreign.headers) == set(missing.headers)
        assert [model["id"] for model in http.get("/v1/models").json()["data"]] == [MODEL]


def test_a_tampered_adapter_is_refused_and_harms_nobody(
    server: Server, client: openai.OpenAI, tmp_path: Path
) -> None:
    version = publish(server, tmp_path / "a", 50, "damaged")
    weights = server.runtime.settings.adapters_dir / version.path / "adapter_model.safetensors"
    good = weights.read_bytes()
    for damaged in (good[:-1] + bytes([good[-1] ^ 1]), good[: len(good) // 2], b""):
        weights.write_bytes(damaged)
        with pytest.raises(openai.InternalServerError) as caught:
            complete(client, version.name)
        assert caught.value.code == "adapter_tampered"
        assert str(server.runtime.settings.home) not in caught.value.message
        assert caught.value.response.headers["x-should-retry"] == "false"
        assert complete(client, MODEL).choices[0].token_ids == truth(None)
    time.sleep(0.02)
    weights.write_bytes(good)
    assert complete(client, version.name).choices[0].token_ids == truth(tmp_path / "a")
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))  # also after it was once good
    with pytest.raises(openai.InternalServerError):
        complete(client, version.name)


def test_an_adapter_of_another_base_is_refused(
    server: Server, client: openai.OpenAI, tmp_path: Path
) -> None:
    version = publish(server, tmp_path / "a", 60, "foreign")
    with server.runtime.database.write() as session:
        session.get_one(AdapterVersion, version.id).base_fingerprint = "base-other"
    with pytest.raises(openai.InternalServerError) as caught:
        complete(client, version.name)
    assert caught.value.code == "adapter_wrong_base"


def test_an_adapter_brings_its_own_tokenizer(
    server: Server, client: openai.OpenAI, tmp_path: Path
) -> None:
    folder = tmp_path / "a"
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}Q: {{ m['content'] }}\nA:{% endfor %}"
    tokenizer.save_pretrained(folder)
    version = publish(server, folder, 70, "own-template")
    answer: Any = client.chat.completions.create(
        model=version.name,
        messages=[{"role": "user", "content": "Hi"}],
        max_tokens=2,
        extra_body={"return_token_ids": True},
    )
    assert tokenizer.decode(answer.choices[0].prompt_token_ids) == "Q: Hi\nA:"
