"""A run's pure functions of (state, batch), built from its config; each is compiled once."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from rwkv_jax.config import (
    PREFERENCES,
    WITH_REFERENCE,
    WITH_TEACHER,
    ApplicationConfig,
    ConfigError,
    StepConfig,
    TrainConfig,
)
from rwkv_jax.models import abstract_model, model_type
from rwkv_jax.models.implementations import check_implementations
from rwkv_jax.models.tuned import is_kept, tuned_shapes
from rwkv_jax.parallel.mesh import default_device
from rwkv_jax.parallel.rules import shardings
from rwkv_jax.parallel.sharded_model import ShardedModel, shard_model
from rwkv_jax.parallel.tuned import shard_tuned
from rwkv_jax.training.application import Application, ExampleLoss, application_of
from rwkv_jax.training.batch import Batch
from rwkv_jax.training.objectives.align import Align, aligned_layers, kept_mixers, mixers_of
from rwkv_jax.training.objectives.distill import Distill
from rwkv_jax.training.objectives.grpo import GRPO, GroupBatch
from rwkv_jax.training.objectives.next_token import NextToken
from rwkv_jax.training.objectives.preference import PairBatch, Preference, Replies
from rwkv_jax.training.optimizer import make_optimizer, tuned_group
from rwkv_jax.training.partition import merge_params, split_params, tuned_partition
from rwkv_jax.training.rates import Rates, learning_layers, without_frozen
from rwkv_jax.training.run_model import TEACHER, RunModel
from rwkv_jax.training.spikes import empty_window
from rwkv_jax.training.state import EvalSums, StepMetrics, TrainState
from rwkv_jax.training.step import Objective, Partition, train_step
from rwkv_jax.training.teacher import TeacherModel, read_teacher, with_teacher
from rwkv_kernels.arguments import broadcast_varying_axes


@dataclasses.dataclass(frozen=True, eq=False)
class TrainFunctions:
    """A run's functions; `jax.jit` its methods directly.

    To train differently, change fields with `dataclasses.replace`.
    """

    objective: Objective
    partition: Partition
    optimizer: optax.GradientTransformation
    """Of the trained parameters."""
    sharded: ShardedModel
    """The model on the mesh; `sharded.param_specs` has every parameter of the run."""
    params: Any
    """Nested dict of the shapes of all parameters of the run."""
    draw_params: Callable[[Array], Any]
    """key -> initial parameters."""
    empty_state: Callable[[], Any] | None
    """The recurrent state of rows that begin a text, if rows continue those of the previous step; else None."""
    run_model: RunModel
    application: Application | None = None
    """Of a run that is an application's; None for a language model's."""
    teacher: TeacherModel | None = None
    """The teacher, whose parameters are among those of the run; None without one."""
    evaluated: Objective | None = None
    """What evaluations sum over held-out rows; None is `objective`."""
    first_step: int = 0
    """The step at which the run begins, in schedule and data order."""
    accumulation_steps: int = 1
    offload_optimizer: bool = False
    """Whether the optimizer's state is in host memory between steps."""
    spike_factor: float | None = None
    """See `StepConfig`; None without a spike guard."""
    spike_window: int = 1
    learning_layers: Any = None
    """See `rates.learning_layers`, of the trained parameters; None if no layer is frozen."""
    ema_decay: float | None = None
    """See `StepConfig`; None without averages."""

    def init(self, key: Array, params: Any = None) -> TrainState:
        """The first state; `initial_state` places it on the devices.

        Args:
          params: those to begin with; None draws them.
        """
        params = self.draw_params(key) if params is None else params
        # Three arrays, not one: a state's buffers are donated, and no buffer can be donated twice.
        step, bad_steps, skipped_steps = (jnp.full((), count, jnp.int32) for count in (self.first_step, 0, 0))
        recurrent_state = None if self.empty_state is None else jax.tree.map(jnp.copy, self.empty_state())
        trained, _ = split_params(params, self.partition)
        opt_state = self.optimizer.init(trained)
        if self.sharded.mesh is not None:
            opt_state = jax.lax.with_sharding_constraint(opt_state, self._device_shardings.opt_state)
        return TrainState(
            params,
            opt_state,
            step,
            jax.random.key_data(key),
            bad_steps,
            skipped_steps,
            recurrent_state,
            None if self.spike_factor is None else empty_window(self.spike_window),
            self.first_averages(params),
        )

    def first_averages(self, params: Any) -> Any:
        """The averages with which a run begins: copies of the trained parameters; None without averages."""
        return None if self.ema_decay is None else jax.tree.map(jnp.copy, split_params(params, self.partition)[0])

    def averaged_params(self, state: TrainState) -> Any:
        """The parameters with the averages in the place of the trained ones, if there are any."""
        if state.ema is None:
            return state.params
        return merge_params(state.ema, split_params(state.params, self.partition)[1])

    def train_step(self, state: TrainState, batch: Any) -> tuple[TrainState, StepMetrics]:
        """One optimizer step; moves the state from and to its place between steps."""
        if self.offload_optimizer:
            state = state._replace(opt_state=jax.device_put(state.opt_state, self._device_shardings.opt_state))
        state, metrics = train_step(
            state,
            batch,
            objective=self.objective,
            partition=self.partition,
            optimizer=self.optimizer,
            sharded=self.sharded,
            accumulation_steps=self.accumulation_steps,
            empty_state=None if self.empty_state is None else self.empty_state(),
            spike_factor=self.spike_factor,
            learning_layers=self.learning_layers,
            ema_decay=self.ema_decay or 0.0,
            first_step=self.first_step,
        )
        if self.sharded.mesh is not None or self.offload_optimizer:
            state = jax.tree.map(jax.device_put, state, self.state_shardings)
        return state, metrics

    def eval_step(self, params: Any, batch: Any) -> EvalSums:
        """Sums over all rows of a batch, each starting from the empty state."""
        objective = self.evaluated or self.objective

        def local_sums(params: Any, batch: Any) -> EvalSums:
            sums, _ = objective.loss_sums(params, batch, None)
            found = EvalSums(sums.loss, objective.count(batch), sums.metrics or {})
            return self.sharded.psum(broadcast_varying_axes(found, batch)[0])

        specs = (self.sharded.select_param_specs(params), self.sharded.batch_specs(batch))
        return self.sharded.shard_map(local_sums, specs, PartitionSpec())(params, batch)

    @functools.cached_property
    def state_shardings(self) -> TrainState:
        """Shardings of the state between steps.

        Raises:
          ConfigError: the devices do not support offloading the optimizer.
        """
        where = self._device_shardings
        if self.offload_optimizer:
            where = where._replace(opt_state=jax.tree.map(_in_host_memory, where.opt_state))
        return where

    @functools.cached_property
    def _device_shardings(self) -> TrainState:
        """Shardings of the state during a step: Adam's moments like their parameters, counters replicated."""
        mesh, whole = self.sharded.mesh, _sharding(self.sharded.mesh, PartitionSpec())
        trained, _ = split_params(self.params, self.partition)
        opt_state = jax.eval_shape(self.optimizer.init, trained)
        recurrent_state = None if self.empty_state is None else jax.eval_shape(self.empty_state)
        if mesh is None:
            params, opt_state, recurrent_state = jax.tree.map(
                lambda _: whole, (self.params, opt_state, recurrent_state)
            )
        else:
            params = shardings(mesh, self.sharded.param_specs)
            opt_state = optax.tree.map_params(
                self.optimizer,
                lambda _, sharding: sharding,
                opt_state,
                split_params(params, self.partition)[0],
                transform_non_params=lambda _: whole,
            )
            specs = self.sharded.carried_specs or self.sharded.state_specs
            recurrent_state = None if recurrent_state is None else shardings(mesh, specs)
        recent = None if self.spike_factor is None else whole
        ema = None if self.ema_decay is None else split_params(params, self.partition)[0]
        return TrainState(params, opt_state, whole, whole, whole, whole, recurrent_state, recent, ema)

    def kept(self, state: TrainState) -> TrainState:
        """The state that checkpoints hold: all but a teacher and the base of a tuning run."""
        tuning, model = self.run_model.tuning, self.run_model.config
        state = state._replace(params={name: part for name, part in state.params.items() if name != TEACHER})
        if not tuning.is_partial:
            return state
        return state._replace(params=split_params(state.params, functools.partial(is_kept, tuning, model))[0])

    @property
    def tokens_sharding(self) -> Any:
        """Sharding of a batch's arrays [B, T]."""
        return _sharding(self.sharded.mesh, self.sharded.tokens_spec)

    @property
    def rows_sharding(self) -> Any:
        """Sharding of a batch's arrays [B]."""
        return _sharding(self.sharded.mesh, self.sharded.rows_spec)


def make_train_functions(
    config: TrainConfig,
    mesh: Mesh | None = None,
    *,
    objective: Callable[[RunModel, ShardedModel, StepConfig], Objective] | None = None,
    partition: Partition | None = None,
) -> TrainFunctions:
    """Builds a config's pure functions; nothing is allocated or compiled.

    The model is defined with NNX but trained as a plain dict of arrays under `jax.jit`: in a hot loop that costs a
    fraction of `nnx.jit`, and checkpoints, conversion and sharding handle plain dicts. On a mesh the loss and its
    gradient run within one `jax.shard_map`, and the elementwise optimizer outside it.

    Args:
      objective: makes an objective from the run's model, the sharded model and `config.training`; None takes the one
        that `training.objective` names.
      partition: selects the trained parameters; the others have no gradient and no optimizer state. None takes those
        of `config.tuning`.

    Raises:
      ConfigError: an unknown implementation, a size that the mesh does not divide, devices that do not support
        offloading, or a partition that trains nothing.
    """
    check_implementations(config.model)
    kind, training = model_type(config.model), config.training
    application = application_of(config)
    graphdef, params = abstract_model(config.model) if application is None else application.abstract
    run_model = RunModel(graphdef, config.tuning, config.model)
    knows_axes = kind if application is None else application
    sharded, group = shard_model(config.model, params, mesh, knows_axes), knows_axes.parameter_group
    named = params
    if config.tuning.is_partial:
        params = tuned_shapes(params, config.tuning, config.model)
        named = named | {name: part for name, part in params.items() if name not in named}
        sharded = shard_tuned(sharded, config.tuning, config.model, params)
        group = functools.partial(tuned_group, config.tuning, group)
    teacher = read_teacher(config, mesh)
    optimizer = config.optimizer
    if partition is None:
        partition, frozen = _named_partition(config, teacher)
        optimizer = dataclasses.replace(optimizer, rates=(*optimizer.rates, *frozen))
    partition = without_frozen(partition, named, optimizer.rates)
    if teacher is not None:
        params, sharded = params | {TEACHER: teacher.shapes}, with_teacher(sharded, teacher)
        partition = functools.partial(_beside_teacher, partition)
    trained, _ = split_params(params, partition)
    if not trained:
        raise ConfigError(f"partition = {partition}: trains none of the model's {len(jax.tree.leaves(params))} arrays")

    def draw_local(key: Array) -> Any:
        rngs = nnx.Rngs(key)
        if application is None:
            model: Any = kind(config.model, rngs=rngs, shard_params=sharded.shard_params)
        else:
            model = application.new_model(rngs, sharded.shard_params)
        return nnx.to_pure_dict(nnx.state(model, nnx.Param))

    def empty_state() -> Any:
        own = run_model.model(params).initial_state(training.batch_size)
        if teacher is None:
            return own
        return {"model": own, TEACHER: teacher.run_model.model(teacher.shapes).initial_state(training.batch_size)}

    learns_from_teacher = objective is None and training.objective in WITH_TEACHER
    functions = TrainFunctions(
        objective=(objective or _named_objective(config, teacher))(run_model, sharded, training),
        partition=partition,
        optimizer=make_optimizer(optimizer, training.num_steps, trained, group, training.first_step),
        sharded=sharded,
        params=params,
        draw_params=refuse_drawing
        if config.tuning.is_partial
        else sharded.shard_map(draw_local, PartitionSpec(), sharded.initial_param_specs),
        empty_state=empty_state if training.carry_state else None,
        run_model=run_model,
        application=application,
        teacher=teacher,
        evaluated=NextToken(run_model, sharded, training) if learns_from_teacher else None,
        first_step=training.first_step,
        accumulation_steps=training.accumulation_steps,
        offload_optimizer=config.parallel.offload_optimizer,
        spike_factor=training.spike_factor,
        spike_window=training.spike_window,
        learning_layers=learning_layers(trained, optimizer.rates),
        ema_decay=training.ema_decay,
    )
    _ = functions.state_shardings  # or devices without host memory would fail only in the first step
    return functions


def _named_partition(config: TrainConfig, teacher: TeacherModel | None) -> tuple[Partition, Rates]:
    """What a run trains by its config: of alignment the mixers that replace attention, else what `tuning` says.

    Also the rates that freeze layers of what it trains.
    """
    if config.training.objective != "align":
        return tuned_partition(config.tuning, config.model), ()
    assert teacher is not None  # as the config has checked
    layers = aligned_layers(config.model, teacher.config)
    return mixers_of(layers, config.model.num_layers), kept_mixers(layers, config.model)


def _beside_teacher(partition: Partition, path: tuple[str, ...]) -> bool:
    """A run's partition, in which a teacher is frozen."""
    return path[0] != TEACHER and partition(path)


def refuse_drawing(key: Array) -> Any:
    """The initial parameters of a tuning run, which are those of its base."""
    del key
    raise ConfigError("initial_state: a tuning run begins from its base; give the parameters (training.tuned)")


def initial_state(functions: TrainFunctions, seed: int, params: Any = None) -> TrainState:
    """The initial state of a run, placed on the devices: the same numbers on every mesh.

    Args:
      params: those to begin with, placed already; None draws them.
    """
    if params is not None:  # which stay where they are, without a copy
        rest = jax.jit(lambda key, params: functions.init(key, params)._replace(params=None))(
            jax.random.key(seed), params
        )
        return jax.device_put(rest, functions.state_shardings._replace(params=None))._replace(params=params)
    if functions.teacher is not None:
        raise ConfigError("initial_state: a run with a teacher begins with both models' parameters; give them")
    # Two programs: the first is the same on every mesh except where it slices matrices.
    return jax.device_put(jax.jit(functions.init)(jax.random.key(seed)), functions.state_shardings)


def abstract_state(functions: TrainFunctions) -> TrainState:
    """Shapes, dtypes and shardings of a run's state; nothing is allocated."""
    shapes = jax.eval_shape(functions.init, jax.random.key(0), functions.params)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        functions.state_shardings,
    )


def abstract_batch(functions: TrainFunctions, config: TrainConfig) -> Any:
    """Shapes, dtypes and shardings of a step's arguments; nothing is allocated.

    Raises:
      ConfigError: a run of an application, whose data alone knows them.
    """
    if functions.application is not None:
        raise ConfigError("rwkv plan: only an application's data knows its batches, and a plan does not read it")
    training, grpo = config.training, config.grpo
    shape = (training.batch_size, training.sequence_length)

    def of_tokens(dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=functions.tokens_sharding)

    def of_rows(dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape[:1], dtype, sharding=functions.rows_sharding)

    tokens, mask, rows = of_tokens(jnp.int32), of_tokens(jnp.float32), of_rows(jnp.float32)
    if training.objective in PREFERENCES:
        is_stored = training.objective in WITH_REFERENCE and config.preference.reference == "stored"
        replies = Replies(tokens, tokens, mask, rows if is_stored else None)
        return PairBatch(replies, replies, rows, of_rows(jnp.bool_) if training.objective == "kto" else None)
    if training.objective == "grpo":
        others = (mask if grpo.iterations > 1 else None, mask if grpo.kl_weight else None)
        return GroupBatch(tokens, tokens, mask, rows, rows, *others)
    return Batch(
        tokens=tokens,
        targets=tokens,
        segment_ids=tokens if training.reset_at_documents else None,
        continues_previous=of_rows(jnp.bool_) if training.carry_state else None,
        dropout_keys=of_tokens(jnp.uint32) if config.tuning.dropout else None,
        **_of_stored_teacher(functions, config),
    )


def _of_stored_teacher(functions: TrainFunctions, config: TrainConfig) -> dict[str, Any]:
    if config.distillation.stored is None:
        return {}
    shape = (config.training.batch_size, config.training.sequence_length)
    top_k, where = config.distillation.top_k or 0, {"sharding": functions.tokens_sharding}
    return {
        "teacher_ids": jax.ShapeDtypeStruct((*shape, top_k), jnp.int32, **where),
        "teacher_log_p": jax.ShapeDtypeStruct((*shape, top_k + 1), jnp.float16, **where),
    }


def _named_objective(
    config: TrainConfig, teacher: TeacherModel | None
) -> Callable[[RunModel, ShardedModel, StepConfig], Objective]:
    if isinstance(config, ApplicationConfig):
        return ExampleLoss
    if config.training.objective == "next_token":
        return NextToken
    if config.training.objective == "align":
        assert teacher is not None  # as the config has checked
        return functools.partial(Align, teacher=teacher)
    if config.training.objective == "distill":
        return functools.partial(Distill, distillation=config.distillation, teacher=teacher)
    if config.training.objective == "grpo":
        return functools.partial(GRPO, grpo=config.grpo)
    return functools.partial(Preference, preference=config.preference)


def _sharding(mesh: Mesh | None, spec: PartitionSpec) -> Any:
    return SingleDeviceSharding(default_device()) if mesh is None else NamedSharding(mesh, spec)


def _in_host_memory(sharding: Any) -> Any:
    try:
        return sharding.with_memory_kind("pinned_host")
    except ValueError as error:
        raise ConfigError(
            "parallel.offload_optimizer = True: these devices cannot reach their hosts' memory; switch it off"
        ) from error
