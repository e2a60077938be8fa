"""The terminal shows the numbers of a comparison, with and without colour, in narrow windows, whatever the text."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import replace

import pytest
from rich.cells import cell_len

from qstar.inspection.comparison import compare, difficulties_beside, gains_beside, largest_differences, paired
from qstar.inspection.comparison_terminal import render_comparison
from qstar.inspection.highlights import level
from qstar.inspection.terminal_parts import SIGNS

CODES = re.compile(r"\x1b\[[0-9;]*m")


def test_the_heading_names_both_models_and_how_they_think(compared):
    shown = render_comparison(compared, width=100).splitlines()
    assert shown[:5] == [
        "first   some/model",
        "        after 2 thoughts of 3 tokens, sampled at temperature 1 with seed 0",
        "second  another/model",
        "        after 2 thoughts of 2 tokens, sampled at temperature 1 with seed 0",
        "17 tokens of 3 texts predicted by both",
    ]


def test_every_token_is_signed_by_the_difference(compared):
    lines = render_comparison(compared).splitlines()
    for number, (document, pairs) in enumerate(
        zip(compared.first.documents, paired(compared.first, compared.second), strict=True), 1
    ):
        differences = [0.0, *(pair.talk_log_prob for pair in pairs)]
        signed = [token + SIGNS[level(each)] for token, each in zip(document.tokens, differences, strict=True)]
        assert f"{number}  {''.join(signed)}" in lines
        assert level(max(differences)) > 0 > level(min(differences))


def test_the_largest_differences_are_listed_with_the_thoughts_of_both(compared):
    shown = re.sub(r"\s*\n\s*", " ", render_comparison(compared, width=200, thoughts=2))
    pairs = [pair for some in largest_differences(compared, 2) for pair in some]
    assert len(pairs) == 4
    for pair in pairs:
        difference = pair.talk_log_prob
        place = f"text {pair.number + 1}, token {pair.first.index + 2}"
        begin = shown.index(f"difference {difference:+.3f}{SIGNS[level(difference)]}  {place}")
        entry = shown[begin:]
        assert f"⟦{pair.document.tokens[pair.first.index + 1]}⟧" in entry
        for side, position in (("first ", pair.first), ("second", pair.second)):
            values = f"log-probability {position.talk_log_prob[0]:.3f}  gain {position.gain:+.3f}"
            entry = entry[entry.index(f"{side}  {values}  weight {position.weight:.3f}") :]
            for each in position.rationales:
                entry = entry[entry.index(f"⟨{''.join(each.tokens)}⟩  weight {each.weight:.3f}") :]
            for name, likely in (("without", position.before), ("with   ", position.after)):
                line = f"{name}  " + "  ".join(f"{each.text} {each.probability:.1%}" for each in likely)
                entry = entry[entry.index(line) :]


def test_no_token_is_listed_where_none_is_asked_for_or_nothing_differs(compared):
    assert "tokens that the second predicts" not in render_comparison(compared, thoughts=0)
    same = render_comparison(compare(compared.first, compared.first))
    assert "tokens that the second predicts" not in same
    assert not re.search("[⁺⁻]", same[same.index("\n\n") : same.index("second less first")])


def test_the_tables_show_both_and_the_differences(compared):
    lines = [" ".join(line.split()) for line in render_comparison(compared).splitlines()]
    first, second = compared.first.summary, compared.second.summary
    for name, each in (
        ("after thoughts", compared.talk_log_prob),
        ("without thoughts", compared.base_log_prob),
        ("gain", compared.gain),
    ):
        difference = each.difference
        interval = f"{difference.mean:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}]"
        assert f"{name} {each.first:+.4f} {each.second:+.4f} {interval}" in lines
    assert f"mean weight of a thought {first.weight:.4f} {second.weight:.4f}" in lines
    assert f"entropy of thoughts, nats a token {first.entropy:.4f} {second.entropy:.4f}" in lines
    assert f"different thoughts, share of all {first.distinct:.1%} {second.distinct:.1%}" in lines
    assert f"likeliest next tokens repaired by a thought {first.repaired} {second.repaired}" in lines
    assert f"likeliest next tokens broken by a thought {first.broken} {second.broken}" in lines
    assert f"likeliest next tokens that only it has right {compared.broken} {compared.repaired}" in lines
    assert f"its thoughts, next token {first.gain.mean:+.4f} {second.gain.mean:+.4f}" in lines
    assert f"its thoughts, 3 tokens ahead {second.gain_ahead[2].mean:+.4f}" in lines
    for name, control in first.controls.items():
        assert f"{name} {control.gain.mean:+.4f} {second.controls[name].gain.mean:+.4f}" in lines
    for name, *both in difficulties_beside(first, second):
        shown = (f"{each.gain.mean:+.4f} of {each.tokens}" for each in both if each is not None)
        assert " ".join([name, *shown]) in lines


def test_what_only_one_model_has_stands_in_its_own_column(compared):
    first, second = compared.first.summary, compared.second.summary
    rows = gains_beside(first, second)
    assert [row[0] for row in rows] == [
        "its thoughts, next token",
        "its thoughts, 2 tokens ahead",
        "its thoughts, 3 tokens ahead",
        *first.controls,
    ]
    assert rows[1][1:] == (first.gain_ahead[1], second.gain_ahead[1])
    assert rows[2][1:] == (None, second.gain_ahead[2])
    assert gains_beside(first, replace(second, controls={}))[-1][1:] == (first.controls["pause tokens"].gain, None)
    hard = replace(second, difficulties=second.difficulties[-1:])
    assert [row[1:] for row in difficulties_beside(first, replace(hard, difficulties=[]))] == [
        (each, None) for each in first.difficulties
    ]
    assert [row[2] for row in difficulties_beside(replace(first, difficulties=[]), hard)] == second.difficulties[-1:]


def test_the_histogram_counts_every_token(compared):
    lines = [line.split() for line in render_comparison(compared).splitlines()]
    begin = next(number for number, line in enumerate(lines) if line[-4:] == ["second", "less", "first,", "nats"]) + 1
    pairs = [pair for some in paired(compared.first, compared.second) for pair in some]
    counts = [sum(level(pair.talk_log_prob) == step for pair in pairs) for step in range(-3, 4)]
    assert [int(line[-1]) for line in lines[begin : begin + 7]] == counts
    assert sum(counts) == compared.tokens


@pytest.mark.parametrize("width", [80, 40, 133])
@pytest.mark.parametrize("which", ["compared", "hostile_compared"])
def test_no_line_of_a_comparison_is_wider_than_the_window(which, width, request):
    shown = render_comparison(request.getfixturevalue(which), width=width)
    assert max(map(cell_len, shown.splitlines())) <= width


@pytest.mark.parametrize("which", ["compared", "hostile_compared"])
def test_colour_changes_nothing_but_colour_in_a_comparison(which, request, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    plain, coloured = (render_comparison(request.getfixturevalue(which), colour=colour) for colour in (False, True))
    assert "\x1b" not in plain
    assert len(CODES.findall(coloured)) > 20
    assert [line.rstrip() for line in CODES.sub("", coloured).split("\n")] == plain.split("\n")


def test_hostile_text_is_shown_and_never_executed_in_a_comparison(hostile_compared):
    shown = render_comparison(hostile_compared)
    assert {each for each in shown if unicodedata.category(each) in ("Cc", "Cf", "Zl", "Zp")} == {"\n"}
    flat = re.sub("[⁺⁻\n ]", "", shown)
    for text in ("␛[31m␛]0;title␇", "<U+202E>righttoleft<U+2066>", "[boldred]markup[/]:smile:[link=", "w" * 50_000):
        assert text in flat
    assert shown.count("␛[31mmodel<U+202E></title><script>\n") == 2
