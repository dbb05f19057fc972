"""The chat page in a browser. Answers are scripted, so that they can be hostile, slow and wrong."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI
from playwright.sync_api import Browser, expect

from tests.serving.browser import Chat, opened
from tests.serving.scripted import HOSTILE, create_scripted_app, running

pytestmark = pytest.mark.browser


@pytest.fixture
def app() -> FastAPI:
    return create_scripted_app()


@pytest.fixture
def address(app: FastAPI) -> Iterator[str]:
    with running(app) as address:
        yield address


@pytest.fixture
def chat(browser: Browser, address: str) -> Iterator[Chat]:
    with opened(browser, address) as chat:
        yield chat


def test_an_answer_is_streamed_and_shown_as_markdown(chat: Chat) -> None:
    answer = chat.ask("markdown")
    expect(answer.get_by_role("heading", name="Squares")).to_be_visible()
    expect(answer.locator("strong")).to_have_text("sum")
    expect(answer.locator("em")).to_have_text("square")
    expect(answer.locator("ol > li > p")).to_have_text(["add the first", "add the next"])
    expect(answer.locator("ol ul > li")).to_have_text(["and so on", "to the last"])
    expect(answer.locator("blockquote")).to_have_text("It was known to Nicomachus.")
    expect(answer.get_by_role("group", name="Code in python")).to_contain_text("return [sum(range(1, 2 * k, 2))")
    expect(answer.locator("footer")).to_contain_text("tokens/s · first after")


def test_thinking_is_folded(chat: Chat) -> None:
    answer = chat.ask("markdown")
    thoughts = answer.get_by_text("Odd numbers add up to squares")
    expect(thoughts).to_be_hidden()
    answer.get_by_text("Thoughts").click()
    expect(thoughts).to_be_visible()
    assert chat.ask("plain").locator("details").is_hidden()


def test_an_answer_appears_while_it_is_written_and_stops(chat: Chat, app: FastAPI) -> None:
    chat.send("slow")
    expect(chat.answers.last).to_contain_text("one two three")
    expect(chat.button("Send")).to_be_hidden()
    chat.button("Stop").click()
    chat.wait()
    expect(chat.answers.last.locator("footer")).to_contain_text("stopped")
    length = len(chat.answers.last.inner_text())
    assert length < 3000
    # What was written of it is part of the conversation.
    chat.ask("more")
    assert [message["role"] for message in app.state.requests[-1]["messages"]] == ["user", "assistant", "user"]
    assert app.state.requests[-1]["messages"][1]["content"].startswith("one two three")
    assert "state" not in app.state.requests[-1]


def test_turns_send_a_state_and_what_is_new(chat: Chat, app: FastAPI) -> None:
    chat.button("Settings").click()
    chat.page.get_by_label("System prompt").fill("Be brief.")
    for text in ("a", "b", "c"):
        chat.ask(text)
    asked = [(request.get("state"), request["messages"]) for request in app.state.requests]
    assert asked[0] == (None, [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"}])
    assert asked[1:] == [
        ("state-0", [{"role": "user", "content": "b"}]),
        ("state-1", [{"role": "user", "content": "c"}]),
    ]
    # Another system prompt is another past.
    chat.page.get_by_label("System prompt").fill("Be long.")
    chat.ask("d")
    assert "state" not in app.state.requests[-1]
    assert len(app.state.requests[-1]["messages"]) == 1 + 7
    assert list(app.state.states) == ["state-3"]


def test_a_fork_starts_from_a_state(chat: Chat, app: FastAPI) -> None:
    for text in ("a", "b"):
        chat.ask(text)
    chat.answers.first.get_by_role("button", name="Fork").click()
    expect(chat.answers).to_have_count(1)
    expect(chat.titles).to_have_text(["a (fork)", "a"])
    chat.ask("c")
    assert (app.state.requests[-1]["state"], len(app.state.requests[-1]["messages"])) == ("state-0", 1)
    chat.titles.last.click()
    expect(chat.answers.last).to_contain_text("You said b.")


def test_a_question_is_edited_in_a_fork(chat: Chat, app: FastAPI) -> None:
    for text in ("a", "b"):
        chat.ask(text)
    chat.button("Edit in a fork").last.click()
    expect(chat.prompt).to_have_value("b")
    chat.ask("c")
    assert (app.state.requests[-1]["state"], app.state.requests[-1]["messages"][0]["content"]) == ("state-0", "c")


def test_an_answer_is_generated_again(chat: Chat, app: FastAPI) -> None:
    for text in ("a", "b"):
        chat.ask(text)
    chat.button("Regenerate").click()
    expect(chat.answers).to_have_count(2)
    chat.wait()
    first, again = app.state.requests[1:]
    assert first == again
    assert list(app.state.states) == ["state-0", "state-2"]


def test_conversations_outlive_the_page(chat: Chat, app: FastAPI) -> None:
    chat.ask("markdown")
    chat.button("New conversation").click()
    chat.ask("second")
    chat.page.reload()
    expect(chat.titles).to_have_text(["second", "markdown"])
    expect(chat.answers).to_contain_text("You said second.")
    chat.ask("third")
    assert app.state.requests[-1]["state"] == "state-1"
    chat.titles.last.click()
    expect(chat.answers.get_by_role("heading", name="Squares")).to_be_visible()


def test_an_answer_that_was_being_written_is_kept(chat: Chat) -> None:
    chat.send("slow")
    expect(chat.answers.last).to_contain_text("one two three")
    chat.page.wait_for_timeout(2500)
    chat.page.reload()
    expect(chat.answers.last).to_contain_text("one two three")
    expect(chat.answers.last.locator("footer")).to_contain_text("interrupted")


def test_deleting_a_conversation_deletes_its_states(chat: Chat, app: FastAPI) -> None:
    for text in ("a", "b"):
        chat.ask(text)
    chat.answers.first.get_by_role("button", name="Fork").click()
    chat.button("Delete a").click()
    chat.button("Keep").click()
    expect(chat.titles).to_have_count(2)
    chat.button("Delete a").click()
    chat.button("Delete").click()
    expect(chat.titles).to_have_text(["a (fork)"])
    expect(chat.button("New conversation")).to_be_focused()
    chat.page.wait_for_timeout(100)
    assert list(app.state.states) == ["state-0"]  # the fork's
    chat.button("Delete a (fork)").click()
    chat.button("Delete").click()
    expect(chat.titles).to_have_count(0)
    chat.page.reload()
    expect(chat.titles).to_have_count(0)
    assert app.state.states == {}


def test_a_conversation_deleted_while_it_is_answered_stays_deleted(chat: Chat) -> None:
    chat.send("slow")
    expect(chat.answers.last).to_contain_text("one two three")
    chat.button("Delete slow").click()
    chat.button("Delete").click()
    expect(chat.button("Send")).to_be_visible()
    expect(chat.titles).to_have_count(0)
    chat.page.reload()
    expect(chat.titles).to_have_count(0)


def test_an_answer_goes_on_while_another_conversation_is_shown(chat: Chat, app: FastAPI) -> None:
    chat.send("slow")
    expect(chat.answers.last).to_contain_text("one two three")
    chat.button("New conversation").click()
    expect(chat.answers).to_have_count(0)
    chat.send("impatient")
    expect(chat.page.get_by_role("alert")).to_contain_text("An answer is being written")
    assert len(app.state.requests) == 1
    chat.page.keyboard.press("Escape")
    expect(chat.button("Send")).to_be_visible()
    chat.titles.last.click()
    expect(chat.answers).to_contain_text("one two three")
    expect(chat.answers.locator("footer")).to_contain_text("stopped")


def test_states_are_saved_and_loaded(chat: Chat, app: FastAPI, tmp_path: Path) -> None:
    chat.ask("a")
    with chat.page.expect_download() as download:
        chat.button("Save state").click()
    assert download.value.suggested_filename == "a.safetensors"
    file = tmp_path / "kept.safetensors"
    download.value.save_as(file)
    assert file.read_bytes() == b"after a"
    app.state.states.clear()
    chat.page.get_by_label("State file").set_input_files(file)
    expect(chat.page.get_by_role("heading", level=1)).to_have_text("kept.safetensors")
    ((name, data),) = app.state.states.items()
    assert data == b"after a"
    chat.ask("b")
    assert (app.state.requests[-1]["state"], len(app.state.requests[-1]["messages"])) == (name, 1)


def test_a_state_that_the_server_lost_is_read_again(chat: Chat, app: FastAPI) -> None:
    chat.ask("a")
    app.state.states.clear()
    expect(chat.ask("b")).to_contain_text("You said b.")
    assert [request.get("state") for request in app.state.requests] == [None, "state-0", None]
    assert len(app.state.requests[-1]["messages"]) == 3


def test_a_server_without_states_is_sent_whole_conversations(chat: Chat, app: FastAPI) -> None:
    app.state.has_states = False
    for text in ("a", "b"):
        expect(chat.ask(text)).to_contain_text(f"You said {text}.")
    assert ["return_state" in request for request in app.state.requests] == [True, False, False]
    assert len(app.state.requests[-1]["messages"]) == 3


def test_hostile_text_runs_nothing(chat: Chat) -> None:
    answer = chat.ask("hostile")
    for part in ("<script>window.hacked = 1</script>", '<svg onload="window.hacked = 3">', "<b onclick="):
        expect(answer).to_contain_text(part)
    for tag in ("script", "img", "svg", "style", "iframe", "a", "u", "b", "meta"):
        expect(answer.locator(tag)).to_have_count(0)
    for text in (HOSTILE, "<img src=x onerror='window.hacked = 11'>"):
        chat.ask(text)
    chat.page.reload()
    expect(chat.answers).to_have_count(3)
    assert chat.page.evaluate("window.hacked") is None
    assert chat.page.evaluate("document.scripts.length") == 10


def test_text_that_nests_without_end_is_shown(chat: Chat) -> None:
    expect(chat.ask("nested")).to_contain_text("deep")


def test_the_policy_refuses_html_and_other_addresses(chat: Chat) -> None:
    refused = chat.page.evaluate("""async () => {
      const tries = [
        () => { document.body.innerHTML = "<p>x</p>"; },
        () => document.write("<p>x</p>"),
        () => fetch("http://127.0.0.1:1/elsewhere"),
      ];
      const failures = [];
      for (const run of tries) try { await run(); } catch { failures.push(run); }
      return failures.length;
    }""")
    assert refused == 3
    chat.complaints.clear()
    chat.requests[:] = [url for url in chat.requests if "elsewhere" not in url]


def test_sampling_fields_are_sent_where_filled(chat: Chat, app: FastAPI) -> None:
    chat.button("Settings").click()
    labels = ("Temperature", "Top p", "Top k", "Min p", "Typical p", "Presence penalty", "Frequency penalty")
    labels += ("Repetition penalty", "Penalty decay", "Maximum tokens", "Seed")
    for label in labels:
        chat.page.get_by_label(label, exact=True).fill("1")
    chat.page.get_by_label("Temperature").fill("0.7")
    chat.page.get_by_label("Min p").fill("")
    chat.page.get_by_label("Order").select_option("rwkv")
    chat.page.get_by_label("Thinking").select_option("a lot")
    chat.ask("a")
    sent = app.state.requests[-1]
    assert sent["chat_template_kwargs"] == {"thinking": "think a lot"}
    names = [label.lower().replace(" ", "_").replace("maximum", "max") for label in labels if label != "Min p"]
    assert {name: sent[name] for name in names} == dict.fromkeys(names, 1) | {"temperature": 0.7}
    assert sent["order"] == "rwkv"
    assert "min_p" not in sent
    chat.page.reload()
    chat.button("Settings").click()
    expect(chat.page.get_by_label("Temperature")).to_have_value("0.7")
    chat.button("Empty all sampling fields").click()
    chat.ask("b")
    assert not {*names, "order"} & set(app.state.requests[-1])


def test_a_wrong_setting_is_shown_and_nothing_is_sent(chat: Chat, app: FastAPI) -> None:
    chat.button("Settings").click()
    chat.page.get_by_label("Top p").fill("1.5")
    chat.button("Close settings").click()
    chat.send("a")
    expect(chat.page.get_by_label("Top p")).to_be_visible()
    expect(chat.prompt).to_have_value("a")
    assert app.state.requests == []


def test_tokens_are_colored_by_probability(chat: Chat, app: FastAPI) -> None:
    chat.button("Settings").click()
    chat.page.get_by_label("Color tokens by probability").check()
    answer = chat.ask("é")
    assert app.state.requests[-1]["logprobs"] is True
    row = answer.get_by_role("group", name="Tokens colored by probability")
    assert row.locator("span").all_text_contents() == ["You", " said", " ", "é."]
    row.focus()
    row.press("ArrowRight")
    expect(answer.get_by_role("status")).to_have_text('"You" 8.21%; instead: "other" 22.3%')
    row.locator("span").last.hover()
    expect(answer.get_by_role("status")).to_have_text('"é." 4.98%; instead: "other" 22.3%')
    # Thinking is none of the answer's tokens.
    expect(chat.ask("markdown").locator(".tokens span").first).to_have_text("#")
    chat.page.get_by_label("Color tokens by probability").uncheck()
    expect(chat.answers.first.locator("p").first).to_have_text("You said é.")


@pytest.mark.parametrize(
    ("question", "words"),
    [
        ("busy", "the queue is full Try again in 7 s."),
        ("broken", "numbers that are not finite"),
        ("cut", "The connection was lost before the end of the answer."),
    ],
)
def test_errors_are_told_in_words(chat: Chat, app: FastAPI, question: str, words: str) -> None:
    answer = chat.ask(question)
    expect(answer).to_contain_text(words)
    expect(chat.page.get_by_role("log")).to_contain_text(words)
    expect(chat.ask("and now?")).to_contain_text("You said and now?.")
    roles = [message["role"] for message in app.state.requests[-1]["messages"]]
    # A question without any answer is left out.
    assert roles == (["user"] if question == "busy" else ["user", "assistant", "user"])


def test_a_server_that_is_gone_is_told_in_words(browser: Browser) -> None:
    with running(create_scripted_app()) as address, opened(browser, address) as chat:
        chat.page.context.set_offline(True)
        expect(chat.ask("a")).to_contain_text("The server cannot be reached. Is it still running?")


def test_an_api_key_is_asked_for_and_kept_in_the_tab(browser: Browser) -> None:
    app = create_scripted_app()
    app.state.key = "secret"
    with running(app) as address, opened(browser, address) as chat:
        expect(chat.page.get_by_role("alert")).to_contain_text("Enter an API key in the settings.")
        chat.button("Settings").click()
        chat.page.get_by_label("API key").fill("secret")
        chat.page.get_by_label("API key").press("Enter")
        expect(chat.page.get_by_label("Model", exact=True)).to_have_value("scripted")
        expect(chat.page.locator("#notice")).to_be_empty()
        chat.page.reload()
        expect(chat.page.get_by_label("Model", exact=True)).to_have_value("scripted")
        stored = chat.page.evaluate("JSON.stringify({...localStorage})")
        assert "secret" not in stored
