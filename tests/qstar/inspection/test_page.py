"""The page holds the numbers of an inspection, and every text as text; it names nothing outside of itself."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

import inspected
import pytest
import tiny
from parsed import Parsed, close

import qstar
from qstar.inspection.highlights import SURPRISE_SCALE, WEIGHT_SCALE, extremes, level, places
from qstar.inspection.page import page, page_data
from qstar.inspection.visible import visible_token


@pytest.mark.parametrize("which", ["found", "hostile"])
def test_the_data_in_the_page_is_that_of_the_inspection(which, request):
    found = request.getfixturevalue(which)
    data = Parsed(page(found)).data()
    strings = data["strings"]
    assert len(set(strings)) == len(strings)
    assert len(data["documents"]) == len(found.documents)
    for ours, document in zip(data["documents"], found.documents, strict=True):
        assert [strings[each] for each in ours["tokens"]] == [visible_token(each) for each in document.tokens]
        assert [int(each) for each in sorted(ours["positions"], key=int)] == [each.index for each in document.positions]
        for position in document.positions:
            mine = ours["positions"][str(position.index)]
            assert mine["weight"] == close(position.weight)
            for name in ("base_log_prob", "talk_log_prob", "gain_ahead"):
                assert mine[name.split("_")[0]] == [close(value) for value in getattr(position, name)]
            for name in ("before", "after"):
                assert [[strings[text], p] for text, p in mine[name]] == [
                    [visible_token(each.text), close(each.probability)] for each in getattr(position, name)
                ]
            assert [each["gain"] for each in mine["rationales"]] == [close(value) for value in position.own_gains]
            for shown, rationale in zip(mine["rationales"], position.rationales, strict=True):
                assert [strings[each] for each in shown["tokens"]] == [visible_token(each) for each in rationale.tokens]
                assert shown["log_probs"] == [close(value) for value in rationale.log_probs]
                for name in ("weight", "entropy", "advantage"):
                    assert shown[name] == close(getattr(rationale, name))


@pytest.mark.parametrize("which", ["found", "hostile"])
def test_every_token_is_there_with_its_levels(which, request):
    found = request.getfixturevalue(which)
    shown = {mine["id"]: (mine, text) for mine, text in Parsed(page(found)).of("span", role="button")}
    assert len(shown) == sum(len(document.tokens) for document in found.documents)
    for number, document in enumerate(found.documents):
        known = {each.index + 1: each for each in document.positions}
        for place, token in enumerate(document.tokens):
            mine, text = shown[f"t{number}-{place}"]
            assert text == visible_token(token)
            assert mine.get("aria-label", text).startswith(text) and ("aria-label" in mine) == (not token.strip())
            position = known.get(place)
            expected = None
            if position is not None and position.gain is not None:
                expected = (level(position.gain), level(position.weight, WEIGHT_SCALE))
                expected = (*expected, level(position.surprise, SURPRISE_SCALE))
            levels = tuple(int(mine[f"data-{name}"]) for name in "gws" if f"data-{name}" in mine)
            assert levels == (expected or ())


def test_the_ranked_lists_lead_to_the_places_of_the_extremes(found):
    parsed = Parsed(page(found, thoughts=3))
    links = [(mine["href"], text) for mine, text in parsed.of("a")]
    best, worst = extremes(found, 3)
    assert links == [
        (f"#t{each.number}-{each.position.index + 1}", f"text {each.number + 1}, token {each.position.index + 2}")
        for each in (*best, *worst)
    ]
    gains = [text for mine, text in parsed.of("span") if "data-g" in mine and "id" not in mine][7:]
    assert gains == [f"{each.position.gain:+.3f}" for each in (*best, *worst)]
    thoughts = [text for _, text in parsed.of("p", **{"class": "thought"})]
    assert len(thoughts) == 2 * len(links)
    first = best[0].position.rationales[0] if best else worst[0].position.rationales[0]
    assert thoughts[0].startswith(f"⟨{''.join(first.tokens)}⟩ weight {first.weight:.3f}")
    gains = [gain for each in (*best, *worst) for gain in each.position.own_gains]
    assert [text.rpartition(", ")[2] for text in thoughts] == [f"gain {gain:+.3f}" for gain in gains]
    assert len({f"{gain:+.3f}" for gain in gains}) > len(links), "the thoughts of one place differ"


def test_the_tables_show_the_summary(found):
    rows = [text.split() for _, text in Parsed(page(found)).of("tr")]
    summary = found.summary

    def estimate(value):
        return [f"{value.mean:+.4f}[{value.low:+.4f},", f"{value.high:+.4f}]"]

    flat = {"".join(row) for row in rows}
    assert "".join(["nothought0", *estimate(summary.gain)]) in flat
    for name, control in summary.controls.items():
        assert "".join([*name.split(), *estimate(control.gain), *estimate(control.lead)]) in flat
    assert "".join(["2", *estimate(summary.gain_ahead[1])]) in flat
    assert f"meanweightofathought{summary.weight:.4f}" in flat
    assert f"entropyofthoughts,natsatoken{summary.entropy:.4f}" in flat
    assert f"differentthoughts,shareofall{summary.distinct:.1%}" in flat
    assert f"likeliestnexttokensrepairedbyathought{summary.repaired}" in flat
    assert f"likeliestnexttokensbrokenbyathought{summary.broken}" in flat


def test_the_charts_count_every_token_and_thought(found):
    gains, weights, difficulties = (mine["aria-label"] for mine, _ in Parsed(page(found)).of("svg"))
    counts = [int(each) for each in re.findall(r": (\d+)", gains)]
    assert counts == [sum(level(each.position.gain) == step for each in places(found)) for step in range(-3, 4)]
    assert sum(int(each) for each in re.findall(r": (\d+)", weights)) == found.summary.thoughts
    for each in found.summary.difficulties:
        assert f"{each.least:g} to {each.below:g}: {each.gain.mean:+.3f}" in difficulties


def test_hostile_text_adds_no_element_and_no_attribute(found, hostile):
    """Wherever text may stand: the page has the elements that its templates give it, and no others."""
    allowed = {(tag, name) for tag, mine, _ in Parsed(page(found)).elements for name in (None, *mine)}
    allowed |= {("span", "aria-label"), ("br", None)}  # of white space and of new lines
    shown = Parsed(page(hostile))
    assert {(tag, name) for tag, mine, _ in shown.elements for name in (None, *mine)} <= allowed
    counts = Counter(tag for tag, _, _ in shown.elements)
    assert (counts["script"], counts["style"], counts["title"]) == (2, 1, 1)
    [(_, title)] = shown.of("title")
    assert title == "Thoughts of ␛[31mmodel<U+202E></title><script>"
    assert page(hostile).count("</script") == 2


@pytest.mark.parametrize("which", ["found", "hostile"])
def test_no_character_of_the_page_steers(which, request):
    text = page(request.getfixturevalue(which))
    assert {each for each in text if unicodedata.category(each) in ("Cc", "Cf", "Cs", "Zl", "Zp")} == {"\n"}
    text.encode()


def test_the_page_names_nothing_outside_of_itself(found):
    parsed = Parsed(page(found))
    assert not {tag for tag, _, _ in parsed.elements} & {"link", "img", "iframe", "object", "embed", "base", "video"}
    addresses = [mine[name] for _, mine, _ in parsed.elements for name in ("src", "href", "action") if name in mine]
    assert all(each.startswith("#t") for each in addresses)
    assert not re.search(r"https?:|url\(|@import", page(found))
    [policy] = [mine["content"] for mine, _ in parsed.of("meta") if "http-equiv" in mine]
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy


def test_two_thousand_tokens_with_two_thoughts_take_less_than_two_megabytes():
    """With the sizes of the defaults: eight tokens in a thought, four ahead."""
    model = tiny.thinking_model("llama")
    text = " ".join(tiny.WORDS[token] for token in tiny.text(1, 99)[0].tolist())
    long = inspected.lengthened(qstar.inspect(model, tiny.tokenizer(), text, controls=False), 2000)
    assert (long.thought_tokens, long.ahead_tokens, long.settings.rationales) == (8, 4, 2)
    assert len(long.documents[0].tokens) == 2000
    assert len(page(long).encode()) < 2_000_000


def test_a_text_is_named_once(found):
    """Texts of thoughts and of likely tokens repeat all the time."""
    data = page_data(inspected.lengthened(found, 1000))
    assert data["strings"] == page_data(inspected.lengthened(found, 7))["strings"]
