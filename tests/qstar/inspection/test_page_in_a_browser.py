"""The page in a browser: nothing is loaded, nothing fails, and keys, pointer and links show every token's thoughts."""

from __future__ import annotations

import json
from pathlib import Path

import inspected
import pytest
from browser import AXE, FOCUSED, PANEL, STATUS, focus_text, found_browser, serious_violations
from parsed import plain, rounded, signed

from qstar.inspection.data import Inspection
from qstar.inspection.highlights import extremes, level
from qstar.inspection.page import page
from qstar.inspection.visible import visible_token

pytestmark = pytest.mark.skipif(found_browser() is None, reason="no browser is here: install chromium to run it")


@pytest.fixture(scope="module")
def files(tmp_path_factory, found, hostile) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    made = {"found": found, "hostile": hostile, "long": inspected.lengthened(found, 20_000)}
    for name, each in made.items():
        (folder / f"{name}.html").write_text(page(each), encoding="utf-8")
    return {name: folder / f"{name}.html" for name in made}


def ids(found: Inspection) -> list[str]:
    return [f"t{n}-{place}" for n, document in enumerate(found.documents) for place in range(len(document.tokens))]


def expected_status(found: Inspection, token: str) -> str:
    number, place = map(int, token[1:].split("-"))
    known = {each.index + 1: each for each in found.documents[number].positions}
    if place not in known:
        return "no thought stands before this token"
    return f"gain {signed(known[place].gain)} nats, weight {plain(known[place].weight)}"


@pytest.mark.parametrize("name", ["found", "hostile", "long"])
def test_nothing_fails_and_nothing_is_asked_for_but_the_file(browser, files, name):
    browser.open(files[name])
    focus_text(browser)
    for key in ("ArrowRight", "ArrowDown", "Enter", "Escape", "End"):
        browser.press(key)
    browser.point("#t0-1", click=True)
    browser.run("for (const each of document.querySelectorAll('input')) each.click()")
    assert browser.complaints == []
    assert [each for each in browser.requests if each != "about:blank"] == [files[name].as_uri()]


def test_the_policy_of_the_page_stops_a_script_that_gets_in(browser, files, tmp_path):
    """So that what a browser complains of is known to be seen here."""
    broken = files["found"].read_text().replace("<main>", "<main><script>document.title = 'in'</script>")
    (tmp_path / "broken.html").write_text(broken)
    browser.open(tmp_path / "broken.html")
    assert browser.run("document.title") == "Thoughts of some/model"
    assert len(browser.complaints) == 1 and "Content Security Policy" in browser.complaints[0]


def test_arrow_keys_reach_every_token_in_order_and_say_its_numbers(browser, files, found):
    browser.open(files["found"])
    focus_text(browser)
    seen = []
    for token in ids(found):
        assert browser.run(STATUS) == expected_status(found, token)
        seen.append(browser.run(FOCUSED))
        browser.press("ArrowRight")
    assert seen == ids(found)
    assert browser.run(FOCUSED) == seen[-1], "the last one has none behind it"
    browser.press("ArrowLeft")
    assert browser.run(FOCUSED) == seen[-2]
    browser.press("Home")
    assert browser.run(FOCUSED) == seen[0]


def test_up_and_down_find_the_coloured_tokens(browser, files, found):
    browser.open(files["found"])
    focus_text(browser)
    coloured = [
        f"t{number}-{each.index + 1}"
        for number, document in enumerate(found.documents)
        for each in document.positions
        if level(each.gain)
    ]
    seen = []
    for _ in coloured:
        browser.press("ArrowDown")
        seen.append(browser.run(FOCUSED))
    assert seen == coloured
    browser.press("ArrowUp")
    assert browser.run(FOCUSED) == coloured[-2]


def test_a_token_shows_its_thoughts_and_what_was_likely(browser, files, found):
    browser.open(files["found"])
    browser.point("#t1-3")
    shown = browser.run(PANEL).replace("\t", " ")
    document = found.documents[1]
    position = document.positions[2]
    assert shown.startswith("⟦ d⟧".replace(" d", document.tokens[3]))
    assert "text 2, token 4" in shown
    for ahead in range(2):
        values = position.base_log_prob[ahead], position.talk_log_prob[ahead]
        row = [document.tokens[3 + ahead].strip(), *map(plain, values), signed(position.gain_ahead[ahead])]
        assert " ".join(row) in shown
    for each, gain in zip(position.rationales, position.own_gains, strict=True):
        pieces = [f"{token}{rounded(value):.2f}" for token, value in zip(each.tokens, each.log_probs, strict=True)]
        assert "".join(pieces).replace("-", "−") in shown
        facts = f"weight {plain(each.weight)}, entropy {plain(each.entropy)} nats, advantage {signed(each.advantage)}"
        assert f"{facts}, gain {signed(gain)}" in shown
    for name, likely in (("without", position.before), ("with", position.after)):
        line = " ".join(f"{each.text} {100 * rounded(each.probability):.1f}%" for each in likely)
        assert f"{name} {line}" in shown


def test_a_token_that_is_held_stays_while_the_pointer_moves_on(browser, files, found):
    browser.open(files["found"])
    browser.point("#t0-2")
    browser.point("#t0-4")
    assert browser.run(STATUS) == expected_status(found, "t0-4")
    browser.point("#t0-4", click=True)
    browser.point("#t1-2")
    assert browser.run(STATUS) == expected_status(found, "t0-4")
    browser.press("Escape")
    browser.point("#t1-3")
    assert browser.run(STATUS) == expected_status(found, "t1-3")
    browser.point("#t1-3", click=True)
    browser.press("ArrowRight")
    assert browser.run(STATUS) == expected_status(found, "t1-4"), "keys go on"
    browser.press("Enter")
    browser.point("#t0-1")
    assert browser.run(STATUS) == expected_status(found, "t1-4")


def test_a_pointer_at_rest_takes_no_token_from_keys(browser, files, found):
    """A browser tells it what lies under it now where the page has scrolled."""
    browser.open(files["found"])
    browser.point("#t0-4")
    browser.run("document.getElementById('t1-2').focus()")
    browser.point("#t0-4")
    assert browser.run(STATUS) == expected_status(found, "t1-2")
    browser.point("#t0-5")
    assert browser.run(STATUS) == expected_status(found, "t0-5")


@pytest.mark.parametrize("kind", ["gain", "weight", "surprise"])
def test_the_switch_changes_colours_signs_and_legend(browser, files, kind):
    browser.open(files["found"])
    browser.run(f"document.querySelector('input[value={kind}]').click()")
    seen = browser.run(
        "[...document.querySelectorAll('#texts .t')].map(each => ["
        f"each.getAttribute('data-{kind[0]}'), getComputedStyle(each).backgroundColor,"
        " getComputedStyle(each, '::after').content])"
    )
    looks = {}
    for step, colour, sign in seen:
        assert looks.setdefault(step, (colour, sign)) == (colour, sign)
    assert len(looks) > 2 and len(set(looks.values())) == len({step for step in looks if step not in (None, "0")}) + 1
    for step, (colour, sign) in looks.items():
        size = int(step or 0)
        assert sign == (json.dumps(("⁺" if size > 0 else "⁻") * abs(size), ensure_ascii=False) if size else "none")
        assert (colour == "rgba(0, 0, 0, 0)") == (size == 0)
    legends = browser.run(
        "[...document.querySelectorAll('.legend')].map(each => [each.dataset.of, !!each.offsetHeight])"
    )
    assert legends == [[each, each == kind] for each in ("gain", "weight", "surprise")]


def test_a_link_of_a_list_jumps_to_its_token(browser, files, found):
    browser.open(files["found"])
    worst = extremes(found, 20)[1][1]
    token = f"t{worst.number}-{worst.position.index + 1}"
    browser.point(f"a[href='#{token}']", click=True)
    browser.until(f"{FOCUSED} === '{token}'")
    assert browser.run(STATUS) == expected_status(found, token)
    browser.open(files["found"], f"#{token}")
    assert browser.run(FOCUSED) == token


def test_the_page_is_light_dark_or_printed(browser, files):
    browser.open(files["found"])
    background = "getComputedStyle(document.body).backgroundColor"
    hidden = "[document.querySelector('aside'), document.getElementById('switch')].map(each => !each.offsetHeight)"
    schemes = {}
    for scheme in ("light", "dark"):
        browser.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        schemes[scheme] = browser.run(background)
    assert schemes == {"light": "rgb(255, 255, 255)", "dark": "rgb(22, 24, 27)"}
    assert browser.run(hidden) == [False, False]
    browser.send("Emulation.setEmulatedMedia", media="print", features=[])
    assert (browser.run(hidden), browser.run(background)) == ([True, True], "rgb(255, 255, 255)")
    browser.send("Emulation.setEmulatedMedia", media="")


def test_hostile_text_is_shown_as_text(browser, files, hostile):
    browser.open(files["hostile"])
    shown = browser.run("[...document.querySelectorAll('#texts .t')].map(each => [each.id, each.textContent])")
    texts = [visible_token(token) for document in hostile.documents for token in document.tokens]
    assert [text for _, text in shown] == texts
    focus_text(browser)
    for document in range(len(hostile.documents)):
        browser.run(f"document.getElementById('t{document}-0').focus()")
        for place in range(min(len(hostile.documents[document].tokens), 12)):
            assert f"text {document + 1}, token {place + 1}" in browser.run(PANEL)
            token = visible_token(hostile.documents[document].tokens[place])
            assert browser.run("document.querySelector('#token h2').textContent") == f"⟦{token}⟧"
            assert browser.run("document.querySelectorAll('script, img, style').length") == 3
            browser.press("ArrowRight")
    assert browser.complaints == []


def test_no_word_is_wider_than_the_page(browser, files):
    browser.open(files["hostile"])
    assert browser.run("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def test_twenty_thousand_tokens_are_painted_and_found_within_a_second(browser, files):
    browser.open(files["long"])
    assert browser.run("document.querySelectorAll('#texts .t').length") >= 20_000
    assert browser.run("performance.getEntriesByName('first-contentful-paint')[0].startTime") < 1000
    taken = browser.run(
        "(() => { const begin = performance.now(); document.getElementById('t0-19000').focus();"
        " document.body.offsetHeight; return performance.now() - begin; })()"
    )
    assert taken < 1000


@pytest.mark.skipif(not AXE.is_file(), reason="axe-core is not here: npm install axe-core in the checkout")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["found", "hostile"])
@pytest.mark.parametrize("kind", ["gain", "weight", "surprise"])
def test_nobody_is_kept_out(browser, files, name, scheme, kind):
    """Of what axe-core knows nothing serious is wrong, in either scheme, whatever the colours mean."""
    browser.open(files[name])
    browser.run(f"document.querySelector('input[value={kind}]').click()")
    browser.point("#t0-1")
    assert serious_violations(browser, scheme) == []
