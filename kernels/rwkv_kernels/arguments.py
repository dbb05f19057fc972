"""Checks that every operator makes of its arguments, and packing and padding in the form that implementations take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, core


def is_concrete(x: Array) -> bool:
    """Whether the values of x are at hand: outside jit, and all on this process."""
    return not isinstance(x, core.Tracer) and x.is_fully_addressable


def values_at_hand(x: Any, validate: bool | None = None) -> bool:
    """Whether the values of x are to be looked at, which exist outside jit only.

    Args:
      validate: None looks where that copies nothing from an accelerator, True wherever there are values, which then
        waits for the device, False nowhere.
    """
    if validate is False or isinstance(x, core.Tracer):
        return False
    if not isinstance(x, Array):
        return True
    return x.is_fully_addressable and (validate is True or all(device.platform == "cpu" for device in x.devices()))


def check_inputs(inputs: Mapping[str, Array], expected: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """Checks floating arrays against their axes' names and sizes.

    Args:
      inputs: arrays by name.
      expected: for each of them, the axes in letters ("B T H N") and their sizes.

    Raises:
      ValueError: a number of axes, a size, a dtype or an empty axis; the message names the argument.
    """
    for name, x in inputs.items():
        axes, shape = expected[name]
        if x.ndim != len(axes.split()):
            raise ValueError(f"{name}: shape {x.shape} must be [{axes}]")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name}: dtype {x.dtype} must be a floating one")
        if 0 in x.shape:
            raise ValueError(f"{name}: shape {x.shape} has an empty axis")
        if x.shape != shape:
            first = next(iter(inputs))
            raise ValueError(
                f"{name}: shape {x.shape} does not go with {first} of shape {inputs[first].shape}: "
                f"must be {shape}, [{axes}]"
            )


def check_axes(name: str, x: Array, axes: str) -> None:
    """Checks the number of axes of the array whose sizes the others are held against.

    Raises:
      ValueError: naming the argument and the axes.
    """
    if x.ndim != len(axes.split()):
        raise ValueError(f"{name}: shape {x.shape} must be [{axes}]")


def check_log_decay(log_w: Array, validate: bool | None) -> None:
    """Refuses decays that cannot be right, where `values_at_hand(log_w, validate)`.

    Raises:
      ValueError: a value above 0, or NaN.
    """
    if not values_at_hand(log_w, validate):
        return
    values = np.asarray(log_w, np.float32)
    if values.size and not values.max() <= 0:
        raise ValueError(f"log_w: its largest value is {values.max()}; it is the log of a decay, so at most 0")


def check_state(name: str, state: Array, shape: tuple[int, ...], axes: str) -> None:
    """Checks an initial state's shape and dtype.

    Raises:
      ValueError: naming the argument, what it is and what it must be.
    """
    if state.shape != shape:
        raise ValueError(f"{name}: shape {state.shape} must be {shape}, {axes}")
    if state.dtype not in (jnp.float32, jnp.float64):
        raise ValueError(f"{name}: dtype {state.dtype} must be float32 or float64; the recurrence is not kept in less")


def recurrence_dtype(inputs: Mapping[str, Array], *states: Array) -> jnp.dtype:
    """Dtype in which the recurrence runs: float64 where any argument is, otherwise float32."""
    is_double = any(x.dtype == jnp.float64 for x in (*inputs.values(), *states))
    return jnp.dtype(jnp.float64 if is_double else jnp.float32)


def check_lengths(lengths: Array | None, batch: int, time: int) -> Array | None:
    """Checks the number of steps of each row.

    Raises:
      ValueError: a shape other than [B], no integer dtype, or (where values are at hand) a length outside 0 to T.
    """
    if lengths is None:
        return None
    lengths = jnp.asarray(lengths)
    if lengths.shape != (batch,):
        raise ValueError(f"lengths: shape {lengths.shape} must be {(batch,)}, [B]")
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(f"lengths: dtype {lengths.dtype} must be an integer one")
    if is_concrete(lengths):
        values = np.asarray(lengths)
        if values.min() < 0 or values.max() > time:
            raise ValueError(f"lengths: values from {values.min()} to {values.max()} must lie from 0 to T = {time}")
    return lengths.astype(jnp.int32)


def is_active(lengths: Array, time: int) -> Array:
    """[B, T]: whether a step lies within its row's length."""
    return jnp.arange(time)[None] < lengths[:, None]


def check_segment_ids(segment_ids: Array, batch: int, time: int) -> Array:
    """Checks the segment of each step.

    Raises:
      ValueError: a shape other than [B, T] or no integer dtype.
    """
    segment_ids = jnp.asarray(segment_ids)
    if segment_ids.shape != (batch, time):
        raise ValueError(f"segment_ids: shape {segment_ids.shape} must be {(batch, time)}, [B, T]")
    if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        raise ValueError(f"segment_ids: dtype {segment_ids.dtype} must be an integer one")
    return segment_ids


def number_segments(
    segment_ids: Array | None, lengths: Array | None, batch: int, time: int, previous: Array | None = None
) -> Array | None:
    """Numbers segments in the order of time, so that a chunk can compare its ends.

    Args:
      segment_ids: [B, T], any integers; a segment ends where they change. Changes beyond a row's length do not count.
      previous: [B], the id before the first step where the row began elsewhere; None if it begins here.

    Returns:
      int32 [B, T] that grows by 1 at each change, or None. Segment 0 continues the initial state.

    Raises:
      ValueError: a shape other than [B, T] or no integer dtype.
    """
    if segment_ids is None:
        return None
    segment_ids = check_segment_ids(segment_ids, batch, time)
    previous = segment_ids[:, 0] if previous is None else previous
    changes = jnp.diff(segment_ids, axis=1, prepend=previous[:, None]) != 0
    if lengths is not None:
        changes &= is_active(lengths, time)
    return jnp.cumsum(changes, axis=1, dtype=jnp.int32)


def starts(segments: Array) -> Array:
    """[B, T]: whether a step begins another segment than the one before it; segments as `number_segments` has them."""
    return jnp.diff(segments, axis=1, prepend=jnp.zeros_like(segments[:, :1])) != 0


def silence(inputs: tuple[Array, ...], lengths: Array | None) -> tuple[Array, ...]:
    """Zeroes what lies beyond a row's length: [B, T, ...] arrays whose zeros change no state and make y zero."""
    if lengths is None:
        return inputs
    active = is_active(lengths, inputs[0].shape[1])
    return tuple(jnp.where(active.reshape(active.shape + (1,) * (x.ndim - 2)), x, 0) for x in inputs)


def pad_time(x: Array, padding: int, *, edge: bool = False) -> Array:
    """Appends steps of zeros, or of the last step, to [B, T, ...]."""
    if not padding:
        return x
    widths = ((0, 0), (0, padding), *((0, 0),) * (x.ndim - 2))
    return jnp.pad(x, widths, mode="edge") if edge else jnp.pad(x, widths)


def _varying_axes(x: Array) -> frozenset[str]:
    """Mesh axes over which x differs from shard to shard, within `shard_map`."""
    kind = jax.typeof(x)
    if hasattr(kind, "vma"):  # the name that other releases of JAX have
        return kind.vma
    return kind.manual_axis_type.varying


def varying_like(x: Array, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """The description of an array that varies over the mesh axes that x varies over."""
    kind = jax.typeof(x)
    if hasattr(kind, "vma"):  # the name that other releases of JAX have
        return jax.ShapeDtypeStruct(shape, dtype, **{"vma": kind.vma})
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind.manual_axis_type)


def broadcast_varying_axes(*trees: Any) -> tuple[Any, ...]:
    """Arrays made to vary over every mesh axis that any of them varies over, within `shard_map`; else as they are.

    A gradient of an argument that is the same on all shards is then the sum of the shards' gradients, as it must be.
    """
    leaves, structure = jax.tree.flatten(trees)
    axes = frozenset[str]().union(*map(_varying_axes, leaves))
    varied = [jax.lax.pcast(x, tuple(sorted(axes - _varying_axes(x))), to="varying") for x in leaves]
    return jax.tree.unflatten(structure, varied)
