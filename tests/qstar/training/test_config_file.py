"""Settings from a file: each value is read as what its setting takes, and what cannot be is refused with its place."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given as drawn
from hypothesis import strategies as st
from transformers.trainer_utils import SaveStrategy

from qstar.config import ThoughtSettings, setting
from qstar.training.config_file import default_of, read_settings, typed_fields, written
from qstar.training.settings import QuietStarArguments, RunSettings

KINDS = (RunSettings, ThoughtSettings, QuietStarArguments)


@dataclass
class Every:
    """A setting of every type."""

    text: str = setting("", "A text.")
    maybe: str | None = setting(None, "A text or nothing.")
    whole: int = setting(1, "An integer.")
    number: float = setting(1.0, "A number.")
    flag: bool = setting(False, "A switch.")
    unset: bool | None = setting(None, "A switch or nothing.")
    choice: str = setting("a", "One of two.", choices=["a", "b"])
    kind: SaveStrategy | str = setting("steps", "One of an enumeration.")
    names: list[str] | str | None = setting(None, "Texts.")
    inside: dict | str | None = setting(None, "Anything, or a path.")
    switches: dict[str, bool] | None = setting(None, "Switches by name.")
    opaque: Path | None = setting(None, "What no file gives.")


def read(tmp_path: Path, text: str, *kinds: type, name: str = "run.yaml") -> dict[str, Any]:
    (tmp_path / name).write_text(text, encoding="utf-8")
    return read_settings(tmp_path / name, kinds or (Every,))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("number: 1e-4", 1e-4),
        ("number: 1E5", 1e5),
        ("number: -.5e+2", -50.0),
        ("number: 3", 3.0),
        ("number: .inf", float("inf")),
        ("number: 1_000.5", 1000.5),
        ("whole: 12", 12),
        ("whole: -1", -1),
        ("whole: 10_000", 10000),
        ("text: 1e-4", "1e-4"),
        ("text: 010", "010"),
        ("text: 12:30", "12:30"),
        ("text: 2026-01-02", "2026-01-02"),
        ("text: on", "on"),
        ("text: No", "No"),
        ("text: 'null'", "null"),
        ("text: ''", ""),
        ("text: |-\n  a\n  b", "a\nb"),
        ("kind: no", "no"),
        ("flag: yes", True),
        ("flag: On", True),
        ("flag: off", False),
        ("unset: False", False),
        ("choice: b", "b"),
        ("names: none", "none"),
        ("names: [on, '1', 2]", ["on", "1", "2"]),
        ("names:\n- a\n- b", ["a", "b"]),
        ("inside: a.json", "a.json"),
        (
            "inside: {a: 1e-5, b: [1, true, null, x], c: {d: 'no'}}",
            {"a": 1e-5, "b": [1, True, None, "x"], "c": {"d": "no"}},
        ),
        ("switches: {a: on, b: no}", {"a": True, "b": False}),
    ],
)
def test_a_value_is_read_as_what_its_setting_takes(tmp_path, text, expected):
    name = text.split(":")[0]
    value = read(tmp_path, text)[name]
    assert value == expected and type(value) is type(expected)


def test_a_null_is_left_out_where_it_is_the_default(tmp_path):
    assert read(tmp_path, "maybe: null\nunset: ~\nnames:\n") == {}
    assert read(tmp_path, "start_init:\nend_init: null\nmodel: null", *KINDS) == {"start_init": None, "end_init": None}


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n"])
def test_a_file_may_be_empty(tmp_path, text):
    assert read(tmp_path, text) == {}


def test_json_is_read_as_yaml_is(tmp_path):
    values = {
        "text": "a/\u00e9\U0001f600\u2028\x7f\t",
        "number": 1e-4,
        "flag": True,
        "names": ["a"],
        "inside": {"b": None},
    }
    for form in (dict(), dict(indent="\t"), dict(ensure_ascii=False, indent=2)):
        assert read(tmp_path, json.dumps(values, **form), name="run.json") == values


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("whole: 1.5", "line 1: whole is '1.5', but it must be an integer"),
        ("whole: 1e3", "line 1: whole is '1e3', but it must be an integer"),
        ("whole: 010", "line 1: whole is '010', but it must be an integer"),
        ("whole: true", "line 1: whole is 'true', but it must be an integer"),
        ("whole: '5'", "line 1: whole is '5', but it must be an integer, without quotation marks"),
        ("whole: null", "line 1: whole is null, but it must be an integer"),
        ("\nnumber: fast", "line 2: number is 'fast', but it must be a number"),
        ("number: [1]", "line 1: number is a list, but it must be a number"),
        ("number: 12:30", "line 1: number is '12:30', but it must be a number"),
        ("flag: 1", "line 1: flag is '1', but it must be true or false"),
        ("flag: maybe", "line 1: flag is 'maybe', but it must be true or false"),
        ("flag: 'no'", "line 1: flag is 'no', but it must be true or false, without quotation marks"),
        ("text: null", "line 1: text is null, but it must be a text"),
        ("text: {a: 1}", "line 1: text is names with values, but it must be a text"),
        ("choice: c", "line 1: choice is 'c', but it must be 'a', 'b'"),
        ("kind: never", "line 1: kind is 'never', but it must be 'no', 'steps', 'epoch', 'best'"),
        ("names: {a: 1}", "line 1: names is names with values, but it must be a text or a list"),
        ("names: [[a]]", "line 1: names is a list, but it must be a text"),
        ("inside: [1]", "line 1: inside is a list, but it must be a text or names with values"),
        ("inside:\n  a: no", "line 2: inside.a is no, but it must be true, false or a text in quotation marks"),
        ("inside: {a: {b: 1, b: 2}}", "line 1: b is given twice, first in line 1"),
        ("switches: {a: 1}", "line 1: switches.a is '1', but it must be true or false"),
        ("opaque: a", "line 1: opaque cannot be given by a file"),
        ("whole: 1\nflag: on\nwhole: 1", "line 3: whole is given twice, first in line 1"),
        ("[a]: 1", "line 1: a name is a list, but it must be a text"),
        ("text: &a b", "line 1: anchors, aliases and tags (&, * and !) are not read"),
        ("whole: !!str 5", "line 1: anchors, aliases and tags (&, * and !) are not read"),
        ("text: 'a", "line 1: found unexpected end of stream"),
        ("text: a\n---\ntext: b", "line 2: but found another document"),
    ],
)  # fmt: skip
def test_what_a_setting_does_not_take_is_refused_with_its_place(tmp_path, text, message):
    with pytest.raises(ValueError) as refused:
        read(tmp_path, text)
    assert str(refused.value) == f"{tmp_path / 'run.yaml'}, {message}"


def test_an_unknown_name_is_refused_with_the_one_that_was_meant(tmp_path):
    with pytest.raises(TypeError) as refused:
        read(tmp_path, "learning_rte: 1", *KINDS)
    assert str(refused.value) == f"{tmp_path / 'run.yaml'} has no setting 'learning_rte'; did you mean 'learning_rate'?"
    with pytest.raises(TypeError, match="no setting 'batch-size'; did you mean 'batch_size'"):
        read(tmp_path, "batch-size: 1", *KINDS)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("fsdp: true", True),  # of a flag that may stand alone
        ("fsdp: full_shard", "full_shard"),
        ("include_num_input_tokens_seen: no", "no"),
        ("include_num_input_tokens_seen: true", True),
        ("trackio_static_space_id: false", False),
        ("trackio_static_space_id: no", "no"),
        ("debug: [underflow_overflow]", ["underflow_overflow"]),
        ("report_to: none", "none"),
        ("report_to: [tensorboard, wandb]", ["tensorboard", "wandb"]),
        ("tf32: off", False),
        ("optim: adafactor", "adafactor"),
        ("save_steps: 0.1", 0.1),
        ("deepspeed: {zero_optimization: {stage: 2}, bf16: {enabled: auto}}", None),
        ("hub_token: 123", "123"),
    ],
)
def test_settings_of_transformers_with_types_of_their_own_are_read(tmp_path, text, expected):
    expected = {"zero_optimization": {"stage": 2}, "bf16": {"enabled": "auto"}} if expected is None else expected
    [value] = read(tmp_path, text, *KINDS).values()
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("debug: [overflow]", "debug is 'overflow', but it must be 'underflow_overflow'"),
        ("optim: adam", "optim is 'adam', but it must be 'adamw_torch'"),
        ("baseline: best", "baseline is 'best', but it must be 'mean', 'leave_one_out', 'base'"),
        ("parallelism_config: {tp_size: 2}", "parallelism_config cannot be given by a file"),
        ("label_names: labels", "label_names is 'labels', but it must be a list"),
    ],
)
def test_settings_of_transformers_refuse_what_they_do_not_take(tmp_path, text, message):
    with pytest.raises(ValueError) as refused:
        read(tmp_path, text, *KINDS)
    assert str(refused.value).startswith(f"{tmp_path / 'run.yaml'}, line 1: {message}")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("run.toml", b"", "config is '{}', but a file must end in .yaml, .yml, .json"),
        ("run.yaml", b"- a", "{} must hold settings, each as name: value, but it holds a list"),
        ("run.json", b'"a"', "{} must hold settings, each as name: value, but it holds 'a'"),
        ("run.json", b'{"text" "a"}', "{}, line 1: Expecting ':' delimiter"),
        ("run.json", b'{"text": "a",\n"text": "b"}', "{}, line 2: text is given twice, first in line 1"),
        ("run.yml", b"text: \xff", "{} is not in UTF-8: invalid start byte at byte 6"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError) as refused:
        read_settings(path, [Every])
    assert str(refused.value) == message.format(path)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config is '.*none.yaml', but there is no such file"):
        read_settings(tmp_path / "none.yaml", [Every])


@drawn(
    st.fixed_dictionaries(
        {},
        optional=dict(
            text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffe\uffff")),
            maybe=st.sampled_from(["no", "null", "1e-4", "~", "a: b # c", "{", " "]),
            whole=st.integers(),
            number=st.floats(allow_nan=False),
            flag=st.booleans(),
            names=st.lists(st.sampled_from(["on", "1", "null", ""])),
            inside=st.dictionaries(
                st.sampled_from(["a", "on", "1", "b c"]),
                st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.sampled_from(["no", "1"]),
            ),
        ),
    )
)
def test_what_is_written_is_read_back(tmp_path_factory, values):
    path = tmp_path_factory.getbasetemp() / "round.yaml"
    for full in (False, True):
        defaults = {each.name: default_of(each) for each, _ in typed_fields(Every)}
        path.write_text(written(values, defaults, [Every], full=full), encoding="utf-8", newline="\n")
        assert read_settings(path, [Every]) == values


def test_every_default_of_a_run_can_be_written_and_read(tmp_path):
    """Also where each line that stands commented out is taken in."""
    defaults = {each.name: default_of(each) for kind in KINDS for each, _ in typed_fields(kind)}
    text = written({}, defaults, KINDS, full=True)
    assert read(tmp_path, text, *KINDS) == {}
    active = "\n".join(line.removeprefix("#") for line in text.splitlines() if not line.startswith("# "))
    assert read(tmp_path, active, *KINDS) == {name: value for name, value in defaults.items() if value is not None}
    assert yaml.safe_load(active).keys() == defaults.keys(), "it is YAML for others as well"


def test_help_stands_above_each_setting_and_a_token_is_not_shown():
    text = written(dict(text="a", hub_token="secret"), dict(maybe=None), [Every], full=False)
    assert text == 'text: "a"\n'
    defaults = {each.name: default_of(each) for each, _ in typed_fields(Every)}
    assert written(dict(whole=3), defaults, [Every], full=True).startswith(
        '\n# A text.\n#text: ""\n\n# A text or nothing.\n#maybe: null\n\n# An integer.\nwhole: 3\n'
    )
    assert written(dict(hub_token="secret"), {}, KINDS, full=False) == "# hub_token is given, but not shown\n"
