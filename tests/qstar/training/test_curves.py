"""Curves at the end of a run: drawn from what it has logged, and left out with a word where matplotlib is missing."""

from __future__ import annotations

import importlib.util
import math

import matplotlib.figure
import pytest
from matplotlib.image import imread
from tiny_runs import records, texts, tiny_train

from qstar.training.curves import CURVES_FILE, PANELS, draw, points, read_metrics


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are drawn."""
    figures, save = [], matplotlib.figure.Figure.savefig

    def watched(figure, *args, **kwargs):
        figures.append(figure)
        return save(figure, *args, **kwargs)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", watched)
    return figures


def test_a_step_that_was_taken_twice_counts_as_it_was_the_last_time():
    """As where a run was killed after its last checkpoint. What was not finite is a gap."""
    found = [{"step": 2, "loss": 5.0}, {"step": 3, "loss": 4.0}, {"step": 1, "other": 1.0}]
    found += [{"step": 2, "loss": 3.0}, {"step": 4, "loss": None}]
    steps, values = points(found, "loss")
    assert steps == [2, 3, 4]
    assert values[:2] == [3.0, 4.0] and math.isnan(values[2])
    assert points(found, "nothing") == ([], [])


def test_a_line_that_a_kill_has_cut_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo\n{"step": 3, "loss": 1.0}\n')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.0}, {"step": 3, "loss": 1.0}]
    assert read_metrics(tmp_path / "missing.jsonl") == []


def test_a_run_draws_what_it_has_logged(drawn, tmp_path):
    """Every line of every panel has the values of ``metrics.jsonl``."""
    options = dict(eval_dataset=texts(4), eval_strategy="steps", eval_steps=2, logging_steps=1, max_steps=4)
    result = tiny_train(tmp_path, curves=True, **options)
    logged = records(result.folder)
    [figure] = drawn
    for axes, panel in zip(figure.axes, PANELS, strict=True):
        assert axes.get_title() == panel.title and axes.get_ylabel() == panel.unit
        assert [line.get_label() for line in axes.lines] == list(panel.lines.values())
        for line, name in zip(axes.lines, panel.lines, strict=True):
            with_it = [record for record in logged if name in record]
            assert line.get_xdata().tolist() == [record["step"] for record in with_it] != [], name
            assert line.get_ydata().tolist() == [record[name] for record in with_it], name
    picture = imread(tmp_path / CURVES_FILE)
    assert picture.shape[0] > 400 and picture.shape[1] > 800
    assert len({tuple(pixel) for row in picture[::4, ::4] for pixel in row.tolist()}) > 10


def test_zero_is_in_the_picture_of_what_may_collapse(tmp_path, drawn):
    draw([{"step": step, "thought_entropy": 2.5 + step / 100} for step in range(3)], tmp_path / CURVES_FILE)
    bottom, top = drawn[0].axes[4].get_ylim()
    assert bottom == 0 and top > 2.5


def test_nothing_is_drawn_where_nothing_was_logged_or_nobody_wants_it(tmp_path, drawn):
    tiny_train(tmp_path / "short", curves=True, max_steps=1)
    tiny_train(tmp_path / "unwanted", curves=False, logging_steps=1)
    assert drawn == [] and not list(tmp_path.glob(f"*/{CURVES_FILE}"))


def test_without_matplotlib_a_word_says_so_and_nothing_fails(tmp_path, monkeypatch, caplog):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    tiny_train(tmp_path, curves=True, logging_steps=1)
    assert not (tmp_path / CURVES_FILE).exists()
    assert "no curves are drawn, since matplotlib is missing: pip install matplotlib" in caplog.text
