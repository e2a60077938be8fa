"""``qstar inspect``: what it prints and writes is what ``qstar.inspect`` finds, for every flag."""

from __future__ import annotations

import json
import sys

import pytest
import tiny_folder

import qstar
from qstar.commands.main import main
from qstar.inspection.data import Inspection
from qstar.inspection.page import page
from qstar.inspection.terminal import render

TEXTS = ["c a b d e", "f g h i"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder.thinking_folder(tmp_path_factory.mktemp("inspect") / "model", ahead_tokens=2)


@pytest.fixture(scope="module")
def loaded(folder):
    return qstar.load(folder)


@pytest.fixture
def command(folder, capsys, monkeypatch):
    """Runs the command on the folder, in a window of 80 columns: its exit code, what it printed, and said beside."""
    monkeypatch.setenv("COLUMNS", "80")

    def run(*flags: object) -> tuple[int, str, str]:
        code = main(["inspect", str(folder), *map(str, flags)])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def inspected(loaded, folder, texts=TEXTS, **settings):
    return qstar.inspect(*loaded, texts, name=str(folder), **settings)


@pytest.mark.parametrize(
    ("flags", "settings"),
    [
        ("", {}),
        ("--temperature 0", dict(temperature=0.0)),
        ("--seed 7 --rationales 3", dict(seed=7, rationales=3)),
        ("--no-controls", dict(controls=False)),
        ("--seq-length 3 --max-tokens 7", dict(seq_length=3, max_tokens=7)),
        ("--max-grid-tokens 20", dict(max_grid_tokens=20)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_it_shows_what_is_found_with_the_same_settings(command, loaded, folder, flags, settings):
    code, out, _ = command("--text", TEXTS[0], "--text", TEXTS[1], *flags.split())
    expected = render(inspected(loaded, folder, **settings))
    assert (code, out) == (0, expected)
    if settings and "max_grid_tokens" not in settings:
        assert expected != render(inspected(loaded, folder)), "the setting changes what is shown"


def test_json_holds_all_that_was_found(command, loaded, folder, tmp_path):
    code, out, _ = command("--text", TEXTS[0], "--json", tmp_path / "found.json", "--seed", 5)
    assert code == 0 and out.endswith(f"written to {tmp_path / 'found.json'}\n")
    assert Inspection.from_json((tmp_path / "found.json").read_text()) == inspected(loaded, folder, TEXTS[0], seed=5)


def test_html_is_the_page_of_what_was_found(command, loaded, folder, tmp_path):
    code, out, _ = command("--text", TEXTS[0], "--html", tmp_path / "found.html", "--json", tmp_path / "found.json")
    assert code == 0
    assert out.splitlines()[-2:] == [f"written to {tmp_path / name}" for name in ("found.json", "found.html")]
    assert (tmp_path / "found.html").read_text(encoding="utf-8") == page(inspected(loaded, folder, TEXTS[0])) + "\n"


@pytest.mark.parametrize(
    ("name", "content", "flags"),
    [
        ("texts.txt", "c a b d e\n\nf g h i\n", ""),
        ("texts.txt", "c a b d e\nf g h i\n", "--documents line"),
        ("texts.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in TEXTS), ""),
        ("texts.json", json.dumps([{"said": text} for text in TEXTS]), "--text-column said"),
        (
            "texts.jsonl",
            "".join(json.dumps({"first": text[:3], "rest": text[4:]}) + "\n" for text in TEXTS),
            "--text-format={first}#{rest}",
        ),
    ],
    ids=["paragraphs", "lines", "jsonl", "json", "format"],
)
def test_texts_are_read_from_files(command, loaded, folder, tmp_path, name, content, flags):
    (tmp_path / name).write_text(content)
    code, out, _ = command("--file", tmp_path / name, *(flag.replace("#", " ") for flag in flags.split()))
    assert (code, out) == (0, render(inspected(loaded, folder)))


def test_so_many_thoughts_are_listed_as_are_asked_for(command, loaded, folder):
    _, out, _ = command("--text", TEXTS[0], "--thoughts", 1)
    assert out == render(inspected(loaded, folder, TEXTS[0]), thoughts=1)
    assert out != render(inspected(loaded, folder, TEXTS[0]))


def test_it_is_coloured_on_a_terminal_unless_no_color_is_set(command, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b" not in command("--text", TEXTS[0])[1]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert "\x1b[" in command("--text", TEXTS[0])[1]
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in command("--text", TEXTS[0])[1]


def test_a_terminal_that_knows_few_characters_is_told_their_numbers(folder, tmp_path):
    with (tmp_path / "out").open("w", encoding="ascii") as file, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", file)
        assert main(["inspect", str(folder), "--text", TEXTS[0]]) == 0
    shown = (tmp_path / "out").read_text()
    assert shown.isascii() and "mean weight of a thought" in shown and r"\u27e6" in shown


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--text", "a b", "--thoughts", "-1"), "thoughts is -1, but it must be at least 0"),
        (("--text", "a b", "--temperature", "0", "--rationales", "2"), "rationales is 2, but at temperature 0"),
        (("--text", " "), "texts hold no token to predict"),
        (
            ("--text", "a b", "--text-column", "said"),
            "text_column is 'said', but there is no file of texts: give --file",
        ),
        (("--text", "a b", "--documents", "line"), "documents is 'line', but there is no file of texts: give --file"),
        (("--file", "."), "file is '.', but it must be a file, not a folder"),
        (("--file", "nowhere.txt"), "file is 'nowhere.txt', but there is no such file or folder"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_inspected_is_said_in_a_line(command, flags, message):
    code, _, err = command(*flags)
    assert code == 1
    assert err.splitlines()[-1].startswith("qstar inspect: ") and message in err.splitlines()[-1]


def test_a_column_that_is_not_there_is_named(command, tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"said": "a b"}\n')
    code, _, err = command("--file", tmp_path / "texts.jsonl")
    assert code == 1 and "has no column 'text', but 'said'" in err
    (tmp_path / "texts.txt").write_text("a b\n")
    code, _, err = command("--file", tmp_path / "texts.txt", "--text-column", "said")
    assert code == 1 and "has no column 'said', but 'text'" in err
    code, _, err = command("--file", tmp_path / "texts.jsonl", "--documents", "line")
    assert code == 1 and "documents is 'line', but only a .txt file is cut into documents by it" in err


def test_one_kind_of_text_must_be_given(command, capsys):
    for flags in ((), ("--text", "a", "--file", "b.txt")):
        with pytest.raises(SystemExit) as ended:
            command(*flags)
        assert ended.value.code == 2
    assert "one of the arguments --text --file is required" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["json", "html"])
def test_a_place_that_is_not_there_is_refused_before_a_model_is_read(command, name, tmp_path):
    place = tmp_path / "nowhere" / "file"
    code, _, err = command("--text", "a b", f"--{name}", place)
    assert code == 1 and f"{name} is {str(place)!r}, but there is no folder {str(place.parent)!r}" in err


def test_a_missing_package_is_named(command, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("qstar.inspection.") and "terminal" in name]:
        monkeypatch.delitem(sys.modules, name)
        monkeypatch.delattr(name)
    for name in ["rich", *(name for name in sys.modules if name.startswith("rich."))]:
        monkeypatch.setitem(sys.modules, name, None)
    code, _, err = command("--text", "a b")
    assert code == 1
    assert "qstar inspect needs the extra inspect, but rich" in err
    assert err.splitlines()[-1].endswith("is not installed: pip install rich")
