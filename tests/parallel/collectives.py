"""Run with eight fake devices: prints, as JSON, the collectives of a training step on meshes, at two lengths.

A case is MESH:LENGTH. Each kind of collective is reported with its number and the bytes of its arrays in one step.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import sys
from typing import Any

import jax

from rwkv_jax.plan.costs import find_collectives
from rwkv_jax.plan.program import parse_module
from rwkv_jax.training.functions import abstract_batch, abstract_state, make_train_functions
from tests.golden import QUICK
from tests.parallel.meshes import config_of, make_mesh


def collectives_of(mesh_name: str, length: int) -> dict[str, Any]:
    """Number and bytes by kind; those that hold an axis of tokens are told by their growth with the length."""
    config = config_of("7", "float32")
    training = dataclasses.replace(
        config.training, sequence_length=length, loss_chunk=None, carry_state=False, accumulation_steps=1
    )
    config = dataclasses.replace(config, training=training)
    mesh = make_mesh(mesh_name)
    assert mesh is not None
    trainer = make_train_functions(config, mesh)
    lowered = jax.jit(trainer.train_step).lower(abstract_state(trainer), abstract_batch(trainer, config))
    module = parse_module(str(lowered.compile(compiler_options=QUICK).as_text()))
    found: collections.defaultdict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
    for collective in find_collectives(module, mesh.size):
        found[collective.kind][0] += collective.executions
        found[collective.kind][1] += collective.executions * collective.bytes
    return dict(found)


def main() -> None:
    cases = [case.split(":") for case in sys.argv[1:]]
    json.dump({f"{mesh}:{length}": collectives_of(mesh, int(length)) for mesh, length in cases}, sys.stdout)


if __name__ == "__main__":
    main()
