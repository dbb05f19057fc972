"""Tokens that a mask leaves out are read and not learned; texts packed into one row are learned as texts apart."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from rwkv_jax.config import ModelConfig, OptimizerConfig, StepConfig, TrainConfig
from rwkv_jax.training.batch import Batch, make_batch
from rwkv_jax.training.functions import make_train_functions
from rwkv_jax.training.step import loss_and_gradients
from tests.golden import QUICK, relative_error

END = 0
TEXTS = [np.random.default_rng(seed).integers(1, 29, length) for seed, length in enumerate((7, 4, 3, 9, 5, 2))]
ANSWERS = (3, 4, 2, 8, 1, 2)
"""Of each text the last tokens count, and with them the end of the text that follows."""


def row_of(texts: list[int], length: int) -> tuple[np.ndarray, np.ndarray]:
    """A row [length + 1] of texts one after the other, each between ends, and the mask [length] of its targets."""
    tokens, counts = [END], []
    for text in texts:
        tokens += [*TEXTS[text].tolist(), END]
        counts += [0] * (len(TEXTS[text]) - ANSWERS[text]) + [1] * (ANSWERS[text] + 1)
    padding = length + 1 - len(tokens)
    return np.array(tokens + [END] * padding, np.int32), np.array(counts + [0] * padding, np.float32)


def batch_of(rows: list[list[int]], length: int) -> Batch:
    tokens, mask = (np.stack(part) for part in zip(*(row_of(row, length) for row in rows), strict=True))
    return make_batch(tokens, end_of_text=END, mask=mask)


PACKED = batch_of([[0, 1, 2], [3, 4], []], 18)
"""A row of three texts, one of two, and one of which nothing counts."""
APART = batch_of([[text] for text in range(5)], 10)


def learned(batch: Batch, accumulation_steps: int = 1) -> tuple[Any, Any]:
    """Mean loss and its gradients, L2Wrap's among them."""
    config = TrainConfig(
        model=ModelConfig(
            "4", vocab_size=29, num_layers=2, width=16, ffn_width=32, dtype="float64", wkv_implementation="scan"
        ),
        optimizer=OptimizerConfig(warmup_steps=0),
        training=StepConfig(batch_size=len(batch.tokens), l2wrap=1e-2),
    )
    functions = make_train_functions(config)
    shapes = functions.params
    draws = np.random.default_rng(3)
    params = jax.tree.map(lambda x: draws.normal(0, 0.3, x.shape), shapes)

    def run(params: Any, batch: Batch) -> tuple[Any, Any]:
        means, gradients, _ = loss_and_gradients(
            params, {}, batch, None, functions.objective, functions.sharded, accumulation_steps
        )
        return means[0], gradients

    return jax.jit(run, compiler_options=QUICK)(params, batch)


def assert_equal(ours: tuple[Any, Any], theirs: tuple[Any, Any]) -> None:
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert relative_error(a, b) < 1e-12


@pytest.fixture(scope="module")
def packed() -> tuple[Any, Any]:
    with jax.enable_x64(True):
        return learned(PACKED)


def test_packed_texts_are_learned_as_texts_apart(float64: None, packed: tuple[Any, Any]) -> None:
    assert PACKED.mask.sum() == APART.mask.sum() == sum(ANSWERS[:5]) + 5
    assert_equal(packed, learned(APART))


def test_micro_batches_are_weighed_by_the_tokens_they_count(float64: None, packed: tuple[Any, Any]) -> None:
    """12, 11 and none: the mean of their means would be another."""
    assert PACKED.mask.sum(axis=1).tolist() == [12, 11, 0]
    assert_equal(learned(PACKED, accumulation_steps=3), packed)


def test_what_is_masked_is_not_learned(float64: None, packed: tuple[Any, Any]) -> None:
    """Other targets where nothing counts, and another text in the row that does not count."""
    counts = PACKED.mask != 0
    targets = np.where(counts, PACKED.targets, 28 - PACKED.targets)
    tokens = PACKED.tokens.copy()
    tokens[2] = np.arange(18) + 5
    other = learned(PACKED._replace(tokens=tokens, targets=targets))
    assert_equal(other, packed)
    everything = learned(PACKED._replace(mask=None))
    assert abs(float(everything[0]) - float(packed[0])) > 1e-3


def test_a_batch_of_which_nothing_counts_has_no_gradient(float64: None) -> None:
    loss, gradients = learned(PACKED._replace(mask=np.zeros_like(PACKED.mask)))
    assert loss == 0
    assert not any(np.any(x) for x in jax.tree.leaves(gradients))
