"""The language model common to all generations: embedding, blocks scanned over layers, norm, head.

The first layer differs from the others (it has ln0, and in RWKV-7 no value residual), so it is separate as
`first_block`; layers 1 to L - 1 are one block with stacked parameters, run by `jax.lax.scan`, so that compile time does
not grow with depth. In a hybrid every run of equal layers is such a stack (stacks.py). For decoding there is a form
with separate arrays per layer (decoding.py).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar, Protocol, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from rwkv_jax.config import ConfigError, ModelConfig, Remat
from rwkv_jax.config.generations import all_specs
from rwkv_jax.models.block import SAVED_BY_REMAT, Block
from rwkv_jax.models.context import UNSHARDED, MeshAxes, SequenceContext, check_tokens
from rwkv_jax.models.grid import check_grid
from rwkv_jax.models.layers import (
    Embedding,
    LayerNorm,
    Linear,
    as_replicated,
    head_gain,
    linear,
    orthogonal,
    uniform,
    wide_dtype,
)
from rwkv_jax.models.outputs import HiddenOutput, ModelOutput
from rwkv_jax.models.stacks import FIRST, LayerRun, is_layers, layer_runs, run_stacks
from rwkv_jax.models.state import State, check_state, zeros_of
from rwkv_kernels.arguments import check_lengths, check_segment_ids

Axes = tuple[str | None, ...]
"""Logical names of a parameter's axes: fields of `rwkv_jax.parallel.rules.Rules`; None for an axis never split."""

Part = TypeVar("Part", bound=nnx.Module)


class PartTransform(Protocol):
    """A function applied to each part of a model: `emb`, `first_block`, one layer of a stack, `ln_out`, `head`."""

    def __call__(self, name: str, part: Part, /) -> Part:
        """Returns the transformed part."""
        ...


def identity(name: str, part: Part) -> Part:
    """Returns every part unchanged."""
    del name
    return part


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

    blocks: Any
    """Layers 1 to L - 1: stacked in one block, or a list; a hybrid's stacks have names of their own (stacks.py)."""

    reads_tokens: ClassVar[bool] = False
    """Whether layers have tables by token, so that a call with `inputs_embeds` needs the tokens, too."""

    learning_rate_factors: ClassVar[dict[str, float]] = {}
    """Factors on the learning rate in the official trainer, by a parameter's last name; 1 for all others."""

    @classmethod
    def initial_block_state(cls, config: ModelConfig, batch_size: int, axes: MeshAxes = UNSHARDED) -> Any:
        """The empty state of one block: zeros of the shapes in its spec, of which a shard has its heads."""
        _, *arrays = config.spec.state(config)  # of equal shifts
        shift, wkv = (zeros_of(array, batch_size, axes) for array in arrays)
        return State(shift, shift, wkv, generation=config.generation)

    @classmethod
    def parameter_axes(cls, path: tuple[str, ...]) -> Axes:
        """Logical axes of a parameter in one layer.

        Args:
          path: official names from the root, such as ("blocks", "att", "key", "weight").
        """
        name = ".".join(path[1:] if is_layers(path[0]) else path)
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

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        shard_params: PartTransform = identity,
        has_embedding: bool = True,
        has_head: bool = True,
    ) -> None:
        """Draws the official initial values.

        Args:
          shard_params: applied to each part as soon as it is drawn, to keep only a device's shard.
          has_embedding: whether there is a table of token vectors; without it calls need `inputs_embeds`.
          has_head: whether there is an output head; without it there are no logits, only hidden states.

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
        if has_embedding:
            self.emb = shard_params("emb", Embedding(self.initial_embedding(config, rngs)))
        first, *runs = self.layer_runs
        self.first_block = shard_params(FIRST, self.new_block(config, first.kind, 0, rngs))
        layers = jnp.arange(1, config.num_layers, dtype=config.parameter_dtype)
        keys = jax.random.split(rngs.params(), config.num_layers - 1)

        def draw(run: LayerRun, layer_and_key: tuple[Array, Array]) -> Block:
            layer, key = layer_and_key
            return shard_params(run.name, self.new_block(config, run.kind, layer, nnx.Rngs(key)))

        for run in runs:
            own = slice(run.layers.start - 1, run.layers.stop - 1)
            # One layer at a time: drawing one takes a multiple of its memory.
            setattr(self, run.name, jax.lax.map(functools.partial(draw, run), (layers[own], keys[own])))
        self.ln_out = shard_params("ln_out", self.last_norm(config))
        if has_head and not config.tied_head:
            self.head = shard_params("head", Linear(self.initial_head(config, rngs)))

    @classmethod
    def last_norm(cls, config: ModelConfig) -> Any:
        """The norm before the head, [..., C] -> [..., C]."""
        return LayerNorm(config.width, config.parameter_dtype)

    @classmethod
    def new_block(cls, config: ModelConfig, kind: str, layer: int | Array, rngs: nnx.Rngs) -> Block:
        """A block with initial values.

        Args:
          kind: of the layer (`GenerationSpec.layer_kinds`).
        """
        del kind  # all are alike
        return cls.block_type(config, layer, rngs=rngs)

    @property
    def layer_runs(self) -> tuple[LayerRun, ...]:
        """How layers are stacked."""
        return layer_runs(self.config.spec.layer_kinds(self.config))

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
        """Whether layers after the first are stacked, as initialized; see `decoding.unstacked`."""
        return not isinstance(getattr(self, "blocks", None), nnx.List)

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
        run = next(run for run in self.layer_runs if layer in run.layers)
        graphdef, params = nnx.split(getattr(self, run.name), nnx.Param)
        return nnx.merge(graphdef, jax.tree.map(lambda x: x[layer - run.layers.start], params))

    @classmethod
    def states_by_kind(cls, state: Any) -> dict[str, Any]:
        """The parts of a state that belong to the kinds of layers (`GenerationSpec.layer_kinds`)."""
        return {"": state}

    @classmethod
    def join_kinds(cls, states: dict[str, Any]) -> Any:
        """The state of its parts, the inverse of `states_by_kind`."""
        return states[""]

    @classmethod
    def initial_layer_states(cls, config: ModelConfig, batch_size: int, axes: MeshAxes = UNSHARDED) -> tuple[Any, ...]:
        """The empty state of each layer."""
        of_kind = cls.states_by_kind(cls.initial_block_state(config, batch_size, axes))
        return tuple(of_kind[kind] for kind in config.spec.layer_kinds(config))

    def initial_state(self, batch_size: int, axes: MeshAxes = UNSHARDED) -> Any:
        """The empty state of `batch_size` texts; a tuple of the layers' states if `unstacked`.

        Arrays have a leading axis L, in a hybrid the number of layers of the kind that they belong to.
        """
        if not self.is_stacked:
            # Distinct arrays, or they could not be donated.
            return jax.tree.map(jnp.copy, self.initial_layer_states(self.config, batch_size, axes))
        kinds = self.config.spec.layer_kinds(self.config)

        def stacked(kind: str, block: Any) -> Any:
            return jax.tree.map(lambda x: jnp.broadcast_to(x, (kinds.count(kind), *x.shape)), block)

        of_kind = self.states_by_kind(self.initial_block_state(self.config, batch_size, axes))
        return self.join_kinds({kind: stacked(kind, block) for kind, block in of_kind.items()})

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
        grid: tuple[int, int] | None = None,
        remat: Remat = "none",
        axes: MeshAxes = UNSHARDED,
        gather_params: PartTransform = identity,
    ) -> HiddenOutput:
        """The final hidden states, the head's input.

        Args:
          tokens: [B, T] integers in [0, V), T >= 1; None if `inputs_embeds` is given, unless the model `reads_tokens`.
          state: from an earlier call; None is the start of a text.
          segment_ids: integers [B, T]; a new text, with an empty state, begins where the id changes along a row. The
            first segment of a row continues `state`.
          lengths: integers [B] from 0 to T; steps beyond a row's length do not change its state, and their outputs are
            undefined.
          inputs_embeds: [B, T, C], instead of embedded tokens.
          grid: rows and columns of an image whose patches are a row's tokens (grid.py); None for text.
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
            tokens,
            state,
            segment_ids,
            lengths,
            inputs_embeds,
            grid=grid,
            remat=remat,
            axes=axes,
            gather_params=gather_params,
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
        axes: MeshAxes = UNSHARDED,
        gather_params: PartTransform = identity,
    ) -> HiddenOutput:
        """The output of every block, [L, B, T, C], and the next state; see `hidden`.

        The head's input is `ln_out` of the last one.
        """
        _, state, streams = self._run(
            tokens, state, segment_ids, lengths, inputs_embeds, axes=axes, gather_params=gather_params, every_layer=True
        )
        return HiddenOutput(streams, state)

    @property
    def head_weight(self) -> Any:
        """The head's matrix [V, C]: the embedding's if `config.tied_head`."""
        if not self.config.tied_head and not hasattr(self, "head"):
            raise ValueError("logits: the model has no head (has_head=False); take its hidden states")
        return (self.emb if self.config.tied_head else self.head).weight[...]

    def gather_head(self, gather_params: PartTransform) -> None:
        """Replaces the part that has the head's matrix by what `gather_params` makes of it, before `logits`."""
        if self.config.tied_head:
            self.emb = gather_params("emb", self.emb)
        else:
            self.head = gather_params("head", self.head)

    def logits(self, hidden: Array) -> Array:
        """Logits [..., V] in at least float32 of hidden vectors [..., C]; on a shard, of its part of V."""
        return linear(hidden, self.head_weight, out_dtype=wide_dtype(hidden.dtype))

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
        grid: tuple[int, int] | None = None,
        remat: Remat = "none",
        axes: MeshAxes = UNSHARDED,
        gather_params: PartTransform = identity,
        every_layer: bool = False,
    ) -> tuple[Array, Any, Any]:
        x, tokens = self._inputs(tokens, inputs_embeds, axes, gather_params)
        batch, time = x.shape[:2]
        segment_ids = None if segment_ids is None else check_segment_ids(segment_ids, batch, time)
        whole_time = time if axes.sequence is None else time * jax.lax.axis_size(axes.sequence)
        lengths = check_lengths(lengths, batch, whole_time)
        if state is not None:
            expected = jax.eval_shape(lambda: self.initial_state(batch, axes))
            source = f"model.initial_state(batch_size={batch})"
            check_state(state, expected, owner=self.config.title, source=source)
        states = self.empty_state(batch, axes) if state is None else state
        if grid is not None:
            check_grid(grid, time, segment_ids, lengths, axes)
        context = SequenceContext(segment_ids, lengths, tokens, grid=grid, axes=axes)
        policy = jax.checkpoint_policies.save_only_these_names(*SAVED_BY_REMAT[remat])

        def run_block(name: str, block: Block, x: Array, state: State, v_first: Any) -> Any:
            # All by name: nnx.tabulate cannot print a call none of whose named arguments has an array.
            return gather_params(name, block)(x=x, state=state, v_first=v_first, context=context)

        def run(name: str, **options: Any) -> Any:
            return jax.checkpoint(functools.partial(run_block, name), policy=policy, **options)

        if not self.is_stacked:
            v_first, next_states, streams = None, [], []
            for block, block_state in zip((self.first_block, *self.blocks), states, strict=True):
                name = "blocks" if next_states else FIRST
                x, values, next_state = run(name)(block, x, block_state, v_first)
                v_first = v_first if next_states else values
                next_states.append(next_state)
                streams.append(x)
            states = tuple(self.replicate_state(state, axes) for state in next_states)
            return x, states, jnp.stack(streams) if every_layer else None

        x, states, streams = run_stacks(self, x, states, run, every_layer=every_layer)
        return x, self.replicate_state(states, axes), streams

    def _inputs(
        self, tokens: Array | None, inputs_embeds: Array | None, axes: MeshAxes, gather_params: PartTransform
    ) -> tuple[Array, Array | None]:
        """The vectors of the tokens or those in their place, [B, T, C] in the compute dtype, and the ids."""
        if self.reads_tokens and tokens is None:
            raise ValueError(f"tokens: {self.config.title}'s layers have tables by token; give tokens, too")
        if not self.reads_tokens and (tokens is None) == (inputs_embeds is None):
            raise ValueError("give tokens, or inputs_embeds in their place, and not both")
        tokens = None if tokens is None else check_tokens(tokens, self.config.vocab_size)
        if inputs_embeds is None:
            if not hasattr(self, "emb"):
                raise ValueError("tokens: the model has no embedding (has_embedding=False); give inputs_embeds")
            assert tokens is not None
            return gather_params("emb", self.emb)(tokens, self.config.dtype, axes), tokens
        x, width = jnp.asarray(inputs_embeds), self.config.width
        if x.ndim != 3 or 0 in x.shape or x.shape[-1] != width:
            raise ValueError(f"inputs_embeds: shape {x.shape} must be [B, T, C = {width}], T from 1")
        if tokens is not None and tokens.shape != x.shape[:2]:
            raise ValueError(f"tokens: shape {tokens.shape} must be {x.shape[:2]}, as many as inputs_embeds")
        return x.astype(self.config.dtype), tokens
