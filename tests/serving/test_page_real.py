"""The chat page before the real server, with a tiny random model: what it says is noise, and always the same."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from rwkv_jax.serving.app import create_app
from rwkv_jax.serving.service import Service
from tests.serving.browser import Chat, opened
from tests.serving.scripted import running

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def address(service: Service) -> Iterator[str]:
    with running(create_app(service)) as address:
        yield address


@pytest.fixture
def chat(browser: Browser, address: str) -> Iterator[Chat]:
    """A tab whose answers are greedy and 8 tokens long."""
    with opened(browser, address) as chat:
        chat.button("Settings").click()
        chat.page.get_by_label("Temperature").fill("0")
        chat.page.get_by_label("Maximum tokens").fill("8")
        yield chat


def text_of(chat: Chat, i: int) -> str:
    return chat.answers.nth(i).locator(".text").last.inner_text()


def test_turns_forks_and_reloads(chat: Chat, service: Service) -> None:
    chat.ask("one")
    chat.ask("two")
    expect(chat.answers.last.locator("footer")).to_contain_text("8 tokens")
    expect(chat.answers.last.locator("footer")).to_contain_text("ended at the maximum of tokens")
    two = text_of(chat, 1)
    assert two
    chat.page.reload()
    expect(chat.answers).to_have_count(2)
    assert text_of(chat, 1) == two
    # From the state of the first answer, which has read nothing else.
    chat.answers.first.get_by_role("button", name="Fork").click()
    with chat.page.expect_request("**/chat/completions") as request:
        chat.ask("two")
    assert text_of(chat, 1) == two
    body = request.value.post_data_json
    assert body is not None
    assert (body["state"][:6], body["messages"]) == ("state-", [{"role": "user", "content": "two"}])
    chat.button("Regenerate").click()
    chat.wait()
    assert text_of(chat, 1) == two


def test_a_stopped_answer_frees_its_slot(chat: Chat, service: Service) -> None:
    chat.page.get_by_label("Maximum tokens").fill("100000")
    chat.send("on and on")
    text = chat.answers.last.locator(".text").last
    expect(text).to_contain_text(re.compile(".{20}", re.DOTALL), timeout=60_000)  # with the programs' compilation
    assert service.engine.stats().num_running == 1
    chat.page.keyboard.press("Escape")
    chat.wait()
    expect(chat.answers.last.locator("footer")).to_contain_text("stopped")
    end = time.monotonic() + 5
    while service.engine.stats().num_running:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_probabilities_are_those_of_the_server(chat: Chat) -> None:
    chat.page.get_by_label("Color tokens by probability").check()
    answer = chat.ask("one")
    row = answer.get_by_role("group", name="Tokens colored by probability")
    expect(row.locator("span")).to_have_count(8)
    row.focus()
    row.press("ArrowRight")
    expect(answer.get_by_role("status")).to_contain_text(re.compile(r"\d%; instead: "))


def test_a_state_file_continues_the_conversation(chat: Chat, tmp_path: Path) -> None:
    chat.ask("one")
    with chat.page.expect_download() as download:
        chat.button("Save state").click()
    file = tmp_path / "one.safetensors"
    download.value.save_as(file)
    chat.ask("two")
    two = text_of(chat, 1)
    chat.page.get_by_label("State file").set_input_files(file)
    expect(chat.page.get_by_role("heading", level=1)).to_have_text("one.safetensors")
    chat.ask("two")
    assert text_of(chat, 0) == two
    # What is not a state is refused in words.
    (tmp_path / "none.safetensors").write_bytes(b"no state")
    chat.page.get_by_label("State file").set_input_files(tmp_path / "none.safetensors")
    expect(chat.page.get_by_role("alert")).to_contain_text("none.safetensors: ")


def test_a_wrong_request_is_refused_in_words(chat: Chat) -> None:
    chat.page.get_by_label("Top k").fill("3000000000")
    expect(chat.ask("one").locator(".error")).to_contain_text("top_k = 3000000000: must be a whole number")
