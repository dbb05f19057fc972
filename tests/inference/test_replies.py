"""Replies are split into thinking, answer and calls, the same however they arrive; nothing is lost or invented."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rwkv_jax.chat.formats import G1, WORLD
from rwkv_jax.chat.messages import ToolCall
from rwkv_jax.chat.replies import Delta, Reply, ReplyParser
from rwkv_jax.chat.template import Thinking

CALL = '{"name": "f", "arguments": {"a": [1, -2.5e3, "\\u00e9\\n", true, null, {}]}}'
FENCED = f"```json\n{CALL}\n```"
F = ToolCall("f", '{"a": [1, -2.5e3, "\\u00e9\\n", true, null, {}]}')


def parse(text: str, opening: str = "", *, thinks: bool = True, calls: bool = True) -> Reply:
    parser = ReplyParser(opening, thinks=thinks, calls=calls)
    return Reply.of([*parser.push(text), *parser.flush()])


@pytest.mark.parametrize(
    ("opening", "text", "reasoning", "content"),
    [
        ("", " It is 2.\n", "", "It is 2."),
        ("", "  two spaces", "", " two spaces"),
        ("", " \n\n \n", "", ""),
        ("", " <think>\nOne.\n</think>\n\n2 <think> 3", "One.", "2 <think> 3"),
        ("", " So <think> is a marker</think>", "", "So <think> is a marker</think>"),
        ("", " <thin", "", "<thin"),
        (" <think", ">\nOne and one.\n</think>\nIt is 2.", "One and one.", "It is 2."),
        (" <think", "> a </think> b </think> c", "a", "b </think> c"),
        (" <think", ">\nOne and", "One and", ""),
        (" <think", "> </thin</think>2", "</thin", "2"),
        (" <think", "> <</think></think", "<", "</think"),
        (" <think", "ing is hard", "", "ing is hard"),
        (" <think", "", "", ""),
        (" <think>\n</think", ">\nIt is 2.", "", "It is 2."),
        (" <think>\n</think", "", "", ""),
        (" <think></think", ">It is 2.", "", "It is 2."),
        (" <think></think>\n", "It is 2.", "", "It is 2."),
        (" <think>\nOne", " and one.</think>2", " and one.", "2"),
        (" It", " is 2.", "", " is 2."),
    ],
)
def test_thinking_is_told_from_the_answer(opening: str, text: str, reasoning: str, content: str) -> None:
    assert parse(text, opening) == (reasoning, content, ())


def test_formats_without_thinking_have_none() -> None:
    assert parse(" <think>a</think>b", thinks=False) == ("", "<think>a</think>b", ())


@pytest.mark.parametrize(
    ("opening", "text", "reply"),
    [
        ("", f" {FENCED}", ("", "", (F,))),
        (" ```json", FENCED.removeprefix("```json"), ("", "", (F,))),
        ("", f"**Tool Call:**\n{FENCED}", ("", "", (F,))),
        ("", f"```\n{CALL}\n```", ("", "", (F,))),
        ("", f"<tool_call>\n{CALL}\n</tool_call>", ("", "", (F,))),
        (" <think", f">\nf helps.\n</think>\n{FENCED}", ("f helps.", "", (F,))),
        ("", f" Let me see.\n\n{FENCED}\n{FENCED}\nDone. ", ("", "Let me see.\nDone.", (F, F))),
        ("", f"<tool_call>{CALL}</tool_call><tool_call>{CALL}</tool_call>", ("", "", (F, F))),
        ("", f"```json\n```json\n{CALL}\n```", ("", "```json", (F,))),
        # A grammar ends a reply with the object.
        ("", FENCED.removesuffix("\n```"), ("", "", (F,))),
        ("", FENCED.removesuffix("`"), ("", "", (F,))),
        ("", '```json\n{"arguments":{ },"name":"g h"}```', ("", "", (ToolCall("g h", "{ }"),))),
    ],
)
def test_calls(opening: str, text: str, reply: tuple[str, str, tuple[ToolCall, ...]]) -> None:
    assert parse(text, opening) == reply


@pytest.mark.parametrize(
    "text",
    [
        f"see {FENCED}",  # within a line
        f"```python\n{CALL}\n```",
        f"```json\n{CALL} and\n```",
        f"```json\n[{CALL}]\n```",
        f"**Tool Call:** {CALL}",
        f"<tool_call>{CALL}</tool>",
        '```json\n{"name": "f"}\n```',
        '```json\n{"name": "f", "arguments": "{}"}\n```',
        '```json\n{"name": "", "arguments": {}}\n```',
        '```json\n{"name": "\\ud800", "arguments": {}}\n```',
        '```json\n{"name": "f", "name": "g", "arguments": {}}\n```',
        '```json\n{"name": "f", "arguments": {}, "id": 1}\n```',
        '```json\n{"name": "f", "arguments": {"a": 01}}\n```',
        '```json\n{"name": "f", "arguments": {"a": NaN}}\n```',
        '```json\n{"name": "f", "arguments": {"a": 1,}}\n```',
        '```json\n{"name": "f", "arguments": {"a": "\n"}}\n```',
        '```json\n{"name": "f", "arguments": {a: 1}}\n```',
        '```json\n{"name": "f", "arguments": {"a": "\\x"}}\n```',
        '```json\n{"name": "f", "arguments": {"a": [1, 2}}}\n```',
        '```json\n{"name": "f", "arguments": {"a": ' + "[" * 99 + "]" * 99 + "}}\n```",
        '```json\n{"name": "f", "arguments": {"a',
    ],
)
def test_what_is_no_call_is_text(text: str) -> None:
    assert parse(text) == ("", text, ())


def test_without_tools_there_are_no_calls() -> None:
    assert parse(FENCED, calls=False) == ("", FENCED, ())


def test_text_is_shown_as_soon_as_it_can_be_no_marker() -> None:
    parser = ReplyParser(calls=True)
    assert parser.push(" ``") == [Delta("hidden", " ")]
    assert parser.push("`json\n{") == []
    assert parser.push('"n') == []
    assert parser.push('"') == [Delta("content", '```json\n{"n"')]
    assert parser.push(" a\n") == [Delta("content", " a")]
    assert parser.push("`x") == [Delta("content", "\n`x")]
    assert parser.flush() == []


MARKERS = (
    "<think>",
    "</think>",
    "```json\n",
    "```",
    "**Tool Call:**",
    "<tool_call>",
    "</tool_call>",
    CALL,
    FENCED,
    "\n",
)
PIECES = st.lists(
    st.one_of(st.sampled_from([*MARKERS, *(marker[:-1] for marker in MARKERS), *'{}" ab,:`<']), st.text(max_size=4)),
    max_size=12,
)
OPENINGS = st.sampled_from(["", " <think", " <think>\n</think", " ```json", " <think></think>\n", " So, </thi", "\n"])


@settings(max_examples=100, deadline=None)
@given(pieces=PIECES, opening=OPENINGS, calls=st.booleans(), cuts=st.data())
@example(pieces=["```json\n", CALL, "\n``"], opening="", calls=True, cuts=None)
def test_any_text_in_any_pieces(pieces: list[str], opening: str, calls: bool, cuts: st.DataObject | None) -> None:
    text = "".join(pieces)
    whole = ReplyParser(opening, calls=calls)
    deltas = [*whole.push(text), *whole.flush()]
    parser, split, begin = ReplyParser(opening, calls=calls), [], 0
    while begin < len(text):
        length = 1 if cuts is None else cuts.draw(st.integers(1, 9))
        split += parser.push(text[begin : begin + length])
        begin += length
    split += parser.flush()
    for some in (deltas, split):
        assert "".join(delta.text for delta in some) == text
    assert Reply.of(split) == Reply.of(deltas)
    for kind, source, call in deltas:
        assert (kind == "tool_call") == (call is not None)
        if kind == "hidden":
            assert re.fullmatch(r"(\s|</?think>|^>)*", source)
        if call is not None:
            assert calls
            assert isinstance(json.loads(call.arguments), dict)
            assert call.arguments in source


def test_the_parser_of_a_format_knows_what_the_prompt_has_begun() -> None:
    messages = [{"role": "user", "content": "What is <think? Write\nAssistant: ```json"}]
    tools = [{"name": "f"}]
    assert Reply.of(G1.reply_parser(G1.render(messages)).push("a <b ")) == ("", "a <b", ())
    ways: dict[Thinking, str] = {"open": ">b</think>", "closed": ">", "empty": ">"}
    for thinking, opening in ways.items():
        parser = G1.reply_parser(G1.render(messages, tools=tools, thinking=thinking), calls=True)
        reply = Reply.of(parser.push(f"{opening}{FENCED}"))
        assert reply == ("b" if thinking == "open" else "", "", (F,))
    parser = G1.reply_parser(G1.render(messages, tools=tools), calls=True)
    assert Reply.of(parser.push(FENCED.removeprefix("```json"))).tool_calls == (F,)
    assert Reply.of(WORLD.reply_parser(WORLD.render(messages), calls=True).push(FENCED)).content == FENCED
