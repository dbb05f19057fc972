"""Runs kernels of tiles on NVIDIA Hopper through Mosaic GPU: two warpgroups, each with half the columns of every tile.

A tile's planes are in shared memory as wgmma takes them, [64, 64] bfloat16 with 64 bytes of a row together, swizzled;
they come and go by TMA. Products are wgmma m64n32k16 from shared memory; a transposed operand costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from rwkv_kernels.arguments import broadcast_varying_axes
from rwkv_kernels.pallas import interpreted_tiles
from rwkv_kernels.pallas.tiles import SIZE, Body, Pair, Stored, Tile, Tiles, is_stored

WARPGROUPS = 2
COLUMNS = SIZE // WARPGROUPS
"""Of a tile that a warpgroup computes."""

_TRANSFORMS = (plgpu.TilingTransform((8, COLUMNS)), plgpu.SwizzleTransform(2 * COLUMNS))


class _Device(Tiles):
    """A program on a device, as one of its warpgroups sees it."""

    def __init__(self, parts: int, chunks: int, place: tuple[Any, Any, Any], scratch: tuple[Any, Any, Any]) -> None:
        super().__init__(parts, chunks)
        self._row, self._head, self._chunk = place
        self._memory, self._arrived, self._met = scratch
        self._warpgroup = lax.axis_index("warpgroup")
        self._hide_addresses()

    def _hide_addresses(self) -> None:
        """Makes addresses in shared memory new to the compiler, which would keep all it has met in registers."""
        first, self._zero = lax.optimization_barrier((self._warpgroup * COLUMNS, jnp.int32(0)))
        self._own = pl.ds(first, COLUMNS)

    def _plane(self, plane: Any) -> Any:
        return self._memory.at[plane + self._zero]

    def _load(self, plane: Any) -> Array:
        return self._plane(plane)[:, self._own].astype(jnp.float32)

    def _store(self, plane: Any, x: Array) -> Array:
        rounded = x.astype(jnp.bfloat16)
        self._plane(plane)[:, self._own] = rounded
        return rounded.astype(jnp.float32)

    def _multiply(self, pairs: list[Pair]) -> Array:
        self._hide_addresses()

        def run(total: Any) -> Array:
            for x, y, form in pairs:
                left, right = self._plane(x), self._plane(y)
                left = left.transpose((1, 0)) if form == "tn" else left
                right = right.at[self._own].transpose((1, 0)) if form == "nt" else right.at[:, self._own]
                plgpu.wgmma(total, left, right)
            return total[...]

        return pl.run_scoped(run, plgpu.WGMMAAccumulatorRef((SIZE, COLUMNS), jnp.float32))

    def _meet(self) -> None:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.commit_smem()
        plgpu.barrier_arrive(self._met)
        plgpu.barrier_wait(self._met)
        self._hide_addresses()

    def _at(self, stored: Stored, plane: int, chunk: Any) -> Any:
        """A plane of a tile in the device's memory."""
        chunk = self._chunk if chunk is None else chunk
        if stored.kind == "time":
            return stored.array.at[plane, self._row, pl.ds(chunk * SIZE, SIZE), self._head]
        if stored.kind == "chunks":
            return stored.array.at[plane, self._row, self._head, chunk]
        if stored.kind == "state":
            return stored.array.at[plane, self._row, self._head]
        row, chunk = (
            0 if size == 1 else x for size, x in zip(stored.array.shape[1:3], (self._row, chunk), strict=True)
        )
        return stored.array.at[plane, row, chunk]

    def _begin_fetch(self, stored: Stored, of_stored: int, chunk: Any, plane: Any) -> None:
        source = self._at(stored, of_stored, chunk)

        @pl.when(self._warpgroup == 0)
        def _() -> None:
            plgpu.copy_gmem_to_smem(source, self._plane(plane), self._arrived.at[plane])

    def _await_fetch(self, plane: Any) -> None:
        plgpu.barrier_wait(self._arrived.at[plane])

    def _begin_sends(self, leaving: list[tuple[Stored, Tile, Any]]) -> None:
        @pl.when(self._warpgroup == 0)
        def _() -> None:
            for stored, tile, chunk in leaving:
                for of_stored, plane in enumerate(tile.planes):
                    plgpu.copy_smem_to_gmem(self._plane(plane), self._at(stored, of_stored, chunk))

    def loop(self, body: Callable[[Any, Array], Array], start: Array) -> Array:
        end = lax.fori_loop(0, self.chunks, body, start)
        self._hide_addresses()  # those of the loop's body mean nothing here
        return end

    def when(self, condition: Any, action: Callable[[], None]) -> None:
        pl.when(condition)(action)


def call(
    name: str, body: Body, parts: int, by_chunk: bool, sizes: tuple[int, int, int], inputs: Any, outputs: Any
) -> Any:
    """Calls a kernel with one program per row, head and, if `by_chunk`, chunk; sizes are B, H and T / 64."""
    batch, heads, chunks = sizes
    stored, structure = jax.tree.flatten(inputs, is_leaf=is_stored)
    results, structure_of_results = jax.tree.flatten(outputs, is_leaf=is_stored)
    planned = interpreted_tiles.plan(body, parts, by_chunk, inputs, outputs)
    tiles = plgpu.SMEM((planned.count, SIZE, SIZE), jnp.bfloat16, transforms=_TRANSFORMS)
    arrived = plgpu.Barrier(num_barriers=planned.count)

    def kernel(*refs: Any) -> None:
        arrays, scratch = refs[:-3], refs[-3:]
        refs_of = [Stored(ref, of.kind) for ref, of in zip(arrays, [*stored, *results], strict=True)]
        row, head = lax.axis_index("row"), lax.axis_index("head")
        place = row, head, lax.axis_index("chunk") if by_chunk else None
        device = _Device(parts, chunks, place, scratch)
        body(
            device,
            jax.tree.unflatten(structure, refs_of[: len(stored)]),
            jax.tree.unflatten(structure_of_results, refs_of[len(stored) :]),
        )
        device.share()
        plgpu.wait_smem_to_gmem(0)

    grid, names = (batch, heads), ("row", "head")
    arrays = plgpu.kernel(
        kernel,
        out_type=[x.array for x in results],
        scratch_types=[tiles, arrived, plgpu.Barrier(num_arrivals=WARPGROUPS)],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        grid=(chunks, *grid) if by_chunk else grid,
        grid_names=("chunk", *names) if by_chunk else names,
        num_threads=WARPGROUPS,
        thread_name="warpgroup",
        kernel_name=name,
    )(*(x.array for x in stored))
    varied, _ = broadcast_varying_axes(arrays, stored[0].array)  # Pallas forgets which mesh axes they vary over
    return jax.tree.unflatten(structure_of_results, varied)
