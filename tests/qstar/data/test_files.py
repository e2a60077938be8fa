"""Local files: what is read is what they hold, and what is wrong in one is named by file, line and column."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset

from qstar.data import load_texts


def test_brackets_in_the_name_of_a_file_are_no_pattern(tmp_path):
    (tmp_path / "data1.txt").write_text("wrong")
    (tmp_path / "data[1].txt").write_text("right")
    assert load_texts(tmp_path / "data[1].txt")["text"][:] == ["right"]
    Dataset.from_dict({"text": ["wrong"]}).to_parquet(tmp_path / "data1.parquet")
    Dataset.from_dict({"text": ["right"]}).to_parquet(tmp_path / "new.parquet")
    (tmp_path / "new.parquet").rename(tmp_path / "data[1].parquet")
    assert load_texts(tmp_path / "data[1].parquet")["text"][:] == ["right"]
    (tmp_path / "data1.jsonl").write_text('{"text": "wrong"}')
    (tmp_path / "data[1].jsonl").write_text('{"text": "right"}')
    assert load_texts(tmp_path / "data[1].jsonl")["text"][:] == ["right"]


@pytest.mark.parametrize(
    "name, content", [("a.txt", "one"), ("a.json", '[{"text": "one"}]'), ("a.jsonl", '{"text": "one"}\n')]
)
def test_a_byte_order_mark_does_not_stay_in_the_text(name, content, tmp_path):
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.encode())
    assert load_texts(tmp_path / name)["text"][:] == ["one"]


@pytest.mark.parametrize(
    "documents, expected",
    [("paragraph", ["a\nb", "c\n"]), ("line", ["a", "b", "", "c"]), ("file", ["a\nb\n\nc\n"])],
)
def test_a_document_of_a_text_file_is_a_paragraph_a_line_or_all_of_it(documents, expected, tmp_path):
    (tmp_path / "a.txt").write_text("a\nb\n\nc\n")
    assert load_texts(tmp_path / "a.txt", documents=documents)["text"][:] == expected
    with pytest.raises(ValueError, match="documents is 'page', but it must be 'paragraph', 'line', 'file'"):
        load_texts(tmp_path / "a.txt", documents="page")


@pytest.mark.parametrize(
    "name, content",
    [
        ("lines.jsonl", '{"text": "2020-01-01", "n": 1}\n\n{"text": "12", "n": "x"}\n'),
        ("lines.json", '{"text": "2020-01-01", "n": 1}\n{"text": "12", "n": "x"}'),
        ("list.json", '[\n {"text": "2020-01-01"},\n {"text": "12"}\n]'),
        ("list.jsonl", '[{"text": "2020-01-01"}, {"text": "12"}]'),
    ],
)
def test_text_that_looks_like_something_else_stays_text(name, content, tmp_path):
    (tmp_path / name).write_text(content)
    assert load_texts(tmp_path / name, columns=["text"])["text"][:] == ["2020-01-01", "12"]


def test_columns_are_those_that_are_asked_for_or_those_of_the_first_row(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": "x", "b": "y", "c": 1}\n{"b": "z", "a": "v", "c": "w"}\n')
    assert load_texts(tmp_path / "a.jsonl", columns=["a", "b"])[:] == {"a": ["x", "v"], "b": ["y", "z"]}
    (tmp_path / "b.jsonl").write_text('{"a": "x"}\n{"b": "z"}\n')
    assert load_texts(tmp_path / "b.jsonl")[:] == {"a": ["x", None]}


def test_one_object_over_several_lines_is_one_row(tmp_path):
    (tmp_path / "a.json").write_text('{\n "text": "a"\n}')
    assert load_texts(tmp_path / "a.json", columns=["text"])["text"][:] == ["a"]


def test_a_file_that_has_changed_is_read_again(tmp_path):
    path = tmp_path / "a.jsonl"
    for text in ("one", "another"):
        path.write_text(json.dumps({"text": text}))
        assert load_texts(path, columns=["text"])["text"][:] == [text]


GOOD = b'{"text": "a"}\n'


@pytest.mark.parametrize(
    "content, message",
    [
        (GOOD + b'\n{"text": null}', "a.jsonl, line 3: column 'text' holds null, but it must hold text, or a chat"),
        (GOOD + b'{"body": "b"}', "line 2 has no column 'text', but 'body'"),
        (GOOD + b'{"text": 3}', "line 2: column 'text' holds the number 3"),
        (GOOD + b'{"text": ["a", "b"]}', r"line 2: column 'text' holds the list \['a', 'b'\]"),
        (b'{"text": ["a", "b"]}', r"line 1: column 'text' holds the list \['a', 'b'\]"),
        (GOOD + b'{"text": "\\ud800"}', "line 2: column 'text' holds half of a surrogate pair at character 1"),
        (GOOD + b'{"text": "b', "line 2, character 10: this is not JSON: it ends too soon"),
        (GOOD + b'{"text": "b"', "line 2, character 13: this is not JSON: it ends too soon"),
        (b'{"text": "b\n' + GOOD, "line 1, character 10: this is not JSON: it ends too soon"),
        (GOOD + b'{"text": b}\n' + GOOD, "line 2, character 10: this is not JSON: Expecting value"),
        (GOOD + b'{"text": "caf\xe9"}', "line 2, character 14: the byte 0xe9 is not UTF-8"),
        (GOOD + b"3", "line 2 holds the number 3, but it must hold an object"),
        (b"", "a.jsonl', but the file is empty"),
        (b"\n \n", "a.jsonl holds no rows"),
        (b"\xef\xbb\xbf", "a.jsonl holds no rows"),
    ],
)
def test_what_is_wrong_in_json_lines_is_named_with_its_place(content, message, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_texts(tmp_path / "a.jsonl", columns=["text"])


def test_a_number_among_texts_is_found_beyond_what_datasets_reads_at_once(tmp_path):
    """It would put all texts that it reads together with the number into quotes."""
    lines = [json.dumps({"text": "a" * 1000})] * 11000 + ['{"text": "b"}', '{"text": 3}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="line 11002: column 'text' holds the number 3"):
        load_texts(tmp_path / "a.jsonl", columns=["text"])


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.json", b'[{"text": "a"}, {"text": null}]', "a.json, row 2: column 'text' holds null"),
        ("a.json", b'[\n{"text": "a"},\n{"text": "b', "a.json, line 3, character 10: this is not JSON: it ends"),
        ("a.json", b"[]", "a.json holds no rows"),
        ("a.txt", b"a\n\nb caf\xe9", "a.txt, line 3, character 6: the byte 0xe9 is not UTF-8"),
        ("a.txt", b"", "a.txt', but the file is empty"),
        ("a.parquet", b"", "a.parquet', but the file is empty"),
        ("a.parquet", b"PAR1", r"dataset is .*a\.parquet', but it cannot be read as \.parquet"),
        ("a.csv", b"text\na\n", "a.csv', but a file must end in .txt, .json, .jsonl, .parquet"),
    ],
)
def test_what_is_wrong_in_other_files_is_named(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_texts(tmp_path / name, columns=["text"])
