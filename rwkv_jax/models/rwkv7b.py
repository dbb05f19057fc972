"""RWKV-7b: RWKV-7a with DEA, an attention beside the time mixing whose keys and values are scaled by token.

Source: the official inference code, RWKV-LM's RWKV-v7/rwkv_v7b_demo.py; no paper and no trainer have been published, so
initial values are ours. With x_t the residual stream before the block's first norm, e_t as in RWKV-7a:

    q_t = qq x_t
    k_t = (x_t k1) k2 * (k_table[token_t] + K e_t)
    v_t = tanh((x_t v1) v2) * (v_table[token_t] + V e_t)
    q, k, v <- norm(lerp(z_t, z_{t-1}, mu))                  each with its own norm and mu
    y_t = sum_s softmax_s(64 tanh(q_t k_s / 1024)) v_s       over s <= t, one head
    x <- x + time_mix(norm(x)) + y

A state has RWKV-7's constant part, the last q, k and v, and k and v of every token after their norms, C + 256 numbers a
token and layer. (The official code keeps x k1 and x v1, 64 numbers, and computes the keys and values of the whole text
anew at every call.) Shape letters: B batch, T time, C width, K size of queries and keys, D rank, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from typing_extensions import override

from rwkv_jax.config import ModelConfig
from rwkv_jax.models.block import BlockOutput
from rwkv_jax.models.cached import CachedModel
from rwkv_jax.models.context import UNSHARDED, MeshAxes, SequenceContext
from rwkv_jax.models.language_model import Axes
from rwkv_jax.models.layers import (
    Embedding,
    LayerNorm,
    Linear,
    broadcast_param,
    channel_param,
    copy_to_tensor_parallel,
    low_rank,
    orthogonal,
    token_shift,
)
from rwkv_jax.models.rwkv7a import BLOCK_AXES as RWKV7A_AXES
from rwkv_jax.models.rwkv7a import RWKV7a, RWKV7aBlock, rows_of_tokens
from rwkv_jax.models.state import State, TimeMixState, zeros_of
from rwkv_jax.models.transformer import KeyValueCache, attend_to_cache, attend_to_call, join, store, token_positions
from rwkv_kernels.arguments import broadcast_varying_axes

LARGEST_SCORE, SCORE_SCALE = 64.0, 1024.0
"""A score is 64 tanh(q k / 1024)."""


class DEAState(NamedTuple):
    """State of a block's DEA."""

    keys: Array
    """[B, 1, S, K] in the compute dtype, with an axis of one head."""
    values: Array
    """[B, 1, S, C] in the compute dtype."""
    position: Array
    """int32 [B]: tokens of the text so far; entries of the cache from there on are undefined."""
    q: Array
    """[B, K], the last query before its shift."""
    k: Array
    """[B, K], the last key before its shift."""
    v: Array
    """[B, C], the last value before its shift."""


class BlockState(NamedTuple):
    """State of a block; in a model's state each array has a leading axis L."""

    recurrence: State
    """Of constant size, as RWKV-7's."""
    attention: DEAState | None
    """None, at the start of a text, for an empty one."""

    @property
    def time_mix(self) -> TimeMixState:
        """The part for time mixing."""
        return self.recurrence.time_mix


def initial_state(config: ModelConfig, batch_size: int) -> DEAState:
    """The empty state of one block's DEA, with room for `config.context_length` tokens."""
    return DEAState(*(zeros_of(array, batch_size) for array in config.spec.state(config)[3:]))


class DEA(nnx.Module):
    """Attention with one head, to keys and values of low rank that are scaled by token.

    Initial values, with which nothing is added to the residual stream:

        qq, k1, k2, v1, v2       orthogonal, gain 1
        k_emb, v_emb             1
        k_emb_x, v_emb_x         0
        x_q, x_k, x_v            0
        lnq, lnk                 weight 1, bias 0
        lnv                      weight 0, bias 0
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        sizes, width, dtype = config.sizes(), config.width, config.parameter_dtype

        def matrix(rows: int, columns: int) -> Array:
            return orthogonal(rngs.params(), (rows, columns), 1.0, dtype)

        def table(size: int) -> Embedding:
            return Embedding(jnp.ones((config.vocab_size, size), dtype))

        keys, rank = sizes.dea_width, sizes.dea_rank
        self.qq = Linear(matrix(keys, width))
        self.k1, self.k2 = nnx.Param(matrix(width, rank)), nnx.Param(matrix(rank, keys))
        self.v1, self.v2 = nnx.Param(matrix(width, rank)), nnx.Param(matrix(rank, width))
        self.k_emb, self.v_emb = table(keys), table(width)
        self.k_emb_x: Linear | None = Linear(jnp.zeros((keys, width), dtype))
        self.v_emb_x: Linear | None = Linear(jnp.zeros((width, width), dtype))
        self.x_q, self.x_k, self.x_v = (channel_param(jnp.zeros((size,), dtype)) for size in (keys, keys, width))
        self.lnq, self.lnk, self.lnv = (LayerNorm(size, dtype) for size in (keys, keys, width))
        self.lnv.weight = nnx.Param(jnp.zeros((width,), dtype))

    def mix(self, x: Array, *, state: DEAState | None, context: SequenceContext) -> tuple[Array, DEAState]:
        """x [B, T, C], the residual stream -> what is added to it [B, T, C], and the next state.

        Args:
          state: None is the start of a text, for which no cache is read.
          context: `axes.sequence` must be None; a run's config sees to that.
        """
        batch, time, _ = x.shape
        held = initial_state(self.config, batch) if state is None else state
        held, _ = broadcast_varying_axes(held, x)
        q = self.qq(x)
        k = low_rank(x, self.k1[...], self.k2[...]) * rows_of_tokens(self.k_emb, self.k_emb_x, context)
        v = jnp.tanh(low_rank(x, self.v1[...], self.v2[...])) * rows_of_tokens(self.v_emb, self.v_emb_x, context)
        q, last_q = self._shifted(q, held.q, self.x_q, self.lnq, context)
        k, last_k = self._shifted(k, held.k, self.x_k, self.lnk, context)
        v, last_v = self._shifted(v, held.v, self.x_v, self.lnv, context)

        tokens = token_positions(held.position, time, context.segment_ids, context.lengths)
        cache = KeyValueCache(held.keys, held.values, held.position)
        q, k, v = (rearrange(z, "B T N -> B 1 T N") for z in (q, k, v))
        attended = attend_to_call(q, k, v, tokens.segments, _score)
        next_cache = store(cache, k, v, tokens)
        if state is not None:
            # As in `transformer.Attention`: read after writing, unless an earlier text of the row still reads.
            before = cache if tokens.segments is not None else next_cache._replace(position=held.position)
            attended = join(attended, attend_to_cache(q, before, tokens.segments, _score))
        y = checkpoint_name(rearrange(attended.y, "B 1 T C -> B T C").astype(x.dtype), "wkv")
        return y, DEAState(*next_cache, last_q, last_k, last_v)

    @staticmethod
    def _shifted(
        z: Array, last: Array, blend: nnx.Param[Array], norm: LayerNorm, context: SequenceContext
    ) -> tuple[Array, Array]:
        z_prev, last = token_shift(z, last, context)
        return norm(z + (z_prev - z) * broadcast_param(blend[...], z)), last


def _score(products: Array) -> Array:
    return LARGEST_SCORE * jnp.tanh(products / SCORE_SCALE)


class RWKV7bBlock(RWKV7aBlock):
    """A residual block: time mixing and DEA beside each other, then channel mixing with DeepEmbed."""

    def __init__(self, config: ModelConfig, layer: int | Array, *, rngs: nnx.Rngs) -> None:
        super().__init__(config, layer, rngs=rngs)
        self.qkv = DEA(config, rngs=rngs)

    @override
    def add_branches(
        self, x: Array, *, state: BlockState, v_first: Array | None, context: SequenceContext
    ) -> BlockOutput:
        own = state.recurrence
        with jax.named_scope("attention"):
            attended, attention = self.qkv.mix(x, state=state.attention, context=context)
        with jax.named_scope("time_mix"):
            y = copy_to_tensor_parallel(self.ln1(x), context.axes.tensor)
            y, v_first, att = self.mix_time(y, state=state.time_mix, v_first=v_first, context=context)
            x = x + y + attended
        with jax.named_scope("channel_mix"):
            y = copy_to_tensor_parallel(self.ln2(x), context.axes.tensor)
            y, ffn_shift = self.ffn.mix(y, state=own.ffn_shift, context=context)
            x = x + y
        recurrence = State(att.shift, ffn_shift, att.wkv, generation=own.generation)
        return BlockOutput(x, v_first, BlockState(recurrence, attention))


BLOCK_AXES: dict[str, Axes] = {
    **RWKV7A_AXES,
    "qkv.qq.weight": (None, "embed"),
    **{f"qkv.{name}1": ("embed", None) for name in "kv"},
    **{f"qkv.{name}2": (None, None) for name in "kv"},
    **{f"qkv.{name}_emb.weight": ("vocab", None) for name in "kv"},
    **{f"qkv.{name}_emb_x.weight": (None, "embed") for name in "kv"},
    **{f"qkv.x_{name}": (None, None, None) for name in "qkv"},
    **{f"qkv.ln{name}.{part}": (None,) for name in "qkv" for part in ("weight", "bias")},
}
"""Logical axes of a block's parameters (`LanguageModel.block_axes`)."""


class RWKV7b(CachedModel, RWKV7a):
    """An RWKV-7b language model: `model(tokens, state) -> (logits, state)`."""

    block_type = RWKV7bBlock
    block_axes = BLOCK_AXES

    @override
    @classmethod
    def initial_block_state(cls, config: ModelConfig, batch_size: int, axes: MeshAxes = UNSHARDED) -> BlockState:
        arrays = (zeros_of(array, batch_size, axes) for array in config.spec.state(config)[:3])
        return BlockState(State(*arrays, generation=config.generation), initial_state(config, batch_size))

    @override
    def empty_state(self, batch_size: int, axes: MeshAxes = UNSHARDED) -> Any:
        """Without a cache, since there is nothing to read: a training step then computes none."""
        state = self.initial_state(batch_size, axes)
        if self.is_stacked:
            return state._replace(attention=None)
        return tuple(of_layer._replace(attention=None) for of_layer in state)

    @override
    @classmethod
    def replicate_state(cls, state: BlockState, axes: MeshAxes) -> BlockState:
        """What DEA keeps is equal on all shards as it is."""
        return state._replace(recurrence=super().replicate_state(state.recurrence, axes))
