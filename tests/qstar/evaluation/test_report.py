"""Reports: the table's numbers, the file and the plot, against what was answered."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from importlib.metadata import version
from math import inf, nan
from statistics import mean

import matplotlib.figure
import pytest
from matplotlib.image import imread

import qstar
from qstar.evaluation.intervals import bootstrap, paired, wilson
from qstar.evaluation.plots import draw_report
from qstar.evaluation.questions import Question, Questions
from qstar.evaluation.record import read_report, write_report
from qstar.evaluation.report import ACCURACY, LOG_LIKELIHOOD, PROBABILITY, Answered, Row, TaskReport

ASKED = 40
QUESTIONS = Questions(
    tuple(
        Question(f"{number} and {number}?", str(2 * number), ("a", "b"), ("A", "B"), "double it", number)
        for number in range(ASKED)
    ),
    source="some/sums",
    fingerprint="0123abcd",
)


def row(name: str, every: int, generated: bool = False) -> Row:
    """Each ``every``-th answer is right."""
    answers = []
    for number in range(ASKED):
        scores = {} if generated else dict(probability=1 / (number + every), log_likelihood=-number / every)
        detail = dict(text="so ...", repeats=["1", None]) if generated else {}
        answers.append(Answered(number % every == 0, said=str(number) if number % 3 else None, detail=detail, **scores))
    return Row(name, tuple(answers), dict(batch_size=8, generated=generated))


REPORT = TaskReport("sums", QUESTIONS, (row("without", 4), row("with its thoughts", 2), row("generated", 3, True)))


def cells(report: TaskReport) -> dict[str, list[str]]:
    """Cells of the table's lines by their first one; the later block's behind a dash."""
    found: dict[str, list[str]] = {}
    for block, lines in enumerate(report.table().split("compared with")):
        for line in lines.splitlines()[1 if block else 2 :]:
            name, *rest = [cell.strip() for cell in line.split("  ") if cell.strip()] or [""]
            found["- " * block + name] = rest
    return found


def test_the_table_has_the_mean_and_the_interval_of_every_row():
    shown = cells(REPORT)
    for each, right in ((REPORT.rows[0], 10), (REPORT.rows[1], 20)):
        low, high = wilson(right, ASKED)
        accuracy = f"{100 * right / ASKED:.1f}% [{100 * low:.1f}, {100 * high:.1f}]"
        p, nats = ([getattr(answer, of) for answer in each.answers] for of in (PROBABILITY, LOG_LIKELIHOOD))
        probability = f"{100 * mean(p):.1f}% [{', '.join(f'{100 * bound:.1f}' for bound in bootstrap(p))}]"
        likelihood = f"{mean(nats):.3f} [{', '.join(f'{bound:.3f}' for bound in bootstrap(nats))}]"
        assert shown[each.name] == [accuracy, probability, likelihood]
    low, high = wilson(14, ASKED)
    assert shown["generated"] == [f"35.0% [{100 * low:.1f}, {100 * high:.1f}]"]


def test_the_table_compares_question_by_question():
    shown = cells(REPORT)
    right = [[answer.right for answer in each.answers] for each in REPORT.rows]
    nats = [[answer.log_likelihood for answer in each.answers] for each in REPORT.rows[:2]]
    points = ", ".join(f"{100 * bound:+.1f}" for bound in paired(right[1], right[0]))
    likelihood = ", ".join(f"{bound:+.3f}" for bound in paired(nats[1], nats[0]))
    gain = mean(nats[1]) - mean(nats[0])
    assert shown["- with its thoughts"] == [f"+25.0 [{points}]", f"{gain:+.3f} [{likelihood}]", "10", "0", "0.002"]
    points = ", ".join(f"{100 * bound:+.1f}" for bound in paired(right[2], right[0]))
    assert shown["- generated"] == [f"+10.0 [{points}]", "10", "6", "0.454"]
    assert "- without" not in shown


def test_another_row_may_be_what_others_are_compared_with():
    report = replace(REPORT, compared_with="with its thoughts")
    assert "compared with 'with its thoughts', question by question" in report.table()
    assert cells(report)["- without"][2:] == ["0", "10", "0.002"]
    assert report.gains["without"].means[ACCURACY].value == -0.25


def test_columns_that_no_row_has_are_left_out():
    lines = TaskReport("sums", QUESTIONS, (row("generated", 3, True),)).table().splitlines()
    assert lines[0] == "sums, 40 questions of some/sums, with 95 % intervals"
    assert lines[2].split() == ["accuracy"] and len(lines) == 5


def test_a_small_p_value_is_not_zero():
    every = [Row(name, tuple(Answered(right) for _ in range(ASKED)), {}) for name, right in (("a", False), ("b", True))]
    shown = cells(TaskReport("sums", QUESTIONS, tuple(every)))
    assert shown["b"] == ["100.0% [91.2, 100.0]"]
    assert shown["- b"] == ["+100.0 [+100.0, +100.0]", "40", "0", "< 0.001"]


def test_a_table_of_long_names_and_large_numbers_is_no_wider_than_a_terminal():
    far = tuple(Answered(True, 1.0, -1234.5 + 100 * (number % 7)) for number in range(ASKED))
    rows = [Row(f"chain of thought, {n} exemplars, the majority of {n} samples", far, {}) for n in (8, 64)]
    questions = replace(QUESTIONS, source="/a/long/path" * 12)
    report = TaskReport("sums", questions, (row("without", 4), *rows))
    lines = report.table().splitlines()
    assert max(map(len, lines)) <= 100
    for begin in (number + 1 for number, line in enumerate(lines) if line.startswith("---")):
        width = lines[begin - 1].index(" ")
        names = " ".join(line[:width].strip() for line in lines[begin:] if line[:width].strip())
        assert all(row.name in names for row in rows)


def test_one_question_has_no_bootstrap_interval():
    report = TaskReport("sums", replace(QUESTIONS, questions=QUESTIONS.questions[:1]), (Row("a", (far,), {}),))
    assert cells(report)["a"] == ["100.0% [20.7, 100.0]", "50.0%", "-2.000"]


far = Answered(True, 0.5, -2.0)


def test_what_makes_no_table_is_refused():
    for rows, what in (
        ((), "sums has 40 questions and 0 rows"),
        ((Row("a", (far,), {}),), "row 'a' has 1 answers, but there are 40 questions"),
        ((row("a", 2), row("a", 3)), "each must have a name of its own"),
    ):
        with pytest.raises(ValueError, match=what):
            TaskReport("sums", QUESTIONS, rows)
    with pytest.raises(ValueError, match="compared_with is 'b', but the rows are"):
        replace(REPORT, compared_with="b")


def test_a_report_is_read_back_as_it_was_written(tmp_path):
    path = tmp_path / "eval.json"
    reports = (REPORT, replace(REPORT, task="more", compared_with="generated"))
    write_report(path, reports, command="qstar eval a --tasks sums", seed=3, held_out=dict(gain=0.5))
    assert read_report(path) == reports
    assert [each.name for each in tmp_path.iterdir()] == ["eval.json"]
    record = json.loads(path.read_text())
    assert record["versions"] == {
        "qstar": qstar.__version__,
        "torch": version("torch"),
        "transformers": version("transformers"),
    }
    assert (record["command"], record["seed"], record["held_out"]) == ("qstar eval a --tasks sums", 3, {"gain": 0.5})
    task = record["tasks"][0]
    assert (task["fingerprint"], task["source"], task["asked"]) == ("0123abcd", "some/sums", ASKED)
    assert task["questions"][7]["answers"]["without"]["log_likelihood"] == -7 / 4
    assert (task["questions"][7]["text"], task["questions"][7]["number"]) == ("7 and 7?", 7)
    thinking = task["rows"][1]
    assert thinking["accuracy"] == {"mean": 0.5, "interval": [*wilson(20, ASKED)]}
    assert thinking["gain"]["repaired"] == 10 and thinking["gain"]["p_value"] == pytest.approx(2 / 2**10)
    assert task["rows"][2]["probability"] is None and "gain" not in task["rows"][0]


def test_what_is_not_finite_is_null_in_the_file(tmp_path):
    lost = Row("lost", (Answered(False, 0.0, -inf), Answered(False, nan, -1.0), *(far,) * (ASKED - 2)), {})
    write_report(tmp_path / "a.json", [TaskReport("sums", QUESTIONS, (lost,))], command="", seed=0)
    [found] = read_report(tmp_path / "a.json")
    assert found.rows[0].answers[:2] == (Answered(False, 0.0, None), Answered(False, None, -1.0))


def test_a_file_that_is_no_report_is_refused(tmp_path):
    path = tmp_path / "eval.json"
    for text, what in (
        ("{", "is no report"),
        ("[]", "is no report"),
        ('{"schema": 9}', "schema 9, but this .* reads 1"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=what):
            read_report(path)


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_the_plot_shows_every_row_where_its_mean_is(tmp_path, monkeypatch, kind):
    figures, save = [], matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda self, *args, **kw: figures.append(self) or save(self, *args, **kw)
    )
    path = tmp_path / f"eval.{kind}"
    assert draw_report(REPORT, path) == f"drawn to {path}"
    [figure] = figures
    accuracy, likelihood = figure.axes
    shown = [(line[0].get_xdata()[0], line[0].get_ydata()[0]) for line in accuracy.containers]
    assert shown == [(0.25, 0), (0.5, 1), (0.35, 2)]
    ends = accuracy.containers[0][2][0].get_segments()[0][:, 0]
    assert ends == pytest.approx([*wilson(10, ASKED)])
    assert [line[0].get_ydata()[0] for line in likelihood.containers] == [0, 1]
    assert [each.get_text() for each in accuracy.get_yticklabels()] == ["without", "with its thoughts", "generated"]
    assert imread(path).std() > 0 if kind == "png" else path.read_text().startswith("<?xml")


def test_without_matplotlib_a_line_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    said = draw_report(REPORT, tmp_path / "eval.png")
    assert said == "no plot is drawn, since matplotlib is missing: pip install matplotlib"
    assert not list(tmp_path.iterdir())
