"""The terminal shows the numbers of an inspection, with and without colour, in narrow windows, whatever the text."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import replace

import pytest
from rich.cells import cell_len

from qstar.inspection.highlights import extremes, level, places
from qstar.inspection.terminal import SIGNS, render

CODES = re.compile(r"\x1b\[[0-9;]*m")


def test_every_gain_is_signed_in_the_text(found):
    lines = render(found).splitlines()
    for number, document in enumerate(found.documents, 1):
        gains = [0.0, *(each.gain for each in document.positions)]
        signed = [token + SIGNS[level(gain)] for token, gain in zip(document.tokens, gains, strict=True)]
        assert f"{number}  {''.join(signed)}" in lines
    assert any(sign in render(found) for sign in ("⁺", "⁻"))


def test_the_best_and_worst_thoughts_are_listed_with_all_that_is_known_of_them(found):
    shown = re.sub(r"\s*\n\s*", " ", render(found, width=200, thoughts=2))
    for place in [place for some in extremes(found, 2) for place in some]:
        position = place.position
        assert (
            f"gain {position.gain:+.3f}{SIGNS[level(position.gain)]}  weight {position.weight:.3f}  "
            f"text {place.number + 1}, token {position.index + 2}" in shown
        )
        assert f"⟦{place.document.tokens[position.index + 1]}⟧" in shown
        for each in position.rationales:
            thought = f"⟨{''.join(each.tokens)}⟩  weight {each.weight:.3f}"
            advantage = "" if each.advantage is None else f"  advantage {each.advantage:+.3f}"
            assert f"{thought}{advantage}  log-probability {sum(each.log_probs):.2f}" in shown
        for name, likely in (("without", position.before), ("with   ", position.after)):
            assert f"{name}  " + "  ".join(f"{each.text} {each.probability:.1%}" for each in likely) in shown


def test_no_thought_is_listed_where_none_is_asked_for(found):
    assert "thoughts, by the gain" not in render(found, thoughts=0)
    assert "best thoughts, by the gain" in render(found, thoughts=1)


def test_the_tables_show_the_summary(found):
    summary, lines = found.summary, [" ".join(line.split()) for line in render(found).splitlines()]

    def estimate(value):
        return f"{value.mean:+.4f} [{value.low:+.4f}, {value.high:+.4f}]"

    assert f"its thoughts, next token {estimate(summary.gain)}" in lines
    assert f"its thoughts, 2 tokens ahead {estimate(summary.gain_ahead[1])}" in lines
    for name, control in summary.controls.items():
        place = lines.index(f"{name} {estimate(control.gain)}")
        assert lines[place + 1] == f"its thoughts beyond that {estimate(control.lead)}"
    assert f"mean weight of a thought {summary.weight:.4f}" in lines
    assert f"entropy of thoughts, nats a token {summary.entropy:.4f}" in lines
    assert f"different thoughts, share of all {summary.distinct:.1%}" in lines
    assert f"likeliest next tokens repaired by a thought {summary.repaired}" in lines
    assert f"likeliest next tokens broken by a thought {summary.broken}" in lines
    for each in summary.difficulties:
        interval = "" if each.gain.low is None else f" [{each.gain.low:+.4f}, {each.gain.high:+.4f}]"
        assert f"{each.least:g} to {each.below:g} {each.tokens} {each.gain.mean:+.4f}{interval}" in lines
    for each in summary.frequent:
        assert f"{each.count} {each.count / summary.thoughts:.1%} ⟨{''.join(each.tokens)}⟩" in lines


def test_histograms_count_every_token_and_every_thought(found):
    lines = [line.split() for line in render(found).splitlines()]
    gains = lines[lines.index(["gain", "for", "the", "next", "token,", "nats"]) + 1 :][:7]
    assert [int(line[-1]) for line in gains] == [
        sum(level(each.position.gain) == step for each in places(found)) for step in range(-3, 4)
    ]
    begin = lines.index(["weight", "of", "a", "thought"]) + 1
    end = next(number for number in range(begin, len(lines)) if not lines[number])
    assert sum(int(line[-1]) for line in lines[begin:end]) == found.summary.thoughts


def test_the_heading_says_what_was_read(found):
    assert render(found, width=200).splitlines()[:2] == [
        "some/model",
        "17 tokens of 3 texts predicted, each after 2 thoughts of 3 tokens, sampled at temperature 1 with seed 0",
    ]
    cut = replace(found, cut=True, settings=replace(found.settings, temperature=0.0, rationales=1, max_tokens=20))
    assert render(cut, width=200).splitlines()[1] == (
        "17 tokens of 3 texts predicted, each after 1 thought of 3 tokens, greedy; the texts go on after 20 tokens"
    )


@pytest.mark.parametrize("width", [80, 40, 133])
@pytest.mark.parametrize("which", ["found", "hostile"])
def test_no_line_is_wider_than_the_window(which, width, request):
    shown = render(request.getfixturevalue(which), width=width)
    assert max(map(cell_len, shown.splitlines())) <= width


@pytest.mark.parametrize("which", ["found", "hostile"])
def test_colour_changes_nothing_but_colour(which, request, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    plain, coloured = (render(request.getfixturevalue(which), colour=colour) for colour in (False, True))
    assert "\x1b" not in plain
    assert len(CODES.findall(coloured)) > 20
    assert [line.rstrip() for line in CODES.sub("", coloured).split("\n")] == plain.split("\n")


@pytest.mark.parametrize("colour", [False, True])
def test_hostile_text_is_shown_and_never_executed(hostile, colour, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    shown = CODES.sub("", render(hostile, colour=colour))
    left = {character for character in shown if unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp")}
    assert left == {"\n"}
    flat = re.sub("[⁺⁻\n ]", "", shown)
    for text in (
        "␛[31m␛]0;title␇",
        "<U+202E>righttoleft<U+2066>",
        "[boldred]markup[/]:smile:[link=",
        "<script>alert(1)",
    ):
        assert text in flat
    assert "😀0😀␍␊␈␈␀␡" in flat
    assert "<U+2028>日本語<U+2029><U+FEFF>" in flat
    assert "w" * 50_000 in flat
    assert shown.startswith("␛[31mmodel<U+202E></title><script>\n")


def test_a_text_in_lines_is_shown_in_lines_with_the_sign_before_the_end(found):
    document = replace(found.documents[0], tokens=["a\nb", "\n", "\n\nc", "", "", "", ""])
    first, second, third = (SIGNS[level(each.gain)] for each in document.positions[:3])
    shown = render(replace(found, documents=[document]), thoughts=0)
    assert f"\n1  a␊\n   b␊{first}\n   ␊\n   ␊\n   c{second}{third}" in shown
