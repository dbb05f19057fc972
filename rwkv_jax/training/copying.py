"""A student that begins with its teacher's parameters: stage 0 of converting a Transformer (RADLADS, arXiv 2505.03005).

What both models have under one name is copied. Where time mixing takes the place of attention, its receptance, key,
value and output are the teacher's query, key, value and output, of which heads shared by several queries are repeated.
What time mixing has besides begins such that it is near linear attention with the teacher's projections:

    x_r, x_w, x_k, x_v, x_a, x_g    0: no token shift
    w0                              from -8 to -4 along the channels of a head: decays of 0.9998 to 0.989 a token
    a0, k_a                         -3, 0: little is removed, and keys are written as they are
    v0                              -5: nearly no share of the first layer's values
    r_k                             0: no bonus
    g1, g2                          a gate of 1: 0, and random columns around 2 / D, whose sum over sigmoid(0) is 1

The rest, such as w1, w2 and ln_x, begins as in RWKV-7.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray

from rwkv_jax.config import ConfigError, ModelConfig
from rwkv_jax.config.generations import TIME_MIX_FIELDS
from rwkv_jax.models.stacks import is_layers
from rwkv_jax.weights.base import whole_on_host
from rwkv_jax.weights.model_difference import model_difference
from rwkv_jax.weights.official import official_names, official_shapes

_FROM_ATTENTION = {"receptance": "query", "key": "key", "value": "value", "output": "output"}


def check_copy(teacher: ModelConfig, student: ModelConfig, source: str) -> None:
    """Refuses a student that cannot begin with a teacher's parameters.

    Args:
      source: the teacher, for the message.

    Raises:
      ConfigError: with both sizes, and the flags that make the student fit.
    """
    place = f"distillation.copy = True: {source} is another model than the student: "
    if difference := model_difference(teacher, student, ("rwkv_layers", *TIME_MIX_FIELDS)):
        raise ConfigError(place + difference)
    kept = set(teacher.rwkv_layers) - set(student.rwkv_layers)
    if kept:
        needed = sorted({*teacher.rwkv_layers, *student.rwkv_layers})
        raise ConfigError(
            f"{place}its layers {' '.join(map(str, sorted(kept)))} have time mixing, and the student's have attention; "
            f"to start from it: --model.rwkv-layers {' '.join(map(str, needed))}"
        )
    ranks = [name for name in TIME_MIX_FIELDS if name.endswith("_rank")]
    own, found = student.sizes(), teacher.sizes()
    differences = [name for name in ranks if getattr(own, name) != getattr(found, name)] if teacher.rwkv_layers else []
    if differences:
        listed = ", ".join(f"model.{x} = {getattr(own, x)} here and {getattr(found, x)} there" for x in differences)
        flags = " ".join(f"--model.{x.replace('_', '-')} {getattr(found, x)}" for x in differences)
        raise ConfigError(f"{place}{listed}; to start from it: {flags}")


def copied_params(tensors: Mapping[str, NDArray], student: ModelConfig, drawn: Any, shardings: Any) -> Any:
    """A student's first parameters.

    Args:
      tensors: the teacher's, by names as official ones; the two models have passed `check_copy`.
      drawn: nested dict of the student's parameters with random first values, on the devices.
      shardings: where each goes.
    """

    def of_layer(name: str, shape: tuple[int, ...]) -> NDArray | None:
        """A layer's copied values, or None."""
        for there in (name, _attention_name(name)):
            if there in tensors:
                return _of_shape(np.asarray(tensors[there]), shape, student.head_dim, name)
        return None

    def leaf(path: tuple[Any, ...], first: Array, sharding: Any) -> Array:
        names = official_names(path, student.num_layers)
        shapes = official_shapes(student)
        found = [of_layer(name, shapes[name]) for name in names]
        stacked = first.shape != shapes[names[0]]
        if all(x is not None for x in found):
            values = np.stack([x for x in found if x is not None]) if stacked else found[0]
            assert values is not None
            values = np.asarray(values, first.dtype)
            return jax.make_array_from_callback(first.shape, sharding, values.__getitem__)
        within = ".".join(str(entry.key) for entry in path[1:]) if is_layers(str(path[0].key)) else ""
        begin = _CONVERTED.get(within)
        if begin is not None:
            first = jax.jit(lambda x: begin(x, student.head_dim), out_shardings=sharding)(first)
        if all(x is None for x in found):
            return first
        whole = whole_on_host(first)  # of which other processes may hold parts
        mixed = np.stack([whole[i] if x is None else x for i, x in enumerate(found)]).astype(first.dtype)
        return jax.make_array_from_callback(first.shape, sharding, mixed.__getitem__)

    return jax.tree.map_with_path(leaf, drawn, shardings)


def _attention_name(name: str) -> str:
    """The name of attention's matrix in the place of one of time mixing; another one stays as it is."""
    *before, matrix, last = name.split(".")
    if before[-1:] == ["att"] and matrix in _FROM_ATTENTION:
        return ".".join([*before, _FROM_ATTENTION[matrix], last])
    return name


def _of_shape(x: NDArray, shape: tuple[int, ...], head_dim: int, name: str) -> NDArray:
    """A teacher's array, with heads that several queries share repeated for each of them."""
    if x.shape == shape:
        return x
    if x.ndim == 2 and x.shape[1:] == shape[1:] and shape[0] % x.shape[0] == 0 and x.shape[0] % head_dim == 0:
        heads = x.reshape(-1, head_dim, x.shape[1])
        return np.repeat(heads, shape[0] // x.shape[0], axis=0).reshape(shape)
    raise ConfigError(
        f"distillation.copy = True: {name} is {list(shape)} here and {list(x.shape)} in the teacher; give the student "
        "the teacher's sizes (rwkv_jax.config.student_of)"
    )


def _constant(value: float) -> Callable[[Array, int], Array]:
    return lambda x, head_dim: jnp.full_like(x, value)


def _slow_decay(x: Array, head_dim: int) -> Array:
    along = jnp.tile(jnp.linspace(-8.0, -4.0, head_dim, dtype=x.dtype), x.shape[-1] // head_dim)
    return jnp.broadcast_to(along, x.shape)


def _open_gate(x: Array, head_dim: int) -> Array:
    del head_dim
    return x - jnp.mean(x, axis=-2, keepdims=True) + 2 / x.shape[-2]


_CONVERTED: dict[str, Callable[[Array, int], Array]] = {
    **{f"att.x_{name}": _constant(0.0) for name in "rwkvag"},
    "att.w0": _slow_decay,
    "att.a0": _constant(-3.0),
    "att.k_a": _constant(0.0),
    "att.v0": _constant(-5.0),
    "att.r_k": _constant(0.0),
    "att.g1": _constant(0.0),
    "att.g2": _open_gate,
}
"""By name within a layer: first values of what attention does not have, from the drawn ones and the size of a head."""
