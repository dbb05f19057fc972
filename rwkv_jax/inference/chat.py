"""The formats in which RWKV models were taught to converse, as text around messages.

A conversation is one text that grows: `first_turn`, the model's reply, `next_turn`, the next reply. What a state has
read is never read again, so each function gives only what is to be appended. A prompt ends at `Assistant:` with no
space behind the colon: the first token of a reply brings its own.

Sources: the templates beside the RWKV-7 G1 weights, for `WORLD` and its ways of thinking; ChatRWKV, for `RAVEN`; the
README of RWKV-LM, for `PILE_QA`.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Literal

from rwkv_jax.config import ConfigError

Thinking = Literal["none", "think", "think a bit", "think a lot", "closed", "empty"]
"""How a G1 model comes to its answer: nothing is said of it; by thinking at its own length; by thinking for a shorter
or a longer time, which the end of the message asks for (models from September 2025 on); or straight away, after
thoughts that the prompt has begun and all but ended, on two lines or on one."""

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
    """Opens a turn; `User: `."""
    before_reply: str
    """Ends the message, and asks for a reply; `\\n\\nAssistant:`, with nothing after the colon."""
    separator: str = "\n\n"
    """Ends a reply, and a system message. Messages never hold it, being cleaned."""
    before_system: str | None = None
    """Opens a system message; None if the format has none."""
    begins_with: str = ""
    """Opens the conversation."""
    stop_strings: tuple[str, ...] = ()
    """What ends a reply: the beginning of the next turn. The end-of-text token ends one, too."""
    thinking: Thinking = "none"
    """How the model comes to its answer."""

    def __post_init__(self) -> None:
        if self.thinking not in _OPENINGS:
            raise ConfigError(f"thinking = {self.thinking!r}: must be one of {', '.join(_OPENINGS)}")
        if self.before_reply.endswith(" "):
            raise ConfigError(f"before_reply = {self.before_reply!r}: leave out the space; replies bring their own")

    def first_turn(self, message: str, system: str | None = None) -> str:
        """The beginning of a conversation, up to where the reply begins.

        Raises:
          ConfigError: an empty message, or a system message in a format that has none.
        """
        return self.begins_with + self._system_part(system) + self._turn(message)

    def next_turn(self, message: str, reply: str = "") -> str:
        """What is to be appended after a reply, up to where the next one begins.

        Args:
          reply: all text that the model has read since the turn before, stop string and all: of what separates the
            turns, the part that it ends with already is not repeated.

        Raises:
          ConfigError: an empty message.
        """
        opening = self.separator + self.before_message
        longest = min(len(opening), len(reply))
        read = next(length for length in range(longest, -1, -1) if reply.endswith(opening[:length]))
        return (self.separator + self._turn(message))[read:]

    def closing(self, reply: str) -> str:
        """What is to be appended so that a reply, all text read since its turn, is closed and any turn may follow."""
        length = len(self.separator)
        while not reply.endswith(self.separator[:length]):
            length -= 1
        return self.separator[length:]

    def answer(self, text: str) -> str:
        """The reply as it is shown: without its thoughts, the space it begins with, and line ends behind it."""
        return self._split(text)[1].removeprefix(" ").lstrip("\n").rstrip()

    def thoughts(self, text: str) -> str:
        """What the model thought before its answer; all of the reply if it has not ended its thoughts.

        Before a reply, with no text, there are none: what the prompt has begun is no thought of the model.
        """
        return self._split(text)[0].removeprefix(">").strip() if text else ""

    def clean(self, text: str) -> str:
        """A message without blank lines, which separate turns, and without space around it."""
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
        cleaned = self.clean(text)
        if not cleaned:
            raise ConfigError(f"{name} = {text!r}: is empty; give it some text")
        return cleaned

    def _split(self, text: str) -> tuple[str, str]:
        """Thoughts and answer."""
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
"""Base models trained on the Pile, which were taught no conversation."""
