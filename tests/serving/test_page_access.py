"""The chat page for those who use a keyboard, a screen reader or a small screen."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from playwright.sync_api import Browser, expect

from tests.serving.browser import Chat, opened
from tests.serving.scripted import MARKDOWN, create_scripted_app, pieces, running

pytestmark = pytest.mark.browser

CONTRASTS = """() => {
  const channel = (c) => (c /= 255, c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  const parse = (text) => {
    const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    canvas.fillStyle = text;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const luminance = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const ground = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const color = parse(getComputedStyle(at).backgroundColor);
      if (color[3] === 255) return color;
    }
    return [255, 255, 255, 255];
  };
  const found = [];
  for (const node of document.querySelectorAll("body *")) {
    const text = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
    if (!text || !node.checkVisibility() || node.closest("script, style, .unseen")) continue;
    const [a, b] = [parse(getComputedStyle(node).color), ground(node)].map(luminance);
    found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), node.outerHTML.slice(0, 80)]);
  }
  return found;
}"""
"""The contrast of each visible text with the nearest opaque ground, as WCAG 2.2 defines it."""


@pytest.fixture(scope="module")
def app() -> FastAPI:
    return create_scripted_app()


@pytest.fixture(scope="module")
def address(app: FastAPI) -> Iterator[str]:
    with running(app) as address:
        yield address


@pytest.fixture
def chat(browser: Browser, address: str) -> Iterator[Chat]:
    with opened(browser, address) as chat:
        yield chat


def focused(chat: Chat) -> str:
    """The role and name of what has the focus."""
    return chat.page.locator(":focus").aria_snapshot().split("\n")[0]


def test_all_is_done_with_the_keyboard(chat: Chat) -> None:
    keys = chat.page.keyboard
    keys.type("one")
    keys.press("Shift+Enter")
    keys.type("two")
    expect(chat.prompt).to_have_value("one\ntwo")
    keys.press("Enter")
    chat.wait()
    expect(chat.answers.last).to_contain_text("You said one two.")
    keys.type("slow")
    keys.press("Enter")
    expect(chat.answers.last).to_contain_text("one two three")
    keys.press("Escape")
    chat.wait()
    expect(chat.prompt).to_be_focused()
    # Backwards from the field: the last answer's actions, in reading order.
    seen = []
    for _ in range(4):
        keys.press("Shift+Tab")
        seen.append(focused(chat))
    assert [name for name in seen if "Fork" in name or "Regenerate" in name], seen
    while "Fork" not in focused(chat):
        keys.press("Shift+Tab")
    keys.press("Enter")
    expect(chat.titles).to_have_count(2)
    expect(chat.prompt).to_be_focused()


def test_the_focus_goes_once_around_in_reading_order(chat: Chat) -> None:
    chat.ask("a")
    is_outside = "document.activeElement === document.body"
    while not chat.page.evaluate(is_outside):
        chat.page.keyboard.press("Tab")
    seen = []
    while True:
        chat.page.keyboard.press("Tab")
        if chat.page.evaluate(is_outside):
            break
        seen.append(focused(chat))
        # The focus is seen: Chromium draws the outline of :focus-visible.
        assert chat.page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid", seen[-1]
    names = [name.partition('"')[2].partition('"')[0] for name in seen]
    assert names == [
        *("Skip to the message field", "New conversation", "a", "Delete a", "Load a state file…"),
        *("Conversations", "Model", "Dark colors", "Settings", "Messages", "Edit in a fork"),
        *("Copy", "Regenerate", "Fork", "Save state", "Message", "Send"),
    ]


def test_panels_give_the_focus_back(chat: Chat) -> None:
    settings = chat.button("Settings")
    settings.press("Enter")
    expect(settings).to_have_attribute("aria-expanded", "true")
    chat.page.keyboard.press("Tab")
    chat.page.keyboard.press("Escape")
    expect(chat.page.get_by_role("complementary", name="Settings")).to_be_hidden()
    expect(settings).to_have_attribute("aria-expanded", "false")
    expect(settings).to_be_focused()
    chat.ask("a")
    chat.button("Delete a").press("Enter")
    expect(chat.page.get_by_role("dialog")).to_be_visible()
    chat.page.keyboard.press("Escape")
    expect(chat.page.get_by_role("dialog")).to_be_hidden()
    expect(chat.button("Delete a")).to_be_focused()


def test_everything_has_a_role_and_a_name(chat: Chat) -> None:
    chat.button("Settings").click()
    chat.page.get_by_label("Color tokens by probability").check()
    chat.ask("markdown")
    for role, name in {
        "navigation": "Conversations",
        "main": None,
        "complementary": "Settings",
        "region": "Messages",
        "log": "Announcements",
    }.items():
        expect(chat.page.get_by_role(role, **({"name": name} if name else {}))).to_have_count(1)  # pyright: ignore
    controls = chat.page.locator("button, input:not([type=file]), select, textarea, summary, [tabindex='0']")
    nameless = []
    for control in controls.all():
        if control.is_visible():
            snapshot = control.aria_snapshot().split("\n")[0]
            if '"' not in snapshot and not snapshot.startswith(("- text: ", "- group: ")):
                nameless.append(snapshot)
    assert nameless == []
    levels = chat.page.locator("h1, h2, h3, h4, h5, h6").evaluate_all("nodes => nodes.map((node) => +node.tagName[1])")
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert chat.page.locator("html").get_attribute("lang") == "en"
    identifiers = chat.page.locator("[id]").evaluate_all("nodes => nodes.map((node) => node.id)")
    assert len(set(identifiers)) == len(identifiers)


def test_answers_are_announced_by_the_block(chat: Chat) -> None:
    chat.page.evaluate("""() => {
      window.said = [];
      new MutationObserver((records) => {
        for (const record of records) for (const node of record.addedNodes) window.said.push(node.textContent);
      }).observe(document.getElementById("announcer"), { childList: true });
    }""")
    chat.ask("markdown")
    said = chat.page.evaluate("window.said")
    assert said[0] == "The model is answering."
    assert said[1] == "Squares"
    assert "It was known to Nicomachus." in said
    assert said[-1].startswith(f"End of the answer. {len(pieces(MARKDOWN))} tokens")
    assert len(said) == 8
    expect(chat.page.get_by_role("log")).to_have_attribute("aria-live", "polite")
    live = chat.page.locator("[aria-live], [role=log], [role=status], [role=alert]")
    assert chat.answers.locator(live).count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_stand_out_from_their_ground(browser: Browser, address: str, scheme: Any) -> None:
    with opened(browser, address, color_scheme=scheme) as chat:
        chat.button("Settings").click()
        chat.ask("markdown")
        chat.ask("broken")
        contrasts = chat.page.evaluate(CONTRASTS)
        assert len(contrasts) > 40
        assert [found for found in contrasts if found[0] < 4.5] == []


def test_light_and_dark_follow_the_system_until_chosen(browser: Browser, address: str) -> None:
    with opened(browser, address, color_scheme="dark") as chat:
        ground = "getComputedStyle(document.body).backgroundColor"
        dark = chat.page.evaluate(ground)
        button = chat.button("Dark colors")
        expect(button).to_have_attribute("aria-pressed", "true")
        chat.page.emulate_media(color_scheme="light")
        expect(button).to_have_attribute("aria-pressed", "false")
        assert chat.page.evaluate(ground) != dark
        button.click()
        assert chat.page.evaluate(ground) == dark
        chat.page.reload()
        assert chat.page.evaluate(ground) == dark


def test_a_narrow_screen_shows_everything(browser: Browser, address: str) -> None:
    with opened(browser, address, viewport={"width": 360, "height": 640}, has_touch=True) as chat:
        expect(chat.page.get_by_role("navigation")).to_be_hidden()
        chat.ask("markdown")
        for name in ("Conversations", "Settings"):
            chat.button(name).click()
            assert chat.page.evaluate("document.documentElement.scrollWidth") <= 360
            chat.button(name).click()
        chat.button("Conversations").click()
        chat.button("New conversation").click()
        expect(chat.page.get_by_role("navigation")).to_be_hidden()
        for control in chat.page.locator("main button:visible, main select, main textarea").all():
            box = control.bounding_box()
            assert box is not None
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= 360
            assert box["height"] >= 24  # WCAG 2.2, 2.5.8


def test_nothing_moves_for_those_who_asked(browser: Browser, address: str) -> None:
    with opened(browser, address, reduced_motion="reduce") as chat:
        chat.send("slow")
        name = "getComputedStyle(document.querySelector('[aria-busy=true] h2'), '::after').animationName"
        chat.page.wait_for_selector("[aria-busy=true]")
        assert chat.page.evaluate(name) == "none"
        chat.page.keyboard.press("Escape")
        chat.wait()
