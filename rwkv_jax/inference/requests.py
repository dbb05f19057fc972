"""What is asked of the engine, checked before any of it is run, and what comes back."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence
from typing import Literal

import numpy as np

from rwkv_jax.checks import ConfigError, is_number, is_whole, require_whole
from rwkv_jax.inference.sampling import SamplingParams
from rwkv_jax.inference.snapshot import Snapshot
from rwkv_jax.inference.text import check_stop_strings

Prompt = str | Sequence[int]
"""A text, or token ids."""

_MOST_GUIDANCE = 1e6

MOST_TOP_LOG_PROBABILITIES = 20
"""Likeliest tokens that can be asked for with each token."""

MOST_SEED = 2**32 - 1
"""Seeds fit in 32 bits."""

FinishReason = Literal["stop", "length"]
"""A stop id or stop string was written, or as many tokens as were allowed."""


class QueueFullError(RuntimeError):
    """More requests are waiting than the engine holds; try again when some of them have ended."""


@dataclasses.dataclass(frozen=True)
class Request:
    """One text to read and to continue."""

    ids: tuple[int, ...]
    """Tokens to read first; at least one, unless `start` has read some."""
    max_tokens: int = 256
    """Most tokens to write; 0 only reads."""
    sampling: SamplingParams = dataclasses.field(default_factory=SamplingParams)
    """How tokens are chosen."""
    seed: int = 0
    """Of the draws: the key of the text's token t is made of seed and t, whatever else is being run."""
    stop: tuple[str, ...] = ()
    """Strings that end the text; neither they nor their first characters are shown."""
    stop_ids: frozenset[int] = frozenset()
    """Tokens that end the text, and are no part of it."""
    num_top: int = 0
    """How many of the likeliest tokens are reported with each token."""
    start: Snapshot | None = None
    """The text so far; None begins a text."""
    guidance: float = 1.0
    """Logits are guidance x these + (1 - guidance) x those after `unguided_ids`."""
    unguided_ids: tuple[int, ...] = ()
    """The text to steer away from (classifier-free guidance, arXiv 2306.17806); none where guidance is 1."""
    keep: bool = False
    """Whether the state is wanted at the end. Such a text is written no further than its reader has read."""
    client: str = ""
    """Who asks: waiting clients take turns."""

    def check(self, vocab_size: int, capacity: int | None, *, name: str = "prompt") -> None:
        """Refuses what cannot be run.

        Args:
          capacity: tokens that a state holds; None where there is no limit.
          name: of the prompt, among others.

        Raises:
          ConfigError: names the value, and what would do.
        """
        if not isinstance(self.sampling, SamplingParams):
            raise ConfigError(f"sampling = {self.sampling!r}: must be a Sampling")
        if not isinstance(self.client, str):
            raise ConfigError(f"client = {self.client!r}: must be a string")
        require_whole("max_tokens", self.max_tokens, 0)
        require_whole("seed", self.seed, 0, MOST_SEED)
        require_whole("num_top", self.num_top, 0, min(MOST_TOP_LOG_PROBABILITIES, vocab_size))
        start = 0 if self.start is None else self.start.num_tokens
        if not self.ids and not start:
            raise ConfigError(f"{name}: is empty; give at least one token (the end-of-text id begins a text)")
        if not self.ids and self.max_tokens == 0:
            raise ConfigError(f"{name}: is empty, and no tokens are asked for; give tokens to read")
        for whose, ids in ((name, self.ids), ("stop_ids", self.stop_ids), ("unguided", self.unguided_ids)):
            _check_ids(whose, ids, vocab_size)
        check_stop_strings(self.stop)
        if not is_number(self.guidance) or not abs(self.guidance) <= _MOST_GUIDANCE:
            raise ConfigError(
                f"guidance = {self.guidance!r}: must be a number of at most {_MOST_GUIDANCE:g}; 1 is no guidance"
            )
        if (self.guidance != 1) != bool(self.unguided_ids):
            raise ConfigError(
                f"guidance = {self.guidance} and an unguided prompt of {len(self.unguided_ids)} tokens: guidance needs "
                "both, a factor other than 1 and a text to steer away from"
            )
        if self.guidance != 1 and (self.keep or self.start is not None):
            raise ConfigError(f"guidance = {self.guidance}: is for single texts; a conversation has one state, not two")
        self.sampling.check_ids(vocab_size)
        longest = max(start + len(self.ids), len(self.unguided_ids)) + self.max_tokens
        if capacity is not None and longest > capacity:
            raise ConfigError(
                f"max_tokens = {self.max_tokens} after {longest - self.max_tokens} tokens: this model's state holds "
                f"{capacity}; ask for less, or build it with a greater model.context_length"
            )


def _check_ids(name: str, ids: Collection[int], vocab_size: int) -> None:
    if not ids:
        return
    if not all(is_whole(token) for token in ids):
        wrong = next(token for token in ids if not is_whole(token))
        raise ConfigError(f"{name}: must be integers, token ids; {wrong!r} is {type(wrong).__name__}")
    values = np.asarray(tuple(ids))
    if values.min() < 0 or values.max() >= vocab_size:
        worst = values.min() if values.min() < 0 else values.max()
        raise ConfigError(f"{name}: token id {worst} must lie from 0 to V - 1 = {vocab_size - 1}")


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A piece of a text as it is written."""

    index: int
    """Which of the prompts it continues."""
    text: str
    """Whole characters; may be empty while a character, or what may become a stop string, is incomplete."""
    ids: tuple[int, ...]
    """The token behind it; none where a stop id, or nothing, was written."""
    log_probabilities: tuple[float, ...]
    """Of each of `ids`, by the model alone (after guidance): no temperature, no penalties."""
    top: tuple[tuple[tuple[int, float], ...], ...] = ()
    """With each of `ids`, the likeliest tokens and their log-probabilities, likeliest first."""
    finish_reason: FinishReason | None = None
    """Set in a text's last chunk."""
    stop: int | str | None = None
    """The stop id or stop string that ended the text."""


@dataclasses.dataclass(frozen=True)
class Completion:
    """A whole continuation."""

    index: int
    """Which of the prompts it continues."""
    text: str
    """Without the prompt and without what stopped it."""
    ids: tuple[int, ...]
    """Tokens written, without a stop id; those of a stop string are among them."""
    log_probabilities: tuple[float, ...]
    """Of each of `ids`, by the model alone (after guidance)."""
    top: tuple[tuple[tuple[int, float], ...], ...]
    """With each of `ids`, the likeliest tokens and their log-probabilities."""
    finish_reason: FinishReason
    """Why it ended."""
    stop: int | str | None
    """The stop id or stop string that ended it."""
    num_prompt_tokens: int
    """Tokens of the prompt."""

    @property
    def mean_log_probability(self) -> float:
        """Of a token of the text; 0 for a text without tokens."""
        return sum(self.log_probabilities) / max(1, len(self.log_probabilities))

    @property
    def score(self) -> float:
        """What `best_of` takes the greatest of: the mean log-probability, but -inf for a text that says nothing."""
        return self.mean_log_probability if self.text else -math.inf


def join(chunks: Sequence[Chunk], index: int, num_prompt_tokens: int) -> Completion:
    """The completion of which these are all chunks, in order."""
    last = chunks[-1]
    if last.finish_reason is None:
        raise ValueError("join: the last chunk does not end a text")
    return Completion(
        index=index,
        text="".join(chunk.text for chunk in chunks),
        ids=tuple(token for chunk in chunks for token in chunk.ids),
        log_probabilities=tuple(value for chunk in chunks for value in chunk.log_probabilities),
        top=tuple(one for chunk in chunks for one in chunk.top),
        finish_reason=last.finish_reason,
        stop=last.stop,
        num_prompt_tokens=num_prompt_tokens,
    )
