"""The JSON of an inspection gives back the inspection, and what is none is refused."""

from __future__ import annotations

import json

import pytest
import tiny

import qstar
from qstar.inspection.data import SCHEMA, Inspection


@pytest.fixture(scope="module")
def found() -> Inspection:
    model = tiny.thinking_model("llama", thought_tokens=2, ahead_tokens=2)
    return qstar.inspect(model, tiny.tokenizer(), ["a b c d", "e f g h i", "j"], max_grid_tokens=90)


def test_json_gives_back_every_value(found):
    text = found.to_json()
    assert Inspection.from_json(text) == found
    assert Inspection.from_json(text).to_json() == text
    assert text.isascii() and "\n" not in text


def test_json_can_be_read_by_others(found):
    values = json.loads(found.to_json())
    assert values["schema"] == SCHEMA == 1
    position = values["documents"][0]["positions"][1]
    ours = found.documents[0].positions[1]
    assert position["rationales"][1]["talk_log_prob"] == ours.rationales[1].talk_log_prob
    assert position["before"][0] == list(ours.before[0])
    assert values["summary"]["difficulties"][-1]["below"] == found.summary.difficulties[-1].below


def test_whole_numbers_in_the_place_of_others_are_read_as_such(found):
    values = json.loads(found.to_json())
    values["summary"]["weight"] = 1
    assert isinstance(Inspection.from_json(json.dumps(values)).summary.weight, float)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values.pop("schema"), "it has no schema"),
        (lambda values: values.update(schema=2), "of another schema, but it must be 1"),
        (lambda values: values.update(model=None), "inspection.model is a NoneType, but it must be a str"),
        (lambda values: values["summary"].pop("weight"), "inspection.summary lacks or has too much: weight;"),
        (lambda values: values.update(more=1), "inspection lacks or has too much: more;"),
        (lambda values: values["documents"][1].update(tokens=3), r"inspection.documents\[1\].tokens is a int"),
        (
            lambda values: values["documents"][0]["positions"][0]["after"][1].pop(),
            r"positions\[0\].after\[1\] has 2 values, but it must have 3",
        ),
        (lambda values: values["summary"].update(tokens=True), "summary.tokens is a bool, but it must be a int"),
        (lambda values: values["settings"].update(seed=-1), "seed is -1, but it must be in"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_inspection_is_refused_with_the_place(found, change, message):
    values = json.loads(found.to_json())
    change(values)
    with pytest.raises(ValueError, match=message):
        Inspection.from_json(json.dumps(values))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '"schema"'])
def test_what_is_no_json_of_an_inspection_is_refused(text):
    with pytest.raises(ValueError, match="this is not the JSON of an inspection"):
        Inspection.from_json(text)
