"""Jinja templates: rendered as by transformers, without access to anything, within bounds; and which one is chosen."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rwkv_jax.chat import sandbox
from rwkv_jax.chat.choice import named_template
from rwkv_jax.chat.formats import G1, PILE_QA, RAVEN, WORLD
from rwkv_jax.chat.jinja_template import JinjaTemplate
from rwkv_jax.chat.messages import Message, ToolCall
from rwkv_jax.chat.replies import Reply
from rwkv_jax.chat.template import ChatTemplate, Thinking
from rwkv_jax.config import ConfigError
from rwkv_jax.data.tokenizers import ByteTokenizer, WorldTokenizer
from rwkv_jax.inference.chat.choice import choose_template

LIKE_G1 = """\
{%- set names = {"user": "User", "assistant": "Assistant", "tool": "User"} -%}
{%- set ns = namespace(system="") -%}
{%- for message in messages if message.role == "system" -%}
    {%- set ns.system = message.content | trim -%}
{%- endfor -%}
{%- if ns.system or tools | length > 0 -%}
{{ "System: " ~ ns.system }}{% if tools %}{{ "\\nTools:\\n" ~ (tools | tojson) }}{% endif %}{{ "\\n\\n" }}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.role not in names and message.role != "system" -%}
        {{- raise_exception("no role " + message.role) -}}
    {%- elif message.role == "system" -%}
        {%- continue -%}
    {%- endif -%}
    {%- if message.role == "assistant" -%}
        {{- "Assistant:" -}}
        {%- generation -%}
            {{- " " ~ message.content | trim if message.content else "" -}}
            {%- for call in message.tool_calls or [] -%}
                {{- ' ```json\\n{"name": ' ~ (call.function.name | tojson) ~ ', "arguments": ' -}}
                {{- (call.function.arguments | tojson) ~ "}\\n```" -}}
            {%- endfor -%}
        {%- endgeneration -%}
        {{- "\\n\\n" -}}
    {%- else -%}
        {{- names[message.role] ~ ": " ~ ("Function output:\\n" if message.role == "tool" else "") -}}
        {{- message.content.strip() ~ "\\n\\n" -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- "Assistant: <think" if thinking is defined and thinking else "Assistant: <think></think>\\n" -}}
{%- endif -%}
"""
USER = Message("user", " 1+1")


def test_a_template_writes_messages_tools_and_calls() -> None:
    template: ChatTemplate = JinjaTemplate(LIKE_G1)
    messages = [
        Message("system", "Be kind."),
        USER,
        Message("assistant", "So.", tool_calls=(ToolCall("add", '{"a":1,  "b":1}', "call_1"),)),
        Message("tool", "<2>", tool_call_id="call_1"),
    ]
    assert template.render(messages, tools=[{"name": "add", "description": "é<"}]) == (
        'System: Be kind.\nTools:\n[{"type": "function", "function": {"name": "add", "description": "é<"}}]\n\n'
        'User: 1+1\n\nAssistant: So. ```json\n{"name": "add", "arguments": {"a":1,  "b":1}}\n```\n\n'
        "User: Function output:\n<2>\n\nAssistant: <think></think>\n"
    )
    assert template.stop_strings == ("\n\nUser:",)


@pytest.mark.parametrize(
    ("thinking", "end", "reply", "reasoning"),
    [
        (None, "<think></think>\n", "b", ""),
        ("none", "<think></think>\n", "b", ""),
        ("closed", "<think></think>\n", "b", ""),
        ("open", "<think", ">\na</think>\nb", "a"),
    ],
)
def test_thinking_is_a_switch_of_the_template(thinking: Any, end: str, reply: str, reasoning: str) -> None:
    template = JinjaTemplate(LIKE_G1)
    prompt = template.render([USER], thinking=thinking)
    assert prompt == f"User: 1+1\n\nAssistant: {end}"
    assert Reply.of(template.reply_parser(prompt).push(reply)) == (reasoning, "b", ())
    assert template.render([USER], variables={"thinking": True}).endswith("<think")
    assert template.render([USER], thinking="empty") == template.render([USER], thinking="closed")


def test_what_a_template_does_not_read_is_refused() -> None:
    ways = JinjaTemplate("{{ reasoning_effort }}")
    assert [ways.render([USER], thinking=way) for way in ("think a bit", "think", "think a lot")] == [
        "low",
        "medium",
        "high",
    ]
    refused: tuple[tuple[JinjaTemplate, Thinking, str], ...] = (
        (ways, "open", "thinking or enable_thinking"),
        (ways, "closed", "thinking or enable_thinking"),
        (JinjaTemplate(LIKE_G1), "think a lot", "reasoning_effort"),
    )
    for template, thinking, unread in refused:
        with pytest.raises(ConfigError, match=f"thinking = '{thinking}': .* does not read {unread}; leave it out"):
            template.render([USER], thinking=thinking)
    with pytest.raises(ConfigError, match=r"variables x: .* does not read them"):
        ways.render([USER], variables={"x": 1})
    defaulted = JinjaTemplate("{% set thinking = thinking | default(false) %}{{ thinking }}")
    assert (defaulted.render([USER]), defaulted.render([USER], thinking="open")) == ("False", "True")


def test_a_final_message_can_be_continued() -> None:
    template = JinjaTemplate(LIKE_G1)
    final = Message("assistant", " It is ")
    assert template.render([USER, final], continue_final_message=True) == "User: 1+1\n\nAssistant: It is"
    for messages in ([USER], [USER, Message("assistant", tool_calls=(ToolCall("f", "{}"),))]):
        with pytest.raises(ConfigError, match="continue_final_message needs"):
            template.render(messages, continue_final_message=True)
    with pytest.raises(ConfigError, match=r"messages\[1\]: .* does not write it as it is"):
        JinjaTemplate("{{ messages[1].content | upper }}").render([USER, final], continue_final_message=True)


def grown(step: str, shown: str = "ns.x", start: str = "'aa'") -> str:
    """A template in which something grows exponentially."""
    loop = f"{{% for i in range(99) %}}{{% set ns.x = {step} %}}{{% endfor %}}"
    return f"{{% set ns = namespace(x={start}) %}}{loop}{{{{ {shown} }}}}"


def render(source: str, **variables: Any) -> str:
    template = JinjaTemplate(source)
    return template.render([USER], variables=variables)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{% for i in range(5) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}", "012"),
        ("{% for m in messages %}\n    {{ loop.length }}{{ loop.last }}\n{% endfor %}", "    1True\n"),
        ('{% macro f(x) %}{{ x ~ "!" }}{% endmacro %}{{ f("a") }}{{ "a".join(["b", "c"]) }}', "a!bac"),
        ("{{ x | tojson(indent=2) }}{{ x | items | list }}", "{\n  \"é\": [\n    1\n  ]\n}[('é', [1])]"),
        ('{{ "a-b" | replace("-", "+") }}{{ "aa".replace("a", "b", 1) }}', "a+bba"),
        ('{{ messages | map(attribute="role") | join(", ") }}{{ "a\nb" | indent(2) }}', "usera\n  b"),
        (
            "{{ tools is none }}{{ documents is none }}{{ bos_token }}{{ nothing }}{{ 2 * 3 + 1 }}{{ [1] + [2] }}",
            "TrueTrue7[1, 2]",
        ),
        ('{{ [[1], {"a": (2,)}] == [[1], {"a": (2,)}] }}{{ 1 < 2 < 2 }}{{ "a" in {"a": 1} }}', "TrueFalseTrue"),
        ("{{ [[2], [1]] | min }}{{ [1, 2] | select('gt', 1) | list }}{{ [1, 1] | unique | list }}", "[1][2][1]"),
        ("{{ 2 in [1, 2] | map('abs') }}{{ [1, 2].index(2) }}{{ [3][0] }}{{ {}.get(1, 4) }}", "True134"),
        ('{% set x = "<b>" | safe %}{{ x }}{{ messages[0]["role"] }}{{ "a b".split(" ")[-1] }}', "<b>userb"),
    ],
)
def test_what_templates_use_works(source: str, text: str) -> None:
    variables = {"x": {"é": [1]}} if source.startswith("{{ x") else {}
    assert render(source, **variables) == text


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("{% if %}", "line 1: Expected an expression"),
        ("{{ raise_exception('only users') }}", "only users; mend the messages, or name another template"),
        ("a\n{{ nothing.x.y }}", "'nothing' is undefined"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ '\\ud800' }}", "surrogates not allowed"),
        # No access to anything.
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.__class__.__init__.__globals__ }}", "unsafe"),
        ("{{ raise_exception.__globals__.keys() }}", "unsafe"),
        ("{{ self._TemplateReference__context.vars }}", "unsafe"),
        ("{{ (messages | map('attr', '__class__') | list) }}", "No filter named 'attr'"),
        ("{% set x = messages.append(1) %}", "unsafe"),
        ("{{ messages[0].update(a=1) }}", "unsafe"),
        ("{{ '{0.__class__}'.format(1) }}", "unsafe"),
        ("{{ (1).to_bytes(9) }}", "unsafe"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{% import 'os' as os %}", "no loader"),
        ("{{ lipsum() }}{{ cycler }}", "'lipsum' is undefined"),
        ("{{ open('/etc/passwd') }}", "'open' is undefined"),
        # No text or work without bounds.
        ("{{ 'a' * 10**9 }}", "more than 4194304 characters"),
        ("{{ [1] * 10**9 }}", "more than 1000000 steps"),
        ("{{ 9**(9**9) }}", "integer that is too large"),
        (grown("ns.x * ns.x", start="9"), "integer that is too large"),
        (grown("ns.x + ns.x"), "characters"),
        (grown("ns.x ~ ns.x"), "characters"),
        (grown("ns.x.join([ns.x, ns.x])"), "characters"),
        (grown("ns.x | replace('a', ns.x)"), "characters"),
        (grown("(ns.x,)", "{ns.x: 1}").replace("99", "101"), "more than 100 deep"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "steps"),
        ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
        ("{% for i in range(99999) %}{{ messages[0].content * 20 }}{% endfor %}", "characters"),
        ("{{ '%99999999d' % 1 }}", "formats a text"),
        ("{{ 'a'.ljust(10**9) }}", "unsafe"),
        ("{{ 'a' | center(10**9) }}", "No filter named 'center'"),
    ],
)
def test_what_templates_must_not_do(source: str, error: str) -> None:
    begin = time.perf_counter()
    with pytest.raises(ConfigError, match=rf"chat_template\.jinja.*{error}"):
        render(source)
    assert time.perf_counter() - begin < 10


USED = {
    "[x, x]": [
        "x",
        "x | tojson",
        "x == y",
        "'b' != 'c' < x",
        "x in [y]",
        "x is eq y",
        "[x] | select('in', [y]) | list",
        "[x, y] | max",
        "([x, y] | reverse) < ([y, x] | reverse)",
        "[x].index(y)",
        "x | upper",
        "x is lower",
        "raise_exception(x)",
    ],
    "(x, x)": ["{x: 1}", "{}[x]", "{}.get(x)", "[1] | map(x) | list", "[x] | unique | list"],
}


@pytest.mark.parametrize(("pair", "used"), [(pair, used) for pair, uses in USED.items() for used in uses])
def test_few_lists_within_each_other_are_not_little_work(pair: str, used: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_STEPS", 5000)
    doublings = f"{{% set x = {pair} %}}" * 60
    with pytest.raises(ConfigError, match=r"chat_template\.jinja.*more than 5000 steps"):
        render(f"{{% set x = 'a' %}}{doublings}{{% set y = x %}}{{% set x = 'a' %}}{doublings}{{{{ {used} }}}}")


def test_files_of_a_tokenizers_folder(tmp_path: Path) -> None:
    assert JinjaTemplate.beside(tmp_path) is None
    config = tmp_path / "tokenizer_config.json"
    for source, text in (
        (None, None),
        ("a", "a"),
        ([{"name": "rag"}], None),
        ([{"name": ["x"], "template": "a"}], None),
        ([1, {"name": ["x"]}, {"name": "default", "template": "b"}], "b"),
    ):
        config.write_text(json.dumps({"chat_template": source}))
        found = JinjaTemplate.beside(tmp_path)
        assert (None if found is None else found.render([USER])) == text
    config.write_text(json.dumps({"chat_template": [{"name": "default", "template": "b"}, {"name": "tool_use"}]}))
    assert choose_template(tmp_path / "model.pth", ByteTokenizer()).render([USER]) == "b"
    (tmp_path / "chat_template.jinja").write_text("c")
    assert choose_template(tmp_path, ByteTokenizer()).render([USER]) == "c"
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"chat_template\.jinja: is not UTF-8"):
        JinjaTemplate.beside(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b" " * (2**24 + 1))
    with pytest.raises(ConfigError, match=r"chat_template\.jinja: is larger than"):
        JinjaTemplate.beside(tmp_path)


def test_without_jinja2_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "chat_template.jinja").write_text("c")
    monkeypatch.delitem(sys.modules, "rwkv_jax.chat.sandbox", raising=False)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(
        ConfigError, match=r"chat_template\.jinja needs the package jinja2: pip install .rwkv-jax\[serve\]"
    ):
        choose_template(tmp_path, ByteTokenizer())


@pytest.mark.parametrize(
    ("name", "tokenizer", "template"),
    [
        ("rwkv7-g1i-1.5b-20260805-ctx16384.pth", WorldTokenizer, G1),
        ("RWKV-x060-World-1B6-v2.1-20240328-ctx4096.pth", WorldTokenizer, WORLD),
        ("RWKV-4-Raven-1B5-v12.pth", ByteTokenizer, RAVEN),
        ("mine.pth", ByteTokenizer, G1),
    ],
)
def test_templates_are_chosen_by_name(
    name: str, tokenizer: Callable[[], Any], template: ChatTemplate, tmp_path: Path
) -> None:
    assert choose_template(tmp_path / name, tokenizer()) is template


def test_templates_have_names(tmp_path: Path) -> None:
    assert named_template("pile-qa") is PILE_QA
    (tmp_path / "mine.jinja").write_text("c")
    assert named_template(str(tmp_path / "mine.jinja")).render([USER]) == "c"
    with pytest.raises(ConfigError, match="template = 'vicuna': is none of g1, world, raven, pile-qa, and no file"):
        named_template("vicuna")
