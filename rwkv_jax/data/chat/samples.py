"""Conversations as tokens, targets and a mask, and many of them in flat arrays.

A conversation is encoded piece by piece, what the model reads and what it replies, so that no token lies across the
border of the two, and prompt and reply have the tokens that they have when the model is asked. It begins with the
end-of-text token, as the engine begins texts. The target of a reply's last token is the end-of-text token, with which
a reply ends; within a conversation, too, although there the next input is the separator: so does the engine go on after
a reply that has ended.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rwkv_jax.chat.template import ChatTemplate, Piece
from rwkv_jax.config import ConfigError
from rwkv_jax.config.data import ChatLoss
from rwkv_jax.data.chat.records import Conversation
from rwkv_jax.data.tokenizers import Tokenizer


class Sample(NamedTuple):
    """A conversation, or the beginning of one."""

    tokens: np.ndarray
    """int32 [n], the first of which is end_of_text."""
    targets: np.ndarray
    """int32 [n]: the next tokens, or end_of_text where a reply that counts ends."""
    mask: np.ndarray
    """bool [n], whether the target counts."""

    def beginning(self, length: int) -> Sample:
        """Its first tokens."""
        return Sample(self.tokens[:length], self.targets[:length], self.mask[:length])


def pieces_of(conversation: Conversation, template: ChatTemplate, loss: ChatLoss) -> list[Piece]:
    """The text of a conversation, with the replies that count in pieces of their own.

    With tools the model is asked for calls only if all replies are calls. Raises ConfigError as `ChatTemplate.pieces`.
    """
    own = [message for message in conversation.messages if message.role == "assistant"]
    return template.pieces(
        conversation.messages,
        replies=conversation.replies[-1:] if loss == "last" else conversation.replies,
        tools=conversation.tools or None,
        tool_choice="required" if all(message.tool_calls for message in own) else "auto",
    )


def make_sample(pieces: Sequence[Piece], tokenizer: Tokenizer, loss: ChatLoss) -> Sample:
    """Tokens, targets and mask of a conversation in pieces.

    Raises:
      ConfigError: a reply of which the template leaves nothing, or text that is not Unicode.
    """
    tokens, counts, ends = [tokenizer.end_of_text], list[bool](), list[int]()
    for text, reply in pieces:
        try:
            ids = tokenizer.encode(text)
        except UnicodeEncodeError as error:
            raise ConfigError(f"has half of a surrogate pair ({error.reason}); give whole characters") from error
        if reply is not None and not ids:
            raise ConfigError(f"messages[{reply}]: the chat format writes nothing of it; remove it")
        tokens += ids
        counts += [reply is not None or loss == "all"] * len(ids)
        if reply is not None and loss != "all":
            ends.append(len(tokens) - 1)
    targets = np.array([*tokens[1:], tokenizer.end_of_text], np.int32)
    mask = np.array([*counts, loss == "all"], bool)
    targets[ends], mask[ends] = tokenizer.end_of_text, True
    return Sample(np.array(tokens, np.int32), targets, mask)


@dataclasses.dataclass(frozen=True, eq=False)
class Samples:
    """Samples one after the other."""

    tokens: np.ndarray
    """int32 [n]."""
    targets: np.ndarray
    """int32 [n]."""
    mask: np.ndarray
    """bool [n]."""
    starts: np.ndarray
    """int64 [samples + 1], where each begins, and n."""
    places: tuple[str, ...]
    """File and line of each."""

    @classmethod
    def of(cls, samples: Sequence[Sample], places: Sequence[str]) -> Samples:
        """From one by one; there must be at least one."""
        tokens, targets, mask = (np.concatenate(parts) for parts in zip(*samples, strict=True))
        starts = np.cumsum([0, *(len(sample.tokens) for sample in samples)], dtype=np.int64)
        return cls(tokens, targets, mask, starts, tuple(places))

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each, int64 [samples]."""
        return np.diff(self.starts)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Sample:
        part = slice(self.starts[index], self.starts[index + 1])
        return Sample(self.tokens[part], self.targets[part], self.mask[part])

    def reordered(self, order: Sequence[int]) -> Samples:
        """The same samples in another order."""
        return Samples.of([self[index] for index in order], [self.places[index] for index in order])
