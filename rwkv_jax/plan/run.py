"""Compiles a run's training step for devices that need not be present."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

from rwkv_jax.config import ConfigError, TrainConfig
from rwkv_jax.parallel.mesh import MeshShape, make_mesh, mesh_from_shape
from rwkv_jax.plan.devices import Topology, topology_devices, unoptimized_on_cpu
from rwkv_jax.plan.planner import Compiled, Plan, Work, make_plan
from rwkv_jax.training.functions import abstract_batch, abstract_state, make_train_functions


def plan_run(config: TrainConfig, topology: Topology) -> Plan:
    """Compiles a run's training step for a topology and plans it; nothing is allocated.

    Raises:
      ConfigError: float64, a topology that the compiler refuses, or a mesh or sizes that do not fit it.
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
    trainer = make_train_functions(config, mesh)
    state, batch = abstract_state(trainer), abstract_batch(trainer, config)
    if mesh is None:
        here = SingleDeviceSharding(devices[0])
        state, batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), (state, batch))
    groups = {
        "parameters": state.params,
        "optimizer": state.opt_state,
        "carried state": state.recurrent_state,
        "counters and key": state._replace(params=None, opt_state=None, recurrent_state=None),
        "batch": batch,
    }
    lowered = jax.jit(trainer.train_step, donate_argnums=0).lower(state, batch)
    compiled, refusal = _compile(lowered, topology)
    return make_plan(topology, mesh, count_work(config), (state, batch), groups, compiled, refusal)


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
    flops = model.flops_per_token(training.sequence_length)
    head = 2 * model.vocab_size * model.width
    recomputed = 0
    if training.remat != "none":  # an upper bound for `operator`, which keeps some results
        recomputed += flops - head
    if training.loss_chunk is not None:
        recomputed += head
    return Work(tokens, 3 * flops * tokens, recomputed * tokens, model.dtype)
