"""Chat formats of RWKV models, as text around messages.

A conversation is one growing text: `first_turn`, the model's reply, `next_turn`, the next reply. Each function returns
only the text to append, since the state has read the rest. A prompt ends with `Assistant:` without a space: the first
token of a reply includes it.

Sources: the templates beside the RWKV-7 G1 weights, for `WORLD` and its ways of thinking; ChatRWKV, for `RAVEN`; the
README of RWKV-LM, for `PILE_QA`.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Literal

from rwkv_jax.config import ConfigError

Thinking = Literal["none", "think", "think a bit", "think a lot", "closed", "empty"]
"""Thinking of G1 models: not requested; of any length; shorter or longer, requested at the end of the message (models
from September 2025 on); or skipped by an empty think block in the prompt, on two lines or on one."""

_OPENINGS: dict[str, str] = {
    "none": "",
    "think": " <think",
    "think a bit": " <think",
    "think a lot": " <think",
    "closed": " <think>\n</think",
    "empty": " <think></think",
}
_END_OF_THOUGHTS = "</think>"


@dataclasses.dataclass(frozen=True)
class ChatFormat:
    """The text around the messages of a conversation."""

    before_message: str
    """Starts a turn; `User: `."""
    before_reply: str
    """Ends the message and prompts for a reply; `\\n\\nAssistant:`, with nothing after the colon."""
    separator: str = "\n\n"
    """Ends a reply or a system message. Removed from messages."""
    before_system: str | None = None
    """Starts a system message; None if the format has none."""
    begins_with: str = ""
    """Starts the conversation."""
    stop_strings: tuple[str, ...] = ()
    """Stop strings of a reply: the start of the next turn. The end-of-text token ends one, too."""
    thinking: Thinking = "none"
    """Thinking mode."""

    def __post_init__(self) -> None:
        if self.thinking not in _OPENINGS:
            raise ConfigError(f"thinking = {self.thinking!r}: must be one of {', '.join(_OPENINGS)}")
        if self.before_reply.endswith(" "):
            raise ConfigError(f"before_reply = {self.before_reply!r}: leave out the space; replies bring their own")

    def first_turn(self, message: str, system: str | None = None) -> str:
        """Text that starts a conversation, up to the reply.

        Raises:
          ConfigError: an empty message, or a system message in a format that has none.
        """
        return self.begins_with + self._system_part(system) + self._turn(message)

    def next_turn(self, message: str, reply: str = "") -> str:
        """Text to append after a reply, up to the next one.

        Args:
          reply: all text since the previous turn, including the stop string; the part of the turn separator that it
            already ends with is not repeated.

        Raises:
          ConfigError: an empty message.
        """
        opening = self.separator + self.before_message
        longest = min(len(opening), len(reply))
        read = next(length for length in range(longest, -1, -1) if reply.endswith(opening[:length]))
        return (self.separator + self._turn(message))[read:]

    def closing(self, reply: str) -> str:
        """Text to append to close a reply, which is all text since its turn, so that any turn may follow."""
        length = len(self.separator)
        while not reply.endswith(self.separator[:length]):
            length -= 1
        return self.separator[length:]

    def answer(self, text: str) -> str:
        """The reply to show: without thinking, leading space and trailing line breaks."""
        return self._split(text)[1].removeprefix(" ").lstrip("\n").rstrip()

    def thoughts(self, text: str) -> str:
        """The model's thinking before its answer; the whole reply if it is still thinking.

        Empty without any reply: the start of the think block in the prompt does not count.
        """
        return self._split(text)[0].removeprefix(">").strip() if text else ""

    def clean(self, text: str) -> str:
        """A message without blank lines, which separate turns, and without surrounding space."""
        return re.sub("\n{2,}", "\n", text.replace("\r\n", "\n")).strip()

    def _system_part(self, system: str | None) -> str:
        if system is None:
            return ""
        if self.before_system is None:
            raise ConfigError(
                f"system = {system!r}: this chat format has no system message; put it in the first message"
            )
        return self.before_system + self._cleaned("system", system) + self.separator

    def _turn(self, message: str) -> str:
        asked = f" {self.thinking}" if self.thinking.startswith("think ") else ""
        opening = _OPENINGS[self.thinking]
        return self.before_message + self._cleaned("message", message) + asked + self.before_reply + opening

    def _cleaned(self, name: str, text: str) -> str:
        cleaned = self.clean(text) if isinstance(text, str) else ""
        if not cleaned:
            raise ConfigError(f"{name} = {text!r}: is empty; give it some text")
        return cleaned

    def _split(self, text: str) -> tuple[str, str]:
        """Splits a reply into thinking and answer."""
        whole = _OPENINGS[self.thinking].removeprefix(" <think") + text
        if self.thinking == "none":
            return "", text
        thoughts, _, answer = whole.partition(_END_OF_THOUGHTS)
        return thoughts, answer


WORLD = ChatFormat(
    before_message="User: ",
    before_reply="\n\nAssistant:",
    before_system="System: ",
    stop_strings=("\n\nUser:", "\n\nSystem:"),
)
"""World and G1 models, generations 5 to 7."""

RAVEN = ChatFormat(
    before_message="Bob: ",
    before_reply="\n\nAlice:",
    stop_strings=("\n\nBob:", "\n\nAlice:"),
)
"""RWKV-4 Raven."""

PILE_QA = ChatFormat(
    before_message="Question:\n",
    before_reply="\n\nDetailed Expert Answer:\n",
    begins_with="\nQ & A\n\n",
    stop_strings=("\n\nQuestion:",),
)
"""Base models trained on the Pile, without chat training."""
