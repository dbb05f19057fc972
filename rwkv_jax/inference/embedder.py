"""Vectors of whole texts from a language model's hidden states."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
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

_MAX_SHORT_CHUNKS = 4
"""Texts of more short chunks than this are read one by one, in long ones."""


class Reading(NamedTuple):
    """What is kept of r texts between two chunks."""

    state: Any
    """The model's state of r rows."""
    total: Array
    """[r, C], sum of the hidden states that count."""
    last: Array
    """[r, C], the hidden state after the last token."""


Run = Callable[[Callable[[], Any]], Any]


def _at_once(work: Callable[[], Any]) -> Any:
    return work()


class Embedder:
    """Embeds texts of any lengths: short ones some at a time, long ones one by one, each in chunks. Thread-safe.

    Memory does not depend on the texts: the state carries what was read. Four programs are compiled, by `warm_up` or on
    first use.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        num_rows: int = 8,
        chunk_length: int = 512,
        short_chunk_length: int = 64,
        initial_state: Any = None,
    ) -> None:
        """Compiles nothing yet.

        Args:
          num_rows: short texts read at once.
          chunk_length: tokens of a long text per call.
          short_chunk_length: tokens of each short text per call.
          initial_state: the model's state of one text, without an axis of rows, in which texts begin; None is empty.
        """
        require_whole("num_rows", num_rows, 1)
        require_whole("short_chunk_length", short_chunk_length, 1)
        require_whole("chunk_length", chunk_length, short_chunk_length)
        self.config = model.config
        self._num_rows, self._short, self._long = num_rows, short_chunk_length, chunk_length
        self._graphdef, self._params = nnx.split(model, nnx.Param)
        self._initial_state = initial_state
        self._begin = jax.jit(self._begin_texts, static_argnums=2)
        self._read = jax.jit(self._read_chunk, donate_argnums=1)
        self._lock = Lock()  # one batch at a time: a second one would only need memory

    def embed(
        self, texts: Sequence[Sequence[int]], pooling: Pooling = "mean", *, skip: int = 0, run: Run = _at_once
    ) -> NDArray[Any]:
        """One vector of length 1 a text, [n, C] in float32, or float64 for a float64 model.

        Args:
          texts: token ids, at least one a text.
          pooling: `mean` of the hidden states after each token, or the `last` one.
          skip: first tokens of each text that are read and do not count in the mean, such as what begins every text.
          run: does a piece of work, one chunk, where the device is used, and returns its result.

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
        short = [index for index in order if len(texts[index]) <= _MAX_SHORT_CHUNKS * self._short]
        count = self._num_rows
        groups = [(short[i : i + count], count, self._short) for i in range(0, len(short), count)]
        groups += [([index], 1, self._long) for index in order[len(short) :]]
        with self._lock:
            for own, num_rows, length in groups:
                total, last = self._read_texts([texts[index] for index in own], num_rows, length, skip, run)
                counts = np.array([len(texts[index]) - skip for index in own])[:, None]
                vectors[own] = total / counts if pooling == "mean" else last
        return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), _MIN_NORM)

    def _check(self, name: str, ids: Sequence[int], skip: int) -> None:
        if len(ids) <= skip:
            raise ConfigError(f"{name}: has no tokens to embed; give it at least one")
        if not 0 <= min(ids) <= max(ids) < self.config.vocab_size:
            raise ConfigError(f"{name}: token ids must lie from 0 to V - 1 = {self.config.vocab_size - 1}")
        capacity = self.config.sizes().context_length
        if capacity and len(ids) > capacity:
            raise ConfigError(f"{name}: has {len(ids)} tokens, this model's state holds {capacity}; shorten it")

    def warm_up(self, run: Run = _at_once) -> None:
        """Compiles all programs, where `run` does it."""
        for shape in ((self._num_rows, self._short), (1, self._long)):
            self._read_texts([[0]], *shape, 0, run)

    def _read_texts(
        self, texts: Sequence[Sequence[int]], num_rows: int, length: int, skip: int, run: Run
    ) -> list[NDArray[Any]]:
        """Sums of the hidden states that count, and last ones, [n, C] each; texts are read in calls of one shape."""
        reading = run(lambda: self._begin(self._params, self._initial_state, num_rows))
        for position in range(0, max(map(len, texts)), length):
            tokens, lengths = np.zeros((num_rows, length), np.int32), np.zeros(num_rows, np.int32)
            for row, ids in enumerate(texts):
                part = ids[position : position + length]
                tokens[row, : len(part)], lengths[row] = part, len(part)
            chunk = functools.partial(self._read, self._params, reading, tokens, lengths, max(0, skip - position))
            # Waited for there: calls that run ahead of the device would keep it from others' work.
            reading = run(lambda chunk=chunk: jax.block_until_ready(chunk()))
        return [x[: len(texts)] for x in run(lambda: jax.device_get((reading.total, reading.last)))]

    def _begin_texts(self, params: Any, initial_state: Any, num_rows: int) -> Reading:
        zeros = jnp.zeros((num_rows, self.config.width), self.config.parameter_dtype)
        if initial_state is None:
            return Reading(nnx.merge(self._graphdef, params).initial_state(num_rows), zeros, zeros)
        rows = jax.tree.map(lambda x: jnp.broadcast_to(x, (num_rows, *x.shape)), initial_state)
        return Reading(rows, zeros, zeros)

    def _read_chunk(self, params: Any, reading: Reading, tokens: Array, lengths: Array, skip: Array) -> Reading:
        """Reads tokens [r, T], of which each row's first `lengths` [r] are valid; the first `skip` do not count."""
        hidden, state = nnx.merge(self._graphdef, params).hidden(tokens, reading.state, lengths=lengths)
        hidden = hidden.astype(reading.total.dtype)
        position = jnp.arange(tokens.shape[1])
        counts = (position >= skip) & (position < lengths[:, None])
        total = reading.total + jnp.sum(jnp.where(counts[..., None], hidden, 0), axis=1)
        last = jnp.take_along_axis(hidden, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
        return Reading(state, total, jnp.where((lengths > 0)[:, None], last, reading.last))
