"""Where a fact passes: causal tracing (Meng et al., arXiv 2202.05262; for RWKV, arXiv 2305.13048, section 7).

A prompt's subject is corrupted by noise on its token vectors, which spoils the answer. Then the clean output of one
block at one token is put back: where the answer's probability recovers, the fact passes. What is put back reaches later
tokens through the states of the layers above. (RWKV-7's layers also read the values of layer 0 directly, which stay
corrupted; so even all tokens of one lower block need not restore everything. Those of the last block do.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from numpy.typing import ArrayLike, NDArray

from rwkv_jax.checks import ConfigError, require
from rwkv_jax.evaluation.inspect.layers import as_tokens, run_block
from rwkv_jax.models import LanguageModel
from rwkv_jax.models.layers import linear, wide_dtype


class CausalTrace(NamedTuple):
    """Probabilities of an answer after a prompt, whose subject is corrupted."""

    answer: int
    """Token id."""
    clean: float
    """With nothing corrupted."""
    corrupted: float
    """With the subject corrupted; mean over the samples of noise."""
    restored: NDArray
    """[L, T]: with the output of one block at one token put back; mean over the same samples."""


class Run(NamedTuple):
    """One way through the layers."""

    streams: tuple[Array, ...]
    """The output of each block, [1, T, C] each."""
    v_first: Array | None
    """Layer 0's values."""


class CorruptedPrompt(NamedTuple):
    """A prompt as it is, and with noise on its subject."""

    clean: Run
    corrupted: tuple[Run, ...]
    """One for each sample of noise."""


def _run(model: LanguageModel, x: Array) -> Run:
    streams, v_first = [], None
    for layer in range(model.config.num_layers):
        result = run_block(model, layer, x, v_first)
        x, v_first = result.x, result.v_first
        streams.append(x)
    return Run(tuple(streams), v_first)


def _probabilities(model: LanguageModel, x: Array) -> NDArray:
    """Of the token after streams [R, T, C], [R, V]."""
    norm, norm_params = nnx.split(model.ln_out, nnx.Param)
    return np.asarray(_reader(norm)(norm_params, model.head_weight, x[:, -1]), np.float64)


@functools.cache
def _reader(norm: Any) -> Callable[..., Array]:
    """(params of the last norm, the head's matrix [V, C], [R, C]) -> probabilities [R, V]."""

    def read(norm_params: Any, weight: Any, x: Array) -> Array:
        hidden = nnx.merge(norm, norm_params)(x)
        return jax.nn.softmax(linear(hidden, weight, out_dtype=wide_dtype(hidden.dtype)))

    return jax.jit(read)


def corrupt(
    model: LanguageModel,
    tokens: ArrayLike,
    subject: tuple[int, int],
    *,
    noise: float = 3.0,
    samples: int = 4,
    seed: int = 0,
) -> CorruptedPrompt:
    """Runs a prompt, clean and with normal noise on the vectors of its subject's tokens.

    Args:
      tokens: [T], the prompt.
      subject: its first token and the one after its last.
      noise: its standard deviation, in units of that of all numbers in the prompt's token vectors.
      samples: draws of the noise.
      seed: of the draws.

    Raises:
      ConfigError: as `as_tokens`; a subject that is not within the prompt, noise below 0, or no samples.
    """
    ids = as_tokens(model, tokens)
    begin, end = subject
    if len(ids) != 1 or not 0 <= begin < end <= ids.shape[1]:
        raise ConfigError(f"subject = {subject}: must lie within the one prompt of {ids.shape[1]} tokens")
    require(noise >= 0, "noise", noise, "must not be negative")
    require(samples >= 1, "samples", samples, "must be at least 1")
    x = model.emb(jnp.asarray(ids), model.config.dtype)
    scale = noise * float(np.std(np.asarray(x, np.float64)))
    drawn = scale * np.random.default_rng(seed).standard_normal((samples, end - begin, x.shape[-1]))
    added = np.zeros((samples, *x.shape), drawn.dtype)
    added[:, 0, begin:end] = drawn
    return CorruptedPrompt(_run(model, x), tuple(_run(model, x + jnp.asarray(each, x.dtype)) for each in added))


def restored_probability(model: LanguageModel, prompt: CorruptedPrompt, answer: int, restore: NDArray) -> NDArray:
    """The answer's probability with some outputs of blocks put back, [R]; mean over the samples.

    Args:
      restore: bool [R, L, T]: of each of R runs, which.
    """
    layers, time = model.config.num_layers, prompt.clean.streams[0].shape[1]
    restore = np.asarray(restore)
    if restore.dtype != bool or restore.shape[1:] != (layers, time):
        raise ConfigError(f"restore: {restore.dtype} of shape {restore.shape} must be bool [R, {layers}, {time}]")
    touched = np.flatnonzero(restore.any(axis=(0, 2)))
    first = int(touched[0]) if len(touched) else layers - 1
    total = np.zeros(len(restore))
    for run in prompt.corrupted:
        # Below the first restored block, and in it, nothing differs from the corrupted run.
        x = jnp.broadcast_to(run.streams[first], (len(restore), *run.streams[first].shape[1:]))
        v_first = None if run.v_first is None else jnp.broadcast_to(run.v_first, x.shape)
        for layer in range(first, layers):
            if layer > first:
                x = run_block(model, layer, x, v_first).x
            x = jnp.where(restore[:, layer, :, None], prompt.clean.streams[layer], x)
        total += _probabilities(model, x)[:, answer]
    return total / len(prompt.corrupted)


def causal_trace(
    model: LanguageModel,
    tokens: ArrayLike,
    subject: tuple[int, int],
    answer: int | None = None,
    *,
    noise: float = 3.0,
    samples: int = 4,
    seed: int = 0,
) -> CausalTrace:
    """The answer's probability with each block's output at each token put back, one at a time.

    Args:
      answer: token id; None is the most likely one after the clean prompt.
      tokens, subject, noise, samples, seed: as in `corrupt`.

    Raises:
      ConfigError: as `corrupt`; an answer that is no token.
    """
    prompt = corrupt(model, tokens, subject, noise=noise, samples=samples, seed=seed)
    layers, time = model.config.num_layers, prompt.clean.streams[0].shape[1]
    clean = _probabilities(model, prompt.clean.streams[-1])[0]
    answer = int(clean.argmax()) if answer is None else answer
    require(0 <= answer < model.config.vocab_size, "answer", answer, f"ids lie below V = {model.config.vocab_size}")
    restored = []
    for layer in range(layers):
        one_each = np.zeros((time, layers, time), bool)
        one_each[np.arange(time), layer, np.arange(time)] = True
        restored.append(restored_probability(model, prompt, answer, one_each))
    nothing = np.zeros((1, layers, time), bool)
    return CausalTrace(
        answer,
        float(clean[answer]),
        float(restored_probability(model, prompt, answer, nothing)[0]),
        np.stack(restored),
    )
