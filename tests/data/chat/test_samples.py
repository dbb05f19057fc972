"""Chats are trained on in the words and tokens in which a model is asked, and only replies and their ends count."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from rwkv_jax.chat.choice import FORMATS
from rwkv_jax.chat.formats import G1
from rwkv_jax.chat.jinja_template import JinjaTemplate
from rwkv_jax.chat.sandbox import BEGIN_GENERATION
from rwkv_jax.chat.template import ChatTemplate
from rwkv_jax.config import ConfigError
from rwkv_jax.data.chat.records import Conversation, read_conversation
from rwkv_jax.data.chat.samples import Sample, Samples, make_sample, pieces_of
from rwkv_jax.data.tokenizers import Tokenizer, WorldTokenizer
from tests.golden import GOLDEN_DIR

WORLD = WorldTokenizer()
SYSTEM, FIRST, SECOND, THIRD = (
    {"role": "system", "content": "Be kind."},
    [{"role": "user", "content": "Hi\n\nthere"}, {"role": "assistant", "content": "Hello.\n\nHow are you?"}],
    [{"role": "user", "content": "Fine: so?"}, {"role": "assistant", "content": "So:  nothing! "}],
    [{"role": "user", "content": "数?"}, {"role": "assistant", "content": "日本語\n"}],
)
TEXTS = [*FIRST, *SECOND, *THIRD]
THOUGHTS = [
    {"role": "user", "content": "1+1"},
    {"role": "assistant", "reasoning": "one\n\ntwo", "content": "2"},
    {"role": "user", "content": "+1"},
    {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 2}}}]},
    {"role": "tool", "content": "3"},
    {"role": "assistant", "content": "3"},
]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"properties": {"a": {}}, "required": ["a"]}}}]

HF = JinjaTemplate(
    "{% for m in messages %}{% if not loop.first %}{{ '\\n' }}{% endif %}"
    "{{ {'user': 'User', 'assistant': 'Assistant', 'system': 'System'}[m.role] }}: {{ m.content.strip() }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\nAssistant:' }}{% endif %}"
)
MARKED = JinjaTemplate(
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
FORGETFUL = JinjaTemplate(
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""It leaves out what was thought before earlier replies."""

CASES: dict[str, tuple[ChatTemplate, list[Any], list[Any] | None]] = {
    **{name: (template, TEXTS, None) for name, template in FORMATS.items()},
    "g1 with a system": (G1, [SYSTEM, *TEXTS], None),
    "g1 with tools": (G1, THOUGHTS, TOOLS),
    "g1 begun by the assistant": (G1, TEXTS[1:], None),
    "jinja": (HF, [SYSTEM, *TEXTS], None),
    "jinja with marks": (MARKED, TEXTS, None),
}


def conversation(messages: list[Any], tools: list[Any] | None = None) -> Conversation:
    return read_conversation({"messages": messages, "tools": tools}, "messages")


def sample_of(
    template: ChatTemplate, chat: Conversation, loss: Any = "assistant", tokenizer: Tokenizer = WORLD
) -> Sample:
    return make_sample(pieces_of(chat, template, loss), tokenizer, loss)


def counted(sample: Sample, tokenizer: Tokenizer = WORLD) -> list[str]:
    """The texts that count, each up to its end of text."""
    runs, text = [], []
    for target in sample.targets[sample.mask].tolist():
        if target == tokenizer.end_of_text:
            runs.append(tokenizer.decode(text))
            text = []
        else:
            text.append(target)
    assert not text
    return runs


@pytest.mark.parametrize("name", CASES)
def test_text_and_tokens_are_those_that_a_model_is_asked_in(name: str) -> None:
    template, messages, tools = CASES[name]
    chat = conversation(messages, tools)
    arguments: dict[str, Any] = {"tools": tools, "tool_choice": "auto"}
    sample = sample_of(template, chat)
    whole = template.render(chat.messages, add_generation_prompt=False, **arguments)
    assert sample.tokens[0] == WORLD.end_of_text
    assert WORLD.decode(sample.tokens[1:].tolist()) == whole
    # Up to each reply: what is asked of the messages before it, and that in tokens where nothing was replied yet.
    at = 0
    for number, reply in enumerate(chat.replies):
        first = int(np.flatnonzero(sample.mask[at:])[0]) + at
        prompt = template.render(chat.messages[:reply], **arguments) if reply else ""
        if reply:
            assert WORLD.decode(sample.tokens[: first + 1].tolist()) == prompt
        if number == 0 and reply:
            assert sample.tokens[1 : first + 1].tolist() == WORLD.encode(prompt)
        at = first + int(np.flatnonzero(sample.targets[first:] == WORLD.end_of_text)[0]) + 1


@pytest.mark.parametrize("name", CASES)
def test_what_counts_are_replies_whole_and_the_end_of_each(name: str) -> None:
    template, messages, tools = CASES[name]
    chat = conversation(messages, tools)
    pieces = pieces_of(chat, template, "assistant")
    replies = [piece.text for piece in pieces if piece.reply is not None]
    assert len(replies) == len(chat.replies)
    assert counted(sample_of(template, chat)) == replies
    assert counted(sample_of(template, chat, "last")) == replies[-1:]
    everything = sample_of(template, chat, "all")
    assert everything.mask.all()
    assert everything.targets.tolist() == [*everything.tokens[1:].tolist(), WORLD.end_of_text]


def test_thoughts_and_calls_are_not_split() -> None:
    assert counted(sample_of(G1, conversation(THOUGHTS, TOOLS))) == [
        " <think>\none\n\ntwo\n</think>\n2",
        ' ```json\n{"name":"add","arguments":{"a":2}}\n```',
        " 3",
    ]


def test_a_reply_ends_with_end_of_text_where_the_next_input_is_the_separator() -> None:
    """As when a model has ended a reply: the engine reads on from before that token."""
    sample = sample_of(G1, conversation([*FIRST, *SECOND]))
    (middle, last) = np.flatnonzero(sample.targets == WORLD.end_of_text)
    assert last == len(sample.tokens) - 1
    assert WORLD.decode(sample.tokens[middle + 1 :].tolist()).startswith("\n\nUser: Fine")
    others = np.delete(np.arange(len(sample.tokens) - 1), middle)
    assert np.array_equal(sample.targets[others], sample.tokens[others + 1])


def test_no_token_lies_across_the_border() -> None:
    """World has tokens such as ": " and ".\\n\\n", which the whole text would have there."""
    template = JinjaTemplate(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}"
        "{% if not loop.last %}{{ '\\n\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\\n\\nassistant: ' }}{% endif %}"
    )
    chat = conversation([{"role": "user", "content": "a"}, {"role": "assistant", "content": " b."}, *SECOND])
    sample = sample_of(template, chat)
    assert counted(sample)[0] == " b."
    whole = WORLD.encode(template.render(chat.messages, add_generation_prompt=False))
    assert WORLD.decode(whole) == WORLD.decode(sample.tokens[1:].tolist())
    assert whole != sample.tokens[1:].tolist()


def test_templates_that_forget_train_on_the_last_reply_only() -> None:
    chat = conversation([*THOUGHTS[:2], *SECOND])
    with pytest.raises(ConfigError, match=r"messages\[1\]: .* writes it otherwise .*; take replies at the end"):
        sample_of(FORGETFUL, chat)
    assert counted(sample_of(FORGETFUL, chat, "last")) == ["So:  nothing! \n"]


def closes_thoughts(begin: str, end: str = "{% endgeneration %}") -> JinjaTemplate:
    """A template that asks with an empty think block, which it writes of no reply, and marks replies."""
    return JinjaTemplate(
        "{% for m in messages %}{% if m.role == 'assistant' %}Assistant:"
        + begin
        + "{{ ' ' ~ m.content }}"
        + end
        + "{% else %}User: {{ m.content }}{% endif %}{{ '\\n\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Assistant: <think></think>\\n' }}{% endif %}"
    )


def test_templates_that_mark_replies_train_on_what_they_mark() -> None:
    template, chat = closes_thoughts("{% generation %}"), conversation(TEXTS[2:])
    assert counted(sample_of(template, chat)) == [" So:  nothing! ", " 日本語\n"]
    assert counted(sample_of(template, chat, "last")) == [" 日本語\n"]
    whole = template.render(chat.messages, add_generation_prompt=False)
    assert WORLD.decode(sample_of(template, chat).tokens[1:].tolist()) == whole
    assert BEGIN_GENERATION not in whole


@pytest.mark.parametrize(
    ("template", "content", "marks"),
    [
        (closes_thoughts("{% if loop.last %}{% generation %}", "{% endgeneration %}{% endif %}"), "a", 1),
        (closes_thoughts("{% generation %}{% endgeneration %}{% generation %}"), "a", 4),
        (closes_thoughts("{% generation %}{% generation %}", "{% endgeneration %}" * 2), "a", 4),
        (closes_thoughts("{% generation %}"), f"a{BEGIN_GENERATION}", 2),
    ],
    ids=["one of two", "two of one", "within each other", "a text with a mark"],
)
def test_marks_that_are_not_one_a_reply_are_refused(template: JinjaTemplate, content: str, marks: int) -> None:
    user, reply = {"role": "user", "content": "b"}, {"role": "assistant", "content": content}
    with pytest.raises(ConfigError, match=rf"messages\[1\]: .* has {marks} texts marked by .* assistant 2 messages"):
        sample_of(template, conversation([user, reply, user, reply | {"content": "c"}]))


def test_formats_refuse_what_they_cannot_write() -> None:
    with pytest.raises(ConfigError, match="has no reasoning"):
        sample_of(FORMATS["world"], conversation(THOUGHTS))
    with pytest.raises(ConfigError, match="tools: this chat format has none"):
        sample_of(FORMATS["world"], conversation(FIRST, TOOLS))
    empty = JinjaTemplate("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}")
    with pytest.raises(ConfigError, match=r"messages\[1\]: the chat format writes nothing of it"):
        sample_of(empty, conversation(FIRST))


def test_samples_one_after_the_other_are_found_again() -> None:
    made = [sample_of(G1, conversation(messages)) for messages in (FIRST, SECOND, [*FIRST, *THIRD])]
    samples = Samples.of(made, ["a", "b", "c"])
    assert samples.lengths.tolist() == [len(sample.tokens) for sample in made]
    for sample, found in zip(made, (samples[0], samples[1], samples[2]), strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(sample, found, strict=True))
    other = samples.reordered([2, 0])
    assert other.places == ("c", "a")
    assert np.array_equal(other[1].targets, made[0].targets)


_THINKING: dict[Any, Any] = {"fake_newline": "closed", "fake": "empty"}


def golden_chats() -> list[dict[str, Any]]:
    lines = (GOLDEN_DIR / "tuning" / "chat_s0.jsonl").read_text().splitlines()
    chats = [json.loads(line) for line in lines]
    return [chat for chat in chats if not chat["name"].startswith("hf_")]


@pytest.mark.parametrize("chat", golden_chats(), ids=lambda chat: chat["name"])
def test_prompts_are_the_official_ones(chat: dict[str, Any]) -> None:
    options = dict(chat.get("options", {}))
    think, calls = options.pop("think", "none"), options.pop("json_call", False)
    assert not options
    text = G1.render(chat["messages"], thinking="open" if think is True else _THINKING.get(think, think))
    # A call is begun where the tools are given as such; here they are a system's text.
    assert text + (" ```json" if calls else "") == chat["text"]
