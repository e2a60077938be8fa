"""The page that steps through a training holds the numbers of its inspections, and every text as text."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import replace

import inspected
import pytest
from parsed import Parsed, close

from qstar.inspection.data import Inspection
from qstar.inspection.highlights import SURPRISE_SCALE, WEIGHT_SCALE, level
from qstar.inspection.history import history_page, snapshot
from qstar.inspection.visible import visible_token

STEPS = (0, 50, 75)


def page_of(found: list[Inspection], name: str = "runs/some") -> str:
    snapshots = [snapshot(step, f"step-{step:06}.html", each) for step, each in zip(STEPS, found, strict=False)]
    return history_page(name, found[-1], snapshots)


@pytest.fixture(scope="module")
def learned() -> list[Inspection]:
    """Inspections of one text at three steps."""
    return inspected.learned()


def test_the_data_in_the_page_is_that_of_the_inspections(learned):
    data = Parsed(page_of(learned)).data()
    strings = data["strings"]
    assert [each["step"] for each in data["steps"]] == list(STEPS)
    assert [each["page"] for each in data["steps"]] == [f"step-{step:06}.html" for step in STEPS]
    for step, found in zip(data["steps"], learned, strict=True):
        gain = found.summary.gain
        assert step["gain"] == [close(value) for value in (gain.mean, gain.low, gain.high)]
        assert len(step["texts"]) == len(found.documents)
        for shown, document in zip(step["texts"], found.documents, strict=True):
            assert [int(index) for index in shown] == [each.index for each in document.positions]
            for each in document.positions:
                levels, gain, weight, thought, before, after = shown[str(each.index)]
                if each.gain is None:
                    assert levels == [] and gain is None
                else:
                    surprise = max(level(each.surprise, SURPRISE_SCALE), 0)
                    assert levels == [level(each.gain), level(each.weight, WEIGHT_SCALE), surprise]
                assert (gain, weight) == (close(each.gain), close(each.weight))
                assert strings[thought] == visible_token("".join(each.rationales[0].tokens))
                for (text, probability), likely in ((before, each.before[0]), (after, each.after[0])):
                    assert (strings[text], probability) == (visible_token(likely.text), close(likely.probability))
    assert len({str(step["texts"]) for step in data["steps"]}) == 3, "else this compares one with itself"


def test_without_a_script_the_last_step_is_shown(learned):
    parsed = Parsed(page_of(learned))
    shown = {mine["id"]: mine for mine, _ in parsed.of("span", role="button")}
    for number, document in enumerate(learned[-1].documents):
        assert len(document.tokens) == sum(each.startswith(f"t{number}-") for each in shown)
        for each in document.positions:
            if each.gain is not None:
                assert shown[f"t{number}-{each.index + 1}"]["data-g"] == str(level(each.gain))
    gain = learned[-1].summary.gain
    [figure] = [text for mine, text in parsed.of("output") if mine["id"] == "figure"]
    assert figure == f"thoughts gain {gain.mean:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}]"
    [(link, _)] = parsed.of("a")
    assert link["href"] == "step-000075.html"


def test_the_curves_are_of_the_gain_the_controls_and_the_signs_of_a_collapse(learned):
    parsed = Parsed(page_of(learned))
    said = [mine["aria-label"] for mine, _ in parsed.of("svg")]
    last = learned[-1].summary
    assert [each.split(", from")[0] for each in said] == [
        "Gain for the next token, nats",
        "Mean weight of a thought",
        "Entropy of thoughts, nats a token",
        "Different thoughts, share of all",
    ]
    assert f"its thoughts: {last.gain.mean:.3f} at the end" in said[0]
    for name, control in last.controls.items():
        assert f"{name}: {control.gain.mean:.3f} at the end" in said[0]
    for text, value in zip(said[1:], (last.weight, last.entropy, last.distinct), strict=True):
        assert text.endswith(f"to 75: {value:.3f} at the end")
    assert [len(mine["points"].split()) for mine, _ in parsed.of("polyline")] == [3] * (4 + 3)


def test_hostile_text_adds_no_element_and_no_attribute(learned, hostile):
    allowed = {(tag, name) for tag, mine, _ in Parsed(page_of(learned)).elements for name in (None, *mine)}
    allowed |= {("span", "aria-label"), ("br", None)}  # of white space and of new lines
    page = page_of([replace(hostile, summary=learned[0].summary)] * 3, name="\x1b[31m\u202e</title><script>")
    shown = Parsed(page)
    assert {(tag, name) for tag, mine, _ in shown.elements for name in (None, *mine)} <= allowed
    assert page.count("</script") == 2
    [(_, title)] = shown.of("title")
    assert title == "Thoughts of ␛[31m<U+202E></title><script> in training"
    assert {each for each in page if unicodedata.category(each) in ("Cc", "Cf", "Cs", "Zl", "Zp")} == {"\n"}


def test_the_page_names_nothing_outside_of_its_folder(learned):
    page = page_of(learned)
    parsed = Parsed(page)
    addresses = [mine[name] for _, mine, _ in parsed.elements for name in ("src", "href", "action") if name in mine]
    assert addresses == ["step-000075.html"]
    assert not re.search(r"https?:|url\(|@import", page)
    [policy] = [mine["content"] for mine, _ in parsed.of("meta") if "http-equiv" in mine]
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy


def test_a_hundred_steps_of_the_default_size_take_less_than_two_megabytes(found):
    long = inspected.lengthened(found, 256)
    snapshots = [snapshot(10 * step, f"step-{10 * step:06}.html", long) for step in range(100)]
    assert len(history_page("some", long, snapshots).encode()) < 2_000_000
