"""Runs on preferences: objectives on meshes and in micro-batches, the stored reference, runs that go on."""

from __future__ import annotations

import dataclasses
import json
import random
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rwkv_jax.config import (
    CheckpointConfig,
    ConfigError,
    DataConfig,
    EvaluationConfig,
    GRPOConfig,
    LoggingConfig,
    ModelConfig,
    ObjectiveName,
    OptimizerConfig,
    PreferenceConfig,
    StepConfig,
    TrainConfig,
    TuningConfig,
)
from rwkv_jax.models import model_type
from rwkv_jax.parallel.mesh import MeshShape, mesh_from_shape
from rwkv_jax.parallel.rules import shardings
from rwkv_jax.training.functions import TrainFunctions, make_train_functions
from rwkv_jax.training.loop import train
from rwkv_jax.training.objectives.grpo import GroupBatch
from rwkv_jax.training.objectives.preference import PairBatch, Replies
from rwkv_jax.training.partition import split_params, train_all
from rwkv_jax.training.preferences import REFERENCE_FILE
from rwkv_jax.training.reporting.metrics import read_metrics
from rwkv_jax.training.run_model import RunModel
from rwkv_jax.training.step import loss_and_gradients
from rwkv_jax.weights.pretrained import save_pretrained
from tests.fake_devices import run_on_fake_devices
from tests.golden import QUICK, relative_error
from tests.small_runs import assert_same_bits

PAIRS, TIME = 8, 12
MODEL = ModelConfig("4", vocab_size=256, num_layers=2, width=16, ffn_width=32, wkv_implementation="scan")
SPLIT_IN_TIME = ModelConfig(
    "7",
    vocab_size=256,
    num_layers=2,
    width=16,
    head_dim=4,
    ffn_width=32,
    decay_rank=4,
    iclr_rank=4,
    value_rank=4,
    gate_rank=4,
    wkv_implementation="scan",
    dtype="float64",
)
OBJECTIVES: dict[ObjectiveName, PreferenceConfig] = {
    "dpo": PreferenceConfig(chosen_weight=0.3, label_smoothing=0.1),
    "orpo": PreferenceConfig(),
    "simpo": PreferenceConfig(),
    "kto": PreferenceConfig(undesirable_weight=0.5),
}

GROUPS = GRPOConfig(
    rewards=(("rewards:any", 1.0),), num_generations=4, max_tokens=8, kl_weight=0.1, ratio="sequence", mean="grpo"
)


def functions_of(
    objective: ObjectiveName, mesh: Any = None, model: ModelConfig = MODEL, **training: Any
) -> TrainFunctions:
    config = TrainConfig(
        model=dataclasses.replace(model, dtype="float64"),
        data=DataConfig(source="pairs.jsonl", tokenizer="bytes"),
        initial_weights="base",
        preference=OBJECTIVES.get(objective, PreferenceConfig()),
        grpo=GROUPS if objective == "grpo" else GRPOConfig(),
        training=StepConfig(objective=objective, batch_size=PAIRS, sequence_length=TIME, num_steps=20, **training),
    )
    return make_train_functions(config, mesh)


def batch_of(objective: ObjectiveName) -> Any:
    """Pairs, or replies, of which two do not count."""
    draws = np.random.default_rng(0)
    sides = []
    for _ in range(2):
        text, ends = draws.integers(1, 250, (PAIRS, TIME + 1)).astype(np.int32), draws.integers(6, TIME, PAIRS)
        mask = (np.arange(TIME) >= 3) & (np.arange(TIME) < ends[:, None])
        reference = draws.normal(-30, 4, PAIRS) if objective in ("dpo", "kto") else None
        sides.append(Replies(text[:, :-1], text[:, 1:], mask.astype(np.float64), reference))
    weight = np.ones(PAIRS)
    weight[3] = weight[6] = 0
    for side in sides:
        side.mask[6] = 0  # as of rows that fill up a batch
    if objective == "grpo":
        tokens, targets, mask, _ = sides[0]
        log_p = (draws.normal(-5, 0.1, (PAIRS, TIME)) for _ in range(2))
        return GroupBatch(tokens, targets, mask * weight[:, None], draws.normal(size=PAIRS) * weight, weight, *log_p)
    return PairBatch(sides[0], sides[1], weight, draws.random(PAIRS) < 0.5 if objective == "kto" else None)


def found_by(functions: TrainFunctions, objective: ObjectiveName, accumulation_steps: int = 1) -> Any:
    """Loss, metrics and gradients of the batch."""
    mesh, batch = functions.sharded.mesh, batch_of(objective)
    params = jax.jit(functions.draw_params, compiler_options=QUICK)(jax.random.key(0))
    params = jax.tree.map(lambda x: x + 0.01 * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), params)
    if mesh is not None:
        batch = jax.device_put(batch, shardings(mesh, functions.sharded.batch_specs(batch)))
        params = jax.device_put(params, shardings(mesh, functions.sharded.param_specs))

    def run(params: Any, batch: Any) -> Any:
        trained, frozen = split_params(params, train_all)
        return loss_and_gradients(
            trained, frozen, batch, None, functions.objective, functions.sharded, accumulation_steps
        )[:2]

    return jax.jit(run, compiler_options=QUICK)(params, batch)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_and_gradient_are_those_of_each_pair_by_itself(objective: ObjectiveName, float64: None) -> None:
    """The mean over pairs that count, by a formula of log-probabilities that a whole softmax gives."""
    functions = functions_of(objective)
    (loss, metrics), gradients = found_by(functions, objective)
    assert all(np.isfinite(x) for x in (loss, *metrics.values()))
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(gradients))
    batch, expected = batch_of(objective), []
    params = jax.jit(functions.draw_params, compiler_options=QUICK)(jax.random.key(0))
    params = jax.tree.map(lambda x: x + 0.01 * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), params)
    log_p = []
    for side in (batch.first, batch.second):
        logits, _ = functions.run_model.model(params)(jnp.asarray(side.tokens))
        each = jnp.take_along_axis(jax.nn.log_softmax(logits), side.targets[..., None], axis=-1)[..., 0]
        log_p.append(np.asarray(jnp.sum(each * side.mask, axis=1)))
    tokens = [side.mask.sum(axis=1) for side in (batch.first, batch.second)]
    counts, beta = batch.weight > 0, OBJECTIVES[objective].beta_of(objective)
    mean = [np.where(counts, total / np.maximum(n, 1), -1) for total, n in zip(log_p, tokens, strict=True)]

    def log_sigmoid(x: Any) -> Any:
        return -np.log1p(np.exp(-x))

    if objective in ("dpo", "kto"):
        ratio = [x - side.reference for x, side in zip(log_p, (batch.first, batch.second), strict=True)]
    if objective == "dpo":
        d = beta * (ratio[0] - ratio[1])
        expected = -0.9 * log_sigmoid(d) - 0.1 * log_sigmoid(-d) - 0.3 * mean[0]
        assert relative_error(metrics["accuracy"], np.mean((d > 0)[counts])) < 1e-12
    elif objective == "orpo":
        odds = [x - np.log1p(-np.exp(x)) for x in mean]
        expected = -mean[0] - beta * log_sigmoid(odds[0] - odds[1])
    elif objective == "simpo":
        expected = -log_sigmoid(beta * (mean[0] - mean[1]) - 1.0)
    else:
        kl = max(0.0, float(np.mean(ratio[1][counts])))
        gain = beta * (ratio[0] - kl) * np.where(batch.desirable, 1, -1)
        expected = np.where(batch.desirable, 1.0, 0.5) * (1 - 1 / (1 + np.exp(-gain)))
        assert relative_error(metrics["kl"], kl) < 1e-10
    assert relative_error(loss, np.mean(np.asarray(expected)[counts])) < 1e-10


@pytest.mark.parametrize("objective", ["dpo", "grpo"])
def test_micro_batches_and_chunks_change_nothing(objective: ObjectiveName, float64: None) -> None:
    whole = found_by(functions_of(objective), objective)
    parts = found_by(functions_of(objective, loss_chunk=7, remat="full"), objective, accumulation_steps=4)
    for ours, theirs in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        assert relative_error(ours, theirs) < 1e-9


@pytest.mark.long
def test_meshes_compute_what_one_device_computes() -> None:
    """Rows, heads, vocabulary and time split over eight devices; pairs stay whole. (ORPO and SimPO sum as DPO does.)"""
    errors = run_on_fake_devices(8, "tests.training.test_preferences")
    assert errors.keys() == {"dpo", "kto", "grpo"}
    assert all(error < 1e-9 for error in errors.values()), errors


def main() -> None:
    jax.config.update("jax_enable_x64", True)
    mesh, errors = mesh_from_shape(MeshShape(data=2, tensor=2, sequence=2), jax.devices()), {}
    for objective in ("dpo", "kto", "grpo"):
        expected = found_by(functions_of(objective, model=SPLIT_IN_TIME), objective)
        found = found_by(functions_of(objective, mesh, model=SPLIT_IN_TIME), objective)
        pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
        errors[objective] = max(relative_error(a, b) for a, b in pairs)
    json.dump(errors, sys.stdout)


@pytest.mark.long
def test_a_step_compares_an_adapter_with_the_model_without_it() -> None:
    """The reference of `adapter_off` is what a model without an adapter gives."""
    config = TrainConfig(
        model=MODEL,
        data=DataConfig(source="pairs.jsonl", tokenizer="bytes"),
        initial_weights="base",
        tuning=TuningConfig("lora", rank=4, targets=("att.*",)),
        preference=PreferenceConfig(reference="adapter_off"),
        optimizer=OptimizerConfig(warmup_steps=0),
        training=StepConfig(objective="dpo", batch_size=PAIRS, sequence_length=TIME, num_steps=20),
    )
    functions = make_train_functions(config)
    draws = np.random.default_rng(1)
    params = jax.tree.map(lambda x: jnp.asarray(draws.normal(0, 0.3, x.shape), x.dtype), functions.params)
    batch = jax.tree.map(lambda x: x.astype(np.float32) if x.dtype == np.float64 else x, batch_of("dpo"))
    batch = batch._replace(first=batch.first._replace(reference=None), second=batch.second._replace(reference=None))
    rest = jax.eval_shape(functions.init, jax.random.key(0), functions.params)
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), rest._replace(params=None))._replace(params=params)
    after, metrics = jax.jit(functions.train_step, compiler_options=QUICK)(state, batch)
    assert bool(metrics.taken)
    same, moved = (set(after.params) - {"adapter"}), after.params["adapter"]
    assert_same_bits({name: after.params[name] for name in same}, {name: params[name] for name in same})
    assert not np.array_equal(
        moved["blocks"]["att"]["key"]["lora_B"], params["adapter"]["blocks"]["att"]["key"]["lora_B"]
    )
    base, own = RunModel(functions.run_model.graphdef), functions.run_model
    ratio = []
    for side in (batch.first, batch.second):
        both = []
        for model in (own.model(params), base.model(own.base(params))):
            logits, _ = model(jnp.asarray(side.tokens))
            each = jnp.take_along_axis(jax.nn.log_softmax(logits), side.targets[..., None], axis=-1)[..., 0]
            both.append(np.asarray(jnp.sum(each * side.mask, axis=1)))
        ratio.append(both[0] - both[1])
    difference = 0.1 * (ratio[0] - ratio[1])[batch.weight > 0]
    assert np.abs(difference).max() > 1e-3
    np.testing.assert_allclose(metrics.loss, np.mean(np.log1p(np.exp(-difference))), rtol=1e-4)


@pytest.mark.parametrize(
    ("objective", "tuning", "message"),
    [
        ("grpo", {"adapter": "pissa", "state": True}, r"^grpo\.kl_weight = 0\.1: needs an adapter"),
        (
            "grpo",
            {"state": True, "initial_prompt": "Hi"},
            r"^tuning\.initial_prompt = 'Hi': the reference model begins",
        ),
        (
            "dpo",
            {"adapter": "lora", "state": True, "initial_state": "s.pth"},
            r"^tuning\.initial_state = 's\.pth': the",
        ),
    ],
)
def test_references_that_are_not_the_first_model_are_refused(objective: Any, tuning: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(
            model=dataclasses.replace(SPLIT_IN_TIME, dtype="float32"),
            data=DataConfig(source="pairs.jsonl", tokenizer="bytes"),
            initial_weights="base",
            tuning=TuningConfig(**tuning),
            preference=PreferenceConfig(reference="adapter_off") if objective == "dpo" else PreferenceConfig(),
            grpo=GROUPS if objective == "grpo" else GRPOConfig(),
            training=StepConfig(objective=objective, batch_size=8, sequence_length=16, reset_at_documents=False),
        )


def write_pairs(path: Path, count: int = 40) -> None:
    """Sums, of which the right one is chosen."""
    draws, lines = random.Random(0), []
    for _ in range(count):
        a, b = draws.randrange(5), draws.randrange(5)
        lines.append(json.dumps({"prompt": f"{a}+{b}=", "chosen": f"{a + b}.", "rejected": f"{a + b + 1}!"}))
    path.write_text("\n".join(lines))


def write_base(path: Path, seed: int) -> None:
    save_pretrained(model_type(MODEL)(MODEL, rngs=nnx.Rngs(seed)), path)


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    """A run on pairs, from random weights."""
    write_base(tmp_path / "base.safetensors", 0)
    write_pairs(tmp_path / "pairs.jsonl")
    return TrainConfig(
        run_dir=str(tmp_path / "run"),
        model=MODEL,
        initial_weights=str(tmp_path / "base.safetensors"),
        data=DataConfig(source=str(tmp_path / "pairs.jsonl"), tokenizer="bytes", held_out=0.2),
        optimizer=OptimizerConfig(learning_rate=1e-2, final_learning_rate=1e-2, warmup_steps=0),
        training=StepConfig(objective="dpo", num_steps=6, batch_size=4, sequence_length=16, accumulation_steps=2),
        evaluation=EvaluationConfig(every=6, batches=1, sample_prompts=()),
        checkpoint=CheckpointConfig(every=3),
        logging=LoggingConfig(every=2),
    )


@pytest.mark.long
def test_a_run_prefers_what_is_chosen_and_goes_on_bit_by_bit(config: TrainConfig, tmp_path: Path) -> None:
    result = train(config)
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    first, *_, last = [record for record in records if record["kind"] == "train"]
    assert first["margin"] < last["margin"]
    assert last["accuracy"] > 0.8
    assert result.measured is not None
    assert result.measured.metrics["margin"] > 0.1
    half, reference = dataclasses.replace(config, run_dir=str(tmp_path / "half")), tmp_path / "half" / REFERENCE_FILE
    train(dataclasses.replace(half, training=dataclasses.replace(half.training, num_steps=3)))
    stored = reference.read_bytes()
    refuse_other_references(half, tmp_path)
    resumed = train(half)
    assert reference.read_bytes() == stored == (tmp_path / "run" / REFERENCE_FILE).read_bytes()
    assert_same_bits(resumed.state.params, result.state.params)
    assert_same_bits(resumed.state.opt_state, result.state.opt_state)


def refuse_other_references(config: TrainConfig, folder: Path) -> None:
    """A run that has begun goes on only with the data and the reference that it was begun with."""
    pairs, reference, base = folder / "pairs.jsonl", folder / "half" / REFERENCE_FILE, folder / "base.safetensors"
    kept, stored = pairs.read_text(), reference.read_bytes()
    pairs.write_text(kept.replace("!", "?"))
    with pytest.raises(ConfigError, match="corpus"):
        train(config)
    pairs.write_text(kept)
    reference.unlink()
    with pytest.raises(ConfigError, match=r"reference\.npz: the reference's log-probabilities are missing"):
        train(config)
    reference.write_bytes(stored[:-100] + bytes(100))
    with pytest.raises(ConfigError, match=r"reference\.npz: cannot be read"):
        train(config)
    reference.write_bytes(stored)
    base.rename(folder / "kept.safetensors")
    write_base(base, 1)
    with pytest.raises(ConfigError, match=r"reference\.npz: was computed with base of the digest"):
        train(config)
    (folder / "kept.safetensors").replace(base)


if __name__ == "__main__":
    main()
