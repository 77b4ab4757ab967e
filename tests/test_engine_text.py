"""Incremental text: the pieces join to the whole, no half character, no part of a stop string."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_tokenizer

from serve.engine.detokenize import TextStream

TOKENIZER = tiny_tokenizer()


def run(
    ids: list[int], stop: tuple[str, ...] = (), prompt: tuple[int, ...] = (), tokenizer: Any = None
) -> tuple[list[str], bool]:
    stream = TextStream(tokenizer or TOKENIZER, prompt, stop)
    pieces = []
    for token in ids:
        text, stopped = stream.push(token)
        pieces.append(text)
        if stopped:
            return pieces, True
    pieces.append(stream.flush())
    return pieces, False


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=40))
def test_pieces_join_to_the_text(text: str) -> None:
    pieces, _ = run(TOKENIZER.encode(text), prompt=tuple(TOKENIZER.encode("héllo €")))
    assert "".join(pieces) == text


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 258), max_size=40))
def test_any_tokens_join_to_what_the_tokenizer_says(ids: list[int]) -> None:
    pieces, _ = run(ids)
    assert "".join(pieces) == TOKENIZER.decode(ids, skip_special_tokens=True)


def test_a_character_comes_whole() -> None:
    pieces, _ = run(TOKENIZER.encode("a€😀"))
    assert pieces == ["a", "", "", "€", "", "", "", "😀", ""]


def test_unfinished_bytes_come_at_the_end() -> None:
    pieces, _ = run(TOKENIZER.encode("€")[:2])
    assert pieces == ["", "", "�"]


def test_bytes_that_the_prompt_began_are_finished() -> None:
    ids = TOKENIZER.encode("€")
    pieces, _ = run(ids[2:], prompt=tuple(ids[:2]))
    assert "".join(pieces) == "€"


@settings(max_examples=200, deadline=None)
@given(
    st.text("ab\n€", max_size=30), st.lists(st.text("ab\n€", min_size=1, max_size=4), max_size=3)
)
def test_stop_strings_are_brute_force(text: str, stops: list[str]) -> None:
    pieces, stopped = run(TOKENIZER.encode(text), tuple(stops))
    said = "".join(pieces)
    # The first stop string to be complete ends the text, at its earliest place.
    for end in range(1, len(text) + 1):
        places = [p for stop in stops if (p := text[:end].find(stop)) >= 0]
        if places:
            assert stopped
            assert said == text[: min(places)]
            return
    assert not stopped
    assert said == text


def test_what_may_become_a_stop_string_is_held_back() -> None:
    pieces, stopped = run(TOKENIZER.encode("ab\n\nc\n\n\n"), ("\n\n\n",))
    assert stopped
    assert pieces == ["a", "b", "", "", "\n\nc", "", "", ""]


def test_stop_strings_wait_for_min_tokens() -> None:
    stream = TextStream(TOKENIZER, (), ("b",))
    said = [stream.push(token, may_stop=n >= 3) for n, token in enumerate(TOKENIZER.encode("abab"))]
    assert said == [("a", False), ("b", False), ("a", False), ("", True)]


def test_leading_spaces_of_word_tokens_survive() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<unk>": 0, "▁Hello": 1, "▁world": 2, "!": 3}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    pieces, _ = run([2, 2, 3] * 8, prompt=(1,), tokenizer=tokenizer)
    assert "".join(pieces) == " world world!" * 8


@pytest.mark.parametrize("length", [1, 11, 12, 13, 50])
def test_windows_of_any_length(length: int) -> None:
    text = ("añ€😀 " * 20)[:length]
    assert "".join(run(TOKENIZER.encode(text))[0]) == text
