"""The page, in a browser: chat with what was done beside each answer, the dial, the race, keys, both colour schemes."""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.serving import serving

CHROMIUM = os.environ.get("KVP_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
playwright = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (apt-get install chromium)")
LONG = "the old harbour and the lamp of the keeper " * 12


@pytest.fixture(scope="module")
def url(fitted: Path) -> Iterator[str]:
    with serving(fitted, api_key=None) as (url, _):
        yield url


@pytest.fixture(scope="module")
def browser() -> Iterator["playwright.Browser"]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: "playwright.Browser", url: str) -> Iterator["playwright.Page"]:
    context = browser.new_context()
    page, troubles, strangers = context.new_page(), [], []
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("console", lambda message: troubles.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: None if request.url.startswith(url) else strangers.append(request.url))
    page.goto(url)
    yield page
    assert not troubles and not strangers
    context.close()


def ask(page: "playwright.Page", view: str, text: str) -> None:
    page.fill(f"#{view} textarea", text)
    page.press(f"#{view} textarea", "Enter")


def test_a_chat_shows_what_was_done_for_each_answer(page: "playwright.Page") -> None:
    playwright.expect(page.locator("#model")).to_have_text("tiny")
    page.click("summary")
    page.check("input[value=exact]")
    page.fill("[name=max_tokens]", "4")
    ask(page, "chat", LONG)
    facts = page.locator("#chat .facts .bar")
    playwright.expect(facts).to_have_count(1)
    first = page.locator("#chat .facts").inner_text()
    assert re.search(r"read in full · first token after [\d.]+ m?s · \d+ prompt tokens: \d+ read", first)
    assert "it reached the most tokens allowed" in first
    ask(page, "chat", "and then?")
    playwright.expect(facts).to_have_count(2)
    assert re.search(r"\d+ reused", page.locator("#chat .facts").nth(1).inner_text())
    page.click("[name=again]")
    playwright.expect(page.locator("#turns article .bar")).to_have_count(2)
    page.click("[name=clear]")
    playwright.expect(page.locator("#turns > *")).to_have_count(0)


def test_the_dial_predicts_and_stays_in_the_tab(page: "playwright.Page") -> None:
    page.click("summary")
    page.select_option("[name=path]", "kvp")
    page.fill("[name=exact_head]", "2")
    page.fill("[name=exact_tail]", "2")
    page.fill("[name=max_tokens]", "2")
    page.reload()
    ask(page, "chat", LONG + "anew")
    playwright.expect(page.locator("#chat .facts .bar .predicted")).to_have_count(1)
    assert re.search(r"predicted · first token .* \d+ predicted", page.locator("#chat .facts").inner_text())


def test_a_race_ends_with_a_verdict(page: "playwright.Page") -> None:
    page.click("summary")
    page.fill("[name=max_tokens]", "2")
    page.keyboard.press("Escape")
    page.click("[data-view=race]")
    for _ in range(2):  # the second on an empty cache, too
        ask(page, "race", LONG)
        playwright.expect(page.locator("#verdict")).to_have_text(
            re.compile(
                r"^By prediction the first token came [\d.]+ times (sooner|later), with (the same|another) answer\.$"
            )
        )
        for lane, path in (("kvp", "predicted"), ("full", "read in full")):
            facts = page.locator(f"[data-lane={lane}] .facts").inner_text()
            assert facts.startswith(path)
            assert "reused" not in facts


def test_keys_and_errors(page: "playwright.Page", url: str) -> None:
    page.click("h1")
    page.keyboard.press("/")
    playwright.expect(page.locator("#chat textarea")).to_be_focused()
    ask(page, "chat", LONG)
    page.keyboard.press("Escape")
    playwright.expect(page.locator("#chat [type=submit]")).to_be_visible()
    playwright.expect(page.locator("#chat .facts").last).to_have_text(re.compile("stopped|first token"))
    page.set_input_files("#chat [type=file]", {"name": "a.txt", "mimeType": "text/plain", "buffer": b"the old town"})
    playwright.expect(page.locator("#chat textarea")).to_have_value("a.txt:\nthe old town")


def test_markup_in_answers_is_text(page: "playwright.Page") -> None:
    shown = page.evaluate(
        """async () => {
            const { showText } = await import("/static/show.js");
            const node = document.createElement("div");
            showText(node, "a <img src=x>\\n```python\\nb < 1\\n```\\nc");
            return [node.querySelectorAll("img").length, node.querySelector("pre").textContent, node.textContent];
        }"""
    )
    assert shown == [0, "b < 1", "a <img src=x>\nb < 1c"]  # the block has lines of its own


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_colour_schemes_contrast(browser: "playwright.Browser", url: str, scheme: str) -> None:
    with browser.new_context(color_scheme=scheme, bypass_csp=True) as context:
        page = context.new_page()
        page.goto(url)
        ink, paper = page.evaluate(
            """() => { const style = getComputedStyle(document.documentElement);
            return [style.color, style.backgroundColor].map((c) => c.match(/\\d+/g).slice(0, 3).map(Number)); }"""
        )
    assert (sum(ink) > sum(paper)) == (scheme == "dark")
    assert abs(sum(ink) - sum(paper)) > 500
