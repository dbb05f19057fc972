"""Run with four fake devices: prints, as JSON, where the parameters of a file lie and whether they are the file's."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from rwkv_jax import from_pretrained, save_pretrained
from rwkv_jax.parallel.mesh import MeshShape, mesh_from_shape
from rwkv_jax.weights.official import official_tensors
from rwkv_jax.weights.safetensors import write_safetensors
from tests.weights.files import CONFIGS, assert_same_bits, random_tensors


def main() -> None:
    mesh = jax.make_mesh((2, 2), ("data", "model"))
    tensors = random_tensors(CONFIGS["6"], "bfloat16")
    tokens = np.arange(12).reshape(1, 12)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "six.safetensors"
        write_safetensors(path, tensors)
        model = from_pretrained(path, mesh=mesh)
        save_pretrained(model, Path(folder) / "again.pth")
        same = from_pretrained(Path(folder) / "again.pth", dtype="float32")
        whole = from_pretrained(path, dtype="float32")
        split = from_pretrained(path, dtype="float32", mesh=mesh)
        as_trained = from_pretrained(
            path, dtype="float32", mesh=mesh_from_shape(MeshShape(fsdp=2, tensor=1, data=2), jax.devices())
        )
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert_same_bits(dict(official_tensors(model.config, params)), tensors)

    @nnx.jit
    def logits(model, tokens):
        return model(tokens)[0]

    expected = np.asarray(logits(whole, tokens))
    report = {
        "shards": {
            ".".join(str(entry.key) for entry in path): sorted({shard.data.shape for shard in leaf.addressable_shards})
            for path, leaf in jax.tree.leaves_with_path(params)
        },
        "devices": {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(params)}.pop(),
        "error": float(np.abs(np.asarray(logits(split, tokens)) - expected).max()),
        "error_as_trained": float(np.abs(np.asarray(logits(as_trained, tokens)) - expected).max()),
        "partitions_as_trained": {
            ".".join(str(entry.key) for entry in path): list(leaf.sharding.spec)
            for path, leaf in jax.tree.leaves_with_path(nnx.to_pure_dict(nnx.state(as_trained, nnx.Param)))
        },
        "error_again": float(np.abs(np.asarray(logits(same, tokens)) - expected).max()),
    }
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
