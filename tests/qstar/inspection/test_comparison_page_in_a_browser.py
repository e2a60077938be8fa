"""The page of a comparison in a browser: nothing fails, and a token of either model shows the thoughts of both."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import inspected
import pytest
from browser import AXE, FOCUSED, PANEL, STATUS, focus_text, found_browser, serious_violations
from parsed import plain, rounded, signed

from qstar.inspection.comparison import SIDES, Comparison, compare, largest_differences, paired
from qstar.inspection.comparison_page import LETTERS, comparison_page
from qstar.inspection.highlights import level
from qstar.inspection.visible import visible_token

pytestmark = pytest.mark.skipif(found_browser() is None, reason="no browser is here: install chromium to run it")
CHOSEN = "[...document.querySelectorAll('.chosen')].map(each => each.id)"


@pytest.fixture(scope="module")
def files(tmp_path_factory, compared, hostile_compared) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    long = compare(*(inspected.lengthened(each, 5_000) for each in (compared.first, compared.second)))
    made = {"compared": compared, "hostile": hostile_compared, "long": long}
    for name, each in made.items():
        (folder / f"{name}.html").write_text(comparison_page(each), encoding="utf-8")
    return {name: folder / f"{name}.html" for name in made}


def ids(found: Comparison, letter: str) -> list[str]:
    return [
        f"{letter}{number}-{place}"
        for number, document in enumerate(found.first.documents)
        for place in range(len(document.tokens))
    ]


def expected_status(found: Comparison, token: str) -> str:
    """The numbers of both models, whichever column the token stands in."""
    number, place = map(int, token[1:].split("-"))
    if place == 0:
        return "no thought stands before this token"
    [pair] = [each for each in paired(found.first, found.second)[number] if each.first.index == place - 1]
    values = [
        f"{side}: gain {signed(each.gain)} nats, weight {plain(each.weight)}"
        for side, each in zip(SIDES, (pair.first, pair.second), strict=True)
    ]
    return "; ".join([f"difference {signed(pair.talk_log_prob)} nats", *values])


@pytest.mark.parametrize("name", ["compared", "hostile", "long"])
def test_nothing_of_a_comparison_fails_and_nothing_is_asked_for_but_the_file(browser, files, name):
    browser.open(files[name])
    focus_text(browser)
    for key in ("ArrowRight", "ArrowDown", "Enter", "Escape", "End"):
        browser.press(key)
    browser.point("#u0-1", click=True)
    browser.run("for (const each of document.querySelectorAll('input')) each.click()")
    assert browser.complaints == []
    assert [each for each in browser.requests if each != "about:blank"] == [files[name].as_uri()]


@pytest.mark.parametrize("letter", LETTERS)
def test_arrow_keys_reach_every_token_of_a_column_and_say_the_numbers_of_both(browser, files, compared, letter):
    browser.open(files["compared"])
    focus_text(browser)
    if letter == "u":
        browser.press("Tab")
    seen = []
    for token in ids(compared, letter):
        assert browser.run(STATUS) == expected_status(compared, token)
        assert browser.run(CHOSEN) == [f"{each}{token[1:]}" for each in LETTERS]
        seen.append(browser.run(FOCUSED))
        browser.press("ArrowRight")
    assert seen == ids(compared, letter)
    assert browser.run(FOCUSED) == seen[-1], "the last one has none behind it"
    browser.press("Home")
    assert browser.run(FOCUSED) == seen[0]
    browser.press("End")
    assert browser.run(FOCUSED) == seen[-1]


def test_tab_goes_from_one_column_to_the_other_and_on(browser, files, compared):
    browser.open(files["compared"])
    focus_text(browser)
    seen = [browser.run(FOCUSED)]
    for _ in range(5):
        browser.press("Tab")
        seen.append(browser.run(FOCUSED))
    assert seen == [f"{letter}{number}-0" for number in range(3) for letter in LETTERS]


def test_up_and_down_find_the_tokens_that_differ(browser, files, compared):
    browser.open(files["compared"])
    focus_text(browser)
    browser.press("Tab")
    coloured = [
        f"u{number}-{pair.first.index + 1}"
        for number, some in enumerate(paired(compared.first, compared.second))
        for pair in some
        if level(pair.talk_log_prob)
    ]
    seen = []
    for _ in coloured:
        browser.press("ArrowDown")
        seen.append(browser.run(FOCUSED))
    assert seen == coloured
    browser.press("ArrowUp")
    assert browser.run(FOCUSED) == coloured[-2]


@pytest.mark.parametrize("letter", LETTERS)
def test_a_token_of_either_column_shows_the_thoughts_of_both(browser, files, compared, letter):
    browser.open(files["compared"])
    browser.point(f"#{letter}1-3")
    assert browser.run(CHOSEN) == ["t1-3", "u1-3"]
    shown = re.sub("[ \t]+", " ", browser.run(PANEL))
    pair = paired(compared.first, compared.second)[1][2]
    assert shown.startswith(f"⟦{pair.document.tokens[3]}⟧") and "text 2, token 4" in shown
    both = pair.first, pair.second
    for row in (
        ("with", *(plain(each.talk_log_prob[0]) for each in both), signed(pair.talk_log_prob)),
        ("without", *(plain(each.base_log_prob[0]) for each in both), signed(pair.base_log_prob)),
        ("gain", *(signed(each.gain) for each in both), signed(pair.gain)),
        ("weight", *(plain(each.weight) for each in both)),
    ):
        assert " ".join(row) in shown
    rest = shown[shown.index("\nfirst\n") :]
    for side, position in zip(SIDES, both, strict=True):
        rest = rest[rest.index(f"{side}\n") :]
        for ahead, values in enumerate(zip(position.base_log_prob, position.talk_log_prob, strict=True)):
            name = pair.document.tokens[3 + ahead].strip()
            rest = rest[rest.index(" ".join([name, *map(plain, values), signed(position.gain_ahead[ahead])])) :]
        for each, gain in zip(position.rationales, position.own_gains, strict=True):
            values = (f"{rounded(value):.2f}".replace("-", "−") for value in each.log_probs)
            rest = rest[rest.index("".join(map("".join, zip(each.tokens, values, strict=True)))) :]
            facts = f"weight {plain(each.weight)}, entropy {plain(each.entropy)} nats"
            rest = rest[rest.index(f"{facts}, advantage {signed(each.advantage)}, gain {signed(gain)}") :]
        for name, likely in (("without", position.before), ("with", position.after)):
            line = " ".join(f"{each.text.strip()} {100 * rounded(each.probability):.1f}%" for each in likely)
            rest = rest[rest.index(f"{name} {line}") :]


def test_a_token_that_is_held_stays_in_both_columns(browser, files, compared):
    browser.open(files["compared"])
    held = "[...document.querySelectorAll('.held')].map(each => each.id)"
    browser.point("#u0-4", click=True)
    browser.point("#t1-2")
    assert browser.run(STATUS) == expected_status(compared, "t0-4")
    assert browser.run(held) == browser.run(CHOSEN) == ["t0-4", "u0-4"]
    browser.press("Escape")
    browser.point("#t1-3")
    assert browser.run(STATUS) == expected_status(compared, "t1-3")
    assert (browser.run(held), browser.run(CHOSEN)) == ([], ["t1-3", "u1-3"])


def test_a_token_that_only_one_model_predicts_is_said_to_be_so(browser, compared, tmp_path):
    first, *rest = compared.second.documents
    second = replace(compared.second, documents=[replace(first, positions=first.positions[1:]), *rest])
    (tmp_path / "one.html").write_text(comparison_page(compare(compared.first, second)))
    browser.open(tmp_path / "one.html")
    browser.point("#u0-1")
    position = compared.first.documents[0].positions[0]
    assert browser.run(STATUS) == (
        f"first: gain {signed(position.gain)} nats, weight {plain(position.weight)}; "
        "second: no thought stands before this token"
    )
    assert browser.run(PANEL).endswith("second\n\nno thought stands before this token")
    assert browser.complaints == []


@pytest.mark.parametrize("kind", ["difference", "gain", "weight", "surprise"])
def test_the_switch_colours_both_columns(browser, files, compared, kind):
    browser.open(files["compared"])
    assert browser.run("document.body.dataset.show") == "difference"
    browser.run(f"document.querySelector('input[value={kind}]').click()")
    seen = browser.run(
        "[...document.querySelectorAll('#texts .t')].map(each => [each.id[0],"
        f" each.getAttribute('data-{kind[0]}'), getComputedStyle(each).backgroundColor,"
        " getComputedStyle(each, '::after').content])"
    )
    looks: dict[int, set] = {}
    for _, step, colour, sign in seen:
        size = int(step or 0)
        looks.setdefault(size, set()).add(colour)
        assert sign == (f'"{("⁺" if size > 0 else "⁻") * abs(size)}"' if size else "none")
        assert (colour == "rgba(0, 0, 0, 0)") == (size == 0)
    assert len(looks) > 2 and all(len(colours) == 1 for colours in looks.values())
    columns = [[step for letter, step, _, _ in seen if letter == each] for each in LETTERS]
    assert (columns[0] == columns[1]) == (kind == "difference")
    legends = browser.run("[...document.querySelectorAll('.legend')].filter(each => each.offsetHeight).length")
    assert legends == 1
    assert browser.run(f"!!document.querySelector('.legend[data-of={kind}]').offsetHeight")


def test_a_link_of_a_list_of_differences_jumps_to_its_token(browser, files, compared):
    browser.open(files["compared"])
    worst = largest_differences(compared, 20)[1][0]
    token = f"t{worst.number}-{worst.first.index + 1}"
    browser.point(f"a[href='#{token}']", click=True)
    browser.until(f"{FOCUSED} === '{token}'")
    assert browser.run(STATUS) == expected_status(compared, token)
    browser.open(files["compared"], f"#u{token[1:]}")
    assert browser.run(FOCUSED) == f"u{token[1:]}"


def test_hostile_text_is_shown_as_text_in_both_columns(browser, files, hostile_compared):
    browser.open(files["hostile"])
    shown = dict(browser.run("[...document.querySelectorAll('#texts .t')].map(each => [each.id, each.textContent])"))
    for letter, found in zip(LETTERS, (hostile_compared.first, hostile_compared.second), strict=True):
        for number, document in enumerate(found.documents):
            for place, token in enumerate(document.tokens):
                assert shown[f"{letter}{number}-{place}"] == visible_token(token)
    for number, document in enumerate(hostile_compared.first.documents):
        browser.run(f"document.getElementById('u{number}-0').focus()")
        for place in range(min(len(document.tokens), 8)):
            token = visible_token(document.tokens[place])
            assert browser.run("document.querySelector('#token h2').textContent") == f"⟦{token}⟧"
            assert browser.run("document.querySelectorAll('script, img, style').length") == 3
            browser.press("ArrowRight")
    assert browser.complaints == []


@pytest.mark.parametrize("width", [1280, 420])
@pytest.mark.parametrize("name", ["compared", "hostile"])
def test_no_word_of_a_comparison_is_wider_than_the_page(browser, files, name, width):
    browser.open(files[name])
    size = dict(width=width, height=900, deviceScaleFactor=1, mobile=False)
    browser.send("Emulation.setDeviceMetricsOverride", **size)
    browser.point("#t0-1")
    inside = (
        "[document.documentElement, document.querySelector('aside')].map(each => each.scrollWidth - each.clientWidth)"
    )
    found = browser.run(inside)
    browser.send("Emulation.clearDeviceMetricsOverride")
    assert found == [0, 0]


def test_columns_stand_beside_each_other_and_below_where_it_is_narrow(browser, files):
    browser.open(files["compared"])
    tops = "['t1-0', 'u1-0'].map(id => document.getElementById(id).getBoundingClientRect().top)"
    wide = browser.run(tops)
    browser.send("Emulation.setDeviceMetricsOverride", width=420, height=900, deviceScaleFactor=1, mobile=False)
    narrow = browser.run(tops)
    browser.send("Emulation.clearDeviceMetricsOverride")
    assert wide[0] == wide[1] and narrow[0] < narrow[1]


@pytest.mark.skipif(not AXE.is_file(), reason="axe-core is not here: npm install axe-core in the checkout")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("name", "kind"), [("compared", "difference"), ("compared", "weight"), ("hostile", "gain")])
def test_a_comparison_keeps_nobody_out(browser, files, name, scheme, kind):
    """Of what axe-core knows nothing serious is wrong, in either scheme, whatever the colours mean."""
    browser.open(files[name])
    browser.run(f"document.querySelector('input[value={kind}]').click()")
    browser.point("#t0-1")
    assert serious_violations(browser, scheme) == []
