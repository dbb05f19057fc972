"""B3 of split.py as the derivative of a chunk, for kernels that loop over chunks with dS at hand."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array

from rwkv_kernels.matmul import Matmul
from rwkv_kernels.ops.wkv7.split import Gradients, Inputs, gradients


class _Written:
    """Takes what a body writes, where that is a value and no memory."""

    dtype = jnp.dtype(jnp.float32)
    value: Array

    def __setitem__(self, index: Any, value: Array) -> None:
        self.value = value


def chunk_gradients(
    matmul: Matmul,
    state: Array,
    inverse: Array,
    over_time: tuple[Array, ...],
    per_head: tuple[Array, ...],
    constants: tuple[Array | None, Array | None],
    dstate: Array,
    dy: Array,
) -> tuple[Array, tuple[Array, ...], tuple[Array, ...]]:
    """As `Launch.chunk_backward`, with the chunk's X [C, C] besides."""
    written, dinitial = Gradients(*(_Written() for _ in over_time)), _Written()
    matmul = matmul._replace(own_derivatives=False)
    gradients(matmul, Inputs._make((*over_time, constants[0])), dy, inverse, state, dstate, written, dinitial)
    return dinitial.value, tuple(x.value for x in written), per_head
