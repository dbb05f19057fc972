"""Run with four fake devices: prints, as JSON, what engines on one device and on meshes of four have written."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax

from rwkv_jax import from_pretrained, save_pretrained
from rwkv_jax.inference.engine.engine import Engine
from rwkv_jax.inference.sampling.grammar import Grammar
from rwkv_jax.inference.sampling.params import SamplingParams
from rwkv_jax.parallel.mesh import MeshShape, mesh_from_shape
from tests.inference.models import CONFIGS, GREEDY, prompts, quick_engine, random_model


def written(engine: Engine) -> dict[str, Any]:
    """Ids of ragged prompts, alone and together, and of a conversation that was left and taken up."""
    each = list(prompts(8, 6))
    session = engine.session()
    session.append("Hello")
    with session.stream(max_tokens=9, sampling=GREEDY) as stream:
        first = [*next(stream).ids, *next(stream).ids]
    return {
        "together": [text.ids for text in engine.generate(each, max_tokens=9, sampling=GREEDY)],
        "alone": [engine.generate(prompt, max_tokens=9, sampling=GREEDY).ids for prompt in each],
        "drawn": [text.ids for text in engine.generate(each, max_tokens=9, sampling=SamplingParams(top_p=0.9))],
        "guided": engine.generate(each[1], max_tokens=9, sampling=GREEDY, guidance_scale=2.0, negative_prompt="x").ids,
        "scored": [score.is_argmax for score in engine.score(each)],
        "matching": engine.generate(each[1], max_tokens=9, grammar=Grammar.regex("[a-z]{3,20}")).ids,
        "conversation": [first, session.generate(max_tokens=5, sampling=GREEDY).ids],
    }


def main() -> None:
    generation, *shapes = sys.argv[1:]
    model = random_model(CONFIGS[generation])
    report: dict[str, Any] = {"one": written(quick_engine(model))}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_pretrained(model, path)
        for shape in shapes:
            data, fsdp, tensor = map(int, shape.split("x"))
            mesh = mesh_from_shape(MeshShape(data=data, fsdp=fsdp, tensor=tensor), jax.devices())
            engine = quick_engine(from_pretrained(path, dtype="float32", mesh=mesh), mesh)
            report[shape] = written(engine)
            leaves = jax.tree.leaves(engine._driver.scheduler.slots._slots)
            report[f"devices of {shape}"] = sorted({len(x.sharding.device_set) for x in leaves})
            report[f"rows of {shape}"] = sorted({x.addressable_shards[0].data.shape[0] for x in leaves})
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
