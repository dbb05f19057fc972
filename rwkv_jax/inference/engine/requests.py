"""Requests to the engine, and the chunks and completions that it returns."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence
from typing import Literal

from rwkv_jax.checks import ConfigError, is_number, is_whole, require_whole, shown
from rwkv_jax.inference.engine.adapters import LoadedAdapter
from rwkv_jax.inference.engine.text import check_stop_strings
from rwkv_jax.inference.sampling.grammar import Grammar
from rwkv_jax.inference.sampling.params import SamplingParams
from rwkv_jax.inference.state.snapshot import Snapshot

Prompt = str | Sequence[int]
"""A text or token ids."""

TopLogprobs = tuple[tuple[int, float], ...]
"""The most likely tokens at a position and their logprobs, most likely first."""

_MAX_GUIDANCE_SCALE = 1e6

MAX_TOP_LOGPROBS = 20
"""Upper bound of `Request.top_logprobs`."""

MAX_SEED = 2**32 - 1
"""Seeds fit in 32 bits."""

FinishReason = Literal["stop", "length"]
"""A stop id or stop string was generated, or `max_tokens` was reached."""


class QueueFullError(RuntimeError):
    """The engine's queue is full; try again when some requests have ended."""


class NotFiniteError(FloatingPointError):
    """The model's logits are not finite."""


NOT_FINITE = "the model's logits are not finite: its weights are broken, or the state from which this text went on"
"""Its message."""


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt to continue."""

    ids: tuple[int, ...]
    """Prompt tokens; at least one unless `state` is given."""
    max_tokens: int = 256
    """Maximum tokens to generate; 0 only prefills."""
    sampling: SamplingParams = dataclasses.field(default_factory=SamplingParams)
    """Sampling parameters."""
    seed: int = 0
    """The random key of the text's token t is derived only from seed and t."""
    stop: tuple[str, ...] = ()
    """Strings that end the text; not even their first characters are shown."""
    stop_ids: frozenset[int] = frozenset()
    """Tokens that end the text; not included in it."""
    top_logprobs: int = 0
    """Number of most likely tokens to report at each position."""
    state: Snapshot | None = None
    """State to continue from; None begins a text."""
    guidance_scale: float = 1.0
    """Logits are guidance_scale x these + (1 - guidance_scale) x those after `negative_ids`."""
    negative_ids: tuple[int, ...] = ()
    """Negative prompt of classifier-free guidance (arXiv 2306.17806); empty where guidance_scale is 1."""
    return_state: bool = False
    """Whether the final state is needed. Such a text runs at most one burst ahead of its consumer."""
    client_id: str = ""
    """The client: clients' queues take turns."""
    grammar: Grammar | None = None
    """What the text must match; None for any text."""
    adapter: LoadedAdapter | None = None
    """The adapter that the text is generated with; None for the base alone."""
    scored_ids: tuple[int, ...] = ()
    """Given tokens behind the prompt, to be scored; nothing is generated then."""

    def check(self, vocab_size: int, capacity: int | None, *, name: str = "prompt") -> None:
        """Checks the request.

        Args:
          capacity: maximum tokens in a state; None for no limit.
          name: of the prompt, for messages.

        Raises:
          ConfigError: an invalid value; the message has the remedy.
        """
        if not isinstance(self.sampling, SamplingParams):
            raise ConfigError(f"sampling = {shown(self.sampling)}: must be a SamplingParams or the name of a preset")
        if not isinstance(self.client_id, str):
            raise ConfigError(f"client_id = {shown(self.client_id)}: must be a string")
        if self.grammar is not None and not isinstance(self.grammar, Grammar):
            raise ConfigError(f"grammar = {shown(self.grammar)}: must be a Grammar, or None")
        require_whole("max_tokens", self.max_tokens, 0)
        require_whole("seed", self.seed, 0, MAX_SEED)
        require_whole("top_logprobs", self.top_logprobs, 0, min(MAX_TOP_LOGPROBS, vocab_size))
        before = 0 if self.state is None else self.state.num_tokens
        if not self.ids and not before:
            raise ConfigError(f"{name}: is empty; give at least one token (the end-of-text id begins a text)")
        if not self.ids and self.max_tokens == 0:
            raise ConfigError(f"{name}: is empty, and no tokens are asked for; give tokens to read")
        named = ((name, self.ids), ("continuation", self.scored_ids), ("stop_ids", self.stop_ids))
        for whose, ids in (*named, ("negative_prompt", self.negative_ids)):
            _check_ids(whose, ids, vocab_size)
        check_stop_strings(self.stop)
        self._check_guidance()
        self.sampling.check_ids(vocab_size)
        longest = max(before + len(self.ids) + len(self.scored_ids), len(self.negative_ids)) + self.max_tokens
        if capacity is not None and longest > capacity:
            raise ConfigError(
                f"max_tokens = {self.max_tokens} after {longest - self.max_tokens} tokens: this model's state holds "
                f"{capacity}; ask for less, or build it with a greater model.context_length"
            )

    def _check_guidance(self) -> None:
        scale = self.guidance_scale
        if not is_number(scale) or not abs(scale) <= _MAX_GUIDANCE_SCALE:
            raise ConfigError(
                f"guidance_scale = {shown(scale)}: must be a number of at most {_MAX_GUIDANCE_SCALE:g}; 1 is no "
                "guidance"
            )
        if (scale != 1) != bool(self.negative_ids):
            raise ConfigError(
                f"guidance_scale = {scale} and a negative prompt of {len(self.negative_ids)} tokens: guidance needs "
                "both, a scale other than 1 and a prompt to steer away from"
            )
        if scale != 1 and (self.return_state or self.state is not None):
            raise ConfigError(f"guidance_scale = {scale}: is for single texts; a conversation has one state, not two")


def _check_ids(name: str, ids: Collection[int], vocab_size: int) -> None:
    if not ids:
        return
    if not all(is_whole(token) for token in ids):
        wrong = next(token for token in ids if not is_whole(token))
        raise ConfigError(f"{name}: must be integers, token ids; {shown(wrong)} is {type(wrong).__name__}")
    smallest, largest = int(min(ids)), int(max(ids))
    if smallest < 0 or largest >= vocab_size:
        worst = shown(smallest if smallest < 0 else largest)
        raise ConfigError(f"{name}: token id {worst} must lie from 0 to V - 1 = {vocab_size - 1}")


@dataclasses.dataclass(frozen=True)
class Chunk:
    """One step of a stream: the text and the token that it adds."""

    index: int
    """Which of the prompts it continues."""
    text: str
    """Whole characters; may be empty while a character or possible stop string is incomplete."""
    ids: tuple[int, ...]
    """Its token; empty for a stop id or if nothing was generated."""
    logprobs: tuple[float, ...]
    """Of each of `ids`, by the model alone (after guidance): no temperature, no penalties."""
    top_logprobs: tuple[TopLogprobs, ...] = ()
    """For each of `ids`, the most likely tokens there."""
    finish_reason: FinishReason | None = None
    """Set in the text's last chunk."""
    stop: int | str | None = None
    """The stop id or stop string that ended the text."""


@dataclasses.dataclass(frozen=True)
class Completion:
    """A complete continuation."""

    index: int
    """Which of the prompts it continues."""
    text: str
    """Text without the prompt, stop string and stop id."""
    ids: tuple[int, ...]
    """Generated tokens without a stop id; includes those of a stop string."""
    logprobs: tuple[float, ...]
    """Of each of `ids`, by the model alone (after guidance)."""
    top_logprobs: tuple[TopLogprobs, ...]
    """For each of `ids`, the most likely tokens there."""
    finish_reason: FinishReason
    """Reason of the end."""
    stop: int | str | None
    """The stop id or stop string that ended it."""
    num_prompt_tokens: int
    """Tokens of the prompt."""

    @property
    def mean_logprob(self) -> float:
        """Mean of `logprobs`; 0 for a text without tokens."""
        return sum(self.logprobs) / max(1, len(self.logprobs))

    @property
    def score(self) -> float:
        """What `best_of` maximizes: `mean_logprob`, but -inf for an empty text."""
        return self.mean_logprob if self.text else -math.inf


def join(chunks: Sequence[Chunk], index: int, num_prompt_tokens: int) -> Completion:
    """Joins all chunks of a text, in order, into its completion."""
    last = chunks[-1]
    if last.finish_reason is None:
        raise ValueError("join: the last chunk does not end a text")
    return Completion(
        index=index,
        text="".join(chunk.text for chunk in chunks),
        ids=tuple(token for chunk in chunks for token in chunk.ids),
        logprobs=tuple(value for chunk in chunks for value in chunk.logprobs),
        top_logprobs=tuple(top for chunk in chunks for top in chunk.top_logprobs),
        finish_reason=last.finish_reason,
        stop=last.stop,
        num_prompt_tokens=num_prompt_tokens,
    )
