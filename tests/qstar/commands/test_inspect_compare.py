"""``qstar inspect --compare``: two models on the same texts, only one of them in memory at a time."""

from __future__ import annotations

import shutil
import sys
import weakref

import pytest
import tiny
import tiny_folder

import qstar
from qstar.commands import inspect as command_module
from qstar.commands.main import main
from qstar.inspection.comparison import Comparison, compare
from qstar.inspection.comparison_page import comparison_page
from qstar.inspection.comparison_terminal import render_comparison

TEXTS = ["c a b d e", "f g h i"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Models of other weights, whose thoughts are of other lengths, and of other numbers of rationales."""
    folder = tmp_path_factory.mktemp("compare")
    first = tiny_folder.thinking_folder(folder / "first", ahead_tokens=2)
    other = dict(seed=5, ahead_tokens=1, thought_tokens=2, rationales=1)
    return first, tiny_folder.thinking_folder(folder / "second", **other)


@pytest.fixture
def command(capsys, monkeypatch):
    """Runs the command, in a window of 80 columns: its exit code, what it printed, and said beside."""
    monkeypatch.setenv("COLUMNS", "80")

    def run(first, second, *flags: object) -> tuple[int, str, str]:
        code = main(["inspect", str(first), "--compare", str(second), *map(str, flags)])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def compared(folders, **settings) -> Comparison:
    """What the command should find; thoughts as many as those of the first."""
    options = dict(rationales=2) | settings
    return compare(*(qstar.inspect(*qstar.load(each), TEXTS, name=str(each), **options) for each in folders))


def given(texts=TEXTS) -> list[str]:
    return [flag for text in texts for flag in ("--text", text)]


@pytest.mark.parametrize(
    ("flags", "settings"),
    [
        ("", {}),
        ("--seed 7 --rationales 3 --no-controls", dict(seed=7, rationales=3, controls=False)),
        ("--temperature 0", dict(temperature=0.0, rationales=1)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_both_models_read_the_same_texts_with_the_same_settings(command, folders, flags, settings):
    code, out, _ = command(*folders, *given(), *flags.split())
    assert (code, out) == (0, render_comparison(compared(folders, **settings)))


def test_json_and_html_hold_both(command, folders, tmp_path):
    files = [tmp_path / name for name in ("both.json", "both.html")]
    code, out, _ = command(*folders, *given(), "--json", files[0], "--html", files[1], "--thoughts", 1)
    assert code == 0 and out.splitlines()[-2:] == [f"written to {file}" for file in files]
    expected = compared(folders)
    assert out.startswith(render_comparison(expected, thoughts=1))
    assert Comparison.from_json(files[0].read_text()) == expected
    assert files[1].read_text(encoding="utf-8") == comparison_page(expected) + "\n"


def test_texts_of_a_file_are_read_by_both(command, folders, tmp_path):
    (tmp_path / "texts.txt").write_text("\n\n".join(TEXTS))
    code, out, _ = command(*folders, "--file", tmp_path / "texts.txt")
    assert (code, out) == (0, render_comparison(compared(folders)))


def test_the_first_model_is_freed_before_the_second_is_loaded(command, folders, monkeypatch):
    loaded, alive = [], []
    load = command_module.ready_model

    def watched(folder):
        alive.append(sum(model() is not None for model in loaded))
        model, tokenizer = load(folder)
        loaded.append(weakref.ref(model))
        return model, tokenizer

    monkeypatch.setattr(command_module, "ready_model", watched)
    assert command(*folders, *given())[0] == 0
    assert (len(loaded), alive) == (2, [0, 0])


def test_what_cannot_be_compared_is_said_before_a_model_is_loaded(command, folders, tmp_path, monkeypatch):
    monkeypatch.setattr(command_module, "ready_model", None)
    (tmp_path / "empty").mkdir()
    shutil.copytree(folders[1], tmp_path / "no_tokenizer")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "no_tokenizer" / file).unlink()
    shutil.copytree(folders[1], tmp_path / "other_tokenizer")
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["h i"])
    tokenizer.save_pretrained(tmp_path / "other_tokenizer")
    (tmp_path / "link").symlink_to(folders[0])
    for other, message in (
        (tmp_path / "nowhere", "nowhere holds no qstar_config.json: it is not the folder of a Quiet-STaR model"),
        (tmp_path / "empty", "empty holds no qstar_config.json: it is not the folder of a Quiet-STaR model"),
        (tmp_path / "no_tokenizer", "no_tokenizer holds no tokenizer that can be read"),
        (tmp_path / "other_tokenizer", "text 2 is not the same tokens to both models, from token 3 on"),
        (folders[0], "but it must be another folder than the one it is compared with"),
        (tmp_path / "link", "but it must be another folder than the one it is compared with"),
    ):
        code, out, err = command(folders[0], other, *given())
        assert (code, out) == (1, "")
        assert [line for line in err.splitlines() if line.startswith("qstar inspect: ") and message in line]
    code, _, err = command(tmp_path / "nowhere", folders[1], *given())
    assert code == 1 and "nowhere holds no qstar_config.json" in err


def test_a_comparison_is_coloured_on_a_terminal(command, folders, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b" not in command(*folders, *given())[1]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert "\x1b[" in command(*folders, *given())[1]
