"""Documents as rows of tokens: text, columns in a format and chats, with labels, and what has nothing to predict."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import tiny
from datasets import Dataset, IterableDataset
from tokenizers import normalizers

from qstar.data import DataSettings, pack, read_rows
from qstar.data.pack import _rows
from qstar.grid import Text

PLAIN = "{% for m in messages %}{{ m['role'][0] + ' ' + m['content'] + ' z ' }}{% endfor %}"
PROMPTED = PLAIN + "{% if add_generation_prompt %}{{ 'a ' }}{% endif %}"
MARKED = (
    "{% for m in messages %}{{ m['role'][0] + ' ' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + ' z ' }}{% endgeneration %}{% else %}{{ m['content'] + ' z ' }}{% endif %}{% endfor %}"
)
CHAT = [("user", "b c"), ("assistant", "d e"), ("user", "f"), ("assistant", "g")]


def messages(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in pairs]


def chatting(template: str | None):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def words(tokens: list[int]) -> str:
    return " ".join("." if token == -100 else tiny.WORDS[token] for token in tokens)


def test_documents_are_cut_into_rows_with_positions_of_their_own():
    rows = pack(Dataset.from_dict({"text": ["a b c d e f g", "", " \n", "h", "i j"]}), tiny.tokenizer(), 4)
    assert [words(row["input_ids"]) for row in rows] == ["a b c d", "e f g <eos>", "h <eos> i j"]
    assert [row["position_ids"] for row in rows] == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 0, 1]]


def test_columns_in_a_format_are_the_text():
    data = Dataset.from_dict({"q": ["a b", "c"], "the answer": ["d", "e"], "n": [1, 2]})
    rows = pack(data, tiny.tokenizer(), 20, text_format="q {q} a {the answer} {q}")
    assert [words(row["input_ids"]) for row in rows] == ["q a b a d a b <eos> q c a e c <eos>"]
    with pytest.raises(ValueError, match="text_format names 'question', but the dataset has 'q', 'the answer', 'n'"):
        pack(data, tiny.tokenizer(), 20, text_format="{question}")
    with pytest.raises(ValueError, match="dataset, row 1: column 'n' holds the number 1, but it must hold text"):
        pack(data, tiny.tokenizer(), 20, text_format="{q} {n}")


@pytest.mark.parametrize("form", ["no column", "{}", "{q", "{q!r}", "{q:>9}"])
def test_a_format_that_is_none_is_refused(form):
    with pytest.raises(ValueError, match=re.escape(f"text_format is {form!r}, but it must")):
        DataSettings(text_format=form).check_data()


@pytest.mark.parametrize("template", [PROMPTED, MARKED], ids=["by its prompt", "by its marks"])
def test_of_chats_the_assistants_part_alone_is_learned(template):
    chats = Dataset.from_dict({"messages": [messages(*CHAT), messages(*CHAT[:2])]})
    rows = pack(chats, chatting(template), 8, "messages")
    assert [words(row["input_ids"]) for row in rows] == ["u b c z a d e z", "u f z a g z u b", "c z a d e z"]
    assert [words(row["labels"]) for row in rows] == [". . . . . d e z", ". . . . g z . .", ". . . d e z"]
    assert [row["position_ids"] for row in rows] == [[*range(8)], [*range(6), 0, 1], [*range(6)]]


@pytest.mark.parametrize("template", [PROMPTED, MARKED], ids=["by its prompt", "by its marks"])
def test_a_chat_is_tokenized_as_the_tokenizer_itself_does(template):
    """In one go: this one opens every text that it is given with a token of its own."""
    tokenizer = chatting(template)
    tokenizer.backend_tokenizer.normalizer = normalizers.Prepend("x ")
    [row] = pack(Dataset.from_dict({"messages": [messages(*CHAT)]}), tokenizer, 20, "messages")
    assert row["input_ids"] == tokenizer.apply_chat_template(messages(*CHAT), return_dict=True)["input_ids"]
    assert words(row["input_ids"]) == "x u b c z a d e z u f z a g z"
    assert words(row["labels"]) == ". . . . . . d e z . . . . g z"


def test_a_tokenizer_that_cannot_place_its_tokens_is_refused_for_chats():
    tokenizer = SimpleNamespace(chat_template=PROMPTED, is_fast=False)
    with pytest.raises(ValueError, match="the tokenizer is a SimpleNamespace, which cannot say which part of a text"):
        pack(Dataset.from_dict({"messages": [messages(*CHAT)]}), tokenizer, 20, "messages")


def test_the_labels_of_chats_are_what_a_batch_predicts():
    [row] = pack(Dataset.from_dict({"messages": [messages(*CHAT)]}), chatting(PROMPTED), 20, "messages")
    batch = {name: Dataset.from_list([row]).with_format("torch")[name][:] for name in row}
    assert words(Text.from_inputs(**batch).targets[0].tolist()) == ". . . . d e z . . . . g z ."


def test_chats_that_cannot_be_read_are_refused_with_their_reason():
    chats = Dataset.from_dict({"messages": [messages(*CHAT)]})
    with pytest.raises(ValueError, match="text_column is 'messages', which holds chats, but the tokenizer has no chat"):
        pack(chats, tiny.tokenizer(), 8, "messages")
    with pytest.raises(ValueError, match=r"text_column is 'text', but .* 'messages'; text_column='messages' reads"):
        pack(chats, tiny.tokenizer(), 8)
    changing = "{% for m in messages %}{{ m['content'] + ' ' }}{% if loop.last %}{{ 'x ' }}{% endif %}{% endfor %}"
    with pytest.raises(ValueError, match="writes message 2 otherwise once the chat goes on, so that the assistant"):
        pack(chats, chatting(changing), 8, "messages")
    with pytest.raises(ValueError, match=r"row 1, column 'messages'.*: no such roles"):
        pack(chats, chatting("{{ raise_exception('no such roles') }}"), 8, "messages")


@pytest.mark.parametrize(
    "column, values, message",
    [
        ("text", ["a", None], "row 2: column 'text' holds null, but it must hold text"),
        ("text", [3], "row 1: column 'text' holds the number 3"),
        ("text", [["a", "b"]], r"row 1: column 'text' holds the list \['a', 'b'\]"),
        ("messages", [messages(*CHAT), None], "row 2: column 'messages' holds null, but it must hold text, or a chat"),
        ("messages", [[{"role": "user"}]], "row 1, column 'messages', message 1 has no 'content'"),
        ("messages", [[{"role": "user", "content": None}]], "message 1: column 'content' holds null"),
        ("messages", [[{"role": "user", "content": "a", "tools": "b"}]], "message 1 has 'tools', but it may have role"),
        ("messages", [messages(("assistant", "a"))], "the assistant speaks first"),
    ],
)
def test_a_row_that_is_no_document_is_named(column, values, message):
    data = Dataset.from_dict({column: values})
    for each in (data, data.to_iterable_dataset()):
        with pytest.raises(ValueError, match=f"dataset.*{message}"):
            list(pack(each, chatting(PROMPTED), 8, column))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "column, values, message",
    [
        ("text", ["", "\n"], "holds no token to predict: its documents are empty"),
        ("messages", [messages(("user", "a"))], "holds no token to predict"),
        ("text", [], "holds no rows"),
    ],
)
def test_a_dataset_without_a_token_to_predict_is_refused(column, values, message, stream):
    data = IterableDataset.from_generator(lambda: ({column: each} for each in values))
    if not stream:
        data = Dataset.from_dict({column: values})
    with pytest.raises(ValueError, match=f"some/data {message}"):
        read_rows(data, chatting(PROMPTED), DataSettings(text_column=column), "some/data")


def test_packing_reads_each_token_once():
    """A document that is longer than a row is cut from where the last row ended: what is left of it is not copied."""

    class Counted(list):
        copied = 0

        def __getitem__(self, key):
            part = super().__getitem__(key)
            Counted.copied += len(part)
            return part

    tokens = Counted(range(10_000))
    rows = _rows([(tokens, tokens)], 10)
    assert [token for ids, _, _ in rows for token in ids] == list(range(10_000))
    assert Counted.copied == 20_000
