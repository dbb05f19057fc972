"""Compiles a run's training step for devices that need not be present."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, SingleDeviceSharding

import rwkv_kernels
from rwkv_jax.config import ConfigError, ModelConfig, TrainConfig
from rwkv_jax.config.generations.hybrid import attention_config
from rwkv_jax.models import abstract_model
from rwkv_jax.models.implementations import check_implementations, known_implementations, refuse_unable
from rwkv_jax.models.tuned import adapter_shapes, at, trained_in_full
from rwkv_jax.parallel.mesh import MeshShape, make_mesh, mesh_from_shape, mesh_shape
from rwkv_jax.plan.devices import Platform, Topology, topology_devices, unoptimized_on_cpu
from rwkv_jax.plan.kernels import map_columns
from rwkv_jax.plan.planner import Compiled, Plan, Work, make_plan
from rwkv_jax.plan.step_time import OperatorCalls
from rwkv_jax.training.functions import abstract_batch, abstract_state, make_train_functions
from rwkv_jax.training.objectives.align import aligned_layers
from rwkv_jax.training.operator_choice import run_workload
from rwkv_jax.training.partition import split_params
from rwkv_jax.training.run_model import TEACHER
from rwkv_jax.training.teacher import read_teacher
from rwkv_kernels.dispatch import Implementation, Problem


def plan_run(config: TrainConfig, topology: Topology) -> Plan:
    """Compiles a run's training step for a topology and plans it; nothing is allocated.

    Raises:
      ConfigError: float64, a topology that the compiler refuses, a mesh or sizes that do not fit it, or a named
        implementation that cannot run on its devices.
    """
    if config.model.dtype == "float64":
        raise ConfigError(
            "model.dtype = 'float64': the rates of devices in float64 are not known here; plan float32 or bfloat16"
        )
    devices = topology_devices(topology)
    mesh = make_mesh(config, devices, topology.device.memory_for_jax)
    if mesh is None and config.parallel.offload_optimizer:
        # An offloading step names the devices that it copies between; without a mesh, those of this machine.
        mesh = mesh_from_shape(MeshShape(), devices[:1])
    refuse_unable_there(config, mesh, topology, devices[0].device_kind)
    trainer = make_train_functions(as_planned_for(config, topology.device.platform, devices[0].device_kind), mesh)
    state, batch = abstract_state(trainer), abstract_batch(trainer, config)
    if mesh is None:
        here = SingleDeviceSharding(devices[0])
        state, batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), (state, batch))
    own = {name: part for name, part in state.params.items() if name != TEACHER}
    trained, frozen = split_params(own, trainer.partition)
    groups = {
        **({"base, frozen": frozen, "trained parameters": trained} if frozen else {"parameters": trained}),
        **({} if trainer.teacher is None else {"teacher, frozen": state.params[TEACHER]}),
        "optimizer": state.opt_state,
        **({} if state.ema is None else {"averages": state.ema}),
        "carried state": state.recurrent_state,
        "counters and key": state._replace(params=None, opt_state=None, recurrent_state=None, ema=None),
        "batch": batch,
    }
    lowered = jax.jit(trainer.train_step, donate_argnums=0).lower(state, batch)
    compiled, refusal = _compile(lowered, topology)
    calls = count_operator_calls(config, mesh)
    work = dataclasses.replace(count_work(config), operator=calls)
    return make_plan(topology, mesh, work, (state, batch), groups, compiled, refusal)


_PLATFORMS: Mapping[Platform, str] = {"cuda": "gpu", "tpu": "tpu", "cpu": "cpu"}
"""As operators name them."""


def refuse_unable_there(config: TrainConfig, mesh: Mesh | None, topology: Topology, device_kind: str) -> None:
    """Refuses a named implementation that cannot run on the planned devices.

    Raises:
      ConfigError: with the reason, and the implementations that can.
    """
    check_implementations(config.model)
    workload = run_workload(config, MeshShape() if mesh is None else mesh_shape(mesh))
    if workload is not None:
        platform = _PLATFORMS[topology.device.platform]
        problem = dataclasses.replace(workload.problem, platform=platform, device_kind=device_kind)
        refuse_unable(config.model, problem, str(topology))


def as_planned_for(config: TrainConfig, platform: Platform, device_kind: str) -> TrainConfig:
    """The config with named implementations that take the planned devices, not this machine's, for their own."""

    def there(named: Implementation) -> Any:
        def refuses(problem: Problem) -> str | None:
            own = _PLATFORMS[platform]
            return named.refuses(dataclasses.replace(problem, platform=own, device_kind=device_kind))

        return dataclasses.replace(named, refuses=refuses)

    model = config.model
    planned = {
        field: there(known[name])
        for field, known in known_implementations(model).items()
        if (name := getattr(model, field)) in known
    }
    return dataclasses.replace(config, model=dataclasses.replace(model, **planned)) if planned else config


def _compile(lowered: Any, topology: Topology) -> tuple[Compiled | None, str | None]:
    """The compiled step, or the compiler's message that memory is too small."""
    platform = topology.device.platform
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {}
        if platform == "cpu":  # never run, so not optimized: a third of the time
            options = unoptimized_on_cpu()
        elif platform == "tpu":  # only libtpu's own dump is complete
            options = {"xla_dump_to": folder}
        try:
            executable = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return None, str(error).strip().splitlines()[0]
        if platform != "tpu":
            return Compiled(executable, executable.as_text()), None
        # Parts that libtpu compiles on trial are dumped too, without the step's name.
        (dumped,) = Path(folder).glob("*.jit_*.after_optimizations.txt")
        return Compiled(executable, dumped.read_text(encoding="utf-8")), None


def count_work(config: TrainConfig) -> Work:
    """Work of a step, from the config alone."""
    model, training = config.model, config.training
    tokens = training.batch_size * training.sequence_length
    if training.objective == "align":
        trained, recomputed = _alignment_flops(config)
        return Work(tokens, trained * tokens, recomputed * tokens, model.dtype)
    flops = model.flops_per_token(training.sequence_length)
    head = 2 * model.vocab_size * model.width
    recomputed = 0
    if training.remat != "none":  # an upper bound for `operator`, which keeps some results
        recomputed += flops - head
    if training.loss_chunk is not None and not training.fused_loss:
        recomputed += head
    trained = 3 * flops
    if config.tuning.is_partial:  # frozen matrices have no gradient of their own
        adapters = jax.tree.leaves(adapter_shapes(config.tuning, model))
        besides = [at(abstract_model(model)[1], path) for path in trained_in_full(config.tuning, model)]
        trained = 2 * flops + sum(6 * x.size for x in adapters) + sum(2 * x.size for x in besides)
    if (teacher := read_teacher(config)) is not None:  # which has no backward pass, but its logits are computed again
        trained += teacher.config.flops_per_token(training.sequence_length)
        if training.loss_chunk is not None:
            recomputed += 2 * teacher.config.vocab_size * teacher.config.width
    return Work(tokens, trained * tokens, recomputed * tokens, model.dtype)


def _alignment_flops(config: TrainConfig) -> tuple[int, int]:
    """Of a token of an alignment, which has no logits, and trains mixers alone; and what is recomputed, at most."""
    teacher, model, length = read_teacher(config), config.model, config.training.sequence_length
    assert teacher is not None  # as the config has checked
    every, aligned = range(model.num_layers), aligned_layers(model, teacher.config)
    blocks = teacher.config.flops_per_token(length) - 2 * teacher.config.vocab_size * teacher.config.width
    own = _mixers_flops(model, every, length)
    mixers = own + 2 * _mixers_flops(model, aligned, length) + _mixers_flops(teacher.config, every, length)
    return blocks + mixers, 0 if config.training.remat == "none" else own


def _mixers_flops(model: ModelConfig, layers: Iterable[int], length: int) -> int:
    """Of a token's pass forward through some layers' attention or time mixing; of other models, at most that."""
    feed_forward = 0
    if "rwkv_layers" in model.spec.own_fields:
        attention = attention_config(model)
        spec = attention.spec
        feed_forward = spec.matrix_parameters(attention, first=False) - spec.attention_matrices(attention)
    return sum(
        2 * (model.spec.layer_matrix_parameters(model, layer) - feed_forward)
        + model.spec.layer_mixing_flops(model, layer, length)
        for layer in layers
    )


def count_operator_calls(config: TrainConfig, mesh: Mesh | None) -> OperatorCalls | None:
    """Calls of the WKV operator on each device in a step; None for a model without one."""
    model, training = config.model, config.training
    operator = model.spec.operator
    if operator is None:
        return None
    sizes = {} if mesh is None else dict(mesh.shape)
    devices, splits_time = math.prod(sizes.values()), sizes.get("sequence", 1) > 1
    axes = rwkv_kernels.OPERATORS[operator].axes
    heads, key_dim, value_dim = model.spec.operator_sizes(model)
    shape = (1, training.sequence_length // sizes.get("sequence", 1), heads, key_dim, value_dim)
    chosen = model.wkv_implementation or rwkv_kernels.explain(operator, shape).chosen
    layers = model.spec.num_operator_layers(model) * training.accumulation_steps
    micro_batch = training.batch_size * training.sequence_length // training.accumulation_steps
    # Decays are in the dtype of parameters, and all is in the recurrence's where time is split.
    names = [name for name, letters in axes.items() if "T" in letters]
    own = {name: model.parameter_dtype if name == "log_w" else model.dtype for name in names}
    dtypes = dict.fromkeys(names, "float32") if splits_time else own
    return OperatorCalls(
        operator=operator,
        implementation=chosen,
        forwards=layers * (2 if training.remat == "full" else 1),
        backwards=layers,
        token_heads=micro_batch * heads / devices,
        key_dim=key_dim,
        value_dim=value_dim,
        item_bytes={name: jnp.dtype(dtype).itemsize for name, dtype in dtypes.items()},
        map_value_dim=map_columns(operator, key_dim, value_dim) if splits_time else 0,
        may_be_measured=model.wkv_implementation is None and training.tune != "never" and not splits_time,
    )
