"""Argument checks that all operators share, and segments, lengths and padding as implementations take them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, core


def is_concrete(x: Array) -> bool:
    """Whether x has values that this process can read: outside jit, and fully addressable."""
    return not isinstance(x, core.Tracer) and x.is_fully_addressable


def values_at_hand(x: Any, validate: bool | None = None) -> bool:
    """Whether to check the values of x; inside jit there are none.

    Args:
      validate: None checks values if nothing has to be copied from an accelerator; True always, which waits for the
        device; False never.
    """
    if validate is False or isinstance(x, core.Tracer):
        return False
    if not isinstance(x, Array):
        return True
    return x.is_fully_addressable and (validate is True or all(device.platform == "cpu" for device in x.devices()))


def axis_sizes(inputs: Mapping[str, Array], axes: Mapping[str, str], sized_by: tuple[str, ...]) -> dict[str, int]:
    """The size of each axis, from the arrays that the other shapes follow from; the first one's sizes hold.

    Args:
      axes: letters of each array's axes, such as "B T H N".

    Raises:
      ValueError: a wrong number of axes; the message names the argument.
    """
    sizes: dict[str, int] = {}
    for name in sized_by:
        _check_axes(name, inputs[name], axes[name])
        sizes = dict(zip(axes[name].split(), inputs[name].shape, strict=True)) | sizes
    return sizes


def check_inputs(
    inputs: Mapping[str, Array], axes: Mapping[str, str], sizes: Mapping[str, int], reference: str
) -> None:
    """Checks number of axes, shape and floating dtype of arrays.

    Args:
      inputs: arrays by name.
      axes: letters of each array's axes, such as "B T H N".
      sizes: of each axis, from `axis_sizes`.
      reference: the array whose shape errors name beside a wrong one.

    Raises:
      ValueError: a wrong number of axes, shape or dtype, or an empty axis; the message names the argument.
    """
    for name, x in inputs.items():
        _check_axes(name, x, axes[name])
        shape = tuple(sizes[letter] for letter in axes[name].split())
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name}: dtype {x.dtype} must be a floating one")
        if 0 in x.shape:
            raise ValueError(f"{name}: shape {x.shape} has an empty axis")
        if x.shape != shape:
            raise ValueError(
                f"{name}: shape {x.shape} does not go with {reference} of shape {inputs[reference].shape}: "
                f"must be {shape}, [{axes[name]}]"
            )


def _check_axes(name: str, x: Array, axes: str) -> None:
    if x.ndim != len(axes.split()):
        raise ValueError(f"{name}: shape {x.shape} must be [{axes}]")


def check_log_decay(log_w: Array, validate: bool | None) -> None:
    """Checks that log_w is at most 0, if `values_at_hand(log_w, validate)`.

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
      ValueError: a wrong shape or dtype; the message names the argument and what it must be.
    """
    if state.shape != shape:
        raise ValueError(f"{name}: shape {state.shape} must be {shape}, {axes}")
    if state.dtype not in (jnp.float32, jnp.float64):
        raise ValueError(f"{name}: dtype {state.dtype} must be float32 or float64; the recurrence is not kept in less")


def recurrence_dtype(inputs: Mapping[str, Array], *states: Array) -> jnp.dtype:
    """Dtype of the recurrence: float64 if any argument is, otherwise float32."""
    is_double = any(x.dtype == jnp.float64 for x in (*inputs.values(), *states))
    return jnp.dtype(jnp.float64 if is_double else jnp.float32)


def check_lengths(lengths: Array | None, batch: int, time: int) -> Array | None:
    """Checks rows' lengths and casts them to int32.

    Raises:
      ValueError: a shape other than [B], a dtype that is not integer, or (if values are known) a length outside 0 to T.
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
    """Checks segment ids.

    Raises:
      ValueError: a shape other than [B, T], or a dtype that is not integer.
    """
    segment_ids = jnp.asarray(segment_ids)
    if segment_ids.shape != (batch, time):
        raise ValueError(f"segment_ids: shape {segment_ids.shape} must be {(batch, time)}, [B, T]")
    if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        raise ValueError(f"segment_ids: dtype {segment_ids.dtype} must be an integer one")
    return segment_ids


def segment_index(
    segment_ids: Array | None, lengths: Array | None, batch: int, time: int, previous: Array | None = None
) -> Array | None:
    """Numbers segments from 0 in order of time, so that two steps of a chunk can be compared.

    Args:
      segment_ids: [B, T], any integers; a segment ends where they change. Changes beyond a row's length do not count.
      previous: [B], the id before the first step if the row begins on another shard; else None.

    Returns:
      int32 [B, T] that grows by 1 at each change, or None. Segment 0 continues the initial state.

    Raises:
      ValueError: a shape other than [B, T], or a dtype that is not integer.
    """
    if segment_ids is None:
        return None
    segment_ids = check_segment_ids(segment_ids, batch, time)
    previous = segment_ids[:, 0] if previous is None else previous
    changes = jnp.diff(segment_ids, axis=1, prepend=previous[:, None]) != 0
    if lengths is not None:
        changes &= is_active(lengths, time)
    return jnp.cumsum(changes, axis=1, dtype=jnp.int32)


def segment_starts(segments: Array) -> Array:
    """[B, T]: whether a segment starts at a step, from `segment_index`."""
    return jnp.diff(segments, axis=1, prepend=jnp.zeros_like(segments[:, :1])) != 0


def zero_padding(inputs: tuple[Array, ...], lengths: Array | None) -> tuple[Array, ...]:
    """Zeroes arrays [B, T, ...] beyond each row's length; zero inputs change no state and give y = 0."""
    if lengths is None:
        return inputs
    active = is_active(lengths, inputs[0].shape[1])
    return tuple(jnp.where(active.reshape(active.shape + (1,) * (x.ndim - 2)), x, 0) for x in inputs)


def pad_time(x: Array, padding: int, *, edge: bool = False) -> Array:
    """Appends steps to [B, T, ...]: zeros, or copies of the last step."""
    if not padding:
        return x
    widths = ((0, 0), (0, padding), *((0, 0),) * (x.ndim - 2))
    return jnp.pad(x, widths, mode="edge") if edge else jnp.pad(x, widths)


def _varying_axes(x: Array) -> frozenset[str]:
    """Mesh axes over which x varies, inside `shard_map`."""
    kind = jax.typeof(x)
    if hasattr(kind, "vma"):  # the name that other releases of JAX have
        return kind.vma
    return kind.manual_axis_type.varying


def varying_like(x: Array, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an array that varies over the same mesh axes as x."""
    kind = jax.typeof(x)
    if hasattr(kind, "vma"):  # the name that other releases of JAX have
        return jax.ShapeDtypeStruct(shape, dtype, **{"vma": kind.vma})
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind.manual_axis_type)


def broadcast_varying_axes(*trees: Any) -> tuple[Any, ...]:
    """Inside `shard_map`, makes all arrays vary over every mesh axis that any of them varies over.

    The gradient of an argument that all shards share is then the sum of the shards' gradients.
    """
    leaves, structure = jax.tree.flatten(trees)
    axes = frozenset[str]().union(*map(_varying_axes, leaves))
    varied = [jax.lax.pcast(x, tuple(sorted(axes - _varying_axes(x))), to="varying") for x in leaves]
    return jax.tree.unflatten(structure, varied)
