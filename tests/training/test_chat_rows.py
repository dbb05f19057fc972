"""Losses of chats, packed and apart, are what other people's code gave; no chat of a row has anything of another."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from numpy.typing import NDArray

from rwkv_jax.config import ModelConfig, OptimizerConfig, StepConfig, TrainConfig
from rwkv_jax.data.chat.rows import fill_rows
from rwkv_jax.data.chat.samples import Sample, Samples
from rwkv_jax.data.tokens.rows import Rows
from rwkv_jax.training.batch import Batch, make_batch
from rwkv_jax.training.functions import make_train_functions
from rwkv_jax.training.step import loss_and_gradients
from rwkv_jax.weights.official import place_params, read_config
from rwkv_jax.weights.sources import open_weights
from tests.golden import GOLDEN_DIR, QUICK, load_golden, relative_error
from tests.models.parameters import SMALL, random_params, to_official

GOLDEN, END = "tuning/sft_s0.npz", 0


def learner(model: ModelConfig, params: Any) -> Callable[[Batch], tuple[Any, Any]]:
    """batch -> mean loss and its gradients, without L2Wrap."""
    config = TrainConfig(
        model=model, optimizer=OptimizerConfig(warmup_steps=0), training=StepConfig(batch_size=4, l2wrap=0.0)
    )
    functions = make_train_functions(config)

    def run(params: Any, batch: Batch) -> tuple[Any, Any]:
        means, gradients, _ = loss_and_gradients(params, {}, batch, None, functions.objective, functions.sharded)
        return means[0], gradients

    compiled = jax.jit(run, compiler_options=QUICK)
    return lambda batch: compiled(params, batch)


@functools.cache
def golden_learner() -> tuple[ModelConfig, Callable[[Batch], tuple[Any, Any]]]:
    weights = open_weights(GOLDEN_DIR / "eval" / "base_v7_s0.safetensors", warn=False).tensors
    config = dataclasses.replace(read_config(weights), dtype="float64", wkv_implementation="scan")
    return config, learner(config, jax.device_get(place_params(weights, config, dtype="float64")))


def golden_batch(part: str) -> Batch:
    """The labels are the tokens that count, or -100; the last token of a row is no input."""
    found = load_golden(GOLDEN)
    tokens, labels = found[f"{part}.tokens"], found[f"{part}.labels"]
    mask = (labels[:, 1:] != -100).astype(np.float32)
    segments = found["packed.segment_ids"][:, :-1] if part == "packed" else None
    return Batch(tokens[:, :-1], tokens[:, 1:], None if segments is None else segments.astype(np.int32), None, mask)


def probed(kind: str, gradient: NDArray) -> Any:
    found, matrix = load_golden(GOLDEN), gradient.reshape(-1, gradient.shape[-1])
    if kind == "grad":
        return gradient
    if kind == "gradR":
        return matrix @ np.stack([found[f"probe.{matrix.shape[1]}.{j}"] for j in (0, 1)], axis=1)
    if kind == "gradL":
        return np.stack([found[f"probe.{matrix.shape[0]}.{j}"] for j in (2, 3)]) @ matrix
    return np.linalg.norm(matrix)


@pytest.mark.parametrize("part", ["right", "packed"])
def test_masked_losses_and_gradients_are_those_of_other_code(float64: None, part: str) -> None:
    """Of rows apart, padded at their right, and of the same texts in one row, whose states are reset."""
    found = load_golden(GOLDEN)
    config, learn = golden_learner()
    loss, gradients = learn(golden_batch(part))
    assert relative_error(loss, found[f"{part}.loss"]) < 1e-12
    ours = to_official(config, gradients)
    norm = np.sqrt(sum(np.sum(np.square(x)) for x in ours.values()))
    assert relative_error(norm, found[f"{part}.gradnorm"]) < 1e-12
    seen = set()
    for key, expected in found.items():
        kind, _, parameter = key.removeprefix("right.").partition(".")
        if key.startswith("right.grad") and parameter in ours:
            assert relative_error(probed(kind, ours[parameter]), expected) < 1e-10, key
            seen.add(kind)
    assert seen == {"grad", "gradR", "gradL", "gradN"}


def test_without_resets_the_loss_would_be_another(float64: None) -> None:
    found = load_golden(GOLDEN)
    batch = golden_batch("packed")
    loss, _ = golden_learner()[1](batch._replace(segment_ids=np.zeros_like(batch.segment_ids)))
    assert relative_error(loss, found["packed.loss_no_reset"]) < 1e-12
    assert abs(float(loss) - found["packed.loss"]) > 0.01


def sample(seed: int, length: int, begin: int) -> Sample:
    tokens = np.append(END, np.random.default_rng(seed).integers(1, 41, length - 1)).astype(np.int32)
    return Sample(tokens, np.append(tokens[1:], END).astype(np.int32), np.arange(length) >= begin)


def batch_of(rows: Rows) -> Batch:
    return make_batch(rows.tokens, end_of_text=END, mask=rows.mask, targets=rows.targets)


@pytest.mark.parametrize("implementation", ["scan", pytest.param("chunked", marks=pytest.mark.long)])
def test_another_chat_in_the_row_changes_nothing(float64: None, implementation: str) -> None:
    """Neither the losses nor the gradients of the second of three, to the last bit, whatever stands around it."""
    model = dataclasses.replace(SMALL["7"], num_layers=2, wkv_implementation=implementation)
    learn = learner(model, random_params(model))
    own = sample(1, 7, 3)

    def learned(before: Sample, behind: Sample) -> tuple[Any, Any]:
        samples = Samples.of([before, own, behind], ["", "", ""])
        spans = [(int(a), int(b)) for a, b in zip(samples.starts[:-1], samples.starts[1:], strict=True)]
        rows = fill_rows(samples, [spans], 20, END)
        only = np.zeros((1, 20), np.float32)
        only[0, 5:12] = own.mask  # nothing else counts
        return learn(batch_of(rows._replace(mask=only)))

    first = learned(sample(2, 5, 1), sample(3, 6, 1))
    other = learned(sample(4, 5, 2), sample(5, 8, 2))
    assert float(first[0]) > 0
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(other), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
