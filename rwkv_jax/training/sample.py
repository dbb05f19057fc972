"""Samples from a model in training, using its stacked and sharded parameters directly.

The inference engine would need a second, unstacked copy of the weights beside the optimizer's state and half a minute
to compile, too much for an occasional sample. Here one program reads the prompt token by token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Sharding

from rwkv_jax.config import ConfigError, ModelConfig
from rwkv_jax.data.tokenizers import Tokenizer, fits_model
from rwkv_jax.inference.sampling.choose import Settings, bias_array, choose, no_occurrences, stack_settings
from rwkv_jax.inference.sampling.params import SamplingParams
from rwkv_jax.training.run_model import RunModel

TOKENS_PER_CALL = 16
"""Tokens per call of the compiled program."""


class _Cursor(NamedTuple):
    """A text that is being generated."""

    token: Array
    """int32 [1], the last token, not yet an input of the model."""
    state: Any
    """Recurrent state after the tokens before it."""
    key: Array
    """PRNG key of the next draws."""


class Sampler:
    """Generates text with one compiled program for prompts and samples of any length."""

    def __init__(
        self, run_model: RunModel, config: ModelConfig, tokenizer: Tokenizer, *, results_on: Sharding | None = None
    ) -> None:
        """Checks that model and tokenizer match.

        Args:
          results_on: sharding of tokens and state; replicated if parameters are on several hosts.
        """
        vocab_size = config.vocab_size
        if not fits_model(tokenizer, vocab_size):
            raise ConfigError(
                f"tokenizer: it has {tokenizer.vocab_size} tokens where the model has {vocab_size}; use its own"
            )
        self._run_model = run_model
        self._tokenizer = tokenizer
        # Padding rows of the embedding have no token and are untrained.
        self._named = np.array([tokenizer.is_named(token) for token in range(vocab_size)])
        self._room = config.sizes().context_length or None
        self._begin = jax.jit(self._begin_text, out_shardings=results_on)
        self._advance = jax.jit(self._advance_some, donate_argnums=1, out_shardings=results_on)

    def _begin_text(self, params: Any, seed: Array) -> _Cursor:
        """The start of a text."""
        start = jnp.full((1,), self._tokenizer.end_of_text, jnp.int32)
        state = self._run_model.first_state(params, 1)
        if state is None:
            state = self._run_model.model(params).initial_state(1)
        return _Cursor(start, state, jax.random.key(seed))

    def _advance_some(
        self, params: Any, cursor: _Cursor, given: Array, num_given: Array, settings: Settings, bias: Array
    ) -> tuple[_Cursor, Array]:
        """Runs TOKENS_PER_CALL steps; the first `num_given` next tokens are given, the others sampled.

        Args:
          settings: of one row; bias: float32 [1, V], added to logits.
        """
        model = self._run_model.model(params)
        occurrences = jnp.asarray(no_occurrences(len(self._named)))[None]

        def body(cursor: _Cursor, position: Array) -> tuple[_Cursor, Array]:
            logits, state = model(cursor.token[:, None], cursor.state)
            draw, key = jax.random.split(cursor.key)
            logits = logits[:, -1].astype(jnp.float32)
            drawn = choose(logits, occurrences, bias, settings, draw[None])
            token = jnp.where(position < num_given, given[position], drawn)
            return _Cursor(token, state, key), token[0]

        return jax.lax.scan(body, cursor, jnp.arange(TOKENS_PER_CALL))

    def tokens(
        self, params: Any, prompt: str | Sequence[int], num_tokens: int, sampling: SamplingParams, seed: int
    ) -> list[int]:
        """Tokens that continue the prompt, a text or token ids, at most `num_tokens`; ends before an end-of-text token.

        Like training documents, the text starts after an end-of-text token. It ends early if a Transformer's cache is
        full. Penalties are ignored.
        """
        given = np.asarray(self._tokenizer.encode(prompt) if isinstance(prompt, str) else prompt, np.int32)
        if self._room is not None:
            num_tokens = min(num_tokens, self._room - len(given) - 1)
        settings, bias = stack_settings([sampling]), bias_array(sampling, self._named)[None]
        cursor = self._begin(params, np.uint32(seed))
        drawn: list[int] = []
        while len(drawn) < num_tokens:
            piece = np.zeros((TOKENS_PER_CALL,), np.int32)
            num_given = min(len(given), TOKENS_PER_CALL)
            piece[:num_given], given = given[:num_given], given[num_given:]
            cursor, tokens = self._advance(params, cursor, piece, np.int32(num_given), settings, bias)
            for token in np.asarray(tokens)[num_given:]:
                if token == self._tokenizer.end_of_text or len(drawn) == num_tokens:
                    return drawn
                drawn.append(int(token))
        return drawn

    def text(
        self, params: Any, prompt: str | Sequence[int], num_tokens: int, sampling: SamplingParams, seed: int
    ) -> str:
        """The continuation's text, without the prompt."""
        return self._tokenizer.decode(self.tokens(params, prompt, num_tokens, sampling, seed))
