"""The training and evaluation steps: pure functions of (state, batch), to be compiled once each."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from rwkv_jax.config import TrainConfig
from rwkv_jax.models import model_type
from rwkv_jax.training.loss import TokenLosses, sum_losses
from rwkv_jax.training.optimizer import make_optimizer


class TrainState(NamedTuple):
    """All that a run carries from one step to the next."""

    params: Any
    """Nested dict of the parameters under their official names."""
    optimizer: Any
    """Optax's state."""
    step: Array
    """int32: optimizer steps taken, which is also the position in the data."""
    key: Array
    """uint32 [2]: key data from which samples are drawn."""
    bad_steps: Array
    """int32: steps in a row that were skipped because loss or gradient was not finite."""
    skipped_steps: Array
    """int32: steps skipped in the whole run."""


class StepMetrics(NamedTuple):
    """What a step reports."""

    loss: Array
    """Mean -log p(token), nats."""
    gradient_norm: Array
    """Global norm before clipping."""
    finite: Array
    """Whether the step was taken: loss and gradient were finite."""


class Trainer(NamedTuple):
    """A config's pure functions; `jax.jit` them as they are."""

    init: Any
    """key -> TrainState."""
    train_step: Any
    """(TrainState, tokens [B, T + 1]) -> (TrainState, StepMetrics)."""
    eval_step: Any
    """(params, tokens [B, T + 1], mask [B, T]) -> TokenLosses."""
    graphdef: Any
    """`nnx.merge(graphdef, params)` is the model."""


def make_trainer(config: TrainConfig) -> Trainer:
    """Builds a config's pure functions; nothing is allocated or compiled.

    The model is defined with NNX but trained as a plain dict of arrays under `jax.jit`: in a hot loop that costs a
    fraction of `nnx.jit`, and checkpoints, conversion and sharding see nothing but a dict.
    """
    kind = model_type(config.model)
    abstract = nnx.eval_shape(lambda: kind(config.model, rngs=nnx.Rngs(0)))
    graphdef, abstract_params = nnx.split(abstract, nnx.Param)
    abstract_params = nnx.to_pure_dict(abstract_params)
    training = config.training
    optimizer = make_optimizer(config.optimizer, training.num_steps, abstract_params, kind.parameter_group)

    def init(key: Array) -> TrainState:
        model = kind(config.model, rngs=nnx.Rngs(key))
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        # Three arrays, not one: a state's buffers are donated, and no buffer can be donated twice.
        step, bad_steps, skipped_steps = (jnp.zeros((), jnp.int32) for _ in range(3))
        return TrainState(params, optimizer.init(params), step, jax.random.key_data(key), bad_steps, skipped_steps)

    def losses(params: Any, tokens: Array, mask: Array | None = None) -> TokenLosses:
        model = nnx.merge(graphdef, params)
        hidden, _ = model.hidden(tokens[:, :-1], remat=training.remat)
        with jax.named_scope("loss"):
            return sum_losses(model.logits, hidden, tokens[:, 1:], mask, training.loss_chunk)

    def objective(params: Any, tokens: Array) -> tuple[Array, Array]:
        total = losses(params, tokens)
        loss = total.nll / total.count
        return loss + training.l2wrap * total.peak / total.count, loss

    def gradients(params: Any, tokens: Array) -> tuple[Array, Any]:
        """Mean loss and gradients, over micro-batches of equal size."""
        value_and_grad = jax.value_and_grad(objective, has_aux=True)
        if training.accumulation_steps == 1:
            (_, loss), grads = value_and_grad(params, tokens)
            return loss, grads
        micro = tokens.reshape(training.accumulation_steps, -1, tokens.shape[-1])

        def body(total: tuple[Array, Any], tokens: Array) -> tuple[tuple[Array, Any], None]:
            (_, loss), grads = value_and_grad(params, tokens)
            return jax.tree.map(jnp.add, total, (loss, grads)), None

        shapes = jax.eval_shape(lambda p, t: (objective(p, t)[1], p), params, micro[0])
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        total, _ = jax.lax.scan(body, zeros, micro)
        return jax.tree.map(lambda x: x / training.accumulation_steps, total)

    def train_step(state: TrainState, tokens: Array) -> tuple[TrainState, StepMetrics]:
        loss, grads = gradients(state.params, tokens)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        updates, next_optimizer = optimizer.update(grads, state.optimizer, state.params)
        next_params = optax.apply_updates(state.params, updates)

        def keep(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, old)

        state = TrainState(
            params=keep(next_params, state.params),
            optimizer=keep(next_optimizer, state.optimizer),
            step=state.step + 1,
            key=state.key,
            bad_steps=jnp.where(finite, 0, state.bad_steps + 1),
            skipped_steps=state.skipped_steps + ~finite,
        )
        return state, StepMetrics(loss, norm, finite)

    def eval_step(params: Any, tokens: Array, mask: Array) -> TokenLosses:
        return losses(params, tokens, mask)

    return Trainer(init, train_step, eval_step, graphdef)
