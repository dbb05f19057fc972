"""The language model common to all generations: embedding, blocks scanned over layers, norm, head.

The first layer differs from the others (it has ln0, and in RWKV-7 no value residual), so it is separate as
`first_block`; layers 1 to L - 1 are one block with stacked parameters, run by `jax.lax.scan`, so that compile time does
not grow with depth. For decoding there is a form with separate arrays per layer (decoding.py).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from rwkv_jax.config import ConfigError, ModelConfig, Remat
from rwkv_jax.config.generations import StateArray, all_specs
from rwkv_jax.models.context import UNSHARDED, MeshAxes, SequenceContext
from rwkv_jax.models.layers import (
    CHECKPOINT_MATMUL,
    CHECKPOINT_WKV_INPUT,
    Embedding,
    LayerNorm,
    Linear,
    as_replicated,
    copy_to_tensor_parallel,
    head_gain,
    linear,
    orthogonal,
    uniform,
    wide_dtype,
)
from rwkv_jax.models.state import State, TimeMixState, check_state
from rwkv_kernels.arguments import check_lengths, check_segment_ids, values_at_hand

Axes = tuple[str | None, ...]
"""Logical names of a parameter's axes: fields of `rwkv_jax.parallel.rules.Rules`; None for an axis never split."""

Part = TypeVar("Part", bound=nnx.Module)


class PartTransform(Protocol):
    """A function applied to each part of a model: `emb`, `first_block`, one layer of `blocks`, `ln_out`, `head`."""

    def __call__(self, name: str, part: Part, /) -> Part:
        """Returns the transformed part."""
        ...


def identity(name: str, part: Part) -> Part:
    """Returns every part unchanged."""
    del name
    return part


SAVED_BY_REMAT: dict[Remat, tuple[str, ...]] = {
    "none": (CHECKPOINT_MATMUL, "wkv"),
    "operator": (CHECKPOINT_WKV_INPUT, "wkv"),
    "full": (),
}
"""Checkpoint policy of a block, which also stores its input: matrix products, the operator's inputs, nothing."""


class TimeMixOutput(NamedTuple):
    """Output of a block's time mixing."""

    y: Array
    """[B, T, C]."""
    v_first: Array | None
    """[B, T, C], the first layer's values; only RWKV-7 has them."""
    state: TimeMixState
    """The next state."""


class BlockOutput(NamedTuple):
    """Output of a block."""

    x: Array
    """[B, T, C], the residual stream."""
    v_first: Array | None
    """[B, T, C], the first layer's values; only RWKV-7 has them."""
    state: Any
    """The next state."""


class HiddenOutput(NamedTuple):
    """Output of the blocks."""

    hidden: Array
    """[B, T, C] after the last norm; of `residual_stream`, [L, B, T, C]."""
    state: Any
    """The next state."""


class ModelOutput(NamedTuple):
    """Output of a model."""

    logits: Array
    """[B, T, V] of the next token, in at least float32."""
    state: Any
    """The next state."""


class Block(nnx.Module):
    """A residual block of layer l: time mixing, then channel mixing, each after a layer norm."""

    time_mix_type: ClassVar[type[Any]]
    """A `Mixer`."""
    channel_mix_type: ClassVar[type[Any]]
    """A `Mixer`."""

    def __init__(self, config: ModelConfig, layer: int | Array, *, rngs: nnx.Rngs) -> None:
        dtype = config.parameter_dtype
        # A traced layer index belongs to a stacked layer, never to the first.
        self.is_first = isinstance(layer, int) and layer == 0
        if self.is_first:
            self.ln0 = LayerNorm(config.width, dtype)
        self.ln1 = LayerNorm(config.width, dtype)
        self.ln2 = LayerNorm(config.width, dtype)
        self.att = self.time_mix_type(config, layer, rngs=rngs)
        self.ffn = self.channel_mix_type(config, layer, rngs=rngs)

    def mix_time(
        self, x: Array, *, state: TimeMixState, v_first: Array | None, context: SequenceContext
    ) -> TimeMixOutput:
        """Time mixing with the model's arguments; only RWKV-7 uses `v_first`, the first layer's values."""
        y, state = self.att.mix(x, state=state, context=context)
        return TimeMixOutput(y, v_first, state)

    def __call__(self, x: Array, *, state: Any, v_first: Array | None, context: SequenceContext) -> BlockOutput:
        """x [B, T, C], the block's state, the first layer's values -> the same three, after the block."""
        if self.is_first:
            x = self.ln0(x)
        with jax.named_scope("time_mix"):
            y = copy_to_tensor_parallel(self.ln1(x), context.axes.tensor)
            y, v_first, att = self.mix_time(y, state=state.time_mix, v_first=v_first, context=context)
            x = x + y
        with jax.named_scope("channel_mix"):
            y = copy_to_tensor_parallel(self.ln2(x), context.axes.tensor)
            y, ffn_shift = self.ffn.mix(y, state=state.ffn_shift, context=context)
            x = x + y
        return BlockOutput(x, v_first, State(att.shift, ffn_shift, att.wkv, generation=state.generation))


SHARED_AXES: dict[str, Axes] = {
    "emb.weight": ("vocab", "embed"),
    "head.weight": ("vocab", "embed"),
    **{f"{norm}.{name}": (None,) for norm in ("ln0", "ln1", "ln2", "ln_out") for name in ("weight", "bias")},
}
"""Logical axes of the parameters common to all generations."""


class LanguageModel(nnx.Module):
    """A causal language model with an explicit state; generations define block, state and parameter groups."""

    block_type: ClassVar[type[Block]]
    block_axes: ClassVar[dict[str, Axes]]
    """Logical axes of a block's own parameters, by official name within the block."""

    learning_rate_factors: ClassVar[dict[str, float]] = {}
    """Factors on the learning rate in the official trainer, by a parameter's last name; 1 for all others."""

    @classmethod
    def initial_block_state(cls, config: ModelConfig, batch_size: int, axes: MeshAxes = UNSHARDED) -> Any:
        """The empty state of one block: zeros of the shapes in its spec, of which a shard has its heads."""

        def zeros(array: StateArray) -> Array:
            sizes = zip(array.shape, array.axes, strict=True)
            own = (size // axes.num_tensor_shards if axis == "heads" else size for size, axis in sizes)
            return jnp.zeros((batch_size, *own), array.dtype)

        _, *arrays = config.spec.state(config)  # of equal shifts
        shift, wkv = map(zeros, arrays)
        return State(shift, shift, wkv, generation=config.generation)

    @classmethod
    def parameter_axes(cls, path: tuple[str, ...]) -> Axes:
        """Logical axes of a parameter in one layer.

        Args:
          path: official names from the root, such as ("blocks", "att", "key", "weight").
        """
        name = ".".join(path[1:] if path[0] in ("blocks", "first_block") else path)
        return (SHARED_AXES | cls.block_axes)[name]

    @classmethod
    def parameter_group(cls, path: tuple[str, ...], ndim: int) -> tuple[float, bool]:
        """A parameter's learning-rate factor and weight decay in the official trainer.

        Args:
          path: official names from the root, such as ("blocks", "att", "key", "weight").
          ndim: axes of the parameter in one layer.

        Returns:
          The factor on its learning rate, and whether its weight decays: all matrices do.
        """
        return cls.learning_rate_factors.get(path[-1], 1.0), path[-1] == "weight" and ndim >= 2

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, shard_params: PartTransform = identity) -> None:
        """Draws the official initial values.

        Args:
          shard_params: applied to each part as soon as it is drawn, to keep only a device's shard.

        Raises:
          ConfigError: the config is of another generation than this class.
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

        # One layer at a time: drawing one takes a multiple of its memory.
        self.blocks = jax.lax.map(draw, (layers, keys))
        self.ln_out = shard_params("ln_out", LayerNorm(config.width, config.parameter_dtype))
        self.head = shard_params("head", Linear(self.initial_head(config, rngs)))

    @classmethod
    def initial_embedding(cls, config: ModelConfig, rngs: nnx.Rngs) -> Array:
        """Initial token vectors [V, C]: uniform in +-1e-4, as the official trainers have them from RWKV-5.2 on.

        (The trainer of the previews 5.0 and 5.1 uses its learning rate, of the same size, as the bound.)
        """
        return uniform(rngs.params(), (config.vocab_size, config.width), 1e-4, config.parameter_dtype)

    @classmethod
    def initial_head(cls, config: ModelConfig, rngs: nnx.Rngs) -> Array:
        """Initial output head [V, C]: orthogonal, with the official gain."""
        shape = (config.vocab_size, config.width)
        return orthogonal(rngs.params(), shape, head_gain(*shape), config.parameter_dtype)

    @classmethod
    def replicate_state(cls, state: Any, axes: MeshAxes) -> Any:
        """The state, with arrays that are equal on all shards of `axes.tensor` marked as replicated."""
        att_shift, ffn_shift = (as_replicated(shift, axes.tensor) for shift in (state.att_shift, state.ffn_shift))
        return dataclasses.replace(state, att_shift=att_shift, ffn_shift=ffn_shift)

    @property
    def is_stacked(self) -> bool:
        """Whether layers 1 to L - 1 are stacked in one block, as initialized; see `decoding.unstacked`."""
        return not isinstance(self.blocks, nnx.List)

    def block(self, layer: int) -> Block:
        """Layer l, from 0 to L - 1; of stacked layers, a new module with slices of their arrays.

        Raises:
          IndexError: there is no such layer.
        """
        if not 0 <= layer < self.config.num_layers:
            raise IndexError(f"layer {layer}: must lie from 0 to L - 1 = {self.config.num_layers - 1}")
        if layer == 0:
            return self.first_block
        if not self.is_stacked:
            return self.blocks[layer - 1]
        graphdef, params = nnx.split(self.blocks, nnx.Param)
        return nnx.merge(graphdef, jax.tree.map(lambda x: x[layer - 1], params))

    def initial_state(self, batch_size: int, axes: MeshAxes = UNSHARDED) -> Any:
        """The empty state of `batch_size` texts; arrays have a leading axis L; a tuple of states if `unstacked`."""
        block = self.initial_block_state(self.config, batch_size, axes)
        if not self.is_stacked:
            # Distinct arrays, or they could not be donated.
            return tuple(jax.tree.map(jnp.copy, block) for _ in range(self.config.num_layers))
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (self.config.num_layers, *x.shape)), block)

    def empty_state(self, batch_size: int, axes: MeshAxes = UNSHARDED) -> Any:
        """The layers' state for a call without one."""
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
    ) -> HiddenOutput:
        """The final hidden states, the head's input.

        Args:
          tokens: [B, T] integers in [0, V), T >= 1; None if `inputs_embeds` is given.
          state: from an earlier call; None is the start of a text.
          segment_ids: integers [B, T]; a new text, with an empty state, begins where the id changes along a row. The
            first segment of a row continues `state`.
          lengths: integers [B] from 0 to T; steps beyond a row's length do not change its state, and their outputs are
            undefined.
          inputs_embeds: [B, T, C], instead of embedded tokens.
          remat: what the backward pass recomputes: `none` stores matrix products, `operator` the WKV operator's
            inputs, `full` only each block's input.
          axes: the mesh axes over which the model is split, within `jax.shard_map`; tokens, segment_ids and the state's
            heads are then the shard's, its shifts and lengths those of the whole.
          gather_params: applied to each part right before it is used, again in recomputation; all-gathers sharded
            weights.

        Returns:
          [B, T, C] in the compute dtype, after the last norm, and the next state.

        Raises:
          ValueError: incompatible shapes or dtypes, a state of another model or batch, or, if values are concrete
            (outside jit), token ids or lengths out of range.
        """
        x, state, _ = self._run(
            tokens, state, segment_ids, lengths, inputs_embeds, remat=remat, axes=axes, gather_params=gather_params
        )
        return HiddenOutput(gather_params("ln_out", self.ln_out)(x), state)

    def residual_stream(
        self,
        tokens: Array | None,
        state: Any = None,
        *,
        segment_ids: Array | None = None,
        lengths: Array | None = None,
        inputs_embeds: Array | None = None,
    ) -> HiddenOutput:
        """The output of every block, [L, B, T, C], and the next state; see `hidden`.

        The head's input is `ln_out` of the last one.
        """
        _, state, streams = self._run(tokens, state, segment_ids, lengths, inputs_embeds, every_layer=True)
        return HiddenOutput(streams, state)

    def logits(self, hidden: Array) -> Array:
        """Logits [..., V] in at least float32 of hidden vectors [..., C]; on a shard, of its part of V."""
        return linear(hidden, self.head.weight[...], out_dtype=wide_dtype(hidden.dtype))

    def __call__(
        self,
        tokens: Array | None,
        state: Any = None,
        *,
        segment_ids: Array | None = None,
        lengths: Array | None = None,
        inputs_embeds: Array | None = None,
        remat: Remat = "none",
    ) -> ModelOutput:
        """Next-token logits [B, T, V] for tokens [B, T], and the next state; see `hidden`."""
        x, state = self.hidden(
            tokens, state, segment_ids=segment_ids, lengths=lengths, inputs_embeds=inputs_embeds, remat=remat
        )
        with jax.named_scope("head"):
            return ModelOutput(self.logits(x), state)

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
        if state is not None:
            expected = jax.eval_shape(lambda: self.initial_state(batch, axes))
            source = f"model.initial_state(batch_size={batch})"
            check_state(state, expected, owner=self.config.title, source=source)
        states = self.empty_state(batch, axes) if state is None else state
        context = SequenceContext(segment_ids, lengths, axes)
        policy = jax.checkpoint_policies.save_only_these_names(*SAVED_BY_REMAT[remat])

        def run_block(name: str, block: Block, x: Array, state: State, v_first: Array | None) -> Any:
            # All by name: nnx.tabulate cannot print a call none of whose named arguments has an array.
            return gather_params(name, block)(x=x, state=state, v_first=v_first, context=context)

        def run(name: str, **options: Any) -> Any:
            return jax.checkpoint(functools.partial(run_block, name), policy=policy, **options)

        if not self.is_stacked:
            x, v_first, next_state = run("first_block")(self.first_block, x, states[0], None)
            next_states, streams = [next_state], [x]
            for block, block_state in zip(self.blocks, states[1:], strict=True):
                x, _, next_state = run("blocks")(block, x, block_state, v_first)
                next_states.append(next_state)
                streams.append(x)
            states = tuple(self.replicate_state(state, axes) for state in next_states)
            return x, states, jnp.stack(streams) if every_layer else None

        first_state = jax.tree.map(lambda s: s[0], states)
        other_states = jax.tree.map(lambda s: s[1:], states)
        x_first, v_first, first_state = run("first_block")(self.first_block, x, first_state, None)

        def body(x: Array, layer: tuple[Any, State]) -> tuple[Array, tuple[State, Any]]:
            # The scan itself keeps XLA from undoing the recomputation; block 0 needs the barriers. The first layer's
            # values are not in the carry, which the backward pass would store once per layer.
            x, _, next_state = run("blocks", prevent_cse=False)(layer[0], x, layer[1], v_first)
            return x, (next_state, x if every_layer else None)

        x, (other_states, streams) = jax.lax.scan(body, x_first, (self.blocks, other_states))
        states = jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), first_state, other_states)
        states = self.replicate_state(states, axes)
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
