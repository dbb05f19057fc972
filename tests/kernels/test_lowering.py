"""Kernels are lowered for their devices, under every transformation, on a machine that has neither.

Lowering writes the kernel in the device compiler's language and finds most of what that compiler would refuse;
tests/devices goes on to machine code.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh
from jax.sharding import PartitionSpec as P

from rwkv_kernels import dispatch
from rwkv_kernels.testing.cases import Shape
from tests.kernels.operators import OPERATORS, Operator, as_jax

# From JAX 0.11 on, each use says so; it works as before.
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")

H100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
V6E = AbstractDevice(device_kind="TPU v6 lite", num_cores=1, platform="tpu")
DEVICES = {
    "pallas_triton": H100,
    "pallas_triton_split": H100,
    "pallas_mosaic_gpu": H100,
    "pallas_mosaic_tpu": V6E,
    "pallas_mosaic_tpu_split": V6E,
}
KERNELS = {
    "pallas_triton": 2,
    "pallas_triton_split": 5,
    "pallas_mosaic_gpu": 5,
    "pallas_mosaic_tpu": 2,
    "pallas_mosaic_tpu_split": 2,
}
"""Of a forward pass with a backward pass."""
TARGETS = {"triton": "__gpu$xla.gpu.triton", "mosaic_gpu": "mosaic_gpu_v2", "mosaic_tpu": "tpu_custom_call"}
SLOW = ("pallas_mosaic_gpu",)
SHAPE = Shape(2, 70, 2, 48, 20)

Loss = Callable[..., jax.Array]
Differentiated = Callable[..., Any]
"""The loss and its gradients."""


def mesh_of(implementation: str) -> AbstractMesh:
    """One device of the kind that an implementation is for."""
    return AbstractMesh((1,), ("data",), (AxisType.Auto,), abstract_device=DEVICES[implementation])


def loss(operator: Operator, implementation: str) -> Loss:
    """(inputs, segment_ids, lengths) -> a scalar, by an implementation that is not asked whether it can run here."""
    run = operator.parts.implementations[implementation].run
    call = functools.partial(operator.run, implementation=dispatch.Implementation(run, dispatch.anything))

    def scalar(
        inputs: dict[str, Any], segment_ids: jax.Array | None, lengths: jax.Array | None, axis_name: str | None = None
    ) -> jax.Array:
        outputs = call(**inputs, segment_ids=segment_ids, lengths=lengths, axis_name=axis_name)
        return sum((jnp.sum(x.astype(jnp.float32)) for x in jax.tree.leaves(outputs)), jnp.float32(0))

    return scalar


def by_itself(loss: Loss, operator: Operator) -> Differentiated:
    return jax.value_and_grad(loss)


def under_vmap(loss: Loss, operator: Operator) -> Differentiated:
    def mapped(inputs: dict[str, Any], *rest: jax.Array) -> Any:
        twice = jax.tree.map(lambda x: jnp.stack([x, x]), inputs)
        return jax.vmap(jax.value_and_grad(loss), in_axes=(0, None, None))(twice, *rest)

    return mapped


def under_remat(loss: Loss, operator: Operator) -> Differentiated:
    return jax.value_and_grad(jax.checkpoint(loss))  # pyright: ignore[reportPrivateImportUsage]


def under_shard_map(loss: Loss, operator: Operator) -> Differentiated:
    mesh = jax.sharding.get_abstract_mesh()

    def shard(inputs: dict[str, Any], *rest: jax.Array) -> jax.Array:
        return jax.lax.psum(loss(inputs, *rest), "data")

    def sharded(inputs: dict[str, Any], *rest: jax.Array) -> jax.Array:
        specs = {name: P() if name in operator.per_head else P("data") for name in inputs}
        return jax.shard_map(shard, mesh=mesh, in_specs=(specs, P("data"), P("data")), out_specs=P())(inputs, *rest)

    return jax.value_and_grad(sharded)


def under_sharded_time(loss: Loss, operator: Operator) -> Differentiated:
    mesh = jax.sharding.get_abstract_mesh()

    def shard(inputs: dict[str, Any], *rest: jax.Array) -> jax.Array:
        return jax.lax.psum(loss(inputs, *rest, axis_name="data"), "data")

    def sharded(inputs: dict[str, Any], *rest: jax.Array) -> jax.Array:
        specs = {name: P(None, "data") if name in operator.over_time else P() for name in inputs}
        in_specs = specs, P(None, "data"), P()
        return jax.shard_map(shard, mesh=mesh, in_specs=in_specs, out_specs=P())(inputs, *rest)

    return jax.value_and_grad(sharded)


LONGER = (under_vmap, under_remat, under_sharded_time)


@pytest.mark.parametrize(
    "transformed",
    [by_itself, under_shard_map, *(pytest.param(each, marks=pytest.mark.long) for each in LONGER)],
)
@pytest.mark.parametrize(
    ("operator", "implementation"),
    [
        pytest.param(operator, name, id=f"{operator}-{name}", marks=pytest.mark.long if name in SLOW else ())
        for operator in OPERATORS
        for name in operator.parts.implementations
        if name in DEVICES
    ],
)
def test_gradients_are_lowered(
    operator: Operator, implementation: str, transformed: Callable[[Loss, Operator], Differentiated]
) -> None:
    assert kernels_in_gradients(operator, implementation, transformed) >= KERNELS[implementation]


def test_large_heads_have_gradients_in_two_kernels() -> None:
    (wkv7,) = (operator for operator in OPERATORS if operator.name == "wkv7")
    shape = SHAPE._replace(key_dim=100)
    assert kernels_in_gradients(wkv7, "pallas_triton_split", under_shard_map, shape) == 6


def kernels_in_gradients(
    operator: Operator,
    implementation: str,
    transformed: Callable[[Loss, Operator], Differentiated],
    shape: Shape = SHAPE,
) -> int:
    """How many kernels the lowered program of a loss and its gradients calls."""
    inputs = operator.make_inputs(operator.cases[0], shape)
    inputs = as_jax(inputs | {"state": None}, jnp.bfloat16) | {"state": as_jax(inputs["state"], jnp.float32)}
    segment_ids = jnp.zeros((shape.batch, shape.time), jnp.int32)
    lengths = jnp.full((shape.batch,), 9)
    device = DEVICES[implementation]
    with use_abstract_mesh(mesh_of(implementation)):
        function = transformed(loss(operator, implementation), operator)
        traced = jax.jit(function).trace(inputs, segment_ids, lengths)
        lowered = traced.lower(lowering_platforms=("cuda" if device.platform == "gpu" else device.platform,))
    (target,) = (target for part, target in TARGETS.items() if part in implementation)
    return lowered.as_text().count(f"custom_call @{target}(")
