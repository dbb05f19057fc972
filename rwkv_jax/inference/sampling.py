"""Sampling of the next token from logits: `SamplingParams`, and functions that apply per-row parameters inside jit.

`SamplingParams.order` selects one of two orders. Both start with:

    1. repetition penalty: the logit of a token that has occurred is divided by it if positive, else multiplied;
    2. presence and frequency penalty: it is reduced by presence + occurrences * frequency;
    3. logit bias is added, and banned tokens are excluded.

With temperature 0, or top_p 0 as in the `rwkv` package, the most likely token is now taken. Otherwise "openai", the
order of transformers and vLLM, continues with

    4. temperature divides the logits;
    5. top-k keeps the k most likely tokens;
    6. top-p keeps the most likely tokens whose probabilities, renormalized after step 5, add up to p;
    7. min-p keeps tokens at least min_p times as likely as the most likely one;
    8. typical keeps, of the remaining tokens, renormalized, those whose surprise is nearest to its mean, until they add
       up to typical_p (Meister et al. 2023, https://arxiv.org/abs/2202.00666);

and "rwkv", the order of the official `rwkv` package, with

    4. top-p, by the probabilities of all tokens at temperature 1;
    5. top-k, of all tokens, so that the stricter of the two applies;
    6. min-p and typical, which the package does not have, as in steps 7 and 8 above, at temperature 1;
    7. probabilities to the power of 1 / temperature.

In both, ties with the last token kept are kept too, and top-k, top-p and min-p always keep the most likely token.
Typical may drop it, but keeps at least one token.

The orders also differ in what counts as an occurrence. In "rwkv" space, tab, single digits and ascending runs of them,
such as 12, weigh 0: only the presence penalty applies to them, as in the package. In "openai" each weighs 1. In both, a
token's occurrences are multiplied by `penalty_decay` at each token, and it keeps the presence penalty.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rwkv_jax.checks import ConfigError, is_number, is_whole, shown
from rwkv_jax.data.tokenizers import Tokenizer
from rwkv_jax.inference.selection import draw, first_largest, largest_floor

Order = Literal["openai", "rwkv"]
"""The order in which settings apply; see the module's docstring."""

Preset = Literal["greedy", "openai", "rwkv"]
"""Names of presets, accepted in place of a `SamplingParams`."""

_WEIGHTLESS = " \t0123456789"
"""Tokens whose text is a substring of this weigh 0 in the order "rwkv", as in the official package."""

_NEVER = -1.0
"""Marks a token that has not occurred; weightless ones that have occurred have 0."""

_MAX_SETTING = 1e9
"""Maximum of settings (and its reciprocal the minimum of divisors), so that results stay within float32."""


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters of a text. Hashable.

    Raises:
      ConfigError: an invalid value; the message has its name.
    """

    temperature: float = 1.0
    """Above 1 flattens the distribution, below 1 sharpens it; 0 always takes the most likely token."""
    top_p: float = 1.0
    """Keep the most likely tokens whose probabilities add up to this; 1 keeps all, 0 is greedy as temperature 0 is."""
    top_k: int = 0
    """Keep this many of the most likely tokens; 0 keeps all."""
    min_p: float = 0.0
    """Keep tokens at least this many times as likely as the most likely one; 0 keeps all."""
    typical_p: float = 1.0
    """Keep the most typical tokens whose probabilities add up to this; 1 keeps all."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens that have occurred, multiplies negative ones (Keskar et al. 2019,
    https://arxiv.org/abs/1909.05858); 1 is none."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens that have occurred."""
    frequency_penalty: float = 0.0
    """Subtracted from the logit of a token for each of its occurrences."""
    penalty_decay: float = 1.0
    """Factor on the weight of earlier occurrences at each token; 1 is no decay."""
    penalize_prompt: bool = False
    """Whether tokens of the prompt count as occurrences, like generated ones."""
    order: Order = "openai"
    """Whether temperature applies before the other settings or after them; see the module's docstring."""
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    """Added to the logits of these ids. Stored as pairs sorted by id."""
    banned: Sequence[int] = ()
    """Ids never to be chosen. Stored as a sorted tuple."""

    def __post_init__(self) -> None:
        self._require_between("temperature", 0, _MAX_SETTING)
        self._require_between("top_p", 0, 1)
        self._require_between("min_p", 0, 1)
        if not (is_number(self.typical_p) and 0 < self.typical_p <= 1):
            raise ConfigError(f"typical_p = {shown(self.typical_p)}: must lie in (0, 1]")
        self._require_between("repetition_penalty", 1 / _MAX_SETTING, _MAX_SETTING)
        self._require_between("presence_penalty", -_MAX_SETTING, _MAX_SETTING)
        self._require_between("frequency_penalty", -_MAX_SETTING, _MAX_SETTING)
        self._require_between("penalty_decay", 0, 1)
        if not is_whole(self.top_k) or not 0 <= self.top_k < 2**31:
            raise ConfigError(f"top_k = {shown(self.top_k)}: must be a whole number from 0 (all tokens) to {2**31 - 1}")
        if type(self.penalize_prompt) is not bool:
            raise ConfigError(f"penalize_prompt = {shown(self.penalize_prompt)}: must be True or False")
        if not (isinstance(self.order, str) and self.order in typing.get_args(Order)):
            raise ConfigError(f"order = {shown(self.order)}: must be one of {', '.join(typing.get_args(Order))}")
        object.__setattr__(self, "logit_bias", _pairs(self.logit_bias))
        object.__setattr__(self, "banned", _ids("banned", self.banned))
        if both := sorted(set(self.banned) & dict(self.logit_bias).keys()):
            raise ConfigError(f"banned and logit_bias both name id {both[0]}: leave it out of one of them")

    def _require_between(self, name: str, minimum: float, maximum: float) -> None:
        value = getattr(self, name)
        # NaN fails every comparison.
        if not (is_number(value) and minimum <= value <= maximum):
            raise ConfigError(f"{name} = {shown(value)}: must be a number from {minimum:g} to {maximum:g}")

    @classmethod
    def openai(cls, **changes: Any) -> Self:
        """The defaults of OpenAI's API: temperature 1 and all else off; `changes` are fields."""
        return cls(**changes)

    @classmethod
    def rwkv(cls, **changes: Any) -> Self:
        """The defaults of the official `rwkv` package, in its order; `changes` are fields."""
        defaults: dict[str, Any] = {
            "order": "rwkv",
            "top_p": 0.85,
            "presence_penalty": 0.2,
            "frequency_penalty": 0.2,
            "penalty_decay": 0.996,
        }
        return cls(**(defaults | changes))

    @classmethod
    def greedy(cls, **changes: Any) -> Self:
        """Always the most likely token; `changes` are fields."""
        defaults: dict[str, Any] = {"temperature": 0.0}
        return cls(**(defaults | changes))

    @classmethod
    def preset(cls, name: str) -> Self:
        """The preset of this name: "greedy", "openai" or "rwkv"."""
        if not (isinstance(name, str) and name in typing.get_args(Preset)):
            raise ConfigError(
                f"sampling = {shown(name)}: must be a SamplingParams, or one of {', '.join(typing.get_args(Preset))}"
            )
        return getattr(cls, name)()

    @property
    def penalizes(self) -> bool:
        """Whether it matters which tokens have occurred."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)

    def check_ids(self, vocab_size: int) -> None:
        """Raises ConfigError for ids outside the vocabulary."""
        for name, ids in (("logit_bias", tuple(dict(self.logit_bias))), ("banned", self.banned)):
            if ids and max(ids) >= vocab_size:
                raise ConfigError(f"{name} names id {shown(max(ids))}: the model's ids are 0 to {vocab_size - 1}")


Sampling = SamplingParams | Preset
"""Settings, or the name of a preset."""


def _ids(name: str, ids: Any) -> tuple[int, ...]:
    ids = ids.tolist() if isinstance(ids, np.ndarray | jax.Array) else ids
    if not isinstance(ids, Sequence | set | frozenset) or isinstance(ids, str | bytes):
        raise ConfigError(f"{name} = {shown(ids)}: must be a sequence of token ids")
    for token in ids:
        if not is_whole(token) or token < 0:
            raise ConfigError(f"{name} names id {shown(token)}: ids are whole numbers from 0")
    return tuple(sorted({int(token) for token in ids}))


def _pairs(biases: Any) -> tuple[tuple[int, float], ...]:
    try:
        of = dict(biases)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"logit_bias = {shown(biases)}: must be a mapping from token ids to numbers") from error
    for token, bias in of.items():
        if not is_number(bias) or not abs(bias) <= _MAX_SETTING:
            raise ConfigError(
                f"logit_bias of id {shown(token)} is {shown(bias)}: must be a number from {-_MAX_SETTING:g} to "
                f"{_MAX_SETTING:g}; `banned` rules a token out"
            )
    return tuple((token, float(of[token])) for token in _ids("logit_bias", tuple(of)))


class Settings(NamedTuple):
    """Settings of rows, each [B], as array arguments of a program. Fields as in `SamplingParams`."""

    temperature: Any
    top_p: Any
    top_k: Any
    min_p: Any
    typical_p: Any
    repetition_penalty: Any
    presence_penalty: Any
    frequency_penalty: Any
    penalty_decay: Any
    rwkv_order: Any


def stack_settings(rows: Sequence[SamplingParams]) -> Settings:
    """NumPy arrays [B]: float32, but int32 for top_k and bool for rwkv_order."""
    rows = [dataclasses.replace(row, temperature=0.0, top_p=1.0) if row.top_p == 0 else row for row in rows]

    def column(name: str) -> np.ndarray:
        if name == "rwkv_order":
            return np.array([row.order == "rwkv" for row in rows], np.bool_)
        return np.array([getattr(row, name) for row in rows], np.int32 if name == "top_k" else np.float32)

    return Settings(*map(column, Settings._fields))


def bias_array(sampling: SamplingParams, is_named: np.ndarray) -> np.ndarray:
    """float32 [V] to add to logits: the bias, and -inf for banned tokens.

    Args:
      is_named: bool [V], whether the tokenizer has a text for an id; others are banned too, since they are untrained.

    Raises:
      ConfigError: an id beyond V, or no token is left.
    """
    sampling.check_ids(len(is_named))
    bias = np.where(is_named, np.float32(0), np.float32(-np.inf))
    for token, value in dict(sampling.logit_bias).items():
        bias[token] += value
    bias[list(sampling.banned)] = -np.inf
    if np.all(np.isneginf(bias)):
        raise ConfigError(f"banned names {len(sampling.banned)} ids, and leaves no token to choose; ban fewer")
    return bias


def occurrence_weights(tokenizer: Tokenizer, vocab_size: int) -> np.ndarray:
    """float32 [V], weight of an occurrence of each token in the order "rwkv": 0 for parts of `_WEIGHTLESS`, else 1."""

    def weight(token: int) -> float:
        text = tokenizer.token_bytes(token).decode(errors="replace") if tokenizer.is_named(token) else ""
        # In the package end_of_text has a text, so that it counts; here it has none.
        return 0.0 if text and text in _WEIGHTLESS else 1.0

    return np.array([weight(token) for token in range(vocab_size)], np.float32)


def no_occurrences(vocab_size: int) -> np.ndarray:
    """Occurrences, float32 [V], of an empty text."""
    return np.full(vocab_size, _NEVER, np.float32)


def initial_occurrences(
    sampling: SamplingParams, prompt_ids: Sequence[int] | np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """Occurrences, float32 [V], after a prompt: none unless the settings penalize its tokens, else as by `count`.

    Args:
      weights: float32 [V], of `occurrence_weights`.
    """
    occurrences = no_occurrences(len(weights))
    if not (sampling.penalize_prompt and sampling.penalizes):
        return occurrences
    ids = np.asarray(prompt_ids, np.int64)
    age = np.arange(len(ids))[::-1]
    sums = np.zeros(len(weights))
    np.add.at(sums, ids, (weights[ids] if sampling.order == "rwkv" else 1.0) * np.power(sampling.penalty_decay, age))
    occurrences[ids] = sums[ids]
    return occurrences


def count(occurrences: Array, tokens: Array, settings: Settings, weights: Array) -> Array:
    """Updates occurrences [B, V] with chosen tokens [B]; rows without penalties are unchanged.

    Args:
      weights: float32 [V], of `occurrence_weights`.
    """

    def counted() -> Array:
        weight = jnp.where(settings.rwkv_order, jnp.asarray(weights)[tokens], 1)[:, None]
        decayed = jnp.where(occurrences >= 0, occurrences * settings.penalty_decay[:, None], occurrences)
        is_chosen = jnp.arange(occurrences.shape[-1], dtype=jnp.int32)[None] == tokens[:, None]
        one_more = jnp.where(is_chosen, jnp.maximum(decayed, 0) + weight, decayed)
        return jnp.where(_penalizes(settings)[:, None], one_more, occurrences)

    return jax.lax.cond(jnp.any(_penalizes(settings)), counted, lambda: occurrences)


def choose(logits: Array, occurrences: Array, bias: Array, settings: Settings, keys: Array) -> Array:
    """Chooses the next token of each row, independently of other rows.

    Args:
      logits: float32 [B, V].
      occurrences: float32 [B, V], of `initial_occurrences` and `count`.
      bias: float32 [B, V], of `bias_array`.
      settings: arrays [B].
      keys: random keys [B]; unused in rows of temperature 0.

    Returns:
      int32 [B].
    """
    arguments = (logits, occurrences, bias, settings, keys)
    # On a CPU one row at a time stays in the cache for all passes; elsewhere all rows are processed together.
    return jax.lax.platform_dependent(*arguments, cpu=choose_one_by_one, default=choose_together)


def choose_one_by_one(*arguments: Any) -> Array:
    """`choose`, row by row."""

    def one(row: Any) -> Array:
        return choose_together(*jax.tree.map(lambda x: x[None], row))[0]

    return jax.lax.map(one, arguments)


def choose_together(logits: Array, occurrences: Array, bias: Array, settings: Settings, keys: Array) -> Array:
    """`choose`, for all rows at once; passes that no row needs are skipped."""
    adjusted = _penalized(logits, occurrences, settings) + bias
    most_likely = first_largest(adjusted)
    is_greedy = settings.temperature <= 0
    drawn = jax.lax.cond(jnp.all(is_greedy), lambda: most_likely, lambda: draw(_kept(adjusted, settings), keys))
    return jnp.where(is_greedy, most_likely, drawn)


def _penalizes(settings: Settings) -> Array:
    return (
        (settings.repetition_penalty != 1) | (settings.presence_penalty != 0) | (settings.frequency_penalty != 0)
    )  # fmt: skip


def _penalized(logits: Array, occurrences: Array, settings: Settings) -> Array:
    """Logits after the penalties."""
    repetition = settings.repetition_penalty[:, None]
    repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
    fall = settings.presence_penalty[:, None] + occurrences * settings.frequency_penalty[:, None]
    return jnp.where(occurrences >= 0, repeated - fall, logits)


def _kept(logits: Array, settings: Settings) -> Array:
    """Unnormalized probabilities after temperature, top-k, top-p, min-p and typical; float32 [B, V].

    A row with a finite logit keeps at least one token, and the most likely one has the weight 1.
    """
    top_k, top_p, typical_p = settings.top_k, settings.top_p, settings.typical_p
    temperature = jnp.where(settings.temperature > 0, settings.temperature, 1)[:, None]
    is_rwkv = settings.rwkv_order[:, None]
    largest = jnp.max(logits, axis=-1, keepdims=True)

    # The largest becomes 0, so that dividing by temperature cannot overflow.
    relative = logits - largest
    scaled = jnp.where(is_rwkv, relative, relative / temperature)
    weights = jnp.exp(scaled)
    everything = jnp.full(top_k.shape, -jnp.inf, logits.dtype)

    def top_k_floor() -> Array:
        k = top_k.astype(jnp.float32)
        floor = largest_floor(lambda floor: _count(logits >= floor), k, -jnp.inf, largest[:, 0], lambda floor: 1.0)
        return jnp.where(top_k > 0, floor, everything)

    in_top_k = logits >= jax.lax.cond(jnp.any(top_k > 0), top_k_floor, lambda: everything)[:, None]

    def top_p_floor() -> Array:
        summed = jnp.where(is_rwkv | in_top_k, weights, 0)
        target = jnp.where(top_p < 1, top_p * jnp.sum(summed, axis=-1), 0)
        # A token between two floors weighs at least as much as the lower one.
        floor = largest_floor(lambda floor: _mass(summed, summed >= floor), target, 0.0, 1.0, lambda floor: floor)
        return jnp.where(top_p < 1, floor, everything)

    in_top_p = weights >= jax.lax.cond(jnp.any(top_p < 1), top_p_floor, lambda: everything)[:, None]
    kept = jnp.where(in_top_k & in_top_p & (weights >= settings.min_p[:, None]), weights, 0)

    def only_typical() -> Array:
        total = jnp.sum(kept, axis=-1, keepdims=True)
        # The surprise without log(total), which cancels in the difference to its mean. -inf * 0 is nan.
        surprise = jnp.where(kept > 0, -scaled, 0)
        mean = jnp.sum(kept * surprise, axis=-1, keepdims=True) / total
        typicality = jnp.where(kept > 0, -jnp.abs(surprise - mean), -jnp.inf)
        # An underflowing target would be reached without any token.
        target = jnp.maximum(jnp.where(typical_p < 1, typical_p * total[:, 0], 0), jnp.finfo(kept.dtype).tiny)
        floor = largest_floor(lambda floor: _mass(kept, typicality >= floor), target, -jnp.inf, 0.0, lambda floor: 0.0)
        left = jnp.where((typicality >= floor[:, None]) | (typical_p >= 1)[:, None], kept, 0)
        # The most likely token may have been dropped: rescale so that the largest remaining weight is 1.
        largest = jnp.max(jnp.where(left > 0, relative, -jnp.inf), axis=-1, keepdims=True)
        return jnp.where(left > 0, jnp.exp((relative - largest) / temperature), 0)

    def all_of_them() -> Array:
        return jnp.where(is_rwkv & (kept > 0), jnp.exp(relative / temperature), kept)

    return jax.lax.cond(jnp.any(typical_p < 1), only_typical, all_of_them)


def _mass(weights: Array, where: Array) -> Array:
    return jnp.sum(jnp.where(where, weights, 0), axis=-1)


def _count(where: Array) -> Array:
    return jnp.sum(where, axis=-1, dtype=jnp.float32)


def logprobs(logits: Array, tokens: Array) -> Array:
    """Logprobs, float32 [B], of tokens [B] under the unmodified distribution of logits [B, V]."""
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def top_logprobs(logits: Array, n: int) -> tuple[Array, Array]:
    """The n most likely tokens under the unmodified distribution: logprobs, float32 [B, n], and ids, int32 [B, n]."""
    values, tokens = jax.lax.top_k(logits, n)
    return values - jax.nn.logsumexp(logits, axis=-1, keepdims=True), tokens
