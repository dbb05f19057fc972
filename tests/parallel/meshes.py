"""Run with eight fake devices and a list of cases: prints, as JSON, how far a step on a mesh is from one device's.

A case is GENERATION:DTYPE:MESH, the mesh as data2.fsdp2.tensor2. It may end in :other for the other options of a step,
in :chats for micro-batches of rows of which different numbers of tokens count, which are compared with one batch, in
:fused for the fused loss, which is compared with the plain one, in a kind of adapter, which is trained alone, or in
:distill or :topk for a teacher of another kind or size, with all or some of its tokens, or, with :chats, in :stored for
what a mesh stores of it; or in :host for lookups of ROSA by the host.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import sys
from typing import Any
from unittest import mock

import jax
import numpy as np

from rwkv_jax.config import (
    DataConfig,
    DistillationConfig,
    ModelConfig,
    OptimizerConfig,
    StepConfig,
    TrainConfig,
    TuningConfig,
)
from rwkv_jax.models.tuned import is_matrix
from rwkv_jax.parallel.mesh import MeshShape, mesh_from_shape
from rwkv_jax.parallel.rules import shardings
from rwkv_jax.training import teacher as teachers
from rwkv_jax.training.batch import dropout_keys, make_batch
from rwkv_jax.training.functions import make_train_functions
from rwkv_jax.training.partition import split_params
from rwkv_jax.training.run_model import TEACHER
from rwkv_jax.training.step import loss_and_gradients
from rwkv_jax.training.stored_teacher import predictions
from rwkv_jax.weights.quantized import pack, packed_matrix
from tests.golden import AS_USERS, QUICK, relative_error
from tests.models.parameters import initial_params, named_config, random_params

SIZES = {"vocab_size": 48, "num_layers": 3, "width": 32, "head_dim": 4, "ffn_width": 64}
RANKS: dict[str, dict[str, Any]] = {
    "4": {},
    "5.0": {},
    "5.2": {},
    "6": {"mix_rank": 6, "decay_rank": 5},
    "7": {"decay_rank": 9, "iclr_rank": 5, "value_rank": 6, "gate_rank": 7},
    "7a": {"decay_rank": 9, "iclr_rank": 5, "value_rank": 6, "gate_rank": 7, "deep_embed_rank": 4},
    "7b": {
        "decay_rank": 9,
        "iclr_rank": 5,
        "value_rank": 6,
        "gate_rank": 7,
        "deep_embed_rank": 4,
        "dea_width": 16,
        "dea_rank": 4,
    },
    "8-rc00": {"decay_rank": 9, "iclr_rank": 5, "value_rank": 6, "gate_rank": 7},
    "7-rosa": {"decay_rank": 9, "iclr_rank": 5, "value_rank": 6, "gate_rank": 7, "rosa_bits": 2, "rosa_window": 20},
    "8-rosa": {"rosa_window": 20},
    "transformer": {},
    "llama": {"attention_heads": 12, "kv_heads": 4, "qkv_bias": True, "qk_norm": True, "tied_head": True},
    "hybrid": {"rwkv_layers": (1,), "decay_rank": 9, "iclr_rank": 5, "value_rank": 6, "gate_rank": 7},
    "converted": {"rwkv_layers": (0, 1, 2), "decay_rank": 9, "iclr_rank": 5, "value_rank": 6, "gate_rank": 7},
    "gla": {},
    "mamba2": {"state_size": 6},
    "rnn": {},
    "lstm": {},
    "deltanet": {"negative_eigenvalues": True},
    "gated_deltanet": {},
}
BATCH, TIME = 16, 32


ADAPTERS = {
    "lora": TuningConfig("lora", rank=4, dropout=0.3, also=("ln",)),
    "dora": TuningConfig("dora", rank=4, also=("time",)),
    "pissa": TuningConfig("pissa", rank=4, layers=(0, 2)),
    "miss": TuningConfig("miss", rank=5),  # which divides no shard of inputs
    "bat": TuningConfig("bat", rank=4),
    "state": TuningConfig(state=True, state_shifts=True),  # with :other, whose rows are texts
    "packed": TuningConfig("lora", rank=4, quantize="int8"),
}


TEACHERS = {
    "distill": DistillationConfig("teacher", temperature=2.0, ce_weight=0.3),
    "topk": DistillationConfig("teacher", temperature=0.7, ce_weight=0.3, top_k=9),
    "stored": DistillationConfig("teacher", temperature=0.7, ce_weight=0.3, top_k=9, stored="stored"),
}


def teacher_of(generation: str, dtype: Any) -> ModelConfig:
    """Another generation's, or another depth's if the student is none."""
    kind = "transformer" if generation == "transformer" else "4"
    return named_config(kind, dtype=dtype, **(SIZES | {"num_layers": 2, "width": 16, "head_dim": 2, "ffn_width": 32}))


def config_of(
    generation: str,
    dtype: Any,
    *,
    other: bool = False,
    chats: bool = False,
    adapter: str | None = None,
    teacher: str | None = None,
) -> TrainConfig:
    """Rows in micro-batches that carry states and hold several documents, a few logits at a time; or none of that.

    (Those of models with a cache carry none either way.)
    """
    model = named_config(generation, dtype=dtype, **SIZES, **RANKS[generation])
    of_base: dict[str, Any] = {"initial_weights": "base", "data": DataConfig(tokenizer="bytes")}
    return TrainConfig(
        model=model,
        optimizer=OptimizerConfig(warmup_steps=0),
        distillation=TEACHERS[teacher] if teacher else DistillationConfig(),
        training=StepConfig(
            objective="distill" if teacher else "next_token",
            batch_size=BATCH,
            sequence_length=TIME,
            accumulation_steps=1 if other else 2,
            carry_state=not other and not chats and not model.sizes().context_length,
            reset_at_documents=not other,
            loss_chunk=None if other else 7,
            remat="full" if other else "none",
            l2wrap=0 if teacher else 1e-2,
        ),
        **of_base if adapter else {},
        tuning=ADAPTERS[adapter] if adapter else TuningConfig(),
    )


def make_mesh(name: str) -> jax.sharding.Mesh | None:
    """The mesh of a case's name; None for `one`."""
    if name == "one":
        return None
    shape = MeshShape(**{axis: int(size) for axis, size in re.findall(r"([a-z]+)(\d+)", name)})
    return mesh_from_shape(shape, jax.devices()[: shape.size])


def rows_of_text() -> np.ndarray:
    """Rows of random tokens with documents that end anywhere, at the borders of shards too."""
    draws = np.random.default_rng(5)
    rows = draws.integers(1, 48, (BATCH, TIME + 1)).astype(np.int32)
    rows[draws.random(rows.shape) < 0.05] = 0
    rows[::3, 0] = rows[1::3, TIME // 2] = rows[2::3, TIME // 4] = 0
    return rows


def parameters_for(model: ModelConfig) -> Any:
    """Random ones in float64; near the initial ones in float32, where random ones round away more than a mesh does.

    (At random ones float32 on one device is 4e-6 from float64, and 2e-6 from float32 on a mesh.)
    """
    if model.dtype == "float64":
        return random_params(model)
    draws = np.random.default_rng(7)
    return jax.tree.map(
        lambda x: (x + 0.02 * draws.standard_normal(x.shape)).astype(model.parameter_dtype), initial_params(model)
    )


def with_adapters(params: Any, shapes: Any) -> Any:
    """The run's parameters: some matrices packed, and adapters of random numbers."""
    draws = np.random.default_rng(8)
    added = {name: part for name, part in shapes.items() if name in ("adapter", "initial_state")}
    added = jax.tree.map(lambda x: 0.1 * draws.standard_normal(x.shape).astype(x.dtype), added)

    def base(x: np.ndarray, like: Any) -> Any:
        return packed_matrix(pack(x, "int8"), transposed=False) if is_matrix(like) else x

    own = {name: part for name, part in shapes.items() if name not in added}
    return jax.tree.map(base, params, own) | added


def results_on(config: TrainConfig, mesh: jax.sharding.Mesh | None) -> dict[str, Any]:
    """Loss, gradients and next state of a batch; without states the sums of an evaluation, too."""
    trainer = make_train_functions(config, mesh)
    params = parameters_for(config.model)
    if config.tuning.is_partial:
        params = with_adapters(params, trainer.params)
    if trainer.teacher is not None:
        params = params | {TEACHER: parameters_for(trainer.teacher.config)}
    draws = np.random.default_rng(6)
    carries = config.training.carry_state
    mask = None if carries else draws.integers(0, 2, (BATCH, TIME)).astype(np.float32)
    if mask is not None:
        mask[3] = 0  # a row of which nothing counts
        if config.training.reset_at_documents:
            mask[4:] *= np.arange(TIME) < 2  # first micro-batches and devices have most of what counts
    end_of_text = 0 if config.training.reset_at_documents else None
    batch = make_batch(rows_of_text(), end_of_text=end_of_text, carries_state=carries, mask=mask)
    if config.tuning.dropout:
        batch = batch._replace(dropout_keys=dropout_keys(0, 0, slice(0, BATCH), TIME))
    shapes = jax.eval_shape(trainer.init, jax.random.key(0), trainer.params).recurrent_state
    recurrent_state = jax.tree.map(lambda x: np.abs(draws.standard_normal(x.shape)).astype(x.dtype), shapes)
    where = trainer.state_shardings
    of_batch = jax.tree.map(lambda x: trainer.rows_sharding if x.ndim == 1 else trainer.tokens_sharding, batch)
    params, batch, recurrent_state = jax.device_put(
        (params, batch, recurrent_state), (where.params, of_batch, where.recurrent_state)
    )
    if config.distillation.stored is not None:
        ids, log_p = stored_on(config, mesh, batch)
        batch = batch._replace(teacher_ids=ids, teacher_log_p=log_p)
    # In float32 rounding is the question, so that is compiled as users do.
    options = QUICK if config.model.dtype == "float64" else AS_USERS

    def step(params: Any, batch: Any, recurrent_state: Any) -> tuple[Any, Any, Any]:
        return loss_and_gradients(
            *split_params(params, trainer.partition),
            batch,
            recurrent_state,
            trainer.objective,
            trainer.sharded,
            trainer.accumulation_steps,
        )

    (loss, _), gradients, recurrent_state = jax.jit(step, compiler_options=options)(params, batch, recurrent_state)
    found = {"loss": loss, "gradients": gradients, "recurrent_state": recurrent_state}
    if config.distillation.stored is not None:
        found["stored"] = (batch.teacher_ids, batch.teacher_log_p)
    if not carries:
        found["evaluation"] = jax.jit(trainer.eval_step, compiler_options=options)(params, batch)
    return found


def stored_on(config: TrainConfig, mesh: jax.sharding.Mesh | None, batch: Any) -> tuple[Any, Any]:
    """The teacher's most likely tokens in a batch, as they are stored."""
    present = dataclasses.replace(config.distillation, stored=None)
    teacher = teachers.read_teacher(dataclasses.replace(config, distillation=present), mesh)
    assert teacher is not None
    params = parameters_for(teacher.config)
    if mesh is not None:
        params = jax.device_put(params, shardings(mesh, teacher.sharded.param_specs))
    return jax.jit(functools.partial(predictions, config, teacher), compiler_options=QUICK)(params, batch)


def distance(ours: Any, theirs: Any) -> float:
    """Relative error of all arrays as one vector."""
    both = [[np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)] for tree in (ours, theirs)]
    return relative_error(*(np.concatenate([np.zeros(1), *arrays]) for arrays in both))


def errors(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    """By result, and that of the worst parameter's gradient by its own norm."""
    found = {name: distance(ours[name], theirs[name]) for name in theirs}
    pairs = zip(jax.tree.leaves(ours["gradients"]), jax.tree.leaves(theirs["gradients"]), strict=True)
    return found | {"worst gradient": max(relative_error(*pair) for pair in pairs)}


def main() -> None:
    found: dict[str, dict[str, float]] = {}
    references: dict[TrainConfig, Any] = {}
    for case in sys.argv[1:]:
        generation, dtype, name, *options = case.split(":")
        with jax.enable_x64(dtype == "float64"):
            adapter, chats = next((option for option in options if option in ADAPTERS), None), "chats" in options
            teacher = next((option for option in options if option in TEACHERS), None)
            named = {"adapter": adapter, "teacher": teacher}
            config = config_of(generation, dtype, other="other" in options, chats=chats, **named)
            if "host" in options:
                model = dataclasses.replace(config.model, rosa_implementation="host", rosa_window=TIME)
                config = dataclasses.replace(config, model=model)
            alone = config
            if chats:
                whole = dataclasses.replace(config.training, accumulation_steps=1)
                alone = dataclasses.replace(config, training=whole)
            training = dataclasses.replace(config.training, fused_loss="fused" in options)
            patched = mock.patch.object(teachers, "read_model", return_value=(teacher_of(generation, dtype), dtype))
            with patched:
                ours = results_on(dataclasses.replace(config, training=training), make_mesh(name))
                if alone not in references:
                    references[alone] = results_on(alone, None)
            found[case] = errors(ours, references[alone])
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
