"""Digests of one model's parameters, wherever they lie: prints JSON; run in a process with four devices."""

from __future__ import annotations

import json

import jax
import numpy as np
from jax.sharding import Mesh

from rwkv_jax.inference.state.state_file import parameters_digest
from rwkv_jax.weights.official import shardings_on
from tests.models.parameters import SMALL, in_dtype, random_params


def main() -> None:
    config = SMALL["4"]
    jax.config.update("jax_enable_x64", True)
    params = in_dtype(random_params(config), config)
    devices = np.array(jax.devices())
    split = jax.device_put(params, shardings_on(Mesh(devices, ("devices",)), config))
    leaves = jax.tree.leaves(split)
    one = jax.device_put(params, devices[3])
    print(
        json.dumps(
            {
                "devices": len(devices),
                "split": sum(not leaf.is_fully_replicated for leaf in leaves),
                "digests": [parameters_digest(each) for each in (params, split, one)],
                "kept on the host": sum(leaf._npy_value is not None for leaf in leaves),
            }
        )
    )


if __name__ == "__main__":
    main()
