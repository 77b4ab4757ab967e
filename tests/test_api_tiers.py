"""Adapters over HTTP: named by a field, added in part, imported, loaded, pinned; cached tokens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import openai
import pytest
import torch
from api_server import MODEL, Server, running, tiny_settings
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from tiny_models import random_adapter, tiny_model, tiny_tokenizer

from data import model_access, permissions

PROMPT = "The cat sat on"
FILES = {"config": "adapter_config.json", "weights": "adapter_model.safetensors"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tiny_settings(tmp_path_factory.mktemp("tiers"))) as found:
        yield found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_adapter(tiny_model("llama"), tmp_path_factory.mktemp("trained") / "a")


@pytest.fixture(scope="module")
def imported(server: Server, folder: Path) -> dict[str, Any]:
    answer = send(server.http(), folder, suffix="mine")
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def send(http: httpx.Client, folder: Path, **fields: str) -> httpx.Response:
    files = {field: (folder / name).read_bytes() for field, name in FILES.items()}
    return http.post("/v1/adapters", files=files, data=fields)


def say_task(folder: Path, task: str) -> None:
    config = json.loads((folder / FILES["config"]).read_text())
    (folder / FILES["config"]).write_text(json.dumps(config | {"task_type": task}))


def complete(server: Server, model: str, **fields: Any) -> Any:
    options = {"prompt": PROMPT, "max_tokens": 10, "temperature": 0, "extra_body": {}} | fields
    options["extra_body"] |= {"ignore_eos": True, "return_token_ids": True}
    return server.client().completions.create(model=model, **options)


def truth(folder: Path | None, scale: float = 1.0) -> list[int]:
    """Greedy tokens of transformers with PEFT."""
    model: Any = tiny_model("llama")
    if folder is not None:
        model = PeftModel.from_pretrained(model, str(folder)).eval()
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.scaling["default"] *= scale
    ids = tiny_tokenizer()(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        out = model.generate(
            input_ids=ids, max_new_tokens=10, do_sample=False, pad_token_id=2, eos_token_id=[]
        )
    return list(out[0, ids.shape[1] :].tolist())


def act(server: Server, name: str, verb: str) -> httpx.Response:
    return server.http().post(f"/v1/adapters/{quote(name, safe='')}/{verb}")


def test_an_imported_adapter_answers_as_peft(
    server: Server, imported: dict[str, Any], folder: Path
) -> None:
    assert imported["id"].startswith(f"ft:{MODEL}:acme:mine:")
    assert (imported["object"], imported["rank"], imported["loaded"]) == ("adapter", 4, True)
    for name in (imported["id"], imported["id"].rpartition(":")[0]):
        assert complete(server, name).choices[0].token_ids == truth(folder)


@pytest.mark.parametrize("field", ["adapter", "adapter_id"])
def test_an_adapter_named_beside_the_base(
    server: Server, imported: dict[str, Any], folder: Path, field: str
) -> None:
    answer = complete(server, MODEL, extra_body={field: imported["id"]})
    assert answer.choices[0].token_ids == truth(folder)
    assert answer.model == imported["id"]


@pytest.mark.parametrize("scale", [0, 0.5, 1])
def test_a_part_of_an_adapter(
    server: Server, imported: dict[str, Any], folder: Path, scale: float
) -> None:
    whole = complete(server, imported["id"])
    answer = complete(server, imported["id"], extra_body={"adapter_scale": scale})
    assert answer.choices[0].token_ids == truth(folder, scale)
    assert (answer.system_fingerprint == whole.system_fingerprint) == (scale == 1)
    chat = server.client().chat.completions.create(
        model=imported["id"],
        messages=[{"role": "user", "content": "hi"}],
        max_tokens=2,
        extra_body={"adapter_scale": scale},
    )
    assert chat.system_fingerprint == answer.system_fingerprint


@pytest.mark.parametrize(
    ("model", "body", "param"),
    [
        (MODEL, {"adapter_scale": 0.5}, "adapter_scale"),
        (MODEL, {"adapter": "ft:none"}, None),
        (MODEL, {"adapter": "MINE", "adapter_scale": 2}, "adapter_scale"),
        (MODEL, {"adapter": "MINE", "adapter_id": "other"}, "adapter_id"),
        ("MINE", {"adapter": MODEL}, "adapter"),
    ],
)
def test_contradictions(
    server: Server, imported: dict[str, Any], model: str, body: Any, param: str | None
) -> None:
    named = {k: imported["id"] if v == "MINE" else v for k, v in body.items()}
    model = imported["id"] if model == "MINE" else model
    with pytest.raises(openai.APIStatusError) as caught:
        complete(server, model, extra_body=named)
    if param is None:
        assert caught.value.status_code == 404
    else:
        assert (caught.value.status_code, caught.value.param) == (400, param)


def test_where_an_adapter_is(server: Server, imported: dict[str, Any]) -> None:
    name = imported["id"]
    complete(server, name)
    [found] = [a for a in server.http().get("/v1/adapters").json()["data"] if a["id"] == name]
    assert (found["tier"], found["pinned"]) == ("resident", False)
    assert found["num_requests"] > 0
    assert found["last_used_at"] >= found["created_at"]
    assert act(server, name, "pin").json()["pinned"] is True
    assert server.http().get(f"/v1/adapters/{quote(name, safe='')}").json()["pinned"] is True
    assert act(server, name, "unpin").json()["pinned"] is False
    act(server, name, "unload")
    complete(server, MODEL)
    assert server.http().get(f"/v1/adapters/{quote(name, safe='')}").json()["tier"] == "disk"
    assert act(server, name, "load").json()["loaded"] is True


def test_of_another_account_nothing_is_known(server: Server, imported: dict[str, Any]) -> None:
    _, key = server.new_account("stranger")
    http = server.http(key)
    assert http.get("/v1/adapters").json()["data"] == []
    for name, route in [(n, r) for n in (imported["id"], "ft:x") for r in ("", "/load", "/pin")]:
        path = f"/v1/adapters/{quote(name, safe='')}{route}"
        answer = http.post(path) if route else http.get(path)
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "model_not_found"


def test_the_same_adapter_of_two_accounts_is_two(
    server: Server, imported: dict[str, Any], folder: Path
) -> None:
    complete(server, imported["id"])
    _, key = server.new_account("twin")
    http = server.http(key)
    twin = send(http, folder, suffix="mine").json()
    assert twin["digest"] == imported["digest"]
    assert (twin["num_requests"], twin["last_used_at"], twin["num_loads"]) == (0, None, 1)
    path = f"/v1/adapters/{quote(twin['id'], safe='')}"
    act(server, imported["id"], "pin")
    for verb in ("unpin", "unload"):
        assert http.post(f"{path}/{verb}").status_code == 200
    mine = server.http().get(f"/v1/adapters/{quote(imported['id'], safe='')}").json()
    assert (mine["loaded"], mine["pinned"]) == (True, True)
    act(server, imported["id"], "unpin")


def test_a_shared_adapter_is_its_owners(server: Server, imported: dict[str, Any]) -> None:
    project, key = server.new_account("friend")
    database = server.runtime.database
    permissions.grant(database, server.project.id, imported["id"], [project.id])
    http, path = server.http(key), f"/v1/adapters/{quote(imported['id'], safe='')}"
    told = http.get(path).json()
    assert told["digest"] == imported["digest"]
    assert {told[k] for k in ("tier", "loaded", "pinned", "num_requests", "num_loads")} == {None}
    for verb in ("load", "unload", "pin", "unpin"):
        assert http.post(f"{path}/{verb}").status_code == 404


def test_a_denied_adapter_is_as_absent(server: Server, folder: Path) -> None:
    project, key = server.new_account("denied")
    http = server.http(key)
    name = send(http, folder).json()["id"]
    model_access.replace(server.runtime.database, project.id, "deny_list", [name])
    quoted = quote(name, safe="")
    assert http.get("/v1/adapters").json()["data"] == []
    answers = [
        http.get(f"/v1/adapters/{quoted}"),
        http.delete(f"/v1/models/{quoted}"),
        http.get(f"/v1/fine_tuning/checkpoints/{quoted}/permissions"),
    ]
    assert {answer.json()["error"]["code"] for answer in answers} == {"model_not_found"}


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (lambda f: (f / FILES["weights"]).write_bytes(b"not safetensors"), "adapter_truncated"),
        (lambda f: (f / FILES["config"]).write_text("{}"), None),
        (lambda f: say_task(f, "SEQ_CLS"), "adapter_unsupported"),
        (lambda f: random_adapter(tiny_model("gpt2"), f, targets=["c_attn"]), "adapter_wrong_base"),
    ],
)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")
def test_a_bad_import_tells_why_and_leaves_nothing(
    server: Server, folder: Path, tmp_path: Path, damage: Any, code: str | None
) -> None:
    mine = shutil.copytree(folder, tmp_path / "mine")
    damage(mine)
    before = server.http().get("/v1/adapters").json()
    answer = send(server.http(), mine)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert code is None or error["code"] == code
    assert "hone-import" not in error["message"]
    assert server.http().get("/v1/adapters").json() == before


def test_an_import_lacks_nothing(server: Server, folder: Path) -> None:
    http = server.http()
    weights = (folder / FILES["weights"]).read_bytes()
    assert (
        http.post("/v1/adapters", files={"weights": weights}).json()["error"]["param"] == "config"
    )
    assert send(http, folder, suffix="a/b").json()["error"]["param"] == "suffix"
    assert send(http, folder, sufix="a").json()["error"]["code"] == "unknown_parameter"


def test_deleted_files_of_a_published_adapter(server: Server, folder: Path) -> None:
    """While its adapter is in memory, and after: told, and nobody else is harmed."""
    name = send(server.http(), folder, suffix="gone").json()["id"]
    expected = complete(server, name).choices[0].token_ids
    version = next(iter(server.runtime.settings.adapters_dir.glob("advr_*")))
    for path in server.runtime.settings.adapters_dir.glob("advr_*"):
        version = path if path.stat().st_mtime > version.stat().st_mtime else version
    shutil.rmtree(version)
    with pytest.raises(openai.APIStatusError) as caught:
        complete(server, name)
    assert str(version) not in caught.value.message
    assert len(expected) == 10
    assert complete(server, MODEL).choices[0].token_ids == truth(None)


def test_cached_tokens_are_told(server: Server) -> None:
    prompt = "a shared beginning " * 8
    told = []
    for _ in range(2):
        usage = complete(server, MODEL, prompt=prompt, max_tokens=2).usage
        told.append(usage.prompt_tokens_details.cached_tokens)
    assert told == [0, (len(prompt) - 1) // 16 * 16]
    chunks = server.client().completions.create(
        model=MODEL, prompt=[prompt, "x"], stream=True, stream_options={"include_usage": True}
    )
    assert list(chunks)[-1].usage.prompt_tokens_details.cached_tokens == told[1]


# ---- completion between a prompt and a suffix ----


@pytest.fixture(scope="module")
def middle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose tokenizer has fill-in-the-middle tokens."""
    settings = tiny_settings(tmp_path_factory.mktemp("middle"))
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<fim_prefix>", "<fim_suffix>", "<fim_middle>"], special_tokens=True)
    tokenizer.save_pretrained(settings.model)
    model = tiny_model("llama")
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(settings.model)
    with running(settings) as found:
        yield found


def test_a_completion_between(middle: Server) -> None:
    before, after, between = range(len(tiny_tokenizer()), len(tiny_tokenizer()) + 3)
    encode = tiny_tokenizer().encode
    ids = [before, *encode("def f("), after, *encode("): pass"), between]
    expected = complete(middle, MODEL, prompt=ids)
    answer = complete(middle, MODEL, prompt="def f(", suffix="): pass")
    assert answer.choices[0].prompt_token_ids == ids
    assert answer.choices[0].token_ids == expected.choices[0].token_ids
    assert answer.usage.prompt_tokens == len(ids)
    with pytest.raises(openai.BadRequestError) as caught:
        complete(middle, MODEL, suffix="x", echo=True)
    assert caught.value.param == "echo"


def test_others_run_while_an_adapter_is_imported(server: Server, folder: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(complete, server, MODEL) for _ in range(4)]
        assert send(server.http(), folder, suffix="busy").status_code == 200
    assert all(one.result().choices[0].token_ids == truth(None) for one in asked)
