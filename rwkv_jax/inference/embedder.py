"""Vectors of whole texts from a language model's hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from numpy.typing import NDArray

from rwkv_jax.checks import ConfigError, require_whole
from rwkv_jax.models import LanguageModel

Pooling = Literal["mean", "last"]
"""How a text's hidden states, the head's inputs, become one vector: their mean, or the one after the last token."""

_MIN_NORM = 1e-12  # of a vector that is not all zeros


class Reading(NamedTuple):
    """What is kept of r texts between two chunks."""

    state: Any
    """The model's state of r rows."""
    total: Array
    """[r, C], sum of the hidden states that count."""
    last: Array
    """[r, C], the hidden state after the last token."""


class Embedder:
    """Embeds texts of any lengths, some at a time, each in chunks. Thread-safe.

    Memory does not depend on the texts: the state carries what was read. Two programs are compiled, on first use.
    """

    def __init__(
        self, model: LanguageModel, *, num_rows: int = 8, chunk_length: int = 512, short_chunk_length: int = 64
    ) -> None:
        """Compiles nothing yet.

        Args:
          num_rows: texts read at once.
          chunk_length: tokens of each text per call.
          short_chunk_length: the same while no text has more left.
        """
        require_whole("num_rows", num_rows, 1)
        require_whole("short_chunk_length", short_chunk_length, 1)
        require_whole("chunk_length", chunk_length, short_chunk_length)
        self.config = model.config
        self._num_rows, self._lengths = num_rows, (short_chunk_length, chunk_length)
        self._graphdef, self._params = nnx.split(model, nnx.Param)
        self._begin = jax.jit(self._begin_texts)
        self._read = jax.jit(self._read_chunk, donate_argnums=1)
        self._lock = Lock()  # one batch at a time: a second one would only need memory

    def embed(self, texts: Sequence[Sequence[int]], pooling: Pooling = "mean", *, skip: int = 0) -> NDArray[Any]:
        """One vector of length 1 a text, [n, C] in float32, or float64 for a float64 model.

        Args:
          texts: token ids, at least one a text.
          pooling: `mean` of the hidden states after each token, or the `last` one.
          skip: first tokens of each text that are read and do not count in the mean, such as what begins every text.

        Raises:
          ConfigError: a text without tokens that count, an id out of range, or a text too long for a Transformer.
        """
        if pooling not in ("mean", "last"):
            raise ConfigError(f"pooling = {pooling!r}: must be mean or last")
        for index, ids in enumerate(texts):
            self._check(f"text {index}", ids, skip if pooling == "mean" else 0)
        vectors = np.zeros((len(texts), self.config.width), self.config.parameter_dtype)
        # Texts of like lengths together, so that few rows wait for the longest.
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        with self._lock:
            for start in range(0, len(order), self._num_rows):
                own = order[start : start + self._num_rows]
                vectors[own] = self._embed([texts[index] for index in own], pooling, skip)
        return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), _MIN_NORM)

    def _check(self, name: str, ids: Sequence[int], skip: int) -> None:
        if len(ids) <= skip:
            raise ConfigError(f"{name}: has no tokens to embed; give it at least one")
        if not 0 <= min(ids) <= max(ids) < self.config.vocab_size:
            raise ConfigError(f"{name}: token ids must lie from 0 to V - 1 = {self.config.vocab_size - 1}")
        capacity = self.config.sizes().context_length
        if capacity and len(ids) > capacity:
            raise ConfigError(f"{name}: has {len(ids)} tokens, this model's state holds {capacity}; shorten it")

    def _embed(self, texts: Sequence[Sequence[int]], pooling: Pooling, skip: int) -> NDArray[Any]:
        reading = self._begin(self._params)
        short, long = self._lengths
        longest, position = max(map(len, texts)), 0
        while position < longest:
            length = short if longest - position <= short else long
            tokens = np.zeros((self._num_rows, length), np.int32)
            lengths = np.zeros(self._num_rows, np.int32)
            for row, ids in enumerate(texts):
                part = ids[position : position + length]
                tokens[row, : len(part)], lengths[row] = part, len(part)
            reading = self._read(self._params, reading, tokens, lengths, max(0, skip - position))
            position += length
        counts = np.array([max(1, len(ids) - skip) for ids in texts])[:, None]
        total, last = (np.asarray(x)[: len(texts)] for x in (reading.total, reading.last))
        return total / counts if pooling == "mean" else last

    def _begin_texts(self, params: Any) -> Reading:
        zeros = jnp.zeros((self._num_rows, self.config.width), self.config.parameter_dtype)
        return Reading(nnx.merge(self._graphdef, params).initial_state(self._num_rows), zeros, zeros)

    def _read_chunk(self, params: Any, reading: Reading, tokens: Array, lengths: Array, skip: Array) -> Reading:
        """Reads tokens [r, T], of which each row's first `lengths` [r] are valid; the first `skip` do not count."""
        hidden, state = nnx.merge(self._graphdef, params).hidden(tokens, reading.state, lengths=lengths)
        hidden = hidden.astype(reading.total.dtype)
        position = jnp.arange(tokens.shape[1])
        counts = (position >= skip) & (position < lengths[:, None])
        total = reading.total + jnp.sum(jnp.where(counts[..., None], hidden, 0), axis=1)
        last = jnp.take_along_axis(hidden, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
        return Reading(state, total, jnp.where((lengths > 0)[:, None], last, reading.last))
