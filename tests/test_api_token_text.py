"""Token strings, bytes and offsets against the tokenizer's own decoding."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from data.errors import ContextTooLong, InvalidInput
from serve.api.logprobs import LOWEST, CompletionLogprobs, top_by_string
from serve.api.prompts import Prompt, read_messages, read_prompts, room_for
from serve.api.schemas import ChatMessage
from serve.api.token_text import OffsetCounter, TokenText
from serve.engine.base import TokenLogprob


@pytest.fixture(scope="module")
def tokens() -> TokenText:
    return TokenText(tiny_tokenizer())


def sentencepiece() -> TokenText:
    """A vocabulary in the style of Llama 2: byte tokens, and a mark for spaces."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = {piece: i for i, piece in enumerate([*pieces, "\u2581the", "\u2581cat", "s"])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return TokenText(
        PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
        )
    )


@given(st.text(max_size=30))
def test_bytes_join_to_the_text(text: str) -> None:
    tokens = TokenText(tiny_tokenizer())
    ids = tokens.tokenizer.encode(text, add_special_tokens=False)
    assert b"".join(map(tokens.bytes_of, ids)).decode("utf-8") == text


def test_half_a_character_is_shown_as_bytes(tokens: TokenText) -> None:
    ids = tokens.tokenizer.encode("é", add_special_tokens=False)
    assert [tokens.string_of(i) for i in ids] == ["bytes:\\xc3", "bytes:\\xa9"]


def test_sentencepiece_vocabulary() -> None:
    tokens = sentencepiece()
    assert [tokens.string_of(i) for i in (259, 260, 261)] == [" the", " cat", "s"]
    assert tokens.bytes_of(3 + 0xC3) == b"\xc3"
    assert tokens.string_of(2) == "</s>"


def test_offsets_count_characters_not_bytes(tokens: TokenText) -> None:
    ids = tokens.tokenizer.encode("aé€b", add_special_tokens=False)
    assert tokens.offsets(ids, 10, OffsetCounter()) == [10, 11, 11, 12, 12, 12, 13]


def test_an_added_bos_takes_no_room_in_the_prompt(tokens: TokenText) -> None:
    ids = tokens.tokenizer.encode("ab", add_special_tokens=False)
    prompt = Prompt((tokens.tokenizer.bos_token_id, *ids), "ab")
    scored = [None, TokenLogprob(ids[0], -1.0, ()), TokenLogprob(ids[1], -2.0, ())]
    found = CompletionLogprobs(tokens, prompt, 0).of_prompt(scored)
    assert found["text_offset"] == [0, 0, 1]
    assert found["token_logprobs"] == [None, -1.0, -2.0]
    assert found["tokens"] == ["<|im_start|>", "a", "b"]


def test_chosen_token_wins_over_a_twin_with_the_same_string() -> None:
    twins = SimpleNamespace(string_of=lambda i: "same" if i < 2 else str(i))
    entry = TokenLogprob(1, -3.0, ((0, -0.5), (2, float("-inf"))))
    assert top_by_string(entry, twins, 5) == {"same": -3.0, "2": LOWEST}  # type: ignore[arg-type]


def test_every_form_of_prompt(tokens: TokenText) -> None:
    a, b = tokens.tokenizer.encode("ab", add_special_tokens=False)
    for value, expected in [
        ("ab", [(a, b)]),
        (["a", "b"], [(a,), (b,)]),
        ([a, b], [(a, b)]),
        ([[a], [b, a]], [(a,), (b, a)]),
        (None, [(tokens.tokenizer.bos_token_id,)]),
        ("", [(tokens.tokenizer.bos_token_id,)]),
    ]:
        assert [prompt.ids for prompt in read_prompts(value, tokens, True)] == expected
    assert read_prompts([a, b], tokens, True)[0].text == "ab"


@pytest.mark.parametrize("value", [[], [[]], [["a"]], ["a", 1], [1, [2]], 5, {}, True, [True]])
def test_prompts_of_no_form(tokens: TokenText, value: object) -> None:
    with pytest.raises(InvalidInput) as caught:
        read_prompts(value, tokens, True)
    assert (caught.value.param, caught.value.code) == ("prompt", "invalid_type")


@pytest.mark.parametrize("wrong", [-1, 259, 10**30])
def test_token_ids_outside_the_vocabulary(tokens: TokenText, wrong: int) -> None:
    with pytest.raises(InvalidInput, match="does not exist"):
        read_prompts([5, wrong], tokens, True)


def test_room_in_the_context() -> None:
    prompt = Prompt((1,) * 10, "")
    assert room_for(prompt, None, 16, 100, "prompt") == 16
    assert room_for(prompt, None, 16, 12, "prompt") == 2
    assert room_for(prompt, 2, 16, 12, "prompt") == 2
    assert room_for(prompt, 0, 16, 10, "prompt") == 0
    for wanted, context in ((3, 12), (None, 10), (0, 9)):
        with pytest.raises(ContextTooLong) as caught:
            room_for(prompt, wanted, 16, context, "prompt")
        assert f"This model's maximum context length is {context} tokens" in str(caught.value)
        assert "prompt is too long" in str(caught.value)
        assert caught.value.param == "prompt"


def test_messages_are_rendered_by_the_chat_template(tokens: TokenText) -> None:
    messages = [
        ChatMessage(role="developer", content="Be brief."),
        ChatMessage(role="user", content="Hi"),
    ]
    text = read_messages(messages, tokens).text
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_a_template_that_refuses(tokens: TokenText) -> None:
    strict = TokenText(tiny_tokenizer())
    strict.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InvalidInput, match="roles must alternate"):
        read_messages([ChatMessage(role="user", content="x")], strict)


def test_no_chat_template() -> None:
    bare = TokenText(tiny_tokenizer())
    bare.tokenizer.chat_template = None
    with pytest.raises(InvalidInput) as caught:
        read_messages([ChatMessage(role="user", content="x")], bare)
    assert caught.value.code == "chat_template_missing"


def test_an_empty_conversation_is_refused() -> None:
    with pytest.raises(InvalidInput, match="at least one message"):
        read_messages([], TokenText(tiny_tokenizer()))
