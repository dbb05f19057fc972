"""A plain Transformer to compare RWKV with: attention with rotary positions, feed-forward, initial values.

Attention over a call and a cache, and what a model with such a state needs besides, are shared with `models/llama.py`,
which groups heads: G of keys and values serve H of queries, each H / G of them. Here G = H.

Every block is x + attention(norm(x)), then x + feed_forward(norm(x)), without biases in the matrix products. Sources:
attention, Vaswani et al. (arXiv 1706.03762); norms before the branches and initial values, GPT-2 (Radford et al.,
2019); rotary positions, Su et al. (arXiv 2104.09864). The feed-forward activation is the squared ReLU (Primer, arXiv
2109.08668) of RWKV's channel mixing, so that a comparison is between attention and recurrence only, not between
activations. Shape letters: B batch, T time, C width, H heads, G heads of keys and values, N head size, F feed-forward
width, L layers, S positions in a state.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from numpy.typing import NDArray
from typing_extensions import override

from rwkv_jax.config import ConfigError, ModelConfig
from rwkv_jax.models.block import BlockOutput, TimeMixOutput
from rwkv_jax.models.context import UNSHARDED, MeshAxes, SequenceContext
from rwkv_jax.models.hybrid import TIME_MIX_AXES, HybridBlock, HybridModel, mix_tokens
from rwkv_jax.models.language_model import Axes
from rwkv_jax.models.layers import (
    LayerNorm,
    Linear,
    Mixer,
    MixOutput,
    checkpoint_wkv_inputs,
    copy_to_tensor_parallel,
    row_parallel_linear,
    wide_dtype,
)
from rwkv_kernels.arguments import broadcast_varying_axes, segment_index, segment_starts

ROTARY_BASE = 10000.0
"""Pair i of a head's N / 2 pairs of channels rotates by ROTARY_BASE^(-2 i / N) per position."""

INITIAL_SCALE = 0.02
"""Standard deviation of the initial matrices, GPT-2's; divided by sqrt(2 L) for those that write the residual."""

PIECE, MAX_PREFIXES = 128, 8
"""Queries per piece, and the maximum number of key prefixes with which pieces are computed."""

CACHE_BLOCK = 256
"""Tokens of the cache read at a time: their keys and values fit a processor's cache."""


class KeyValueCache(NamedTuple):
    """Keys and values of a block's attention; a model's state has a leading axis L on each array."""

    keys: Array
    """[B, G, S, N] in the compute dtype, rotated; heads before positions, so that matmuls read them contiguously."""
    values: Array
    """[B, G, S, N] in the compute dtype."""
    position: Array
    """int32 [B]: tokens of the text so far; cache entries from there on are undefined."""


def initial_state(config: ModelConfig, batch_size: int, axes: MeshAxes = UNSHARDED) -> KeyValueCache:
    """The empty state of one block, with room for `config.context_length` tokens."""
    heads = config.num_kv_heads // axes.num_tensor_shards
    empty = jnp.zeros((batch_size, heads, config.sizes().context_length, config.head_dim), config.dtype)
    return KeyValueCache(empty, empty, jnp.zeros((batch_size,), jnp.int32))


class TokenPositions(NamedTuple):
    """Positions of a call's tokens in their texts."""

    positions: Array
    """int32 [B, T], from 0 in each text."""
    segments: Array | None
    """int32 [B, T]: number of the text within the row; text 0 continues the state's. None if each row has one."""
    is_kept: Array
    """bool [B, T]: tokens of the row's last text, which are stored in the next state."""
    next_position: Array
    """int32 [B]: tokens of the row's last text after this call."""


def token_positions(
    position: Array, time: int, segment_ids: Array | None = None, lengths: Array | None = None
) -> TokenPositions:
    """Positions of `time` tokens after `position` [B]; segment_ids and lengths as in `LanguageModel.hidden`."""
    step = jnp.arange(time, dtype=jnp.int32)[None, :]
    lengths = jnp.full_like(position, time) if lengths is None else lengths
    is_read = step < lengths[:, None]
    segments = segment_index(segment_ids, lengths, len(position), time)
    if segments is None:
        return TokenPositions(position[:, None] + step, None, is_read, position + lengths)
    begin = lax.cummax(jnp.where(segment_starts(segments), step, 0), axis=1)
    positions = jnp.where(segments == 0, position[:, None] + step, step - begin)
    last = jnp.take_along_axis(positions, jnp.maximum(lengths - 1, 0)[:, None], axis=1)[:, 0]
    is_kept = is_read & (segments == segments[:, -1:])
    return TokenPositions(positions, segments, is_kept, jnp.where(lengths > 0, last + 1, position))


def rotary_frequencies(head_dim: int, base: float = ROTARY_BASE) -> NDArray:
    """theta_i of each pair of channels, [N / 2] in float64."""
    half = head_dim // 2
    return base ** -(np.arange(half) / half)


def rotate(x: Array, positions: Array, frequencies: NDArray | None = None) -> Array:
    """Rotary positions: channels (i, i + N / 2) of each head as a complex number, times e^{j position theta_i}.

    Args:
      x: [B, T, H, N]; positions: int32 [B, T].
      frequencies: theta [N / 2]; None is `rotary_frequencies(N)`.

    Returns:
      [B, T, H, N] in x's dtype, computed in at least float32.
    """
    half = x.shape[-1] // 2
    wide = wide_dtype(x.dtype)
    theta = jnp.asarray(rotary_frequencies(x.shape[-1]) if frequencies is None else frequencies, wide)
    angle = positions[:, :, None, None].astype(wide) * theta[None, None, None, :]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    real, imaginary = x[..., :half].astype(wide), x[..., half:].astype(wide)
    return jnp.concatenate([real * cos - imaginary * sin, real * sin + imaginary * cos], axis=-1).astype(x.dtype)


class Attended(NamedTuple):
    """Attention to some keys, in at least float32, with the sums needed to join it with attention to others."""

    y: Array
    """[B, H, T, M], the mean of the values by the softmax of the scores."""
    log_total: Array
    """[B, H, T], the log of the sum of the scores' exponentials."""


Score = Callable[[Array], Array]
"""From the products of queries with keys to what the softmax is taken of."""


def attend(q: Array, k: Array, v: Array, is_visible: Array, score: Score | None = None) -> Attended:
    """Softmax attention to the keys that each query sees.

    Args:
      q: [B, H, T, N]; k: [B, G, S, N]; v: [B, G, S, M]; is_visible: bool, broadcasts to [B, 1, T, S], for all heads.
      score: None divides by sqrt(N).

    Returns:
      Sums in at least float32. For a query that sees no key, `y` is undefined and `log_total` so low that joining with
      another drops it.
    """
    wide = wide_dtype(q.dtype)
    q = rearrange(q, "B (G R) T N -> B G R T N", G=k.shape[1])  # R queries share a key
    products = jnp.einsum("BGRTN,BGSN->BGRTS", q, k, preferred_element_type=wide)
    scores = products / math.sqrt(q.shape[-1]) if score is None else score(products)
    scores = jnp.where(is_visible[:, :, None], scores, -1e30)
    largest = lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - largest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    y = jnp.einsum("BGRTS,BGSN->BGRTN", weights.astype(v.dtype), v, preferred_element_type=wide)
    log_total = (largest + jnp.log(total))[..., 0]
    return Attended(rearrange(y / total, "B G R T N -> B (G R) T N"), rearrange(log_total, "B G R T -> B (G R) T"))


def join(first: Attended, second: Attended) -> Attended:
    """Joins attention to two sets of keys."""
    log_total = jnp.logaddexp(first.log_total, second.log_total)
    first_share, second_share = (jnp.exp(part.log_total - log_total)[..., None] for part in (first, second))
    return Attended(first.y * first_share + second.y * second_share, log_total)


def attend_to_call(q: Array, k: Array, v: Array, segments: Array | None, score: Score | None = None) -> Attended:
    """Causal attention of a call's tokens to each other.

    Queries are processed in pieces, each with a prefix of the keys: nearly half of all scores are never computed, and
    for texts of more than PIECE * MAX_PREFIXES tokens only one piece's scores are in memory at a time, also in the
    backward pass, which recomputes them.

    Args:
      q: [B, H, T, N]; k, v: [B, G, T, N]; segments: int32 [B, T], tokens of different segments do not see each other.
      score: as in `attend`.
    """
    time = q.shape[2]
    prefix = PIECE * -(-time // (PIECE * MAX_PREFIXES))
    parts = []
    for begin in range(0, time, prefix):
        end = min(begin + prefix, time)
        keys, values = k[:, :, :end], v[:, :, :end]

        @jax.checkpoint
        def of_piece(first: Array | int, q: Array, keys: Array = keys, values: Array = values) -> Attended:
            queries = first + jnp.arange(q.shape[2])
            is_visible = (queries[:, None] >= jnp.arange(keys.shape[2])[None, :])[None, None]  # [1, 1, T, S]
            if segments is not None:
                own = lax.dynamic_slice_in_dim(segments, first, q.shape[2], axis=1)
                is_visible = is_visible & (own[:, None, :, None] == segments[:, None, None, : keys.shape[2]])
            return attend(q, keys, values, is_visible, score)

        whole = begin + (end - begin) // PIECE * PIECE
        if whole - begin > PIECE:  # a loop keeps XLA from computing all pieces at once
            pieces = rearrange(q[:, :, begin:whole], "B H (piece T) N -> piece B H T N", T=PIECE)
            mapped = lax.map(lambda piece: of_piece(*piece), (jnp.arange(begin, whole, PIECE), pieces))
            parts += [Attended(*part) for part in zip(*mapped, strict=True)]
            begin = whole
        for first in range(begin, end, PIECE):
            parts.append(of_piece(first, q[:, :, first : min(first + PIECE, end)]))
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=2), *parts)


def attend_to_cache(q: Array, cache: KeyValueCache, segments: Array | None, score: Score | None = None) -> Attended:
    """Attention of a call's tokens to those in a state.

    The cache is read in blocks, up to the longest text of the batch: the cost per token grows with that text, not with
    the cache's size, and each number is read from memory once.

    Args:
      q: [B, H, T, N]; segments: int32 [B, T], of which segment 0 alone continues the cache's text.
      score: as in `attend`.
    """
    batch, heads, time, _ = q.shape
    capacity = cache.keys.shape[2]
    block = min(CACHE_BLOCK, capacity)
    continues = jnp.ones((batch, time), bool) if segments is None else segments == 0
    wide = wide_dtype(q.dtype)
    empty = jnp.zeros((batch, heads, time, cache.values.shape[-1]), wide)
    nothing = Attended(empty, jnp.full((batch, heads, time), -1e30, wide))

    def read(attended: Attended, begin: Array) -> tuple[Attended, None]:
        def with_block() -> Attended:
            first = jnp.minimum(begin, capacity - block)  # the last block overlaps the one before
            k, v = (lax.dynamic_slice_in_dim(x, first, block, axis=2) for x in (cache.keys, cache.values))
            place = first + jnp.arange(block)
            is_held = (place >= begin)[None, :] & (place[None, :] < cache.position[:, None])
            return join(attended, attend(q, k, v, is_held[:, None, None, :] & continues[:, None, :, None], score))

        return lax.cond(begin < jnp.max(cache.position), with_block, lambda: attended), None

    return lax.scan(read, nothing, jnp.arange(0, capacity, block))[0]


def store(cache: KeyValueCache, k: Array, v: Array, tokens: TokenPositions) -> KeyValueCache:
    """Writes a call's keys and values [B, G, T, N] to the cache; those that do not fit or are not kept are dropped."""
    nowhere = cache.keys.shape[2]
    index = jnp.where(tokens.is_kept, tokens.positions, nowhere)
    rows = jnp.arange(len(index))[:, None]

    def written(held: Array, new: Array) -> Array:
        return held.at[rows, :, index].set(rearrange(new, "B G T N -> B T G N").astype(held.dtype), mode="drop")

    return KeyValueCache(written(cache.keys, k), written(cache.values, v), tokens.next_position)


def split_heads(x: Array, head_dim: int) -> Array:
    """[B, T, H N] -> [B, T, H, N]."""
    return rearrange(x, "B T (H N) -> B T H N", N=head_dim)


def normal(key: Array, shape: tuple[int, ...], scale: float, dtype: str) -> Array:
    """A random matrix of independent normal entries with this standard deviation."""
    return scale * jax.random.normal(key, shape, jnp.dtype(dtype))


class Attention(Mixer):
    """Causal self-attention with rotary positions."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config

        def square(scale: float) -> Linear:
            return Linear(normal(rngs.params(), (config.width, config.width), scale, config.parameter_dtype))

        self.query, self.key, self.value = (square(INITIAL_SCALE) for _ in range(3))
        self.output = square(INITIAL_SCALE / math.sqrt(2 * config.num_layers))

    @override
    def initial_state(self, batch_size: int) -> KeyValueCache:
        return initial_state(self.config, batch_size)

    def values(self, x: Array) -> Array:
        """The values [B, T, C] of normalized x [B, T, C], which `mix` computes too."""
        return self.value(x)

    def project(self, x: Array, positions: Array) -> tuple[Array, Array, Array]:
        """Queries [B, T, H, N], keys and values [B, T, G, N] of normalized x [B, T, C]; the first two are rotated.

        Args:
          positions: int32 [B, T].
        """
        projected = (project(x) for project in (self.query, self.key, self.value))
        q, k, v = (split_heads(z, self.config.head_dim) for z in projected)
        return rotate(q, positions), rotate(k, positions), v

    @override
    def mix(self, x: Array, *, state: KeyValueCache | None, context: SequenceContext) -> MixOutput:
        """Attention to a call's own tokens and those of the state.

        Args:
          x: [B, T, C], already normalized.
          state: None is the start of a text, for which no cache is read.
          context: `axes.sequence` must be None.

        Returns:
          y [B, T, C] and the next state. A token that does not fit the state is visible only within its call.

        Raises:
          ConfigError: time that is split over a mesh axis, or more tokens than a new state has room for.
        """
        axes = context.axes
        if axes.sequence is not None:
            raise ConfigError(
                f"axes.sequence = {axes.sequence!r}: {self.config.spec.a_title}'s attention is not split over time; "
                "use other axes"
            )
        config = self.config
        batch, time, _ = x.shape
        if state is None and time > config.sizes().context_length:
            raise ConfigError(
                f"model.context_length = {config.sizes().context_length}: a state has no room for T = {time} tokens; "
                "make it larger, or read fewer"
            )
        held = initial_state(config, batch, axes) if state is None else state
        held, _ = broadcast_varying_axes(held, x)
        tokens = token_positions(held.position, time, context.segment_ids, context.lengths)

        projected = self.project(x, tokens.positions)
        q, k, v = checkpoint_wkv_inputs(*(rearrange(z, "B T H N -> B H T N") for z in projected))
        attended = attend_to_call(q, k, v, tokens.segments)
        next_state = store(held, k, v, tokens)
        if state is None:
            y = attended.y
        else:
            # Read after writing, or XLA would copy the whole cache at each token. Only a packed row may overwrite
            # entries that an earlier text of the row still reads.
            before = held if tokens.segments is not None else next_state._replace(position=held.position)
            y = join(attended, attend_to_cache(q, before, tokens.segments)).y
        # Stored for the backward pass under RWKV's name for the output of token mixing.
        y = checkpoint_name(rearrange(y, "B H T N -> B T (H N)").astype(x.dtype), "wkv")
        return MixOutput(row_parallel_linear(y, self.output.weight[...], context.axes.tensor), next_state)


class FeedForward(nnx.Module):
    """Two matrices with a squared ReLU between them, named as in RWKV's channel mixing."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        width, ffn_width, dtype = config.width, config.sizes().ffn_width, config.parameter_dtype
        self.key = Linear(normal(rngs.params(), (ffn_width, width), INITIAL_SCALE, dtype))
        scale = INITIAL_SCALE / math.sqrt(2 * config.num_layers)
        self.value = Linear(normal(rngs.params(), (width, ffn_width), scale, dtype))

    def __call__(self, x: Array, tensor_axis: str | None = None) -> Array:
        """[B, T, C] -> [B, T, C]; a mesh axis may split the width between the matrices."""
        return row_parallel_linear(jnp.square(jax.nn.relu(self.key(x))), self.value.weight[...], tensor_axis)


class TransformerBlock(HybridBlock):
    """A residual block: attention or time mixing, then the feed-forward network, each after a layer norm."""

    time_mix_type = Attention
    scope: ClassVar[str] = "attention"
    """Name under which compiled programs list the mixing of tokens."""

    def __init__(self, config: ModelConfig, layer: int | Array, *, rngs: nnx.Rngs, kind: str = "") -> None:
        self.ln1 = LayerNorm(config.width, config.parameter_dtype)
        self.ln2 = LayerNorm(config.width, config.parameter_dtype)
        self.set_mixer(config, kind, layer, rngs)
        self.ffn = FeedForward(config, rngs=rngs)

    @override
    def mix_branch(self, x: Array, *, state: Any, v_first: Array | None, context: SequenceContext) -> TimeMixOutput:
        y = copy_to_tensor_parallel(self.ln1(x), context.axes.tensor)
        return mix_tokens(self, y, state=state, v_first=v_first, context=context)

    @override
    def __call__(self, x: Array, *, state: Any, v_first: Array | None, context: SequenceContext) -> BlockOutput:
        with jax.named_scope(self.scope):
            y = copy_to_tensor_parallel(self.ln1(x), context.axes.tensor)
            y, v_first, state = mix_tokens(self, y, state=state, v_first=v_first, context=context)
            x = x + y
        with jax.named_scope("feed_forward"):
            x = x + self.ffn(copy_to_tensor_parallel(self.ln2(x), context.axes.tensor), context.axes.tensor)
        return BlockOutput(x, v_first, state)


BLOCK_AXES: dict[str, Axes] = {
    **TIME_MIX_AXES,
    **{f"att.{name}.weight": ("heads", "embed") for name in ("query", "key", "value")},
    "att.output.weight": ("embed", "heads"),
    "ffn.key.weight": ("ffn", "embed"),
    "ffn.value.weight": ("embed", "ffn"),
}
"""What the axes of a block's parameters mean (`LanguageModel.block_axes`): `heads` is the width, split by heads."""


class AttentionModel(HybridModel):
    """Base of language models with a key-value cache as state: `model(tokens, state) -> (logits, state)`.

    In `config.rwkv_layers` RWKV-7's time mixing takes the place of attention, and a state of constant size that of the
    cache.
    """

    @override
    @classmethod
    def empty_cache(cls, config: ModelConfig, batch_size: int, axes: MeshAxes = UNSHARDED) -> KeyValueCache:
        return initial_state(config, batch_size, axes)

    @override
    @classmethod
    def initial_embedding(cls, config: ModelConfig, rngs: nnx.Rngs) -> Array:
        return normal(rngs.params(), (config.vocab_size, config.width), INITIAL_SCALE, config.parameter_dtype)

    @override
    @classmethod
    def initial_head(cls, config: ModelConfig, rngs: nnx.Rngs) -> Array:
        return normal(rngs.params(), (config.vocab_size, config.width), INITIAL_SCALE, config.parameter_dtype)


class Transformer(AttentionModel):
    """A Transformer language model."""

    block_type = TransformerBlock
    block_axes = BLOCK_AXES
