"""The chat page in Debian's Chromium, as a person uses it."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from typing import Any

from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    path = shutil.which("chromium")
    assert path is not None, "there is no chromium: apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path)
        yield browser
        browser.close()


class Chat:
    """A tab with the page, which by its end must have asked nobody but its server and broken no rule of its policy."""

    def __init__(self, page: Page, address: str) -> None:
        self.page, self.address = page, address
        self.requests: list[str] = []
        self.complaints: list[str] = []
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", lambda message: self.complaints.append(message.text) if message.type == "error" else None)

    @property
    def prompt(self) -> Locator:
        return self.page.get_by_label("Message", exact=True)

    @property
    def answers(self) -> Locator:
        return self.page.get_by_role("article", name="Answer")

    @property
    def titles(self) -> Locator:
        return self.page.locator("#conversations .open")

    def button(self, name: str) -> Locator:
        return self.page.get_by_role("button", name=name, exact=True)

    def send(self, text: str) -> None:
        self.prompt.fill(text)
        self.prompt.press("Enter")

    def ask(self, text: str) -> Locator:
        """Sends a message and waits for the end of the answer."""
        self.send(text)
        self.wait()
        return self.answers.last

    def wait(self) -> None:
        # The first answer of a real server waits for its programs.
        expect(self.page.locator("[aria-busy=true]")).to_have_count(0, timeout=60_000)
        expect(self.button("Send")).to_be_visible()


@contextlib.contextmanager
def opened(browser: Browser, address: str, **options: Any) -> Iterator[Chat]:
    """A browser's profile of its own with the page open.

    Args:
      options: of the profile, such as its viewport.
    """
    profile = browser.new_context(**options)
    profile.set_default_timeout(10_000)
    chat = Chat(profile.new_page(), address)
    chat.page.goto(address)
    expect(chat.prompt).to_be_focused()
    yield chat
    # A failed request of the server's is a complaint, too, which the tests of failures expect.
    assert not [text for text in chat.complaints if "Failed to load resource" not in text]
    assert all(url.startswith((address, "data:", "blob:" + address)) for url in chat.requests), chat.requests
    profile.close()
