"""Every implementation under `shard_map` over rows and heads on four devices, against the definition; prints errors.

A program of its own, because the number of devices is set before JAX starts: test_sharding.py runs it.
"""

from __future__ import annotations

import functools
import json
import sys
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from rwkv_kernels.testing.cases import Shape
from tests.golden import QUICK, relative_error
from tests.kernels.operators import WAYS, Inputs, Operator, Way, differentiate, exactly

SHAPE = Shape(4, 17, 2, 4, 3)
OPTIONS = {
    "segment_ids": (np.arange(17) > np.array([3, 20, 9, 16])[:, None]).astype(np.int32),
    "lengths": np.array([17, 12, 0, 17]),
}


def specs_of(operator: Operator, inputs: Inputs) -> dict[str, Any]:
    """How each input is split over rows and heads."""
    split = {name: P("rows", None, "heads") for name in operator.over_time}
    split |= {name: P("heads") for name in operator.per_head}
    return split | {"state": jax.tree.map(lambda _: P("rows", "heads"), inputs["state"])}


def errors(way: Way) -> dict[str, float]:
    """Relative differences of results and gradients from those of the definition on one device."""
    mesh = jax.make_mesh((2, 2), ("rows", "heads"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    inputs, cotangents = way.problem("realistic", SHAPE)
    split = specs_of(way.operator, inputs)

    def run(**arguments: Any) -> Any:
        options = {name: arguments.pop(name) for name in OPTIONS}
        shard = jax.shard_map(
            lambda inputs, options: way.run(**inputs, **options),
            mesh=mesh,
            in_specs=(split, dict.fromkeys(OPTIONS, P("rows"))),
            out_specs=(split["v"], split["state"]),
            # Interpreted kernels mix index arithmetic with what varies over the mesh, which the check refuses.
            check_vma=not way.is_pallas,
        )
        return shard(arguments, options)

    results = jax.jit(functools.partial(differentiate, run), compiler_options=QUICK)(inputs, cotangents, OPTIONS)
    expected = exactly(way.operator, inputs, cotangents, OPTIONS)
    return {name: relative_error(results[name], expected[name]) for name in expected}


def main() -> None:
    """Prints errors by way and by array, as JSON, of the ways named as arguments."""
    assert jax.device_count() == 4
    found = {}
    for way in WAYS:
        if str(way) in sys.argv[1:]:
            with jax.enable_x64(way.dtype is np.float64):
                found[str(way)] = errors(way)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
