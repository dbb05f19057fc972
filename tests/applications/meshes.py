"""Run with eight fake devices and an application's name: prints how far its step on meshes is from one device's."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from typing import Any

import jax
import numpy as np

from rwkv_jax.applications.audio.config import Audio, AudioConfig
from rwkv_jax.applications.seq2seq.config import Seq2Seq, Seq2SeqConfig
from rwkv_jax.applications.series.config import Series, SeriesConfig
from rwkv_jax.applications.vision.config import Vision, VisionConfig
from rwkv_jax.config import ApplicationConfig, ModelConfig, StepConfig
from rwkv_jax.parallel.mesh import MeshShape, mesh_from_shape
from rwkv_jax.parallel.rules import shardings
from rwkv_jax.training.functions import make_train_functions
from rwkv_jax.training.own_rows import open_examples
from rwkv_jax.training.step import loss_and_gradients
from tests.applications import toy

MESHES = {
    "majority": ("data8", "data2.fsdp2.tensor2", "fsdp4.tensor2"),
    "audio": ("data8", "data2.fsdp2.tensor2"),
    "vision": ("data8", "data2.fsdp2.tensor2"),
    "seq2seq": ("data8", "data2.fsdp4"),
    "series": ("data8", "data2.fsdp2.tensor2"),
}


def config_of(application: str) -> ApplicationConfig:
    """The smallest run of an application, of layers whose heads two devices share."""
    if application == "majority":
        return toy.config("unused")
    model = ModelConfig(vocab_size=64, num_layers=2, width=32, head_dim=8)
    if application == "audio":
        audio = Audio(words="tones", max_words=2, num_examples=16, num_held_out=1)
        return AudioConfig(model=model, audio=audio, training=StepConfig(sequence_length=70))
    if application == "vision":
        vision = Vision(images="lines", num_examples=64)
        return VisionConfig(model=model, vision=vision, training=StepConfig(sequence_length=16))
    if application == "series":
        return SeriesConfig(model=model, series=Series(source="waves"), training=StepConfig(sequence_length=8))
    seq2seq = Seq2Seq(num_examples=64, num_held_out=8)
    return Seq2SeqConfig(model=model, seq2seq=seq2seq, training=StepConfig(sequence_length=sum(seq2seq.sizes)))


def step_on(application: str, name: str | None) -> Any:
    """Metrics and gradients of a step, on a mesh or one device."""
    config = config_of(application)
    training = StepConfig(
        batch_size=16,
        sequence_length=config.training.sequence_length,
        accumulation_steps=1 if name is None else 2,
        remat="none" if name is None else "full",
    )
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="float64"), training=training)
    mesh = None
    if name is not None:
        shape = MeshShape(**{axis: int(size) for axis, size in re.findall(r"([a-z]+)(\d+)", name)})
        mesh = mesh_from_shape(shape, jax.devices()[: shape.size])
    functions = make_train_functions(config, mesh)
    assert functions.application is not None
    params = toy.params_of(functions.application)
    if mesh is not None:
        params = jax.device_put(params, shardings(mesh, functions.sharded.param_specs))
    batch = open_examples(functions.application, functions, lambda line: None)[1].load(3, params)

    def run(params: Any, batch: Any) -> Any:
        reported, gradients, _ = loss_and_gradients(
            params, {}, batch, None, functions.objective, functions.sharded, training.accumulation_steps
        )
        return reported, gradients

    return jax.tree.map(np.asarray, jax.jit(run)(params, batch))


def main() -> None:
    """Prints {mesh: {what: largest error relative to the largest value}}."""
    jax.config.update("jax_enable_x64", True)
    application = sys.argv[1]
    (loss, metrics), gradients = step_on(application, None)

    def error(found: Any, expected: Any) -> float:
        pairs = zip(*map(jax.tree.leaves, (found, expected)), strict=True)
        return max(float(np.max(np.abs(x - y)) / (np.max(np.abs(y)) + 1e-3)) for x, y in pairs)

    found = {}
    for name in MESHES[application]:
        (own_loss, own_metrics), own = step_on(application, name)
        errors = {"loss": error(own_loss, loss), "metrics": error(own_metrics, metrics)}
        found[name] = errors | {"gradients": error(own, gradients)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
