"""`SamplingParams`: how the tokens of one text are sampled, and the orders in which its settings apply.

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
from typing import Any, Literal, Self

import jax
import numpy as np

from rwkv_jax.checks import ConfigError, is_number, is_whole, shown

Order = Literal["openai", "rwkv"]
"""The order in which settings apply; see the module's docstring."""

Preset = Literal["greedy", "openai", "rwkv"]
"""Names of presets, accepted in place of a `SamplingParams`."""

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
