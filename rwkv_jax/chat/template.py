"""What all chat templates do: a conversation as a prompt, and what to make of the reply."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

from rwkv_jax.chat.messages import Message, clean
from rwkv_jax.chat.replies import ReplyParser
from rwkv_jax.config import ConfigError

Thinking = Literal["none", "open", "think", "think a bit", "think a lot", "closed", "empty"]
"""Thinking of G1 models: not requested; begun in the prompt, as long as the model chooses; begun, with its length
requested in parentheses at the end of the message; or skipped by an empty think block, on two lines or on one."""

ToolChoice = Literal["auto", "required"]
"""Whether a reply may be something else than a call of a tool."""


class Piece(NamedTuple):
    """A part of a conversation's text."""

    text: str
    reply: int | None = None
    """The message of the assistant that this is all of; None for what stands around and between replies."""


def begins_thinking(thinking: Thinking) -> bool:
    """Whether a reply begins within a think block."""
    return thinking not in ("none", "closed", "empty")


def check_start(template: ChatTemplate, system: str | None, thinking: Thinking | None) -> None:
    """Raises ConfigError unless a conversation can start with this system's message and go on in this way."""
    if system is not None and not clean(system):
        raise ConfigError(f"system = {system!r}: is empty; give it some text")
    template.render([*start_of(system), Message("user", "message")], thinking=thinking)


def start_of(system: str | None) -> tuple[Message, ...]:
    """Messages before the user's first one."""
    return () if system is None else (Message("system", system),)


class ChatTemplate(Protocol):
    """Writes conversations as a model was trained to read them."""

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Stop strings of a reply: the start of the next turn. The end-of-text token ends one, too."""
        ...

    def render(
        self,
        messages: Sequence[Message | Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: ToolChoice = "required",
        thinking: Thinking | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of a conversation, for the engine, which puts the end-of-text token before it.

        A conversation that goes on begins with the same text, so that its state is found in the prefix cache.

        Args:
          messages: as in `read_messages`.
          tools: functions that the model may call, in OpenAI's form: `{"type": "function", "function": {"name",
            "description", "parameters"}}`, or what is under `function` alone.
          tool_choice: with tools, whether the reply must be a call.
          thinking: None for the template's own.
          add_generation_prompt: whether a reply begins at the end of the text.
          continue_final_message: the reply goes on with the last message, the assistant's, in place of a new one.
          variables: more variables of a Jinja template.

        Raises:
          ConfigError: what the template cannot write; the error names the message and the remedy.
        """
        ...

    def pieces(
        self,
        messages: Sequence[Message | Mapping[str, Any]],
        *,
        replies: Collection[int] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: ToolChoice = "required",
    ) -> list[Piece]:
        """The text of a finished conversation in parts, for training.

        Joined they are what `render` gives without a generation prompt, and what stands before a reply is what it gives
        of the messages before, with one that begins nothing of the reply: a model is asked as it was trained.

        Args:
          replies: messages of the assistant that become pieces of their own; None for all of them.

        Raises:
          ConfigError: as `render`, or a template that writes a message otherwise when others follow.
        """
        ...

    def reply_parser(self, prompt: str, *, calls: bool = False) -> ReplyParser:
        """A parser for the reply to a rendered prompt; with `calls`, for tool calls, too."""
        ...
