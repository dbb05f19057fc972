"""Front end of WKV-5, 6 and 7, whose state is a matrix per head: argument checks, packing, choice of implementation."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from rwkv_kernels import arguments, dispatch, pieces, sharded
from rwkv_kernels.precision import Precision, check_precision


def _run(
    chosen: dispatch.Implementation, inputs: dict[str, Array], state: Array, options: dict[str, Any]
) -> tuple[Array, Array]:
    """Runs an implementation on arguments that all vary over the same mesh axes."""
    precision = options["precision"]
    arrays, state, rest = arguments.broadcast_varying_axes(tuple(inputs.values()), state, options | {"precision": None})
    return chosen.run(*arrays, state, **rest | {"precision": precision})


@dataclasses.dataclass(frozen=True)
class MatrixOperator:
    """A WKV operator with state [B, H, M, N]."""

    name: str
    axes: Mapping[str, str]
    """Axes of the arguments, in order: "B T H N", "B T H M" or "H N"."""
    step: Callable[..., tuple[Array, Array]]
    """(state, *arguments of one token in the state's dtype) -> (state, y)."""
    implementations: Mapping[str, dispatch.Implementation]
    """All implementations, by name."""
    preferred: Callable[[dispatch.Problem], tuple[str, ...]]
    """Names in the order that `implementation=None` tries; docs/operators.md says what was measured where."""
    algebra: pieces.Algebra
    """Operations on its state transitions."""
    affine_map: Callable[..., pieces.AffineMap]
    """(run, inputs by name, a state, segments, lengths) -> the affine map of these steps."""

    def _prepare(
        self, inputs: dict[str, Any], state: Any, axis_t: str, validate: bool | None = None
    ) -> tuple[dict[str, Array], Array]:
        """Checked arguments, and the initial state in the recurrence's dtype."""
        inputs = {name: jnp.asarray(x) for name, x in inputs.items()}
        axes = {name: letters.replace("T ", axis_t) for name, letters in self.axes.items()}
        sizes: dict[str, int] = {}
        for name in ("r", "v"):
            arguments.check_axes(name, inputs[name], axes[name])
            sizes = dict(zip(axes[name].split(), inputs[name].shape, strict=True)) | sizes
        for name, letters in axes.items():
            if letters == "H N" and inputs[name].shape == (sizes["H"], 1):  # one value per head
                inputs[name] = jnp.broadcast_to(inputs[name], (sizes["H"], sizes["N"]))
        expected = {name: (letters, tuple(sizes[x] for x in letters.split())) for name, letters in axes.items()}
        arguments.check_inputs(inputs, expected)
        arguments.check_log_decay(inputs["log_w"], validate)
        shape = tuple(sizes[x] for x in "BHMN")
        if state is None:
            return inputs, jnp.zeros(shape, arguments.recurrence_dtype(inputs))
        state = jnp.asarray(state)
        arguments.check_state("state", state, shape, "[B, H, M, N] with the value axis first")
        return inputs, state.astype(arguments.recurrence_dtype(inputs, state))

    def _choose(
        self, inputs: dict[str, Array], state: Array, implementation: str | dispatch.Implementation | None
    ) -> dispatch.Implementation:
        batch, time, heads, key_dim = inputs["r"].shape
        problem = dispatch.Problem(
            jax.default_backend(), (batch, time, heads, key_dim, inputs["v"].shape[-1]), state.dtype.name
        )
        return dispatch.choose(self.name, self.implementations, self.preferred(problem), problem, implementation)

    def _silence(self, inputs: dict[str, Array], lengths: Array | None) -> tuple[dict[str, Array], dict[str, Any]]:
        """Inputs zeroed beyond lengths, and `lengths` for implementations that still need it."""
        over_time = {name: x for name, x in inputs.items() if "T" in self.axes[name]}
        silenced = inputs | dict(zip(over_time, arguments.silence(tuple(over_time.values()), lengths), strict=True))
        # A decay that does not depend on the step cannot be zeroed.
        return silenced, {} if "log_w" in over_time else {"lengths": lengths}

    def run(
        self,
        inputs: dict[str, Any],
        state: Any,
        *,
        segment_ids: Any,
        lengths: Any,
        implementation: str | dispatch.Implementation | None,
        precision: Precision,
        validate: bool | None,
    ) -> tuple[Array, Array]:
        """The operator over a sequence: y in v's dtype, and the final state."""
        inputs, state = self._prepare(inputs, state, "T ", validate)
        check_precision(precision)
        chosen = self._choose(inputs, state, implementation)
        batch, time = inputs["r"].shape[:2]
        lengths = arguments.check_lengths(lengths, batch, time)
        segments = arguments.number_segments(segment_ids, lengths, batch, time)
        silenced, options = self._silence(inputs, lengths)
        options |= {"segments": segments, "precision": precision}
        y, state = _run(chosen, silenced, state, options)
        return y.astype(inputs["v"].dtype), state

    def run_sharded(
        self,
        inputs: dict[str, Any],
        state: Any,
        *,
        axis_name: str,
        segment_ids: Any,
        lengths: Any,
        implementation: str | dispatch.Implementation | None,
        precision: Precision,
    ) -> tuple[Array, Array]:
        """The operator over a sequence whose time is split over a mesh axis, inside `shard_map`.

        Each shard computes the affine map of its steps, all-gathers the maps, and runs from its incoming state.

        Args:
          inputs: this shard's steps; state: of the whole sequence, the same on every shard of the axis.
          lengths: of the whole sequence.

        Returns:
          This shard's y, and the final state of the whole sequence.
        """
        inputs, state = self._prepare(inputs, state, "T ")
        check_precision(precision)
        chosen = self._choose(inputs, state, implementation)
        batch, time = inputs["r"].shape[:2]
        whole = time * lax.axis_size(axis_name)
        lengths = sharded.lengths_of_this_shard(arguments.check_lengths(lengths, batch, whole), time, axis_name)
        segments = sharded.segments_of_this_shard(segment_ids, lengths, batch, time, axis_name)
        silenced, options = self._silence(inputs, lengths)
        options |= {"segments": segments, "precision": precision}
        # In the state's dtype, so that the gradients of the two runs are summed before they are rounded.
        silenced = {name: x.astype(state.dtype) for name, x in silenced.items()}
        run = functools.partial(_run, chosen, options=options)
        piece = self.affine_map(run, silenced, state, segments, lengths)
        y, final = run(silenced, sharded.state_of_shard(self.algebra, piece, state, axis_name))
        return y.astype(inputs["v"].dtype), sharded.from_last_shard(final, axis_name)

    def run_step(self, inputs: dict[str, Any], state: Any) -> tuple[Array, Array]:
        """The operator for one token."""
        inputs, state = self._prepare(inputs, state, "")
        state, y = self.step(state, *(x.astype(state.dtype) for x in inputs.values()))
        return y.astype(inputs["v"].dtype), state
