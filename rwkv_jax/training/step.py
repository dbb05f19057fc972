"""The training and evaluation steps: pure functions of (state, batch), to be compiled once each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from rwkv_jax.config import ConfigError, TrainConfig
from rwkv_jax.models import model_type
from rwkv_jax.parallel.mesh import default_device
from rwkv_jax.parallel.rules import shardings
from rwkv_jax.parallel.sharded_model import ShardedModel, shard_model
from rwkv_jax.training.batch import Batch
from rwkv_jax.training.loss import TokenLosses, sum_losses
from rwkv_jax.training.optimizer import make_optimizer
from rwkv_kernels.arguments import broadcast_varying_axes


class TrainState(NamedTuple):
    """All that a run carries from one step to the next."""

    params: Any
    """Nested dict of the parameters under their official names."""
    opt_state: Any
    """Optax's state."""
    step: Any
    """int32: optimizer steps taken, which is also the position in the data."""
    key: Any
    """uint32 [2]: key data from which samples are drawn."""
    bad_steps: Any
    """int32: steps in a row that were skipped because loss or gradient was not finite."""
    skipped_steps: Any
    """int32: steps skipped in the whole run."""
    recurrent_state: Any = None
    """The model's state after each row of the batch; None where rows do not go on with one another."""


class StepMetrics(NamedTuple):
    """What a step reports."""

    loss: Array
    """Mean -log p(token), nats."""
    gradient_norm: Array
    """Global norm before clipping."""
    finite: Array
    """Whether the step was taken: loss and gradient were finite."""


@dataclasses.dataclass(frozen=True)
class TrainFunctions:
    """A config's pure functions; `jax.jit` them as they are."""

    init: Callable[[Any], TrainState]
    """key -> TrainState, of which `initial_state` makes one that lies where it should."""
    train_step: Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]
    loss_and_gradients: Callable[[Any, Batch, Any], tuple[Array, Any, Any]]
    """(params, batch, model state or None) -> mean loss, its gradients with L2Wrap's, the next model state."""
    eval_step: Callable[[Any, Batch], TokenLosses]
    """(params, batch) -> the sums over all of its rows, each read from the empty state."""
    graphdef: Any
    """`nnx.merge(graphdef, params)` is the model."""
    sharded: ShardedModel
    """What is where."""
    state_shardings: TrainState
    """Where each array of the state lies."""

    @property
    def tokens_sharding(self) -> Any:
        """Where arrays with axes [B, T] of a batch lie."""
        return _sharding(self.sharded.mesh, self.sharded.tokens_spec)

    @property
    def rows_sharding(self) -> Any:
        """Where arrays with the axis [B] of a batch lie."""
        return _sharding(self.sharded.mesh, self.sharded.rows_spec)


def make_train_functions(config: TrainConfig, mesh: Mesh | None = None) -> TrainFunctions:
    """Builds a config's pure functions; nothing is allocated or compiled.

    The model is defined with NNX but trained as a plain dict of arrays under `jax.jit`: in a hot loop that costs a
    fraction of `nnx.jit`, and checkpoints, conversion and sharding see nothing but a dict. On a mesh the loss and its
    gradient run within one `jax.shard_map`, and the optimizer, which is element by element, outside it.

    Raises:
      ConfigError: a size that the mesh does not divide, or an optimizer to offload where devices cannot.
    """
    kind = model_type(config.model)
    abstract = nnx.eval_shape(lambda: kind(config.model, rngs=nnx.Rngs(0)))
    graphdef, abstract_params = nnx.split(abstract, nnx.Param)
    abstract_params = nnx.to_pure_dict(abstract_params)
    split = shard_model(config.model, abstract_params, mesh)
    training = config.training
    optimizer = make_optimizer(config.optimizer, training.num_steps, abstract_params, kind.parameter_group)

    def draw_params(key: Array) -> Any:
        model = kind(config.model, rngs=nnx.Rngs(key), shard_params=split.shard_params)
        return nnx.to_pure_dict(nnx.state(model, nnx.Param))

    def empty_state() -> Any:
        return nnx.merge(graphdef, abstract_params).initial_state(training.batch_size)

    def init(key: Array) -> TrainState:
        params = split.shard_map(draw_params, PartitionSpec(), split.initial_param_specs)(key)
        # Three arrays, not one: a state's buffers are donated, and no buffer can be donated twice.
        step, bad_steps, skipped_steps = (jnp.zeros((), jnp.int32) for _ in range(3))
        recurrent_state = jax.tree.map(jnp.copy, empty_state()) if training.carry_state else None
        moments = optimizer.init(params)
        if mesh is not None:
            moments = jax.lax.with_sharding_constraint(moments, in_device_memory.opt_state)
        return TrainState(params, moments, step, jax.random.key_data(key), bad_steps, skipped_steps, recurrent_state)

    def losses(params: Any, batch: Batch, state: Any) -> tuple[TokenLosses, Any]:
        """This device's sums, and the next state of its rows."""
        model = nnx.merge(graphdef, params)
        hidden, state = model.hidden(
            batch.tokens,
            state,
            segment_ids=batch.segment_ids,
            remat=training.remat,
            axes=split.axes,
            gather_params=split.gather_params,
        )
        with jax.named_scope("loss"):
            model.head = split.gather_params("head", model.head)
            sums = sum_losses(model.logits, hidden, batch.targets, batch.mask, training.loss_chunk, split.axes.tensor)
        return sums, state

    def shares(params: Any, batch: Batch, recurrent_state: Any) -> tuple[Array, Any, Any]:
        """Mean loss of the whole batch, this device's share of the gradients, the next state of its rows."""
        micro = jax.tree.map(lambda x: x.reshape(training.accumulation_steps, -1, *x.shape[1:]), batch)
        states = jax.tree.map(lambda x: _micro_rows(x, training.accumulation_steps), recurrent_state)
        counted = jnp.ones(batch.tokens.shape, jnp.float32) if batch.mask is None else batch.mask
        count = jnp.maximum(split.psum(jnp.sum(broadcast_varying_axes(counted, batch.tokens)[0])), 1)

        def objective(params: Any, batch: Batch, state: Any) -> tuple[Array, tuple[Array, Any]]:
            total, state = losses(params, batch, state)
            return (total.nll + training.l2wrap * total.peak) / count, (total.nll / count, state)

        def body(total: Any, micro: tuple[Batch, Any]) -> tuple[Any, Any]:
            (_, (loss, state)), gradients = jax.value_and_grad(objective, has_aux=True)(own, *micro)
            return jax.tree.map(jnp.add, total, (loss, gradients)), state if training.carry_state else None

        own = split.as_varying(params)
        if training.accumulation_steps == 1:
            one = jax.tree.map(lambda x: x[0], (micro, states))
            (_, (loss, state)), gradients = jax.value_and_grad(objective, has_aux=True)(own, *one)
            states = jax.tree.map(lambda x: x[None], state) if training.carry_state else None
        else:
            zeros = jax.tree.map(lambda x: broadcast_varying_axes(jnp.zeros_like(x), x)[0], own)
            nothing, _ = broadcast_varying_axes(jnp.zeros((), config.model.parameter_dtype), batch.tokens)
            (loss, gradients), states = jax.lax.scan(body, (nothing, zeros), (micro, states))
        return split.psum(loss), split.psum_gradients(gradients), jax.tree.map(_rows_again, states)

    def loss_and_gradients(params: Any, batch: Batch, recurrent_state: Any) -> tuple[Array, Any, Any]:
        state_specs = split.state_specs if training.carry_state else None
        arguments = (split.param_specs, _batch_specs(split, batch), state_specs)
        return split.shard_map(shares, arguments, (PartitionSpec(), split.param_specs, state_specs))(
            params, batch, recurrent_state
        )

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        recurrent_state = state.recurrent_state
        if training.carry_state:
            recurrent_state = _where_rows(batch.continues_previous, recurrent_state, empty_state())
        loss, gradients, recurrent_state = loss_and_gradients(state.params, batch, recurrent_state)
        norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        moments = state.opt_state
        if config.parallel.offload_optimizer:
            moments = jax.device_put(moments, in_device_memory.opt_state)
        updates, next_optimizer = optimizer.update(gradients, moments, state.params)
        next_params = optax.apply_updates(state.params, updates)

        def keep(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, old)

        if training.carry_state:  # what a step that went wrong leaves is no context for the next one
            recurrent_state = keep(recurrent_state, empty_state())
        state = TrainState(
            params=keep(next_params, state.params),
            opt_state=keep(next_optimizer, moments),
            step=state.step + 1,
            key=state.key,
            bad_steps=jnp.where(finite, 0, state.bad_steps + 1),
            skipped_steps=state.skipped_steps + ~finite,
            recurrent_state=recurrent_state,
        )
        if mesh is not None or config.parallel.offload_optimizer:
            state = jax.tree.map(jax.device_put, state, state_shardings)
        return state, StepMetrics(loss, norm, finite)

    def eval_step(params: Any, batch: Batch) -> TokenLosses:
        def sums(params: Any, batch: Batch) -> TokenLosses:
            return split.psum(losses(params, batch, None)[0])

        on_all: Any = TokenLosses(*(PartitionSpec(),) * 3)  # pyright: ignore[reportArgumentType]
        run = split.shard_map(sums, (split.param_specs, _batch_specs(split, batch)), on_all)
        return run(params, batch)

    recurrent_state = jax.eval_shape(empty_state) if training.carry_state else None
    in_device_memory = _state_shardings(split, optimizer, abstract_params, recurrent_state)
    state_shardings = in_device_memory
    if config.parallel.offload_optimizer:
        in_host_memory = jax.tree.map(_in_host_memory, in_device_memory.opt_state)
        state_shardings = in_device_memory._replace(opt_state=in_host_memory)
    return TrainFunctions(init, train_step, loss_and_gradients, eval_step, graphdef, split, state_shardings)


def initial_state(trainer: TrainFunctions, seed: int) -> TrainState:
    """The state of a run that begins, each array where it belongs: the same numbers on every mesh."""
    # Two programs: the first is the same on every mesh but for where it cuts matrices.
    return jax.device_put(jax.jit(trainer.init)(jax.random.key(seed)), trainer.state_shardings)


def abstract_state(trainer: TrainFunctions) -> TrainState:
    """Shapes, dtypes and shardings of a run's state; nothing is allocated."""
    shapes = jax.eval_shape(trainer.init, jax.random.key(0))
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes, trainer.state_shardings
    )


def abstract_batch(trainer: TrainFunctions, config: TrainConfig) -> Batch:
    """Shapes, dtypes and shardings of what a run's step reads; nothing is allocated."""
    training = config.training
    shape = (training.batch_size, training.sequence_length)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=trainer.tokens_sharding)
    rows = jax.ShapeDtypeStruct(shape[:1], jnp.bool_, sharding=trainer.rows_sharding)
    return Batch(
        tokens=tokens,
        targets=tokens,
        segment_ids=tokens if training.reset_at_documents else None,
        continues_previous=rows if training.carry_state else None,
    )


def _sharding(mesh: Mesh | None, spec: PartitionSpec) -> Any:
    return SingleDeviceSharding(default_device()) if mesh is None else NamedSharding(mesh, spec)


def _state_shardings(
    split: ShardedModel, optimizer: optax.GradientTransformation, params: Any, recurrent_state: Any
) -> TrainState:
    """Optimizer moments lie where their parameters do; counters are everywhere."""
    whole = _sharding(split.mesh, PartitionSpec())
    moments = jax.eval_shape(optimizer.init, params)

    if split.mesh is None:
        params, moments, recurrent_state = (
            jax.tree.map(lambda _: whole, tree) for tree in (params, moments, recurrent_state)
        )
    else:
        params = shardings(split.mesh, split.param_specs)
        moments = optax.tree.map_params(
            optimizer, lambda _, sharding: sharding, moments, params, transform_non_params=lambda _: whole
        )
        recurrent_state = None if recurrent_state is None else shardings(split.mesh, split.state_specs)
    return TrainState(params, moments, whole, whole, whole, whole, recurrent_state)


def _in_host_memory(sharding: Any) -> Any:
    try:
        return sharding.with_memory_kind("pinned_host")
    except ValueError as error:
        raise ConfigError(
            "parallel.offload_optimizer = True: these devices cannot reach their hosts' memory; switch it off"
        ) from error


def _batch_specs(split: ShardedModel, batch: Batch) -> Batch:
    return jax.tree.map(lambda x: split.tokens_spec if x.ndim == 2 else split.rows_spec, batch)


def _micro_rows(x: Array, steps: int) -> Array:
    """[L, B, ...] -> [steps, L, B / steps, ...]."""
    return jnp.moveaxis(x.reshape(x.shape[0], steps, -1, *x.shape[2:]), 1, 0)


def _rows_again(x: Array) -> Array:
    """[steps, L, b, ...] -> [L, steps * b, ...]."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _where_rows(condition: Array, x: Any, y: Any) -> Any:
    """x in the rows [B] where the condition holds, else y; arrays [L, B, ...]."""
    return jax.tree.map(lambda x, y: jnp.where(condition.reshape(1, -1, *(1,) * (x.ndim - 2)), x, y), x, y)
