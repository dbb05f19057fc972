"""Conversations are written as the models were taught them, and each turn adds only what has not been read."""

from __future__ import annotations

import dataclasses

import pytest

from rwkv_jax.config import ConfigError
from rwkv_jax.data.tokenizers import WorldTokenizer
from rwkv_jax.inference.chat.formats import PILE_QA, RAVEN, WORLD, ChatFormat, Thinking


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
        ("think", "User: 1+1\n\nAssistant: <think"),
        ("think a bit", "User: 1+1 think a bit\n\nAssistant: <think"),
        ("think a lot", "User: 1+1 think a lot\n\nAssistant: <think"),
        ("closed", "User: 1+1\n\nAssistant: <think>\n</think"),
        ("empty", "User: 1+1\n\nAssistant: <think></think"),
    ],
)
def test_ways_of_thinking(thinking: Thinking, prompt: str) -> None:
    chat = dataclasses.replace(WORLD, thinking=thinking)
    assert chat.first_turn("1+1") == prompt
    assert chat.next_turn("1+1") == "\n\n" + prompt


@pytest.mark.parametrize(
    ("thinking", "text", "thoughts", "answer"),
    [
        ("none", " It is 2.\n", "", "It is 2."),
        ("none", "  two spaces", "", " two spaces"),
        ("think", ">\nOne and one.\n</think>\nIt is 2.", "One and one.", "It is 2."),
        ("think a lot", "> a </think> b </think> c", "a", "b </think> c"),
        ("think", ">\nOne and", "One and", ""),
        ("closed", ">\nIt is 2.", "", "It is 2."),
        ("empty", ">It is 2.", "", "It is 2."),
        ("closed", "", "", ""),
        ("empty", "", "", ""),
        ("think", "", "", ""),
    ],
)
def test_thoughts_and_answers_are_told_apart(thinking: Thinking, text: str, thoughts: str, answer: str) -> None:
    chat = dataclasses.replace(WORLD, thinking=thinking)
    assert (chat.thoughts(text), chat.answer(text)) == (thoughts, answer)


def test_messages_lose_blank_lines_and_the_space_around_them() -> None:
    assert WORLD.clean("\n a\n\n\n b\r\n\r\nc \n") == "a\n b\nc"
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
    with pytest.raises(ConfigError, match="before_reply = 'A: '"):
        ChatFormat("Q: ", "A: ")
