"""The skeleton that every generation shares: embedding, blocks scanned over layers, norm, head.

The first layer differs from the others (it owns ln0, and in RWKV-7 it has no value residual), so it stands alone as
`first_block`; layers 1 to L - 1 are one block whose parameters have a leading axis, run by `jax.lax.scan`. Compile
time therefore does not grow with depth.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from rwkv_jax.config import ModelConfig
from rwkv_jax.models.layers import KEPT, Embedding, LayerNorm, Linear, head_gain, linear, orthogonal, uniform
from rwkv_jax.models.state import State, TimeMixState
from rwkv_kernels.arguments import check_lengths, check_segment_ids, is_concrete


class Block(nnx.Module):
    """A residual block of layer l: time mixing, then channel mixing, each behind a layer norm."""

    time_mix_type: ClassVar[type[Any]]
    channel_mix_type: ClassVar[type[Any]]

    def __init__(self, config: ModelConfig, layer: int | Array, *, rngs: nnx.Rngs) -> None:
        dtype = config.parameter_dtype
        # A traced layer index is one of the stacked layers, which are never the first.
        self.is_first = isinstance(layer, int) and layer == 0
        if self.is_first:
            self.ln0 = LayerNorm(config.width, dtype)
        self.ln1 = LayerNorm(config.width, dtype)
        self.ln2 = LayerNorm(config.width, dtype)
        self.att = self.time_mix_type(config, layer, rngs=rngs)
        self.ffn = self.channel_mix_type(config, layer, rngs=rngs)

    def mix_time(
        self, x: Array, state: TimeMixState, v_first: Array | None, **rows: Array | None
    ) -> tuple[Array, Array | None, TimeMixState]:
        """Time mixing as the model calls it; only RWKV-7 has a use for `v_first`, the first layer's values."""
        y, state = self.att(x, state, **rows)
        return y, v_first, state

    def __call__(
        self, x: Array, state: State, v_first: Array | None, **rows: Array | None
    ) -> tuple[Array, Array | None, State]:
        """x [B, T, C], the block's state, the first layer's values -> the same three, after the block.

        Args:
          rows: `segment_ids` and `lengths`, as `LanguageModel.hidden` has them.
        """
        if self.is_first:
            x = self.ln0(x)
        with jax.named_scope("time_mix"):
            y, v_first, att = self.mix_time(self.ln1(x), TimeMixState(state.att_shift, state.wkv), v_first, **rows)
            x = x + y
        with jax.named_scope("channel_mix"):
            y, ffn_shift = self.ffn(self.ln2(x), state.ffn_shift, **rows)
            x = x + y
        return x, v_first, State(att.shift, ffn_shift, att.wkv)


class LanguageModel(nnx.Module):
    """A causal language model with an explicit state; a generation names its block, state and parameter groups."""

    generations: ClassVar[tuple[str, ...]]
    """The values of `config.generation` that it serves."""
    block_type: ClassVar[type[Block]]

    @staticmethod
    def initial_block_state(config: ModelConfig, batch_size: int) -> State:
        """The empty state of one block."""
        raise NotImplementedError

    @staticmethod
    def parameter_group(path: tuple[str, ...], ndim: int) -> tuple[float, bool]:
        """How the official trainer treats a parameter.

        Args:
          path: official names from the root, such as ("blocks", "att", "key", "weight").
          ndim: axes of the parameter in one layer.

        Returns:
          The factor on its learning rate, and whether its weight decays.
        """
        raise NotImplementedError

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        if config.generation not in self.generations:
            raise ValueError(
                f"model.generation = {config.generation!r}: {type(self).__name__} is {', '.join(self.generations)}; "
                "rwkv_jax.models.model_type(config) is the class of a generation"
            )
        self.config = config
        self.emb = Embedding(self.initial_embedding(config, rngs))
        self.first_block = self.block_type(config, 0, rngs=rngs)
        layers = jnp.arange(1, config.num_layers, dtype=config.parameter_dtype)
        keys = jax.random.split(rngs.params(), config.num_layers - 1)
        self.blocks = jax.vmap(lambda layer, key: self.block_type(config, layer, rngs=nnx.Rngs(key)))(layers, keys)
        self.ln_out = LayerNorm(config.width, config.parameter_dtype)
        shape = (config.vocab_size, config.width)
        self.head = Linear(orthogonal(rngs.params(), shape, head_gain(*shape), config.parameter_dtype))

    @staticmethod
    def initial_embedding(config: ModelConfig, rngs: nnx.Rngs) -> Array:
        """Initial token vectors [V, C]: uniform in +-1e-4, as the official trainers have them from RWKV-5.2 on.

        (That of the previews 5.0 and 5.1 takes its learning rate, which is of that size, for the bound.)
        """
        return uniform(rngs.params(), (config.vocab_size, config.width), 1e-4, config.parameter_dtype)

    def initial_state(self, batch_size: int) -> State:
        """The empty state of `batch_size` texts; every array has a leading axis L."""
        block = self.initial_block_state(self.config, batch_size)
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (self.config.num_layers, *x.shape)), block)

    def hidden(
        self,
        tokens: Array | None,
        state: State | None = None,
        *,
        segment_ids: Array | None = None,
        lengths: Array | None = None,
        inputs_embeds: Array | None = None,
        remat: bool = False,
    ) -> tuple[Array, State]:
        """What the head reads.

        Args:
          tokens: [B, T] integers in [0, V), T from 1; None where `inputs_embeds` is given.
          state: what an earlier call returned; None is the start of a text.
          segment_ids: integers [B, T]; a new text, with nothing before it, begins where the id changes along a row. The
            first segment of a row continues `state`.
          lengths: integers [B] from 0 to T; steps beyond a row's length leave its state as it was, and what is returned
            for them means nothing.
          inputs_embeds: [B, T, C], in place of the embedding's vectors.
          remat: keep only each block's input for the backward pass and recompute the rest.

        Returns:
          [B, T, C] in the compute dtype, after the last norm, and the next state.

        Raises:
          ValueError: shapes or dtypes that do not go together, a state of another model or batch, or, where values are
            at hand (outside jit), token ids or lengths out of range.
        """
        x, state, _ = self._run(tokens, state, segment_ids, lengths, inputs_embeds, remat=remat)
        return self.ln_out(x), state

    def residual_stream(
        self,
        tokens: Array | None,
        state: State | None = None,
        *,
        segment_ids: Array | None = None,
        lengths: Array | None = None,
        inputs_embeds: Array | None = None,
    ) -> tuple[Array, State]:
        """The hidden states of every layer: [L, B, T, C], what each block hands on, and the next state; see `hidden`.

        The head reads `ln_out` of the last of them.
        """
        _, state, streams = self._run(tokens, state, segment_ids, lengths, inputs_embeds, every_layer=True)
        return streams, state

    def logits(self, hidden: Array) -> Array:
        """Logits [..., V] in at least float32 of hidden vectors [..., C]."""
        return linear(hidden, self.head.weight[...], out_dtype=jnp.promote_types(hidden.dtype, jnp.float32))

    def __call__(
        self,
        tokens: Array | None,
        state: State | None = None,
        *,
        segment_ids: Array | None = None,
        lengths: Array | None = None,
        inputs_embeds: Array | None = None,
        remat: bool = False,
    ) -> tuple[Array, State]:
        """Logits [B, T, V] of the token after each of tokens [B, T], and the next state; see `hidden`."""
        x, state = self.hidden(
            tokens, state, segment_ids=segment_ids, lengths=lengths, inputs_embeds=inputs_embeds, remat=remat
        )
        with jax.named_scope("head"):
            return self.logits(x), state

    def _run(
        self,
        tokens: Array | None,
        state: State | None,
        segment_ids: Array | None,
        lengths: Array | None,
        inputs_embeds: Array | None,
        *,
        remat: bool = False,
        every_layer: bool = False,
    ) -> tuple[Array, State, Any]:
        x = self._inputs(tokens, inputs_embeds)
        batch, time = x.shape[:2]
        segment_ids = None if segment_ids is None else check_segment_ids(segment_ids, batch, time)
        lengths = check_lengths(lengths, batch, time)
        states = self.initial_state(batch) if state is None else self._check_state(state, batch)
        rows = {"segment_ids": segment_ids, "lengths": lengths}
        policies = jax.checkpoint_policies
        policy = policies.nothing_saveable if remat else policies.save_only_these_names(KEPT, "wkv")
        run = functools.partial(jax.checkpoint, _run_block, policy=policy)
        first_state = jax.tree.map(lambda s: s[0], states)
        other_states = jax.tree.map(lambda s: s[1:], states)
        x_first, v_first, first_state = run()(self.first_block, x, first_state, None, rows)

        def body(carry: tuple[Array, Any], layer: tuple[Any, State]) -> tuple[tuple[Array, Any], tuple[State, Any]]:
            # The scan itself keeps XLA from undoing the recomputation; block 0 needs the barriers.
            x, v_first, next_state = run(prevent_cse=False)(layer[0], carry[0], layer[1], carry[1], rows)
            return (x, v_first), (next_state, x if every_layer else None)

        (x, _), (other_states, streams) = jax.lax.scan(body, (x_first, v_first), (self.blocks, other_states))
        states = jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), first_state, other_states)
        return x, states, jnp.concatenate([x_first[None], streams]) if every_layer else None

    def _inputs(self, tokens: Array | None, inputs_embeds: Array | None) -> Array:
        if (tokens is None) == (inputs_embeds is None):
            raise ValueError("give tokens, or inputs_embeds in their place, and not both")
        width, vocab_size = self.config.width, self.config.vocab_size
        if inputs_embeds is not None:
            inputs_embeds = jnp.asarray(inputs_embeds)
            if inputs_embeds.ndim != 3 or 0 in inputs_embeds.shape or inputs_embeds.shape[-1] != width:
                raise ValueError(f"inputs_embeds: shape {inputs_embeds.shape} must be [B, T, C = {width}], T from 1")
            return inputs_embeds.astype(self.config.dtype)
        tokens = jnp.asarray(tokens)
        if tokens.ndim != 2 or 0 in tokens.shape or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(
                f"tokens: {tokens.dtype} of shape {tokens.shape} must be integers of shape [B, T], T from 1"
            )
        if is_concrete(tokens):
            values = np.asarray(tokens)
            if values.min() < 0 or values.max() >= vocab_size:
                raise ValueError(
                    f"tokens: from {values.min()} to {values.max()} must lie from 0 to V - 1 = {vocab_size - 1}"
                )
        return self.emb(tokens).astype(self.config.dtype)

    def _check_state(self, state: State, batch: int) -> State:
        expected = jax.eval_shape(lambda: self.initial_state(batch))
        if jax.tree.structure(state) != jax.tree.structure(expected):
            raise ValueError(
                f"state: is none of RWKV-{self.config.generation}, whose states have the form of "
                f"model.initial_state(batch_size={batch})"
            )
        for (path, leaf), like in zip(jax.tree.leaves_with_path(state), jax.tree.leaves(expected), strict=True):
            if leaf.shape != like.shape:
                raise ValueError(f"state{jax.tree_util.keystr(path)}: shape {leaf.shape} must be {like.shape}")
        return state


def _run_block(block: Block, x: Array, state: State, v_first: Array | None, rows: dict[str, Array | None]) -> Any:
    return block(x, state, v_first, **rows)
