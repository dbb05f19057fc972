"""Front end that all operators share: argument checks, packing, sharded time, choice of implementation."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from rwkv_kernels import arguments, dispatch, sharded
from rwkv_kernels.precision import check_precision
from rwkv_kernels.xla import state_passing
from rwkv_kernels.xla.state_passing import State


def _run(
    chosen: dispatch.Implementation, inputs: dict[str, Array], state: State, options: dict[str, Any]
) -> tuple[Array, State]:
    """Runs an implementation on arguments that all vary over the same mesh axes."""
    static = {name: x for name, x in options.items() if isinstance(x, (str, int))}
    arrays, state, rest = arguments.broadcast_varying_axes(
        tuple(inputs.values()), state, {name: x for name, x in options.items() if name not in static}
    )
    return chosen.run(*arrays, state, **rest, **static)


def _empty_matrix(sizes: Mapping[str, int], dtype: jnp.dtype) -> Array:
    return jnp.zeros([sizes[x] for x in "BHMN"], dtype)


def _check_matrix(state: Any, sizes: Mapping[str, int]) -> Array:
    state = jnp.asarray(state)
    shape = tuple(sizes[x] for x in "BHMN")
    arguments.check_state("state", state, shape, "[B, H, M, N] with the value axis first")
    return state


@dataclasses.dataclass(frozen=True)
class Operator:
    """A WKV operator with all its implementations; WKV-4 multiplies no matrices, and so has no precision."""

    name: str
    axes: Mapping[str, str]
    """Axes of the arguments, in order: "B T H N", "B T H M" or "H N"; of WKV-4, "B T C" or "C"."""
    implementations: Mapping[str, dispatch.Implementation]
    """All implementations, by name."""
    transition_ops: state_passing.TransitionOps
    """Operations on its state transitions."""
    affine_map: Callable[..., state_passing.AffineMap]
    """(run, inputs by name, a state, segments, lengths) -> the affine map of these steps."""
    sized_by: tuple[str, ...] = ("r", "v")
    """Arguments whose shapes the others must go with."""
    empty_state: Callable[[Mapping[str, int], jnp.dtype], State] = _empty_matrix
    """(size of each axis, dtype) -> the state before any token."""
    check_state: Callable[[Any, Mapping[str, int]], State] = _check_matrix
    """(initial state, size of each axis) -> its arrays; raises ValueError."""
    preferred: Callable[[dispatch.Problem], tuple[str, ...]] = dispatch.default_order
    """Names in the order that `implementation=None` tries; docs/operators.md says what was measured where."""

    def run(
        self,
        inputs: dict[str, Any],
        state: Any,
        *,
        axis_name: str | None,
        segment_ids: Any,
        lengths: Any,
        implementation: str | dispatch.Implementation | None,
        chunk_size: int | None,
        validate: bool | None,
        **options: Any,
    ) -> tuple[Array, State]:
        """The operator over a sequence: y in v's dtype, and the final state.

        With an axis_name, each shard computes the affine map of its steps, all-gathers the maps, and runs from its
        initial state; the final state is that of the whole sequence.

        Args:
          inputs: by name; if time is split, this shard's steps.
          state, lengths: of the whole sequence.
          options: of implementations: `precision`, where the operator multiplies matrices.
        """
        inputs, state, sizes = self._prepare(inputs, state, validate)
        if "precision" in options:
            check_precision(options["precision"])
        batch, time, dtype = sizes["B"], sizes["T"], jax.tree.leaves(state)[0].dtype
        shape = (batch, time, sizes["H"] if "H" in sizes else sizes["C"], sizes.get("N", 1), sizes.get("M", 1))
        problem = dispatch.problem_here(shape, dtype.name)
        preferred = self.preferred(problem)
        chosen = dispatch.choose(self.name, self.implementations, preferred, problem, implementation, chunk_size)
        if chunk_size is not None:
            options["chunk_size"] = chunk_size

        if axis_name is None:
            lengths = arguments.check_lengths(lengths, batch, time)
            segments = arguments.segment_index(segment_ids, lengths, batch, time)
        else:
            lengths = arguments.check_lengths(lengths, batch, time * lax.axis_size(axis_name))
            lengths = sharded.lengths_of_this_shard(lengths, time, axis_name)
            segments = sharded.segments_of_this_shard(segment_ids, lengths, batch, time, axis_name)
        over_time = {name: x for name, x in inputs.items() if "T" in self.axes[name]}
        zeroed = arguments.zero_padding(tuple(over_time.values()), lengths)
        zeroed = inputs | dict(zip(over_time, zeroed, strict=True))
        if "log_w" not in over_time:  # a decay that does not depend on the step cannot be zeroed beyond lengths
            options["lengths"] = lengths
        run = functools.partial(_run, chosen, options=options | {"segments": segments})

        if axis_name is None:
            y, final = run(zeroed, state)
            return y.astype(inputs["v"].dtype), final
        # In the state's dtype, so that the gradients of the two runs are summed before they are rounded.
        zeroed = {name: x.astype(dtype) for name, x in zeroed.items()}
        span = self.affine_map(run, zeroed, state, segments, lengths)
        y, final = run(zeroed, sharded.state_of_shard(self.transition_ops, span, state, axis_name))
        return y.astype(inputs["v"].dtype), sharded.from_last_shard(final, axis_name)

    def _prepare(
        self, inputs: dict[str, Any], state: Any, validate: bool | None
    ) -> tuple[dict[str, Array], State, dict[str, int]]:
        """Checked arguments, the initial state in the recurrence's dtype, and the size of each axis."""
        inputs = {name: jnp.asarray(x) for name, x in inputs.items()}
        sizes = arguments.axis_sizes(inputs, self.axes, self.sized_by)
        for name, letters in self.axes.items():
            if letters == "H N" and inputs[name].shape == (sizes["H"], 1):  # one value per head
                inputs[name] = jnp.broadcast_to(inputs[name], (sizes["H"], sizes["N"]))
        arguments.check_inputs(inputs, self.axes, sizes, self.sized_by[0])
        arguments.check_log_decay(inputs["log_w"], validate)
        if state is None:
            return inputs, self.empty_state(sizes, arguments.recurrence_dtype(inputs)), sizes
        state = self.check_state(state, sizes)
        dtype = arguments.recurrence_dtype(inputs, *jax.tree.leaves(state))
        return inputs, jax.tree.map(lambda x: x.astype(dtype), state), sizes
