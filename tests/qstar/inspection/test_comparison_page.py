"""The page of a comparison holds the numbers of both models and their differences, and every text as text."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from dataclasses import replace

import pytest
from parsed import Parsed, close

from qstar.inspection.comparison import (
    SIDES,
    compare,
    difficulties_beside,
    gains_beside,
    largest_differences,
    paired,
)
from qstar.inspection.comparison_page import LETTERS, comparison_page
from qstar.inspection.highlights import SURPRISE_SCALE, WEIGHT_SCALE, level, places
from qstar.inspection.page import page
from qstar.inspection.visible import visible_token


@pytest.fixture(scope="module")
def parsed(compared) -> Parsed:
    return Parsed(comparison_page(compared))


def estimate(value) -> str:
    interval = "" if value.low is None else f"[{value.low:+.4f}, {value.high:+.4f}]"
    return f"{value.mean:+.4f}{interval}"


def spelled(data, strings):
    """Data of a page with texts in the place of their numbers."""
    return [
        [[strings[each] for each in document["tokens"]]]
        + [
            [number, position["base"], position["gain"], position["weight"]]
            + [[strings[text], p] for name in ("before", "after") for text, p in position[name]]
            + [[[strings[text] for text in each["tokens"]], each["gain"]] for each in position["rationales"]]
            for number, position in document["positions"].items()
        ]
        for document in data
    ]


def test_the_data_of_each_model_is_that_of_its_own_page(compared, parsed):
    data = parsed.data()
    assert [each["name"] for each in data["models"]] == list(SIDES)
    for model, found in zip(data["models"], (compared.first, compared.second), strict=True):
        alone = Parsed(page(found)).data()
        assert spelled(model["documents"], data["strings"]) == spelled(alone["documents"], alone["strings"])


def test_the_data_holds_the_differences_of_every_next_token(compared, parsed):
    found = parsed.data()["differences"]
    pairs = paired(compared.first, compared.second)
    assert [sorted(map(int, each)) for each in found] == [[pair.first.index for pair in some] for some in pairs]
    for number, some in enumerate(pairs):
        for pair in some:
            mine = found[number][str(pair.first.index)]
            assert mine == {
                "talk": close(pair.talk_log_prob),
                "base": close(pair.base_log_prob),
                "gain": close(pair.gain),
            }


def test_every_token_stands_in_both_columns_with_the_levels_of_its_model(compared, parsed):
    shown = {mine["id"]: (mine, text) for mine, text in parsed.of("span", role="button")}
    assert len(shown) == 2 * sum(len(document.tokens) for document in compared.first.documents)
    pairs = paired(compared.first, compared.second)
    for letter, found in zip(LETTERS, (compared.first, compared.second), strict=True):
        for number, document in enumerate(found.documents):
            known = {each.index + 1: each for each in document.positions}
            differences = {pair.first.index + 1: level(pair.talk_log_prob) for pair in pairs[number]}
            for place, token in enumerate(document.tokens):
                mine, text = shown[f"{letter}{number}-{place}"]
                assert text == visible_token(token)
                expected = {}
                if place in known:
                    each = known[place]
                    values = level(each.gain), level(each.weight, WEIGHT_SCALE), level(each.surprise, SURPRISE_SCALE)
                    expected = dict(zip("gwsd", (*values, differences[place]), strict=True))
                assert {name: int(mine[f"data-{name}"]) for name in "gwsd" if f"data-{name}" in mine} == expected


def test_a_token_that_only_one_model_predicts_has_no_difference(compared):
    second = compared.second.documents[0]
    documents = [replace(second, positions=second.positions[1:]), *compared.second.documents[1:]]
    shown = Parsed(comparison_page(compare(compared.first, replace(compared.second, documents=documents))))
    assert "0" not in shown.data()["differences"][0] and "1" in shown.data()["differences"][0]
    for letter in LETTERS:
        [(mine, _)] = shown.of("span", id=f"{letter}0-1")
        assert ("data-d" in mine, "data-g" in mine) == (False, letter == "t")


def test_the_lists_lead_to_the_largest_differences_and_show_both(compared):
    shown = Parsed(comparison_page(compared, thoughts=3))
    pairs = [pair for some in largest_differences(compared, 3) for pair in some]
    assert [(mine["href"], text) for mine, text in shown.of("a")] == [
        (f"#t{each.number}-{each.first.index + 1}", f"text {each.number + 1}, token {each.first.index + 2}")
        for each in pairs
    ]
    entries = [re.sub(r"\s+", " ", text) for _, text in shown.of("li")][-len(pairs) :]
    for pair, entry in zip(pairs, entries, strict=True):
        assert f"{pair.talk_log_prob:+.3f} " in entry
        for side, position in (("first", pair.first), ("second", pair.second)):
            values = f"{position.talk_log_prob[0]:.3f}, gain {position.gain:+.3f}, weight {position.weight:.3f}"
            entry = entry[entry.index(f"{side} log-probability {values}") :]
            for each, gain in zip(position.rationales, position.own_gains, strict=True):
                thought = f"⟨{''.join(each.tokens)}⟩ weight {each.weight:.3f}, "
                advantage = "" if each.advantage is None else f"advantage {each.advantage:+.3f}, "
                entry = entry[entry.index(f"{thought}{advantage}gain {gain:+.3f}") :]
            for name, likely in (("without", position.before), ("with", position.after)):
                line = " ".join(f"{each.text} {100 * each.probability:.1f}%" for each in likely)
                entry = entry[entry.index(re.sub(r"\s+", " ", f"{name} {line}")) :]


def test_the_tables_of_the_page_show_both_and_the_differences(compared, parsed):
    rows = {re.sub(r"\s+", "", text) for _, text in parsed.of("tr")}
    first, second = compared.first.summary, compared.second.summary

    def there(*cells: str) -> bool:
        return re.sub(r"\s+", "", "".join(cells)) in rows

    for name, each in (
        ("after thoughts", compared.talk_log_prob),
        ("without thoughts", compared.base_log_prob),
        ("gain of thoughts", compared.gain),
    ):
        assert there(name, f"{each.first:+.4f}", f"{each.second:+.4f}", estimate(each.difference))
    for name, *both in gains_beside(first, second):
        assert there(name, *(estimate(each) for each in both if each is not None))
    for name, *both in difficulties_beside(first, second):
        assert there(name, *(f"{each.tokens}{estimate(each.gain)}" for each in both if each is not None))
    assert there("mean weight of a thought", f"{first.weight:.4f}", f"{second.weight:.4f}")
    assert there("entropy of thoughts, nats a token", f"{first.entropy:.4f}", f"{second.entropy:.4f}")
    assert there("different thoughts, share of all", f"{first.distinct:.1%}", f"{second.distinct:.1%}")
    assert there("likeliest next tokens that only it has right", f"{compared.broken}", f"{compared.repaired}")
    for summary in (first, second):
        for each in summary.frequent:
            assert there(f"⟨{''.join(each.tokens)}⟩", str(each.count))


def test_the_head_says_which_model_predicts_better_and_what_thoughts_gain(compared, parsed):
    [(_, headline)] = parsed.of("p", **{"class": "headline"})
    talk, gain = compared.talk_log_prob.difference, compared.gain
    assert headline == (
        f"Second less first, after thoughts: {talk.mean:+.4f} nats a token [{talk.low:+.4f}, {talk.high:+.4f}]; "
        f"thoughts gain {gain.first:+.4f} in the first, {gain.second:+.4f} in the second"
    )
    assert [re.sub(r"\s+", " ", text) for _, text in parsed.of("dd")] == [
        "some/model after 2 thoughts of 3 tokens, sampled at temperature 1 with seed 0.",
        "another/model after 2 thoughts of 2 tokens, sampled at temperature 1 with seed 0.",
    ]


def test_the_charts_count_the_tokens_and_thoughts_of_each_model(compared, parsed):
    labels = [mine["aria-label"] for mine, _ in parsed.of("svg")]
    assert len(labels) == 7

    def counts(title):
        [label] = [each for each in labels if each.startswith(title)]
        return [int(each) for each in re.findall(r": (\d+)", label)]

    pairs = [pair for some in paired(compared.first, compared.second) for pair in some]
    assert counts("Difference after thoughts, nats") == [
        sum(level(pair.talk_log_prob) == step for pair in pairs) for step in range(-3, 4)
    ]
    for side in SIDES:
        found = getattr(compared, side)
        assert counts(f"Gain for the next token, nats: {side}") == [
            sum(level(each.position.gain) == step for each in places(found)) for step in range(-3, 4)
        ]
        assert sum(counts(f"Weight of a thought: {side}")) == found.summary.thoughts
        [label] = [each for each in labels if each.startswith(f"Gain by nats without thoughts: {side}")]
        for each in found.summary.difficulties:
            assert f"{each.least:g} to {each.below:g}: {each.gain.mean:+.3f}" in label


def test_charts_beside_each_other_have_one_scale(compared, parsed):
    """A point lies at 170 + 78 gain / reach, whichever model it is of."""
    gains = [each.gain for side in SIDES for each in getattr(compared, side).summary.difficulties]
    bounds = [bound for gain in gains for bound in (gain.low, gain.mean, gain.high) if bound is not None]
    reach = max(map(abs, bounds))
    places_of = [float(mine["cx"]) for mine, _ in parsed.of("circle")]
    assert places_of == pytest.approx([170 + 78 * gain.mean / reach for gain in gains], abs=0.06)


def test_hostile_text_adds_no_element_and_no_attribute_to_a_comparison(compared, hostile_compared):
    allowed = {(tag, name) for tag, mine, _ in Parsed(comparison_page(compared)).elements for name in (None, *mine)}
    allowed |= {("span", "aria-label"), ("br", None)}  # of white space and of new lines
    text = comparison_page(hostile_compared)
    shown = Parsed(text)
    assert {(tag, name) for tag, mine, _ in shown.elements for name in (None, *mine)} <= allowed
    counts = Counter(tag for tag, _, _ in shown.elements)
    assert (counts["script"], counts["style"], counts["title"]) == (2, 1, 1)
    name = "␛[31mmodel<U+202E></title><script>"
    assert [title for _, title in shown.of("title")] == [f"Thoughts of {name} and of {name}"]
    assert text.count("</script") == 2
    assert {each for each in text if unicodedata.category(each) in ("Cc", "Cf", "Cs", "Zl", "Zp")} == {"\n"}


def test_a_comparison_names_nothing_outside_of_itself(compared, parsed):
    assert not {tag for tag, _, _ in parsed.elements} & {"link", "img", "iframe", "object", "embed", "base", "video"}
    addresses = [mine[name] for _, mine, _ in parsed.elements for name in ("src", "href", "action") if name in mine]
    assert addresses and all(each.startswith("#t") for each in addresses)
    assert not re.search(r"https?:|url\(|@import", comparison_page(compared))
    [policy] = [mine["content"] for mine, _ in parsed.of("meta") if "http-equiv" in mine]
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy
