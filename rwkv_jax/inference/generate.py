"""Text from a model, some tokens at a time, with one compiled program and a state that does not grow."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Sharding

from rwkv_jax.config import ConfigError, ModelConfig
from rwkv_jax.data.tokenizers import StreamingDecoder, Tokenizer, fits_model
from rwkv_jax.inference.sampling import (
    Sampling,
    Settings,
    bias_of,
    choose,
    count,
    initial_occurrences,
    occurrence_weights,
    settings_of,
)

TOKENS_PER_CALL = 16
"""Tokens for which the device runs on its own; text appears in pieces of as many."""


class _Cursor(NamedTuple):
    """Where a text stands."""

    token: Array
    """int32 [1], the last token, which the model has not read yet."""
    state: Any
    """What the model carries after the tokens before it."""
    key: Array
    """Key of the draws still to come."""
    occurrences: Array
    """float32 [1, V], of the tokens drawn so far."""


class _Drawing(NamedTuple):
    """How tokens are drawn."""

    settings: Settings
    """Of one row."""
    bias: Any
    """float32 [1, V], to be added to logits."""
    weights: Any
    """float32 [V], what an occurrence of each token weighs."""


class Generator:
    """Continues texts with a model; holds one compiled program for prompts and samples of any length."""

    def __init__(
        self, graphdef: Any, config: ModelConfig, tokenizer: Tokenizer, *, results_on: Sharding | None = None
    ) -> None:
        """Checks that model and tokenizer go together.

        Args:
          results_on: where tokens and state come to lie; with parameters on several hosts, on every device.
        """
        vocab_size = config.vocab_size
        if not fits_model(tokenizer, vocab_size):
            raise ConfigError(
                f"tokenizer: it has {tokenizer.vocab_size} tokens where the model has {vocab_size}; use its own"
            )
        self._graphdef = graphdef
        self._tokenizer = tokenizer
        # Embeddings have rows that no tokenizer names, and that no text has trained.
        self._named = np.array([tokenizer.is_named(token) for token in range(vocab_size)])
        self._weights = occurrence_weights(tokenizer, vocab_size)
        self._begin = jax.jit(self._begin_text, out_shardings=results_on)
        self._advance = jax.jit(self._advance_some, donate_argnums=1, out_shardings=results_on)

    def _begin_text(self, params: Any, seed: Array, occurrences: Array) -> _Cursor:
        """The start of a text."""
        start = jnp.full((1,), self._tokenizer.end_of_text, jnp.int32)
        return _Cursor(start, nnx.merge(self._graphdef, params).initial_state(1), jax.random.key(seed), occurrences)

    def _advance_some(
        self, params: Any, cursor: _Cursor, given: Array, num_given: Array, drawing: _Drawing
    ) -> tuple[_Cursor, Array]:
        """Reads TOKENS_PER_CALL tokens: the first `num_given` successors are given, the others drawn."""
        model = nnx.merge(self._graphdef, params)

        def body(cursor: _Cursor, position: Array) -> tuple[_Cursor, Array]:
            logits, state = model(cursor.token[:, None], cursor.state)
            draw, key = jax.random.split(cursor.key)
            logits = logits[:, -1].astype(jnp.float32)
            drawn = choose(logits, cursor.occurrences, drawing.bias, drawing.settings, draw[None])
            counted = count(cursor.occurrences, drawn, drawing.settings, drawing.weights)
            is_given = position < num_given
            token = jnp.where(is_given, given[position], drawn)
            return _Cursor(token, state, key, jnp.where(is_given, cursor.occurrences, counted)), token[0]

        return jax.lax.scan(body, cursor, jnp.arange(TOKENS_PER_CALL))

    def stream_tokens(self, params: Any, prompt: str, num_tokens: int, sampling: Sampling, seed: int) -> Iterator[int]:
        """Tokens that continue the prompt, at most `num_tokens`; ends before an end-of-text token.

        The text begins as the training documents do, after an end-of-text token.
        """
        given = np.asarray(self._tokenizer.encode(prompt), np.int32)
        drawing = _Drawing(settings_of([sampling]), bias_of(sampling, self._named)[None], self._weights)
        occurrences = initial_occurrences(sampling, given, self._weights)
        cursor = self._begin(params, np.uint32(seed), occurrences[None])
        emitted = 0
        while emitted < num_tokens:
            piece = np.zeros((TOKENS_PER_CALL,), np.int32)
            num_given = min(len(given), TOKENS_PER_CALL)
            piece[:num_given], given = given[:num_given], given[num_given:]
            cursor, tokens = self._advance(params, cursor, piece, np.int32(num_given), drawing)
            for token in np.asarray(tokens)[num_given:]:
                if token == self._tokenizer.end_of_text or emitted == num_tokens:
                    return
                emitted += 1
                yield int(token)

    def stream(self, params: Any, prompt: str, num_tokens: int, sampling: Sampling, seed: int) -> Iterator[str]:
        """The continuation's text in pieces that never end inside a character; the prompt is not repeated."""
        decoder = StreamingDecoder(self._tokenizer)
        for token in self.stream_tokens(params, prompt, num_tokens, sampling, seed):
            if text := decoder.push(token):
                yield text
        if text := decoder.flush():
            yield text

    def generate(self, params: Any, prompt: str, num_tokens: int, sampling: Sampling, seed: int) -> str:
        """The continuation's whole text."""
        return "".join(self.stream(params, prompt, num_tokens, sampling, seed))
