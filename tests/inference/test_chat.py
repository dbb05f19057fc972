"""Conversations are written as the models were taught them, and each turn adds only what has not been read."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from rwkv_jax.chat.formats import G1, PILE_QA, RAVEN, WORLD, ChatFormat
from rwkv_jax.chat.messages import Message, ToolCall, clean, read_messages
from rwkv_jax.chat.template import ChatTemplate, Thinking
from rwkv_jax.config import ConfigError
from rwkv_jax.data.tokenizers import WorldTokenizer
from rwkv_jax.inference.chat.fim import FIM_STOP, fim_prompt

USER = {"role": "user", "content": "1+1"}
FIND, CREATE = (
    {
        "type": "function",
        "function": {
            "name": "find_free_slots",
            "description": "Find free calendar slots",
            "parameters": {
                "type": "object",
                "properties": {"date": {"type": "string"}, "duration_minutes": {"type": "integer"}},
                "required": ["date", "duration_minutes"],
            },
        },
    },
    {"name": "create", "parameters": {"properties": {"title": {"type": "string"}, "place": {}}, "required": ["title"]}},
)
CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "find_free_slots", "arguments": '{"date":"2026-05-08","duration_minutes":30}'},
}


def test_world_conversation_from_the_first_word_to_the_last() -> None:
    text = WORLD.first_turn("Hello", system="Be kind.")
    assert text == "System: Be kind.\n\nUser: Hello\n\nAssistant:"
    text += " Hi!" + WORLD.next_turn("How are you?", " Hi!")
    assert text == "System: Be kind.\n\nUser: Hello\n\nAssistant: Hi!\n\nUser: How are you?\n\nAssistant:"


def test_other_formats() -> None:
    assert RAVEN.first_turn("Hello") + " Hi!" + RAVEN.next_turn("Bye") == (
        "Bob: Hello\n\nAlice: Hi!\n\nBob: Bye\n\nAlice:"
    )
    assert PILE_QA.first_turn("Why?") + "So." + PILE_QA.next_turn("How?") == (
        "\nQ & A\n\nQuestion:\nWhy?\n\nDetailed Expert Answer:\nSo.\n\nQuestion:\nHow?\n\nDetailed Expert Answer:\n"
    )


@pytest.mark.parametrize("read", ["", "\n", "\n\n", "\n\nUs", "\n\nUser:", "\n\nUser: "])
def test_whatever_of_the_next_turn_was_read_is_not_repeated(read: str) -> None:
    reply = " Fine." + read
    assert reply + WORLD.next_turn("Good", reply) == " Fine.\n\nUser: Good\n\nAssistant:"


def test_a_stop_string_is_what_the_next_turn_begins_with() -> None:
    for chat in (WORLD, RAVEN, PILE_QA):
        assert any(chat.next_turn("x").startswith(stop) for stop in chat.stop_strings)


@pytest.mark.parametrize(("reply", "closing"), [(" a", "\n\n"), (" a\n", "\n"), (" a\n\n", ""), ("", "\n\n")])
def test_closing_completes_the_separator(reply: str, closing: str) -> None:
    assert WORLD.closing(reply) == closing


def test_prompts_are_the_official_tokens() -> None:
    tokens = WorldTokenizer().encode(WORLD.first_turn("hi"))
    assert tokens == [24281, 59, 4571, 261, 5585, 41693, 59]


@pytest.mark.parametrize(
    ("thinking", "prompt"),
    [
        ("none", "User: 1+1\n\nAssistant:"),
        ("open", "User: 1+1\n\nAssistant: <think"),
        ("think", "User: 1+1 (think)\n\nAssistant: <think"),
        ("think a bit", "User: 1+1 (think a bit)\n\nAssistant: <think"),
        ("think a lot", "User: 1+1 (think a lot)\n\nAssistant: <think"),
        ("closed", "User: 1+1\n\nAssistant: <think>\n</think"),
        ("empty", "User: 1+1\n\nAssistant: <think></think"),
    ],
)
def test_ways_of_thinking(thinking: Thinking, prompt: str) -> None:
    chat = dataclasses.replace(G1, thinking=thinking)
    assert chat.first_turn("1+1") == prompt
    assert chat.next_turn("1+1") == "\n\n" + prompt
    assert chat.render([USER]) == prompt
    assert G1.render([USER], thinking=thinking) == prompt


def test_messages_lose_blank_lines_and_the_space_around_them() -> None:
    assert clean("\n a\n\n\n b\r\n\r\nc \n") == "a\n b\nc"
    assert WORLD.first_turn("a\n\nUser: b {c}\n\n") == "User: a\nUser: b {c}\n\nAssistant:"


@pytest.mark.parametrize("empty", ["", " \n\n"])
def test_empty_messages_are_refused(empty: str) -> None:
    with pytest.raises(ConfigError, match="message = "):
        WORLD.first_turn(empty)
    with pytest.raises(ConfigError, match="message = "):
        WORLD.next_turn(empty)
    with pytest.raises(ConfigError, match="system = "):
        WORLD.first_turn("Hello", system=empty)


def test_formats_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"system = 'Be kind\.'"):
        RAVEN.first_turn("Hello", system="Be kind.")
    with pytest.raises(ConfigError, match="thinking = 'hard'"):
        dataclasses.replace(WORLD, thinking="hard")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="thinking = 'open': this chat format has none"):
        dataclasses.replace(WORLD, thinking="open")
    with pytest.raises(ConfigError, match="before_reply = 'A: '"):
        ChatFormat("Q: ", "A: ")


@pytest.mark.parametrize("chat", [WORLD, G1, RAVEN, PILE_QA])
def test_a_list_of_messages_is_what_its_turns_add_up_to(chat: ChatFormat) -> None:
    template: ChatTemplate = chat
    system = None if chat.before_system is None else "Be kind."
    space = "" if chat is PILE_QA else " "
    text = chat.first_turn("a\n\nb ", system) + f"{space}c\n\nd"
    text += chat.next_turn("e", text)
    messages = [Message("user", "a\n\nb "), Message("assistant", "c\n\nd\n"), Message("user", "e")]
    if system is not None:
        messages.insert(0, Message("developer", system))
    assert template.render(messages) == text
    begun = template.render(messages[:-1], add_generation_prompt=False)
    assert text.startswith(begun)
    assert begun.endswith("c\n\nd")
    assert template.render(messages, add_generation_prompt=False) + chat.before_reply == text


def test_tools_calls_and_their_results_are_written_as_g1_models_read_them() -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Schedule a sync"}, {"type": "text", "text": " soon."}]},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call_1", "content": '{"free_slots":[]}'},
    ]
    text = (
        'System: Tools:\n[\n{"name":"find_free_slots","description":"Find free calendar slots","arguments":'
        '{"date":{"type":"string"},"duration_minutes":{"type":"integer"}}},\n'
        '{"name":"create","arguments":{"title":{"type":"string"},"place":{}},"required":["title"]}\n]\n'
        "Return only a JSON function call.\n\nUser: Schedule a sync soon.\n\nAssistant: ```json\n"
        '{"name":"find_free_slots","arguments":{"date":"2026-05-08","duration_minutes":30}}\n```\n\n'
        'User: Function output:\n{"free_slots":[]}\n\nAssistant: ```json'
    )
    assert G1.render(messages, tools=[FIND, CREATE]) == text
    # Thinking comes first; a reply that need not be a call is not begun as one.
    assert G1.render(messages, tools=[FIND], thinking="open").endswith("\n\nAssistant: <think")
    free = G1.render([{"role": "system", "content": "Be kind."}, *messages], tools=[FIND], tool_choice="auto")
    assert free.startswith("System: Be kind.\nTools:\n[\n{")
    assert free.endswith("\n\nAssistant:")
    assert "call, or answer.\n\nUser" in free


def test_replies_in_a_conversation_keep_their_thoughts_and_never_begin_a_turn() -> None:
    thought = Message(
        "assistant", "So\n\n\nUser: x", reasoning="hm\n\nAssistant: y\n\nz", tool_calls=(ToolCall("f", "{}"),)
    )
    text = G1.render([Message("user", "a"), thought, Message("tool", ""), Message("tool", "b\n\nc")])
    assert text == (
        "User: a\n\nAssistant: <think>\nhm\nAssistant: y\n\nz\n</think>\nSo\nUser: x\n"
        '```json\n{"name":"f","arguments":{}}\n```\n\n'
        "User: Function output:\n\nUser: Function output:\nb\nc\n\nAssistant:"
    )


def test_a_final_message_can_be_continued() -> None:
    final = {"role": "assistant", "content": "It "}
    assert G1.render([USER, final], continue_final_message=True) == "User: 1+1\n\nAssistant: It "
    thinking = {"role": "assistant", "reasoning_content": "One"}
    prompt = G1.render([USER, thinking], continue_final_message=True)
    assert prompt == "User: 1+1\n\nAssistant: <think>\nOne"
    parser = G1.reply_parser(prompt)
    assert [delta.kind for delta in parser.push(" and</think>2")] == ["reasoning", "hidden", "content"]


ASSISTANT = {"role": "assistant", "content": "2"}
CALLS = {"role": "assistant", "tool_calls": [CALL]}


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([], "messages: must be a list with at least one"),
        ("hi", "messages: must be a list"),
        ([USER, {"role": "robot", "content": "x"}], r"messages\[1\]: role = 'robot': must be one of system"),
        ([{"content": "x"}], r"messages\[0\]: role = ''"),
        ([USER, 3], r"messages\[1\]: must be an object"),
        ([USER | {"text": "x"}], r"messages\[0\]: has no field text; it may have role, content"),
        ([USER | {"name": 1}], r"messages\[0\]: name must be a string, not int"),
        ([USER | {"content": 1}], r"messages\[0\]: content must be a string or a list of parts, not int"),
        ([USER | {"content": [{"type": "image_url"}]}], r"messages\[0\]\.content\[0\]: must be .*models read text"),
        ([USER | {"content": " \n"}], r"messages\[0\]: content is empty"),
        ([USER | {"content": "\ud800"}], r"messages\[0\]: has half of a surrogate pair"),
        ([USER | {"tool_calls": [CALL]}], r"messages\[0\]: only the assistant has tool_calls, not the user"),
        ([USER | {"reasoning_content": "x"}], r"messages\[0\]: only the assistant has reasoning, not the user"),
        ([USER, ASSISTANT | {"tool_calls": 1}], r"messages\[1\]: tool_calls must be a list"),
        ([USER, ASSISTANT | {"tool_calls": [{}]}], r"messages\[1\]\.tool_calls\[0\]: must be"),
        ([USER, ASSISTANT | {"tool_calls": [{"function": {"name": "f", "arguments": {}}}]}], "arguments is JSON text"),
        ([USER, ASSISTANT | {"tool_calls": [{"function": {"name": "f", "arguments": "[]"}}]}], "text of an object"),
        ([USER, ASSISTANT | {"tool_calls": [{"function": {"name": " ", "arguments": "{}"}}]}], "name the function"),
        ([USER, {"role": "tool", "content": "x"}], r"messages\[1\]: a tool's message answers a call"),
        ([USER, CALLS, {"role": "tool", "tool_call_id": "no"}], r"messages\[2\]: tool_call_id = 'no': .*call_1"),
        ([USER, USER], r"messages\[1\]: is the second in a row of the user; join the two"),
        ([USER, ASSISTANT, ASSISTANT, USER], r"messages\[2\]: is the second in a row of the assistant"),
        ([USER, ASSISTANT], r"messages\[1\]: is the assistant's, which asks for no reply"),
        ([USER, {"role": "system", "content": "x"}, USER], r"messages\[1\]: the system's message comes first"),
        ([ASSISTANT | {"reasoning_content": "</think>"}, USER], r"messages\[0\]: reasoning has a <think> marker"),
    ],
)
def test_messages_that_cannot_be_written_are_named(messages: Any, error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        G1.render(messages)


def test_what_a_format_does_not_have_is_refused() -> None:
    for messages, arguments, error in (
        ([USER], {"tools": [FIND]}, "tools: this chat format has none"),
        ([USER, CALLS, USER], {}, r"messages\[1\]: this chat format has no tools"),
        ([USER, ASSISTANT | {"reasoning_content": "x"}, USER], {}, r"messages\[1\]: this chat format has no reasoning"),
        ([USER], {"thinking": "open"}, "thinking = 'open'"),
        ([USER], {"variables": {"x": 1}}, "variables x: are for Jinja templates"),
        ([USER], {"continue_final_message": True}, r"messages\[0\]: continue_final_message needs"),
        (
            [{"role": "system", "content": "x"}, USER],
            {},
            "system = 'x': this chat format has no system message",
        ),
    ):
        with pytest.raises(ConfigError, match=error):
            RAVEN.render(messages, **arguments)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("tool", "error"),
    [
        (1, r"tools\[0\]: must be"),
        ({"type": "function", "function": {}}, r"tools\[0\]: must be"),
        ({"name": "f", "parameters": []}, None),
        ({"name": "f", "parameters": [1]}, "parameters of f must be a JSON schema"),
        ({"name": "f", "parameters": {"properties": {}, "required": 1}}, "required of f must be a list"),
        ({"name": "f", "parameters": {"x": float("nan")}}, "cannot be written as JSON"),
        ({"name": "f", "description": "\ud800"}, "cannot be written as JSON"),
    ],
)
def test_tools_that_cannot_be_written_are_named(tool: Any, error: str | None) -> None:
    if error is None:
        assert '{"name":"f","arguments":{}}' in G1.render([USER], tools=[tool])
        return
    with pytest.raises(ConfigError, match=error):
        G1.render([USER], tools=[tool])


def test_messages_are_read_once() -> None:
    read = read_messages([USER, CALLS, {"role": "tool", "content": "x", "tool_call_id": "call_1", "name": "f"}])
    assert read[1].tool_calls == (ToolCall("find_free_slots", CALL["function"]["arguments"], "call_1"),)
    assert read_messages(read) == read


def test_filling_in_the_middle() -> None:
    assert fim_prompt("def f(", "):\n") == "✿prefix✿✿suffix✿):\n✿middle✿def f("
    assert FIM_STOP == "✿"
    with pytest.raises(ConfigError, match="suffix: has the character ✿"):
        fim_prompt("a", "✿")
