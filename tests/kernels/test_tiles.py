"""Kernels of tiles in Pallas' interpreter of GPUs: two warpgroups, copies, barriers, and no races; what they take."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from rwkv_kernels.ops.wkv7 import pallas_mosaic_gpu
from rwkv_kernels.ops.wkv7.cases import make_inputs
from rwkv_kernels.pallas import interpreted_tiles, tiles
from rwkv_kernels.pallas.tiles import SIZE, is_stored
from rwkv_kernels.precision import Precision
from rwkv_kernels.testing.cases import Shape
from tests.golden import QUICK, relative_error

OF_A_PROGRAM = 232448 - 2048 - 8 * 32
"""Bytes of shared memory on an H100 without what Mosaic GPU keeps for itself and barriers."""


def arguments(shape: Shape, dtype: Any, is_packed: bool) -> tuple[list[Array], Array | None]:
    """A case's arrays in order, log_w and the state float32; and segments."""
    inputs = make_inputs("realistic", shape)
    exact = ("log_w", "state")
    arrays = [jnp.asarray(inputs[n], jnp.float32 if n in exact else dtype) for n in ("r", "log_w", *"kvab", "state")]
    segments = jnp.asarray(np.arange(shape.time) // 50, jnp.int32)[None].repeat(shape.batch, 0)
    return arrays, segments if is_packed else None


def with_gradients(precision: Precision, *, interpret: bool) -> Any:
    """(arrays, segments) -> results, and their own gradients."""

    def run(arrays: list[Array], segments: Array | None) -> Any:
        call = functools.partial(
            pallas_mosaic_gpu.wkv7_pallas_mosaic_gpu, precision=precision, segments=segments, interpret=interpret
        )
        results, pull_back = jax.vjp(call, *arrays)
        return results, pull_back(results)

    return run


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("precision", ["full", "default", "fast"])
def test_programs_fit_into_shared_memory(
    monkeypatch: pytest.MonkeyPatch, precision: Precision, dtype: Any, is_packed: bool
) -> None:
    taken: list[int] = []

    def call(body: Any, parts: int, by_chunk: bool, sizes: Any, inputs: Any, outputs: Any) -> Any:
        taken.append(interpreted_tiles.plan(body, parts, by_chunk, inputs, outputs).count)
        return jax.tree.map(lambda x: jnp.zeros(x.array.shape, x.array.dtype), outputs, is_leaf=is_stored)

    monkeypatch.setattr(interpreted_tiles, "call", call)
    arrays, segments = arguments(Shape(1, 128, 1, SIZE, SIZE), dtype, is_packed)
    jax.eval_shape(with_gradients(precision, interpret=True), arrays, segments)
    assert len(taken) == 5
    assert max(taken) * 2 * SIZE**2 <= OF_A_PROGRAM
    assert max(taken) <= 32  # barriers


def test_what_was_written_is_not_multiplied_before_all_have_met() -> None:
    memory = interpreted_tiles.Interpreted(parts=2, chunks=1)
    x = memory.new(jnp.eye(SIZE))
    with pytest.raises(AssertionError):
        memory.product((x, x, "nn"))
    memory.share()
    np.testing.assert_array_equal(memory.product((x, x, "nt")), np.eye(SIZE))


def test_memory_is_given_out_again_only_after_all_have_met() -> None:
    memory = interpreted_tiles.Interpreted(parts=2, chunks=1)
    first = memory.new(jnp.eye(SIZE))
    memory.share()
    memory.free(first)
    assert not set(memory.new(jnp.eye(SIZE)).planes) & set(first.planes)
    memory.share()
    assert memory.new(jnp.eye(SIZE)) == first


@pytest.mark.parametrize(("planes", "bound"), [(1, 2**-8), (2, 2**-16), (tiles.EXACT, 0)])
def test_planes_add_up_to_the_array(planes: int, bound: float) -> None:
    x = jnp.asarray(np.random.default_rng(0).standard_normal(1000), jnp.float32)
    joined = jax.jit(lambda x: tiles.join(tiles.split(x, planes), x.dtype))(x)  # compilers would cancel casts
    assert np.max(np.abs(joined - x) / np.abs(x)) <= bound


@pytest.mark.long
@pytest.mark.skipif(not jax.__version__.startswith("0.10."), reason="races are found and said in other ways there")
def test_warpgroups_agree_with_plain_jax_and_do_not_race(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter knows neither tensor cores' operands nor tilings, so these two are replaced by what they mean."""
    from jax._src.pallas.mosaic.interpret.race_detection_state import RaceDetectionState  # it is said nowhere else
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from rwkv_kernels.pallas import mosaic_gpu

    def multiply(self: Any, pairs: list[tiles.Pair]) -> Array:
        total = jnp.zeros((SIZE, mosaic_gpu.COLUMNS), jnp.float32)
        for x, y, form in pairs:
            left, right = (self._memory[plane].astype(jnp.float32) for plane in (x, y))
            left, right = left.T if form == "tn" else left, right.T if form == "nt" else right
            own = jax.lax.dynamic_slice(right, (0, self._own.start), (SIZE, mosaic_gpu.COLUMNS))
            total = total + jnp.dot(left, own, precision="highest")
        return total

    def show_addresses(self: Any) -> None:
        self._zero, self._own = 0, pl.ds(self._warpgroup * mosaic_gpu.COLUMNS, mosaic_gpu.COLUMNS)

    monkeypatch.setattr(mosaic_gpu._Device, "_multiply", multiply)
    monkeypatch.setattr(mosaic_gpu._Device, "_hide_addresses", show_addresses)
    monkeypatch.setattr(mosaic_gpu, "_TRANSFORMS", ())
    watches: list[Any] = []

    def watch(*arguments: Any, **options: Any) -> Any:
        watches.append(RaceDetectionState(*arguments, **options))
        return watches[-1]

    monkeypatch.setattr(gpu_callbacks, "RaceDetectionState", watch)
    interpreter = InterpretGPUParams(detect_races=True)
    monkeypatch.setattr(plgpu, "kernel", functools.partial(plgpu.kernel, interpret=interpreter))

    given = arguments(Shape(1, 128, 1, SIZE, SIZE), jnp.bfloat16, is_packed=False)
    expected = jax.jit(with_gradients("fast", interpret=True), compiler_options=QUICK)(*given)
    results = jax.jit(with_gradients("fast", interpret=False), compiler_options=QUICK)(*given)
    for result, exact in zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True):
        assert relative_error(result, exact) < 2e-3
    assert len(watches) == 5
    assert not any(watch.races_found for watch in watches)
