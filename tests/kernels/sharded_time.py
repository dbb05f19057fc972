"""Every operator with time split over a mesh axis, on four devices, against the whole sequence on one; prints errors.

A program of its own, because the number of devices is set before JAX starts: test_sharded_time.py runs it.
"""

from __future__ import annotations

import functools
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import rwkv_kernels
from rwkv_kernels.testing.cases import Shape
from tests.golden import QUICK, relative_error
from tests.kernels.operators import WAYS, Options, Way, differentiate, with_gradients

SHAPE = Shape(2, 20, 2, 4, 3)
CHANGES = np.array([[3, 10, 11, 99], [5, 9, 15, 99]])
"""Steps at which a row's segments start: within shards, and where one shard ends and the next begins."""
PACKED = {
    "segment_ids": np.sum(np.arange(SHAPE.time)[None, :, None] >= CHANGES[:, None], axis=-1, dtype=np.int32),
    "lengths": np.array([18, 7]),
}
CASES: dict[str, Options] = {"plain": {}, "packed": PACKED}
WAYS_HERE = tuple(way for way in WAYS if way.name in ("scan", "chunked"))
"""Interpreted kernels cannot keep track of what varies over a mesh; what shards tell each other is the same for all."""


def errors(way: Way, case: str) -> dict[str, float]:
    """Relative differences of results and gradients from those of the whole sequence."""
    mesh = jax.make_mesh((2, 2), ("rows", "time"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    operator, options = way.operator, CASES[case]
    inputs, cotangents = way.problem("realistic", SHAPE)
    split: dict[str, Any] = {name: P("rows", "time") for name in operator.over_time}
    split |= {name: P() for name in operator.per_head}
    split |= {"state": jax.tree.map(lambda _: P("rows"), inputs["state"])}
    splits_of_options = {"segment_ids": P("rows", "time"), "lengths": P("rows")}

    def run(**arguments: Any) -> Any:
        given = {name: arguments.pop(name) for name in options}
        shard = jax.shard_map(
            lambda inputs, given: way.run(**inputs, **given, axis_name="time"),
            mesh=mesh,
            in_specs=(split, {name: splits_of_options[name] for name in given}),
            out_specs=(split["v"], split["state"]),
        )
        return shard(arguments, given)

    results = jax.jit(functools.partial(differentiate, run), compiler_options=QUICK)(inputs, cotangents, options)
    expected = with_gradients(way)(inputs, cotangents, options)
    return {name: relative_error(results[name], expected[name]) for name in expected}


def halo_is_right() -> bool:
    """A token shift over the whole sequence is the one that shards make with their halo."""
    mesh = jax.make_mesh((4,), ("time",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jnp.arange(2.0 * 12 * 3).reshape(2, 12, 3)

    def shift(x: jax.Array) -> jax.Array:
        return jnp.concatenate([rwkv_kernels.from_previous_shard(x[:, -1:], "time"), x[:, :-1]], axis=1)

    shifted = jax.shard_map(shift, mesh=mesh, in_specs=P(None, "time"), out_specs=P(None, "time"))(x)
    return bool(jnp.array_equal(shifted, jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1]))


def main() -> None:
    """Prints the errors in every case of the ways named as arguments, and whether the halo is right, as JSON."""
    assert jax.device_count() == 4
    found = {}
    for way in [way for way in WAYS_HERE if str(way) in sys.argv[1:]]:
        with jax.enable_x64(way.dtype is np.float64):
            for case in CASES:
                found[f"{way}, {case}"] = errors(way, case)
    print(json.dumps({"errors": found, "halo": halo_is_right()}))


if __name__ == "__main__":
    main()
