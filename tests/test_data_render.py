"""Rendering: ids and loss masks against the text they stand for, token by token."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import CHATML, EOS_ID, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data.errors import DataError, InvalidInput
from data.render import IGNORED, Example, prompt_ids, question, render, truncate
from data.rows import Chat, Message, Preference, PromptCompletion, Text

TOKENIZER = tiny_tokenizer()  # one token a byte; `<|im_end|>` is EOS and padding
BOS, EOS = "<|im_start|>", "<|im_end|>"
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40).filter(
    lambda text: "<|" not in text
)


def tokenizer_with(template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def user(content: str) -> Message:
    return Message("user", content)


def assistant(content: str, weight: Any = None) -> Message:
    return Message("assistant", content, weight)


def learned(example: Example, tokenizer: Any = TOKENIZER) -> str:
    return tokenizer.decode([label for label in example.labels if label != IGNORED])


def read(example: Example, tokenizer: Any = TOKENIZER) -> str:
    return tokenizer.decode(example.input_ids)


def token_by_token(example: Example, pieces: list[tuple[str, bool]]) -> None:
    """Check every id and label against pieces of text that are learned or only read."""
    ids: list[int] = []
    labels: list[int] = []
    for text, is_learned in pieces:
        part = TOKENIZER.encode(text, add_special_tokens=False)
        ids += part
        labels += part if is_learned else [IGNORED] * len(part)
    assert list(example.input_ids) == ids
    assert list(example.labels) == labels


def test_prompt_and_completion() -> None:
    example = render(TOKENIZER, PromptCompletion("Where is it?\n\nIntent:", " parcel"))
    token_by_token(example, [("Where is it?\n\nIntent:", False), (" parcel" + EOS, True)])


def test_conversation() -> None:
    row = Chat(
        (
            Message("developer", "Be brief."),
            user("Hi"),
            assistant("Hello!"),
            user("2+2?"),
            assistant("4"),
            user("Thanks"),
        )
    )
    token_by_token(
        render(TOKENIZER, row),
        [
            (f"{BOS}system\nBe brief.{EOS}\n{BOS}user\nHi{EOS}\n{BOS}assistant\n", False),
            (f"Hello!{EOS}", True),
            (f"\n{BOS}user\n2+2?{EOS}\n{BOS}assistant\n", False),
            (f"4{EOS}", True),
        ],
    )


def test_conversation_is_what_the_template_renders() -> None:
    row = Chat((user("Hi"), assistant("Hello!"), user("2+2?"), assistant("4")))
    turns = [{"role": m.role, "content": m.content} for m in row.messages]
    whole = TOKENIZER.apply_chat_template(turns, tokenize=False)
    assert read(render(TOKENIZER, row)) == whole.rstrip("\n")


def test_weight_0_turns_are_read_and_not_learned() -> None:
    row = Chat((user("a"), assistant("no", 0), user("b"), assistant("yes", 1)))
    example = render(TOKENIZER, row)
    assert learned(example) == "yes" + EOS
    assert "no" in read(example)


def test_completion_of_messages_learns_that_alone() -> None:
    row = PromptCompletion((user("a"), assistant("old"), user("b")), (assistant("new"),))
    assert learned(render(TOKENIZER, row)) == "new" + EOS


def test_text_is_learned_from_a_documents_first_token_on() -> None:
    example = render(TOKENIZER, Text("abc"))
    assert example.input_ids == (1, *TOKENIZER.encode("abc", add_special_tokens=False), EOS_ID)
    assert example.labels == (IGNORED, *example.input_ids[1:])


def test_empty_prompt_is_the_start_of_a_document() -> None:
    assert prompt_ids(TOKENIZER, "") == [1]
    without_bos = tiny_tokenizer()
    without_bos.bos_token = None
    assert prompt_ids(without_bos, "") == [EOS_ID]


def test_eos_in_the_prompt_stays_out_of_the_loss() -> None:
    row = Chat((user("a"), assistant("b")))  # the template writes EOS after the user's turn
    example = render(TOKENIZER, row)
    assert example.input_ids.count(EOS_ID) == 2
    assert example.labels.count(EOS_ID) == 1


@given(TEXT, TEXT.filter(bool))
def test_any_pair_is_its_prompt_then_its_completion(prompt: str, completion: str) -> None:
    example = render(TOKENIZER, PromptCompletion(prompt, completion))
    start = len(prompt_ids(TOKENIZER, prompt))
    assert list(example.input_ids[:start]) == prompt_ids(TOKENIZER, prompt)
    assert set(example.labels[:start]) == {IGNORED}
    assert example.labels[start:] == example.input_ids[start:]
    assert TOKENIZER.decode(example.input_ids[start:-1]) == completion
    assert example.input_ids[-1] == EOS_ID


@given(st.lists(st.tuples(TEXT, TEXT, st.sampled_from([None, 0, 1])), min_size=1, max_size=4))
def test_any_conversation_learns_its_weighted_answers(turns: list[tuple[str, str, Any]]) -> None:
    turns[-1] = (*turns[-1][:2], 1)
    messages = [m for q, a, weight in turns for m in (user(q), assistant(a, weight))]
    example = render(TOKENIZER, Chat(tuple(messages)))
    assert learned(example) == "".join(a + EOS for _, a, weight in turns if weight != 0)
    asked, answer = question(TOKENIZER, Chat(tuple(messages)))
    assert list(example.input_ids[: len(asked)]) == asked  # what serving will be sent
    assert answer == turns[-1][1]


@given(TEXT, TEXT.filter(bool), st.integers(8, 120))
def test_truncation_keeps_the_first_token_the_answer_and_eos(
    prompt: str, completion: str, limit: int
) -> None:
    whole = render(TOKENIZER, PromptCompletion(prompt, completion))
    cut = truncate(whole, limit)
    assert len(cut) == min(len(whole), limit) == len(cut.labels)
    assert cut.labels[-1] == cut.input_ids[-1] == EOS_ID
    assert cut.num_trained == min(whole.num_trained, limit - 1)
    if cut.num_trained == whole.num_trained:
        assert cut.input_ids[0] == whole.input_ids[0]
        assert cut.input_ids[1:] == whole.input_ids[len(whole) - len(cut) + 1 :]
    else:
        start = len(whole) - whole.num_trained
        assert cut.input_ids[1:-1] == whole.input_ids[start : start + limit - 2]


def test_truncating_a_conversation_keeps_its_last_answer() -> None:
    row = Chat((user("a" * 50), assistant("b" * 50), user("c"), assistant("last")))
    cut = truncate(render(TOKENIZER, row), 40)
    assert len(cut) == 40
    assert learned(cut).endswith("last" + EOS)


def test_a_tokenizer_that_adds_spaces_adds_none_to_completions() -> None:
    letters = ["<s>", "</s>", "<unk>", "\n", "▁", *"abcdefghijklmnopqrstuvwxyz:"]
    backend = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[], unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    for completion in ("yes", " yes"):
        example = render(tokenizer, PromptCompletion("ask:", completion))
        assert read(example, tokenizer) == f"ask:{completion}</s>"


def test_a_base_without_chat_template() -> None:
    with pytest.raises(InvalidInput, match="no chat template") as caught:
        render(tokenizer_with(None), Chat((user("a"), assistant("b"))))
    assert caught.value.code == "chat_template_missing"


def test_a_template_that_renders_history_differently() -> None:
    forgetful = CHATML.replace(
        "message['content']",
        "(message['content'] if loop.last or message['role'] == 'user' else '...')",
    )
    row = Chat((user("a"), assistant("first"), user("b"), assistant("second")))
    with pytest.raises(DataError, match=r"messages\[1\] differently") as caught:
        render(tokenizer_with(forgetful), row)
    assert caught.value.code == "chat_template_not_prefix"
    single = Chat((user("a"), assistant("first", 0), user("b"), assistant("second")))
    assert learned(render(tokenizer_with(forgetful), single)) == "second" + EOS


def test_a_template_that_refuses_the_messages() -> None:
    strict = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="roles must alternate") as caught:
        render(tokenizer_with(strict), Chat((user("a"), assistant("b"))))
    assert caught.value.code == "chat_template_refused"


def test_a_template_without_end_of_turn_learns_the_whole_turn() -> None:
    bare = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    assert learned(render(tokenizer_with(bare), Chat((user("a"), assistant("b"))))) == "b\n"


@pytest.mark.parametrize(
    ("row", "code"),
    [
        (Chat((assistant("hello"),)), "no_prompt"),
        (Chat((user("a"), assistant("b", 0))), "no_assistant_message"),
        (Preference("a", "b", "c"), "wrong_format"),
    ],
)
def test_rows_that_teach_nothing(row: Any, code: str) -> None:
    with pytest.raises(DataError) as caught:
        render(TOKENIZER, row)
    assert caught.value.code == code


@pytest.mark.parametrize(
    "row",
    [
        PromptCompletion("a", "b"),
        PromptCompletion((Message("user", "a"),), "b"),
        Chat((Message("user", "a"), Message("assistant", "b"))),
    ],
)
def test_a_tokenizer_without_eos(row: Any) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(InvalidInput, match="no EOS token"):
        render(tokenizer, row)
