"""Run with eight fake devices and a generation: prints, as JSON, what of a new run's state depends on the mesh."""

from __future__ import annotations

import json
import math
import sys
from typing import Any

import jax
import numpy as np

from rwkv_jax.training.functions import initial_state, make_train_functions
from tests.parallel.meshes import config_of, make_mesh


def state_on(generation: str, mesh: str) -> Any:
    return initial_state(make_train_functions(config_of(generation, "float32"), make_mesh(mesh)), 3)


def main() -> None:
    (generation,) = sys.argv[1:]
    expected = jax.tree.leaves(state_on(generation, "one"))
    found: dict[str, dict[str, Any]] = {}
    for mesh in ("data2.fsdp2.tensor2", "fsdp4.sequence2"):
        ours = jax.tree.leaves_with_path(state_on(generation, mesh))
        found[mesh] = {
            "different": [
                jax.tree_util.keystr(path)
                for (path, x), y in zip(ours, expected, strict=True)
                if np.asarray(x).tobytes() != np.asarray(y).tobytes()
            ],
            "largest_share": max(
                math.prod(x.sharding.shard_shape(x.shape)) / x.size
                for path, x in ours
                if x.ndim - ("blocks" in jax.tree_util.keystr(path)) == 2 and x.size > 1000
            ),
        }
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
