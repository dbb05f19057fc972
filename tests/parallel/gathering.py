"""Run with eight fake devices: prints, as JSON, the gradient of a gathered bfloat16 table at tokens that come again."""

from __future__ import annotations

import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rwkv_jax.models.layers import Embedding
from rwkv_jax.parallel.sharded_model import shard_model
from rwkv_jax.training.functions import make_train_functions
from tests.parallel.meshes import config_of, make_mesh


def main() -> None:
    config = config_of("7", "bfloat16")
    shapes = jax.eval_shape(make_train_functions(config).init, jax.random.key(0)).params
    split = shard_model(config.model, shapes, make_mesh("fsdp2"))
    tokens = np.repeat(np.array([2, 5], np.int32), [3000, 5192]).reshape(2, 4096)

    def total(table: Array, tokens: Array) -> Array:
        embedding = split.gather_params("emb", Embedding(table))
        return split.psum(jnp.sum(embedding(tokens, "bfloat16").astype(jnp.float32)))

    spec: Any = split.param_specs["emb"]["weight"]
    gradient = split.shard_map(jax.grad(total), (spec, split.tokens_spec), spec)
    found = jax.jit(gradient)(jnp.ones(shapes["emb"]["weight"].shape), tokens)
    json.dump({str(token): float(found[token, 0]) for token in (2, 5)}, sys.stdout)


if __name__ == "__main__":
    main()
