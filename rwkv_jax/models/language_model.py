"""The skeleton that every generation shares: embedding, blocks scanned over layers, norm, head.

The first layer differs from the others (it owns ln0, and in RWKV-7 it has no value residual), so it stands alone as
`first_block`; layers 1 to L - 1 are one block whose parameters have a leading axis, run by `jax.lax.scan`. Compile
time therefore does not grow with depth. For decoding there is a form with arrays for each layer (decoding.py).
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from rwkv_jax.config import ConfigError, ModelConfig, Remat
from rwkv_jax.config.generations import all_specs
from rwkv_jax.models.layers import (
    CHECKPOINT_MATMUL,
    CHECKPOINT_WKV_INPUT,
    Embedding,
    LayerNorm,
    Linear,
    head_gain,
    linear,
    orthogonal,
    uniform,
)
from rwkv_jax.models.shards import UNSHARDED, MeshAxes, as_replicated, copy_to_tensor_parallel
from rwkv_jax.models.state import State, TimeMixState
from rwkv_kernels.arguments import check_lengths, check_segment_ids, values_at_hand

Axes = tuple[str | None, ...]
"""What the axes of a parameter mean: fields of `rwkv_jax.parallel.rules.Rules`; None for one that stays whole."""

Part = TypeVar("Part", bound=nnx.Module)


class PartTransform(Protocol):
    """What is done to each part of a model: `emb`, `first_block`, one layer of `blocks`, `ln_out`, `head`."""

    def __call__(self, name: str, part: Part, /) -> Part:
        """The part to go on with."""
        ...


def identity(name: str, part: Part) -> Part:
    """Every part as it is."""
    del name
    return part


SAVED_BY_REMAT: dict[Remat, tuple[str, ...]] = {
    "none": (CHECKPOINT_MATMUL, "wkv"),
    "operator": (CHECKPOINT_WKV_INPUT, "wkv"),
    "full": (),
}
"""What a block keeps for its backward pass, besides its input: matrix products, what the recurrence read, nothing."""


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
        self, x: Array, state: TimeMixState, v_first: Array | None, *, axes: MeshAxes, **rows: Array | None
    ) -> tuple[Array, Array | None, TimeMixState]:
        """Time mixing as the model calls it; only RWKV-7 has a use for `v_first`, the first layer's values."""
        y, state = self.att(x, state, axes=axes, **rows)
        return y, v_first, state

    def __call__(
        self, x: Array, state: State, v_first: Array | None, *, axes: MeshAxes = UNSHARDED, **rows: Array | None
    ) -> tuple[Array, Array | None, State]:
        """x [B, T, C], the block's state, the first layer's values -> the same three, after the block.

        Args:
          axes, and in rows `segment_ids` and `lengths`: as `LanguageModel.hidden` has them.
        """
        if self.is_first:
            x = self.ln0(x)
        with jax.named_scope("time_mix"):
            before = TimeMixState(state.att_shift, state.wkv)
            entering = copy_to_tensor_parallel(self.ln1(x), axes.tensor)
            y, v_first, att = self.mix_time(entering, before, v_first, axes=axes, **rows)
            x = x + y
        with jax.named_scope("channel_mix"):
            y, ffn_shift = self.ffn(
                copy_to_tensor_parallel(self.ln2(x), axes.tensor), state.ffn_shift, axes=axes, **rows
            )
            x = x + y
        return x, v_first, State(att.shift, ffn_shift, att.wkv)


SHARED_AXES: dict[str, Axes] = {
    "emb.weight": ("vocab", "embed"),
    "head.weight": ("vocab", "embed"),
    **{f"{norm}.{name}": (None,) for norm in ("ln0", "ln1", "ln2", "ln_out") for name in ("weight", "bias")},
}
"""What the axes of the parameters mean that every generation has."""


class LanguageModel(nnx.Module):
    """A causal language model with an explicit state; a generation names its block, state and parameter groups."""

    block_type: ClassVar[type[Block]]
    block_axes: ClassVar[dict[str, Axes]]
    """What the axes of a block's own parameters mean, by official name within the block."""

    @staticmethod
    def initial_block_state(config: ModelConfig, batch_size: int, axes: MeshAxes = UNSHARDED) -> Any:
        """The empty state of one block."""
        raise NotImplementedError

    @classmethod
    def parameter_axes(cls, path: tuple[str, ...]) -> Axes:
        """What the axes of a parameter in one layer mean.

        Args:
          path: official names from the root, such as ("blocks", "att", "key", "weight").
        """
        name = ".".join(path[1:] if path[0] in ("blocks", "first_block") else path)
        return (SHARED_AXES | cls.block_axes)[name]

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

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, shard_params: PartTransform = identity) -> None:
        """Draws the official initial values.

        Args:
          shard_params: applied to each part as soon as it is drawn; keeps a device's shard where the whole would
            not fit.

        Raises:
          ConfigError: the config is of a generation that this class does not serve.
        """
        if not isinstance(self, config.spec.load_model_class()):
            served = ", ".join(spec.name for spec in all_specs() if isinstance(self, spec.load_model_class()))
            raise ConfigError(
                f"model.generation = {config.spec.name!r}: {type(self).__name__} is {served}; "
                "rwkv_jax.models.model_type(config) is the class of a generation"
            )
        self.config = config
        self.emb = shard_params("emb", Embedding(self.initial_embedding(config, rngs)))
        self.first_block = shard_params("first_block", self.block_type(config, 0, rngs=rngs))
        layers = jnp.arange(1, config.num_layers, dtype=config.parameter_dtype)
        keys = jax.random.split(rngs.params(), config.num_layers - 1)

        def draw(layer_and_key: tuple[Array, Array]) -> Block:
            layer, key = layer_and_key
            return shard_params("blocks", self.block_type(config, layer, rngs=nnx.Rngs(key)))

        # One layer after the other: what it takes to draw one is a multiple of its size.
        self.blocks = jax.lax.map(draw, (layers, keys))
        self.ln_out = shard_params("ln_out", LayerNorm(config.width, config.parameter_dtype))
        self.head = shard_params("head", Linear(self.initial_head(config, rngs)))

    @staticmethod
    def initial_embedding(config: ModelConfig, rngs: nnx.Rngs) -> Array:
        """Initial token vectors [V, C]: uniform in +-1e-4, as the official trainers have them from RWKV-5.2 on.

        (That of the previews 5.0 and 5.1 takes its learning rate, which is of that size, for the bound.)
        """
        return uniform(rngs.params(), (config.vocab_size, config.width), 1e-4, config.parameter_dtype)

    @staticmethod
    def initial_head(config: ModelConfig, rngs: nnx.Rngs) -> Array:
        """Initial output head [V, C]: orthogonal, with the official gain."""
        shape = (config.vocab_size, config.width)
        return orthogonal(rngs.params(), shape, head_gain(*shape), config.parameter_dtype)

    @staticmethod
    def alike_on_shards(state: Any, axes: MeshAxes) -> Any:
        """A state of which JAX knows what all shards of `axes.tensor` hold alike."""
        att_shift, ffn_shift = (as_replicated(shift, axes.tensor) for shift in (state.att_shift, state.ffn_shift))
        return State(att_shift, ffn_shift, state.wkv)

    @property
    def is_stacked(self) -> bool:
        """Whether layers 1 to L - 1 are one block with a leading axis, as they are drawn; see `decoding.unstacked`."""
        return not isinstance(self.blocks, nnx.List)

    def initial_state(self, batch_size: int, axes: MeshAxes = UNSHARDED) -> Any:
        """The empty state of `batch_size` texts; arrays have a leading axis L, or `unstacked` layers their own."""
        block = self.initial_block_state(self.config, batch_size, axes)
        if not self.is_stacked:
            # Arrays of their own, or they could not be donated.
            return tuple(jax.tree.map(jnp.copy, block) for _ in range(self.config.num_layers))
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (self.config.num_layers, *x.shape)), block)

    def empty_state(self, batch_size: int, axes: MeshAxes = UNSHARDED) -> Any:
        """What the layers are given where a call is without a state."""
        return self.initial_state(batch_size, axes)

    def hidden(
        self,
        tokens: Array | None,
        state: Any = None,
        *,
        segment_ids: Array | None = None,
        lengths: Array | None = None,
        inputs_embeds: Array | None = None,
        remat: Remat = "none",
        axes: MeshAxes = UNSHARDED,
        gather_params: PartTransform = identity,
    ) -> tuple[Array, Any]:
        """What the head reads.

        Args:
          tokens: [B, T] integers in [0, V), T from 1; None where `inputs_embeds` is given.
          state: what an earlier call returned; None is the start of a text.
          segment_ids: integers [B, T]; a new text, with nothing before it, begins where the id changes along a row. The
            first segment of a row continues `state`.
          lengths: integers [B] from 0 to T; steps beyond a row's length leave its state as it was, and what is returned
            for them means nothing.
          inputs_embeds: [B, T, C], in place of the embedding's vectors.
          remat: what the backward pass recomputes: `none` keeps the matrix products, `operator` what the recurrence
            read, `full` only each block's input.
          axes: the mesh axes over which the model is split, within `jax.shard_map`; tokens and segment_ids are then a
            shard's own, the state's heads too, its shifts and lengths those of the whole.
          gather_params: applied to each part right before it is used, and again where the backward pass recomputes;
            all-gathers weights that are scattered over devices.

        Returns:
          [B, T, C] in the compute dtype, after the last norm, and the next state.

        Raises:
          ValueError: shapes or dtypes that do not go together, a state of another model or batch, or, where values are
            at hand (outside jit), token ids or lengths out of range.
        """
        x, state, _ = self._run(
            tokens, state, segment_ids, lengths, inputs_embeds, remat=remat, axes=axes, gather_params=gather_params
        )
        return gather_params("ln_out", self.ln_out)(x), state

    def residual_stream(
        self,
        tokens: Array | None,
        state: Any = None,
        *,
        segment_ids: Array | None = None,
        lengths: Array | None = None,
        inputs_embeds: Array | None = None,
    ) -> tuple[Array, Any]:
        """The hidden states of every layer: [L, B, T, C], what each block hands on, and the next state; see `hidden`.

        The head reads `ln_out` of the last of them.
        """
        _, state, streams = self._run(tokens, state, segment_ids, lengths, inputs_embeds, every_layer=True)
        return streams, state

    def logits(self, hidden: Array) -> Array:
        """Logits [..., V] in at least float32 of hidden vectors [..., C]; a shard's, of its own part of V."""
        return linear(hidden, self.head.weight[...], out_dtype=jnp.promote_types(hidden.dtype, jnp.float32))

    def __call__(
        self,
        tokens: Array | None,
        state: Any = None,
        *,
        segment_ids: Array | None = None,
        lengths: Array | None = None,
        inputs_embeds: Array | None = None,
        remat: Remat = "none",
    ) -> tuple[Array, Any]:
        """Logits [B, T, V] of the token after each of tokens [B, T], and the next state; see `hidden`."""
        x, state = self.hidden(
            tokens, state, segment_ids=segment_ids, lengths=lengths, inputs_embeds=inputs_embeds, remat=remat
        )
        with jax.named_scope("head"):
            return self.logits(x), state

    def _run(
        self,
        tokens: Array | None,
        state: Any,
        segment_ids: Array | None,
        lengths: Array | None,
        inputs_embeds: Array | None,
        *,
        remat: Remat = "none",
        axes: MeshAxes = UNSHARDED,
        gather_params: PartTransform = identity,
        every_layer: bool = False,
    ) -> tuple[Array, Any, Any]:
        x = self._inputs(tokens, inputs_embeds, axes, gather_params)
        batch, time = x.shape[:2]
        segment_ids = None if segment_ids is None else check_segment_ids(segment_ids, batch, time)
        whole_time = time if axes.sequence is None else time * jax.lax.axis_size(axes.sequence)
        lengths = check_lengths(lengths, batch, whole_time)
        states = self.empty_state(batch, axes) if state is None else self._check_state(state, batch, axes)
        rows = {"segment_ids": segment_ids, "lengths": lengths}
        policy = jax.checkpoint_policies.save_only_these_names(*SAVED_BY_REMAT[remat])

        def run_block(name: str, block: Block, x: Array, state: State, v_first: Array | None) -> Any:
            return gather_params(name, block)(x, state, v_first, axes=axes, **rows)

        def run(name: str, **options: Any) -> Any:
            return jax.checkpoint(functools.partial(run_block, name), policy=policy, **options)

        if not self.is_stacked:
            x, v_first, next_state = run("first_block")(self.first_block, x, states[0], None)
            next_states, streams = [next_state], [x]
            for block, block_state in zip(self.blocks, states[1:], strict=True):
                x, _, next_state = run("blocks")(block, x, block_state, v_first)
                next_states.append(next_state)
                streams.append(x)
            states = tuple(self.alike_on_shards(state, axes) for state in next_states)
            return x, states, jnp.stack(streams) if every_layer else None

        first_state = jax.tree.map(lambda s: s[0], states)
        other_states = jax.tree.map(lambda s: s[1:], states)
        x_first, v_first, first_state = run("first_block")(self.first_block, x, first_state, None)

        def body(x: Array, layer: tuple[Any, State]) -> tuple[Array, tuple[State, Any]]:
            # The scan itself keeps XLA from undoing the recomputation; block 0 needs the barriers. The first layer's
            # values are no part of the carry, of which the backward pass keeps a copy for each layer.
            x, _, next_state = run("blocks", prevent_cse=False)(layer[0], x, layer[1], v_first)
            return x, (next_state, x if every_layer else None)

        x, (other_states, streams) = jax.lax.scan(body, x_first, (self.blocks, other_states))
        states = jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), first_state, other_states)
        states = self.alike_on_shards(states, axes)
        return x, states, jnp.concatenate([x_first[None], streams]) if every_layer else None

    def _inputs(
        self, tokens: Array | None, inputs_embeds: Array | None, axes: MeshAxes, gather_params: PartTransform
    ) -> Array:
        if (tokens is None) == (inputs_embeds is None):
            raise ValueError("give tokens, or inputs_embeds in their place, and not both")
        width, vocab_size = self.config.width, self.config.vocab_size
        if inputs_embeds is not None:
            inputs_embeds = jnp.asarray(inputs_embeds)
            if inputs_embeds.ndim != 3 or 0 in inputs_embeds.shape or inputs_embeds.shape[-1] != width:
                raise ValueError(f"inputs_embeds: shape {inputs_embeds.shape} must be [B, T, C = {width}], T from 1")
            return inputs_embeds.astype(self.config.dtype)
        given, tokens = tokens, jnp.asarray(tokens)
        if tokens.ndim != 2 or 0 in tokens.shape or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(
                f"tokens: {tokens.dtype} of shape {tokens.shape} must be integers of shape [B, T], T from 1"
            )
        if values_at_hand(given):
            values = np.asarray(given)
            if values.min() < 0 or values.max() >= vocab_size:
                raise ValueError(
                    f"tokens: from {values.min()} to {values.max()} must lie from 0 to V - 1 = {vocab_size - 1}"
                )
        return gather_params("emb", self.emb)(tokens, self.config.dtype, axes)

    def _check_state(self, state: Any, batch: int, axes: MeshAxes) -> Any:
        expected = jax.eval_shape(lambda: self.initial_state(batch, axes))
        if jax.tree.structure(state) != jax.tree.structure(expected):
            raise ValueError(
                f"state: is none of {self.config.title}, whose states have the form of "
                f"model.initial_state(batch_size={batch})"
            )
        for (path, leaf), like in zip(jax.tree.leaves_with_path(state), jax.tree.leaves(expected), strict=True):
            if leaf.shape != like.shape:
                raise ValueError(f"state{jax.tree_util.keystr(path)}: shape {leaf.shape} must be {like.shape}")
        return state
