"""The page that steps through a training, in a browser: every step shows its own numbers, by pointer and by keys."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import inspected
import pytest
from browser import AXE, STATUS, Browser, found_browser, serious_violations
from parsed import plain, rounded, signed

from qstar.inspection.data import Inspection
from qstar.inspection.highlights import level
from qstar.inspection.history import history_page, snapshot
from qstar.inspection.visible import visible_token

pytestmark = pytest.mark.skipif(found_browser() is None, reason="no browser is here: install chromium to run it")
STEPS = (0, 50, 75)
FIGURE = "document.getElementById('figure').textContent"
SLIDER = "document.getElementById('step')"
LEVELS = "[...document.querySelectorAll('#texts .t')].map(each => each.dataset.g ?? null)"
ROWS = "[...document.querySelectorAll('#token tbody tr')].map(row => [...row.cells].map(each => each.textContent))"
CURRENT = "document.querySelector('#token tr[aria-current]').cells[0].textContent"


@pytest.fixture(scope="module")
def learned() -> list[Inspection]:
    return inspected.learned()


@pytest.fixture(scope="module")
def files(tmp_path_factory, learned, hostile) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    made = {"learned": learned, "hostile": [replace(hostile, summary=each.summary) for each in learned]}
    for name, found in made.items():
        snapshots = [snapshot(step, f"step-{step:06}.html", each) for step, each in zip(STEPS, found, strict=True)]
        (folder / f"{name}.html").write_text(history_page("some", found[-1], snapshots), encoding="utf-8")
    return {name: folder / f"{name}.html" for name in made}


def slide(browser: Browser, to: int) -> None:
    """As a person that drags the slider."""
    browser.run(f"(step => {{ step.value = {to}; step.dispatchEvent(new Event('input')); }})({SLIDER})")


def expected_levels(found: Inspection) -> list[str | None]:
    shown = []
    for document in found.documents:
        known = {each.index + 1: each.gain for each in document.positions}
        shown += [known.get(place) for place in range(len(document.tokens))]
    return [None if gain is None else str(level(gain)) for gain in shown]


@pytest.mark.parametrize("name", ["learned", "hostile"])
def test_nothing_fails_and_nothing_is_asked_for_but_the_file(browser, files, name):
    browser.open(files[name])
    for to in (0, 2, 1):
        slide(browser, to)
    browser.point("#t0-1", click=True)
    for key in ("ArrowRight", "PageUp", "PageDown", "Enter", "Escape", "End"):
        browser.press(key)
    browser.run("for (const each of document.querySelectorAll('input[type=radio]')) each.click()")
    assert browser.complaints == []
    assert [each for each in browser.requests if each != "about:blank"] == [files[name].as_uri()]


def test_a_step_shows_its_levels_its_gain_and_its_link(browser, files, learned):
    browser.open(files["learned"])
    seen = set()
    for to in (2, 0, 1):
        slide(browser, to)
        found = learned[to]
        gain = found.summary.gain
        assert browser.run(LEVELS) == expected_levels(found)
        interval = f"[{signed(gain.low, 4)}, {signed(gain.high, 4)}]"
        assert browser.run(FIGURE) == f"thoughts gain {signed(gain.mean, 4)} {interval}"
        assert browser.run("document.getElementById('number').textContent") == f"step {STEPS[to]}"
        assert browser.run(f"{SLIDER}.getAttribute('aria-valuetext')") == f"step {STEPS[to]}"
        assert browser.run("document.getElementById('whole').getAttribute('href')") == f"step-{STEPS[to]:06}.html"
        seen.add(tuple(browser.run("[...document.querySelectorAll('.marker')].map(each => each.getAttribute('x1'))")))
    assert len(seen) == 3, "markers go along"


def test_a_token_shows_its_thought_at_every_step(browser, files, learned):
    browser.open(files["learned"])
    browser.point("#t1-3")
    positions = [found.documents[1].positions[2] for found in learned]
    rows = [
        [str(step), signed(each.gain, 2), plain(each.weight, 2), f"⟨{''.join(each.rationales[0].tokens)}⟩"]
        for step, each in zip(STEPS, positions, strict=True)
    ]
    assert len({row[1] for row in rows}) == 3
    for to in (2, 0, 1):
        slide(browser, to)
        assert browser.run(ROWS) == rows
        assert browser.run(CURRENT) == str(STEPS[to])
        assert browser.run(STATUS) == f"gain {signed(positions[to].gain)} nats, weight {plain(positions[to].weight)}"
        likely = browser.run("document.querySelector('#token .likely').textContent")
        before, after = positions[to].before[0], positions[to].after[0]
        chances = [f"{each.text} {100 * rounded(each.probability):.1f}%" for each in (before, after)]
        assert likely == f"likeliest without {chances[0]}, with {chances[1]}"


def test_the_token_that_gained_most_is_shown_at_first(browser, files, learned):
    browser.open(files["learned"])
    gains = [
        (each.gain, f"text {number + 1}, token {each.index + 2}")
        for number, document in enumerate(learned[-1].documents)
        for each in document.positions
        if each.gain is not None
    ]
    assert max(gains)[1] in browser.run("document.getElementById('token').textContent")
    browser.open(files["learned"], "#t2-1")
    assert browser.run("document.activeElement.id") == "t2-1"


def test_keys_go_from_step_to_step(browser, files):
    browser.open(files["learned"])
    browser.run("document.getElementById('t0-2').focus()")
    seen = [browser.run(CURRENT)]
    for key in ("PageUp", "PageUp", "PageUp", "PageDown"):
        browser.press(key)
        seen.append(browser.run(CURRENT))
    assert seen == ["75", "50", "0", "0", "50"]
    browser.run(f"{SLIDER}.focus()")
    browser.press("ArrowRight")
    assert browser.run(CURRENT) == "75"


def test_the_steps_play_from_the_first_to_the_last(browser, files):
    browser.open(files["learned"])
    browser.point("#play", click=True)
    assert browser.run(f"{SLIDER}.value") == "0"
    assert browser.run("document.getElementById('play').textContent") == "Pause"
    browser.until(f"{SLIDER}.value === '2' && document.getElementById('play').textContent === 'Play'")
    browser.point("#play", click=True)
    slide(browser, 1)
    assert browser.run("document.getElementById('play').textContent") == "Play", "who chooses a step has it stay"


def test_hostile_text_is_shown_as_text(browser, files, hostile):
    browser.open(files["hostile"])
    shown = browser.run("[...document.querySelectorAll('#texts .t')].map(each => each.textContent)")
    assert shown == [visible_token(token) for document in hostile.documents for token in document.tokens]
    for number, document in enumerate(hostile.documents):
        browser.run(f"document.getElementById('t{number}-{document.positions[0].index + 1}').focus()")
        thought = visible_token("".join(document.positions[0].rationales[0].tokens))
        assert browser.run(ROWS)[0][3] == f"⟨{thought}⟩"
    assert browser.run("document.querySelectorAll('script, img, style').length") == 3
    assert browser.complaints == []
    assert browser.run("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


@pytest.mark.skipif(not AXE.is_file(), reason="axe-core is not here: npm install axe-core in the checkout")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["learned", "hostile"])
def test_nobody_is_kept_out(browser, files, name, scheme):
    """Of what axe-core knows nothing serious is wrong, in either scheme."""
    browser.open(files[name])
    assert serious_violations(browser, scheme) == []
