"""Replies that a model in training draws, with its own stacked and sharded parameters and no copy of them.

As `training/sample.py`, this uses the engine's choice of tokens without its slots, which need unstacked weights. All
prompts are read at once; each one's state is then forked, and its G replies begin from the same numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Sharding

from rwkv_jax.config import ModelConfig
from rwkv_jax.data.tokenizers import Tokenizer
from rwkv_jax.inference.sampling.choose import bias_array, choose, no_occurrences, stack_settings
from rwkv_jax.inference.sampling.params import SamplingParams
from rwkv_jax.training.run_model import RunModel


class Drawn(NamedTuple):
    """Replies, G in a row for each prompt."""

    tokens: np.ndarray
    """int32 [P * G, N]; end_of_text from the end of a reply on."""
    lengths: np.ndarray
    """int32 [P * G]: tokens of each reply, with its end if it has one."""
    ended: np.ndarray
    """bool [P * G], whether a reply has ended before N tokens were drawn."""

    def ids(self, row: int) -> list[int]:
        """The tokens of a reply, without its end."""
        return self.tokens[row, : int(self.lengths[row]) - int(self.ended[row])].tolist()


class _Loop(NamedTuple):
    position: Array
    token: Array
    state: Any
    drawn: Array
    alive: Array


@dataclasses.dataclass(eq=False)
class Continuations:
    """Draws replies to a fixed number of prompts with one compiled program."""

    run_model: RunModel
    config: ModelConfig
    tokenizer: Tokenizer
    prompt_length: int
    """Most tokens of a prompt."""
    group_size: int
    """G."""
    max_tokens: int
    """N."""
    results_on: Sharding | None = None
    """Sharding of the results; replicated where parameters are on several devices."""

    def __post_init__(self) -> None:
        is_named = np.array([self.tokenizer.is_named(token) for token in range(self.config.vocab_size)])
        is_named[self.tokenizer.end_of_text] = True
        self._bias = bias_array(SamplingParams(), is_named)
        self._run = jax.jit(self._draw, out_shardings=self.results_on)

    def draw(self, params: Any, prompts: Sequence[np.ndarray], seed: int) -> Drawn:
        """Draws G replies to each prompt from all tokens, at temperature 1.

        Args:
          prompts: int32 [n] each, n from 1 to `prompt_length`.
        """
        tokens = np.zeros((len(prompts), self.prompt_length), np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = prompt
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        return Drawn(*map(np.asarray, self._run(params, tokens, lengths, np.uint32(seed))))

    def _draw(self, params: Any, prompts: Array, lengths: Array, seed: Array) -> tuple[Array, Array, Array]:
        model, end = self.run_model.model(params), self.tokenizer.end_of_text
        first = self.run_model.first_state(params, prompts.shape[0])
        hidden, state = model.hidden(prompts, first, lengths=lengths)
        last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
        logits = model.logits(last)
        # The fork: each prompt's state and logits, G times.
        state = jax.tree.map(lambda x: jnp.repeat(x, self.group_size, axis=1), state)
        rows = prompts.shape[0] * self.group_size
        settings = stack_settings([SamplingParams()] * rows)
        occurrences = jnp.broadcast_to(jnp.asarray(no_occurrences(self.config.vocab_size)), (rows, len(self._bias)))
        bias = jnp.broadcast_to(jnp.asarray(self._bias), occurrences.shape)
        keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.key(seed), row))(jnp.arange(rows))

        def drawn_from(logits: Array, position: Array) -> Array:
            own = jax.vmap(lambda key: jax.random.fold_in(key, position))(keys)
            return choose(logits.astype(jnp.float32), occurrences, bias, settings, own)

        def step(loop: _Loop) -> _Loop:
            drawn = loop.drawn.at[:, loop.position].set(jnp.where(loop.alive, loop.token, end))
            alive = loop.alive & (loop.token != end)
            logits, state = model(loop.token[:, None], loop.state)
            token = drawn_from(logits[:, 0], loop.position + 1)
            return _Loop(loop.position + 1, token, state, drawn, alive)

        start = _Loop(
            jnp.int32(0),
            drawn_from(jnp.repeat(logits, self.group_size, axis=0), jnp.int32(0)),
            state,
            jnp.full((rows, self.max_tokens), end, jnp.int32),
            jnp.ones(rows, bool),
        )
        loop = jax.lax.while_loop(lambda loop: (loop.position < self.max_tokens) & jnp.any(loop.alive), step, start)
        ended = ~loop.alive
        is_end = loop.drawn == end
        lengths = jnp.where(ended, jnp.argmax(is_end, axis=1) + 1, self.max_tokens)
        return loop.drawn, lengths.astype(jnp.int32), ended
