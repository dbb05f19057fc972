"""Takes the picture of docs/serving.md: python -m tests.serving.screenshot docs/chat_page.png [light|dark]."""

from __future__ import annotations

import sys
from typing import Any

from playwright.sync_api import expect

from tests.serving.browser import chromium, opened
from tests.serving.scripted import create_scripted_app, running


def main(path: str, scheme: Any = "light") -> None:
    """Saves a PNG of a conversation, whose answers are scripted."""
    app = create_scripted_app()
    app.state.pause = 0.03
    options = {"color_scheme": scheme, "viewport": {"width": 1000, "height": 720}}
    with running(app) as address, chromium() as browser, opened(browser, address, **options) as chat:
        chat.ask("What is new?")
        chat.button("New conversation").click()
        chat.ask("How do odd numbers add up?")
        chat.button("Settings").click()
        chat.page.get_by_label("Color tokens by probability").check()
        chat.button("Close settings").click()
        chat.ask("And without the code?")
        chat.answers.last.locator(".tokens span").nth(3).hover()
        expect(chat.answers.last.get_by_role("status")).not_to_be_empty()
        chat.page.screenshot(path=path)


if __name__ == "__main__":
    main(*sys.argv[1:])
