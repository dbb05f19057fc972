"""Measures the speed of an engine, and the memory of a model and its states.

Timing starts after a burst, when all programs are compiled and all prompts prefilled, and ends when the tokens are on
the host. Variants are interleaved (A B C A B C ...), so that changes of the machine's speed affect all.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from rwkv_jax.checks import ConfigError, require_counts
from rwkv_jax.config import ModelConfig
from rwkv_jax.inference.engine.engine import Engine
from rwkv_jax.inference.sampling.params import SamplingParams
from rwkv_jax.inference.state.snapshot import Snapshot
from rwkv_jax.models import LanguageModel
from rwkv_jax.models.packed import Int4Matrix, Int8Matrix


@dataclasses.dataclass(frozen=True)
class Timing:
    """Repeated measurements of one variant."""

    seconds: tuple[float, ...]
    """Seconds per token of each text, one per repetition."""

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)


def latency(
    engine: Engine, contexts: Sequence[int], *, num_tokens: int = 32, repetitions: int = 5, seed: int = 0
) -> dict[int, Timing]:
    """Seconds per token of one text after contexts of random tokens.

    Args:
      contexts: numbers of tokens before the timed ones.
      num_tokens: tokens timed per repetition, rounded up to whole bursts.

    Raises:
      ConfigError: no context, one below 1, or fewer than one token or repetition; or as `Engine.stream`.
    """
    require_counts(contexts=contexts, num_tokens=(num_tokens,), repetitions=(repetitions,))
    lengths = sorted(set(contexts))
    tokens = np.random.default_rng(seed).integers(1, engine.config.vocab_size, lengths[-1]).tolist()
    snapshot: Snapshot | None = None
    snapshots: dict[int, Snapshot] = {}
    for before, length in itertools.pairwise([0, *lengths]):
        snapshots[length] = snapshot = engine.prefill(snapshot, tokens[before:length])
    found: dict[int, list[float]] = {length: [] for length in lengths}
    for repetition, length in itertools.product(range(repetitions + 1), lengths):
        seconds = _seconds_per_token(engine, [[]], num_tokens, state=snapshots[length])
        if repetition:  # the first compiles
            found[length].append(seconds)
    return {length: Timing(tuple(seconds)) for length, seconds in found.items()}


def throughput(engines: Mapping[int, Engine], *, num_tokens: int = 32, repetitions: int = 5) -> dict[int, Timing]:
    """Seconds per token of each text when several run at once; tokens/s is the number of texts divided by it.

    Args:
      engines: by number of texts, at most the engine's slots.
      num_tokens: tokens timed per text and repetition, rounded up to whole bursts.

    Raises:
      ConfigError: fewer than one text, token or repetition, or too few slots.
    """
    require_counts(batch_sizes=tuple(engines), num_tokens=(num_tokens,), repetitions=(repetitions,))
    for size, engine in engines.items():
        if size > engine.options.num_slots:
            raise ConfigError(f"batch size {size}: the engine has {engine.options.num_slots} slots; build it with more")
    found: dict[int, list[float]] = {size: [] for size in engines}
    for repetition, (size, engine) in itertools.product(range(repetitions + 1), engines.items()):
        # Different texts, so that each is prefilled.
        prompts = [[1 + i % (engine.config.vocab_size - 1)] for i in range(size)]
        seconds = _seconds_per_token(engine, prompts, num_tokens)
        if repetition:  # the first compiles
            found[size].append(seconds)
    return {size: Timing(tuple(seconds)) for size, seconds in found.items()}


def _seconds_per_token(
    engine: Engine, prompts: Sequence[Sequence[int]], num_tokens: int, state: Snapshot | None = None
) -> float:
    """Seconds per token of greedy decoding without stop tokens."""
    burst = engine.options.burst_length
    num_timed = -(-num_tokens // burst) * burst
    with engine.stream(
        prompts, max_tokens=1 + num_timed, sampling=SamplingParams.greedy(), stop_ids=(), state=state
    ) as stream:
        for _ in prompts:  # a burst of one token each
            next(stream)
        begin = time.perf_counter()
        num_generated = sum(len(chunk.ids) for chunk in stream)
        seconds = time.perf_counter() - begin
    assert num_generated == len(prompts) * num_timed
    return seconds / num_timed


@dataclasses.dataclass(frozen=True)
class MemoryUse:
    """Bytes of a model and of its states."""

    parameters: Mapping[str, int]
    """Bytes of the parameters by dtype."""
    state: int
    """Bytes of one text's state, from its arrays."""
    state_expected: int
    """Bytes of one text's state, in closed form."""
    logits: int
    """Bytes of the logits that an engine keeps with each state."""
    transformer: str
    """Config of the Transformer of equal size."""
    caches: Mapping[int, int]
    """Bytes of its keys and values by context length, in closed form: 2 L G N T numbers of the compute dtype."""


def memory(model: LanguageModel, contexts: Sequence[int]) -> MemoryUse:
    """Counts bytes without running the model.

    Raises:
      ConfigError: a context below 1, or no Transformer has the model's size.
    """
    require_counts(contexts=contexts)
    config = model.config
    state = jax.eval_shape(lambda: model.initial_state(1))
    peer = config if config.sizes().context_length else config.transformer_of_equal_size()
    return MemoryUse(
        parameters=_bytes_by_dtype(nnx.state(model, nnx.Param)),
        state=sum(_bytes_by_dtype(state).values()),
        state_expected=state_bytes(config),
        logits=4 * config.vocab_size,
        transformer=f"{peer.num_layers} x {peer.width}, {peer.num_parameters() / 1e6:.1f}M parameters",
        caches={context: cache_bytes(peer, context) for context in sorted(set(contexts))},
    )


def state_bytes(config: ModelConfig) -> int:
    """Bytes of one text's state, in closed form, from the state shapes of the model's spec."""
    arrays = (array for layer in range(config.num_layers) for array in config.spec.layer_state(config, layer))
    return sum(math.prod(array.shape) * jax.numpy.dtype(array.dtype).itemsize for array in arrays)


def cache_bytes(config: ModelConfig, num_tokens: int) -> int:
    """Bytes of a Transformer's cache after `num_tokens` tokens: a key and a value [G, N] per token and layer."""
    numbers = 2 * config.num_layers * config.num_kv_heads * config.head_dim * num_tokens
    return numbers * jax.numpy.dtype(config.dtype).itemsize


def _bytes_by_dtype(tree: Any) -> dict[str, int]:
    found: dict[str, int] = {}
    for leaf in jax.tree.leaves(tree):
        name = np.dtype(leaf.dtype).name
        found[name] = found.get(name, 0) + leaf.size * np.dtype(leaf.dtype).itemsize
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def weights_format(model: LanguageModel) -> str:
    """Format of a model's matrices: `int8`, `int4`, or the dtype of most of its parameters' bytes."""
    params = nnx.state(model, nnx.Param)
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, Int8Matrix | Int4Matrix))
    if any(isinstance(leaf, Int4Matrix) for leaf in leaves):  # which has 8-bit matrices too
        return "int4"
    if any(isinstance(leaf, Int8Matrix) for leaf in leaves):
        return "int8"
    return next(iter(_bytes_by_dtype(params)))
