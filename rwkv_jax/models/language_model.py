"""The skeleton that every generation shares: embedding, blocks scanned over layers, norm, head.

The first layer of RWKV-7 differs from the others (it owns ln0 and has no value residual), so it stands alone as
`first_block`; layers 1 to L - 1 are one block whose parameters have a leading axis, run by `jax.lax.scan`. Compile
time therefore does not grow with depth.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar, Generic, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from rwkv_jax.config import ModelConfig
from rwkv_jax.models.layers import KEPT, Embedding, LayerNorm, Linear, head_gain, linear, orthogonal, uniform

StateT = TypeVar("StateT")


class LanguageModel(nnx.Module, Generic[StateT]):
    """A causal language model with an explicit state; a generation names its block, state and parameter groups."""

    block_type: ClassVar[type[Any]]
    """Called with (config, layer, rngs=); its instances map (x, state, v_first) to the same three."""

    @staticmethod
    def initial_block_state(config: ModelConfig, batch_size: int) -> Any:
        """The empty state of one block."""
        raise NotImplementedError

    @staticmethod
    def parameter_group(path: tuple[str, ...], ndim: int) -> tuple[float, bool]:
        """The factor on a parameter's learning rate and whether its weight decays, from its path and axes."""
        raise NotImplementedError

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        vocab_size, width, dtype = config.vocab_size, config.width, config.parameter_dtype
        self.emb = Embedding(uniform(rngs.params(), (vocab_size, width), 1e-4, dtype))
        self.first_block = self.block_type(config, 0, rngs=rngs)
        layers = jnp.arange(1, config.num_layers, dtype=dtype)
        keys = jax.random.split(rngs.params(), config.num_layers - 1)
        self.blocks = jax.vmap(lambda layer, key: self.block_type(config, layer, rngs=nnx.Rngs(key)))(layers, keys)
        self.ln_out = LayerNorm(width, dtype)
        self.head = Linear(orthogonal(rngs.params(), (vocab_size, width), head_gain(vocab_size, width), dtype))

    def initial_state(self, batch_size: int) -> StateT:
        """The empty state of `batch_size` texts; every field has a leading axis L."""
        block = self.initial_block_state(self.config, batch_size)
        return jax.tree.map(lambda x: jnp.zeros((self.config.num_layers, *x.shape), x.dtype), block)

    def hidden(self, tokens: Array, state: StateT | None = None, *, remat: bool = False) -> tuple[Array, StateT]:
        """What the head reads.

        Args:
          tokens: [B, T] integers in [0, V), T from 1.
          state: what an earlier call returned; None is the start of a text.
          remat: keep only each block's input for the backward pass and recompute the rest.

        Returns:
          [B, T, C] in the compute dtype, after the last norm, and the next state.
        """
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(f"tokens: {tokens.dtype} of shape {tokens.shape} must be integers of shape [B, T]")
        states: StateT = self.initial_state(tokens.shape[0]) if state is None else state
        policies = jax.checkpoint_policies
        policy = policies.nothing_saveable if remat else policies.save_only_these_names(KEPT, "wkv")
        run = functools.partial(jax.checkpoint, _run_block, policy=policy)
        x = self.emb(tokens).astype(self.config.dtype)
        first_state = jax.tree.map(lambda s: s[0], states)
        other_states = jax.tree.map(lambda s: s[1:], states)
        x, v_first, first_state = run()(self.first_block, x, first_state, None)

        def body(carry: tuple[Array, Array], layer: tuple[Any, StateT]) -> tuple[tuple[Array, Array], StateT]:
            # The scan itself keeps XLA from undoing the recomputation; block 0 needs the barriers.
            x, v_first, next_state = run(prevent_cse=False)(layer[0], carry[0], layer[1], carry[1])
            return (x, v_first), next_state

        (x, _), other_states = jax.lax.scan(body, (x, v_first), (self.blocks, other_states))
        states = jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), first_state, other_states)
        return self.ln_out(x), states

    def logits(self, hidden: Array) -> Array:
        """Logits [..., V] in at least float32 of hidden vectors [..., C]."""
        return linear(hidden, self.head.weight[...], out_dtype=jnp.promote_types(hidden.dtype, jnp.float32))

    def __call__(self, tokens: Array, state: StateT | None = None, *, remat: bool = False) -> tuple[Array, StateT]:
        """Logits [B, T, V] of the token after each of tokens [B, T], and the next state; see `hidden`."""
        x, state = self.hidden(tokens, state, remat=remat)
        with jax.named_scope("head"):
            return self.logits(x), state


def _run_block(block: Any, x: Array, state: Any, v_first: Array | None) -> tuple[Array, Array, Any]:
    return block(x, state, v_first)
