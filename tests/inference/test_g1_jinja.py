"""The Jinja template that we write for others has the text of our own formats, and marks what we train on."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_jax.chat.formats import G1, WORLD, g1_in_jinja
from rwkv_jax.chat.jinja_template import JinjaTemplate
from rwkv_jax.chat.template import Thinking
from rwkv_jax.config import ConfigError
from rwkv_jax.data.tokenizers import WorldTokenizer, chat_template_beside, write_hugging_face_tokenizer
from rwkv_jax.inference.chat.choice import choose_template

TEMPLATE = JinjaTemplate(g1_in_jinja())
BEGIN, END = "\ue002", "\ue003"
MARKED = JinjaTemplate(
    g1_in_jinja()
    .replace("{%- generation -%}", f'{{{{- "{BEGIN}" -}}}}')
    .replace("{%- endgeneration -%}", f'{{{{- "{END}" -}}}}')
)

ADD = {"name": "add", "description": "Adds é<&>", "parameters": {"properties": {"a": {}, "b": {"type": "number"}}}}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": ADD},
    {"type": "function", "function": ADD | {"parameters": ADD["parameters"] | {"required": ["b", "a"]}}},
    {"type": "function", "function": ADD | {"parameters": ADD["parameters"] | {"required": ["a"]}, "description": ""}},
    {"type": "function", "function": {"name": 'n"o', "parameters": {"type": "object"}}},
    {"type": "function", "function": {"name": "nothing"}},
]

SPACE = ["\n", "\t", "\n\n", "\n\n\n", "\r\n", " ", "  ", "\u2028", "\x85", "\x00"]
TURNS = ["User:", "\n\nUser:", "\n\nAssistant:", "System:"]
WORDS = st.sampled_from([*SPACE, *TURNS, "a", "日本", "<b>&'\"", "{{ x }}", "{% if %}", "```json", "</s>", "\\n"])
TEXTS = st.lists(WORDS, max_size=9).map("".join)
FULL = TEXTS.map(lambda text: f"x{text}" if not text.strip() else text)
CALLS = st.lists(
    st.builds(
        lambda name, value: {
            "type": "function",
            "function": {"name": f"f{name}", "arguments": json.dumps({"a": value})},
        },
        TEXTS,
        st.none() | TEXTS | st.lists(st.integers()),
    ),
    max_size=2,
)


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Messages that G1 has a text for, ended by the user or a tool."""
    messages: list[dict[str, Any]] = []
    if draw(st.booleans()):
        messages.append({"role": draw(st.sampled_from(["system", "developer"])), "content": draw(FULL)})
    for _ in range(draw(st.integers(0, 3))):
        messages.append({"role": "user", "content": draw(FULL)})
        reply: dict[str, Any] = {"role": "assistant", "content": draw(FULL)}
        if draw(st.booleans()):
            reply["reasoning_content"] = draw(TEXTS)
        if calls := draw(CALLS):
            reply |= {"tool_calls": calls, "content": draw(TEXTS)}
        messages.append(reply)
        if calls:
            messages += [{"role": "tool", "content": draw(TEXTS)} for _ in calls]
            messages.append({"role": "assistant", "content": draw(FULL)})
    return [
        *messages,
        {"role": "user", "content": [{"type": "text", "text": text} for text in draw(st.tuples(FULL, TEXTS))]},
    ]


@settings(max_examples=120, deadline=None)
@given(
    messages=conversations(),
    tools=st.none() | st.lists(st.sampled_from(TOOLS), min_size=1, max_size=3),
    thinking=st.sampled_from(["none", "open", "think", "think a bit", "think a lot", "empty"]),
    required=st.booleans(),
)
def test_the_text_is_that_of_our_format(
    messages: list[dict[str, Any]], tools: Any, thinking: Thinking, required: bool
) -> None:
    ours: dict[str, Any] = {"tools": tools, "tool_choice": "required" if required else "auto", "thinking": thinking}
    variables = {"tool_choice": "required"} if required else {}
    for asks in (True, False):
        wanted = G1.render(messages, **ours, add_generation_prompt=asks)
        found = TEMPLATE.render(
            messages, tools=tools, thinking=thinking, add_generation_prompt=asks, variables=variables
        )
        assert found == wanted


@settings(max_examples=60, deadline=None)
@given(messages=conversations(), tools=st.none() | st.lists(st.sampled_from(TOOLS), min_size=1, max_size=2))
def test_what_is_marked_is_what_we_train_on(messages: list[dict[str, Any]], tools: Any) -> None:
    messages = messages[:-1] or [messages[-1], {"role": "assistant", "content": "Yes."}]
    pieces = G1.pieces(messages, tools=tools, tool_choice="auto")
    wanted = "".join(piece.text if piece.reply is None else f"{BEGIN}{piece.text}{END}" for piece in pieces)
    assert MARKED.render(messages, tools=tools, add_generation_prompt=False) == wanted
    # Our own way to find replies in any template finds the same ones.
    found = [(piece.text, piece.reply) for piece in TEMPLATE.pieces(messages, tools=tools) if piece.reply is not None]
    assert found == [(piece.text, piece.reply) for piece in pieces if piece.reply is not None]


def test_without_thinking_and_tools_it_is_the_text_of_world_models() -> None:
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi\n\nthere "}]
    assert TEMPLATE.render(messages) == WORLD.render(messages) == "System: Be kind.\n\nUser: Hi\nthere\n\nAssistant:"
    assert TEMPLATE.stop_strings == ("\n\nUser:",)


@pytest.mark.parametrize(
    ("variables", "end"),
    [
        ({}, "\n\nAssistant:"),
        ({"enable_thinking": True}, "\n\nAssistant: <think"),
        ({"thinking": True}, "\n\nAssistant: <think"),
        ({"enable_thinking": False}, "\n\nAssistant: <think></think"),
        ({"enable_thinking": False, "thinking": True}, "\n\nAssistant: <think></think"),
        ({"enable_thinking": None}, "\n\nAssistant:"),
        ({"reasoning_effort": "low"}, " (think a bit)\n\nAssistant: <think"),
        ({"reasoning_effort": "high", "enable_thinking": True}, " (think a lot)\n\nAssistant: <think"),
        ({"reasoning_effort": None}, "\n\nAssistant:"),
        ({"tool_choice": "auto"}, "\n\nAssistant:"),
    ],
    ids=str,
)
def test_switches(variables: dict[str, Any], end: str) -> None:
    assert TEMPLATE.render([{"role": "user", "content": "a"}], variables=variables) == f"User: a{end}"


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        (["user", "user"], "two messages of the user in a row; join the two"),
        (["user", "assistant", "assistant"], "two messages of the assistant in a row"),
        (["user", "system"], "the system's message comes first and alone"),
    ],
)
def test_what_our_format_refuses_is_refused(messages: list[str], error: str) -> None:
    with pytest.raises(ConfigError, match=rf"chat_template\.jinja: {error}"):
        TEMPLATE.render([{"role": role, "content": "x"} for role in messages])


def test_a_marker_of_thinking_is_refused() -> None:
    reply = {"role": "assistant", "content": "x", "reasoning_content": "a</think>"}
    with pytest.raises(ConfigError, match="reasoning_content has a <think> marker"):
        TEMPLATE.render([{"role": "user", "content": "x"}, reply], add_generation_prompt=False)


def test_a_reply_can_be_continued() -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "It\n\nis"}]
    arguments: dict[str, Any] = {"add_generation_prompt": False, "continue_final_message": True}
    assert TEMPLATE.render(messages, **arguments) == G1.render(messages, **arguments)


def test_our_own_template_beside_weights_needs_no_jinja(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_hugging_face_tokenizer(WorldTokenizer(), tmp_path)
    assert (tmp_path / "chat_template.jinja").read_text(encoding="utf-8") == g1_in_jinja()
    monkeypatch.setitem(sys.modules, "rwkv_jax.chat.sandbox", None)
    assert choose_template(tmp_path / "model.safetensors", WorldTokenizer()) is G1
    assert chat_template_beside(tmp_path) is None
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": g1_in_jinja()}))
    assert choose_template(tmp_path / "model.safetensors", WorldTokenizer()) is G1
    assert chat_template_beside(tmp_path) is None
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(ConfigError, match="needs the package jinja2"):
        choose_template(tmp_path / "model.safetensors", WorldTokenizer())
