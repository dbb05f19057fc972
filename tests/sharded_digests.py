"""Digests of one array, whole and split over four devices in several ways, as JSON; test_digests.py runs it."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from rwkv_jax.digests import digest_tree


def main() -> None:
    """Prints a digest for each sharding."""
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    x = jax.random.normal(jax.random.key(0), (8, 4), jnp.bfloat16)
    specs = (P(), P("a"), P(None, "b"), P("b", "a"))
    found = [digest_tree({"x": x})["x"]]
    found += [digest_tree({"x": jax.device_put(x, NamedSharding(mesh, spec))})["x"] for spec in specs]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
