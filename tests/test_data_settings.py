"""Configuration: where values come from, and that every mistake is told, with its place."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field, model_validator

from data.errors import ConfigError
from data.settings import Settings, StrictModel, load_settings, nearest, read_config


class Inner(StrictModel):
    rank: int = 4
    mode: Literal["a", "b"] = "a"


class Example(StrictModel):
    path: Path
    rate: float = 0.5
    names: list[str] = Field(default_factory=list)
    inner: Inner = Inner()

    @model_validator(mode="after")
    def _check(self) -> Example:
        if self.rate > 1:
            raise ValueError(f"rate is {self.rate}; expected at most 1")
        return self


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problems(path: Path | None, *words: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read_config(Example, path, words)
    assert all(problem in str(caught.value) for problem in caught.value.problems)
    return caught.value.problems


def test_words_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, "path: a.txt\nrate: 0.25\ninner: {rank: 8}\n")
    config = read_config(Example, path, ["rate=0.75", "inner.mode=b", "names=[x, y]"])
    assert config.path == Path("a.txt")
    assert (config.rate, config.names) == (0.75, ["x", "y"])
    assert (config.inner.rank, config.inner.mode) == (8, "b")


def test_variables_stand_between_file_and_words(tmp_path: Path) -> None:
    path = write(tmp_path, "port: 1\nhost: file\nmodel: file\n")
    environ = {"HONE_PORT": "2", "HONE_HOST": "variable", "OTHER": "x"}
    settings = load_settings(path, ["port=3"], environ)
    assert (settings.port, settings.host, settings.model) == (3, "variable", "file")
    by_variable = load_settings(environ={"HONE_CONFIG": str(path), "HONE_API_KEY": "sk-x"})
    assert by_variable.host == "file"


def test_unknown_keys_name_the_nearest_and_their_place(tmp_path: Path) -> None:
    path = write(tmp_path, "path: a\nraet: 1\ninner:\n  rnak: 2\n")
    found = problems(path, "zzz=1")
    assert found[0] == f'{path}:2: unknown key "raet"; did you mean "rate"?'
    assert found[1] == f'{path}:4: unknown key "inner.rnak"; did you mean "rank"?'
    assert found[2].startswith('"zzz=1": unknown key "zzz"; known keys: path, rate')


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, "rate: hot\ninner: {rank: low, mode: c}\nodd: 1\n")
    found = problems(path, "names=3", "nonsense")
    assert len(found) == 7
    for place in (f"{path}:1", f"{path}:2", f"{path}:3", '"names=3"', '"nonsense"', '"path"'):
        assert any(place in problem for problem in found), place


def test_impossible_combinations_are_told_with_the_value() -> None:
    assert problems(None, "path=a", "rate=2") == ["rate is 2.0; expected at most 1"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "is not valid YAML"),
        ("- 1\n- 2\n", "must be a mapping"),
        ("path: a\npath: b\n", '"path" is given twice'),
        ("path: 2024-13-45\n", "is not valid YAML"),
        ("path: &a [*a]\n", "is not valid YAML"),
        ("path: !!python/object:os.system x\n", "is not valid YAML"),
    ],
)
def test_broken_files_are_told_with_their_line(tmp_path: Path, text: str, said: str) -> None:
    found = problems(write(tmp_path, text))
    assert any(said in problem and "config.yaml:" in problem for problem in found)


def test_files_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    assert "cannot be read" in problems(tmp_path / "absent.yaml")[0]
    binary = tmp_path / "config.yaml"
    binary.write_bytes(b"\xff\xfe")
    assert "is not UTF-8" in problems(binary)[0]


def test_an_empty_file_means_the_defaults(tmp_path: Path) -> None:
    assert read_config(Settings, write(tmp_path, "")) == Settings()


def test_a_word_may_not_reach_into_a_value() -> None:
    assert any("is a value, not a section" in p for p in problems(None, "path=a", "path.b=1"))


def test_settings_put_everything_below_home(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    assert settings.effective_database_url == f"sqlite:///{tmp_path}/hone.db"
    assert settings.effective_blob_url == f"file://{tmp_path}/files"
    folders = (settings.files_dir, settings.adapters_dir, settings.models_dir, settings.runs_dir)
    assert {folder.parent for folder in folders} == {tmp_path}


@pytest.mark.parametrize("word", ["port=70000", "max_batch=0", "lease_s=-1", "log_level=loud"])
def test_settings_out_of_range_are_refused(word: str) -> None:
    with pytest.raises(ConfigError, match=word.partition("=")[0]):
        load_settings(overrides=[word], environ={})


@pytest.mark.parametrize("word", ["port=no", "lease_s=on", "max_context=false"])
def test_truth_values_are_not_numbers(word: str) -> None:
    with pytest.raises(ConfigError, match="a number is expected"):
        load_settings(overrides=[word], environ={})


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Settings().port = 1  # type: ignore[misc]


def test_nearest_is_none_when_nothing_is_close() -> None:
    assert nearest("learning_rat", ["learning_rate", "rank"]) == "learning_rate"
    assert nearest("zzz", ["learning_rate", "rank"]) is None
