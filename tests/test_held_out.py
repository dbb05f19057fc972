"""Held-out loss is the mean over every predicted token, and bits per byte what they are called."""

from __future__ import annotations

import gzip
import lzma
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rwkv_jax.config import ModelConfig, OptimizerConfig, StepConfig, TrainConfig
from rwkv_jax.data.corpus import TokenFile
from rwkv_jax.data.tokens.batches import evaluation_windows
from rwkv_jax.held_out import bits_per_byte, compressed_bits_per_byte, evaluate
from rwkv_jax.training.batch import Batch, make_batch
from rwkv_jax.training.functions import TrainFunctions, make_train_functions
from rwkv_jax.training.state import EvalSums
from tests.programs import compiled_quickly

BATCH, LENGTH = 3, 16


def token_file(count: int, num_bytes: int) -> TokenFile:
    tokens = np.random.default_rng(0).integers(0, 50, count).astype(np.uint16)
    return TokenFile(Path("unused"), tokens, num_bytes, 1)


@pytest.fixture(scope="module", autouse=True)
def compiled_programs() -> Iterator[None]:
    """Compiles quickly: rounding is not the question here."""
    with compiled_quickly():
        yield


@pytest.fixture(scope="module")
def trainer() -> TrainFunctions:
    return make_train_functions(
        TrainConfig(
            model=ModelConfig(vocab_size=50, num_layers=2, width=16, head_dim=8),
            optimizer=OptimizerConfig(warmup_steps=0),
            training=StepConfig(batch_size=BATCH, sequence_length=LENGTH),
        )
    )


@pytest.fixture(scope="module")
def params(trainer: TrainFunctions) -> Any:
    return jax.jit(trainer.init)(jax.random.key(0)).params


# One window that is not full, exactly two full ones, and two and a bit.
@pytest.mark.parametrize(
    "count",
    [
        pytest.param(20, marks=pytest.mark.long),
        pytest.param(2 * BATCH * LENGTH + 1, marks=pytest.mark.long),
        2 * BATCH * LENGTH + 23,
    ],
)
def test_loss_is_the_mean_over_every_predicted_token(trainer: TrainFunctions, params: Any, count: int) -> None:
    file = token_file(count, num_bytes=3 * count)
    windows = evaluation_windows(file.tokens, batch_size=BATCH, sequence_length=LENGTH)
    batches = (make_batch(tokens, end_of_text=None, mask=mask) for tokens, mask, _ in windows)
    result = evaluate(jax.jit(trainer.eval_step), params, batches, file)

    forward = jax.jit(lambda tokens: trainer.run_model.model(params)(tokens)[0][0])
    losses: list[float] = []
    for start in range(0, count - 1, LENGTH):
        row = file.tokens[start : start + LENGTH + 1].astype(np.int32)
        # Padded to one length for the compiler's sake; what comes later does not reach back.
        padded = np.zeros(LENGTH, np.int32)
        padded[: len(row) - 1] = row[:-1]
        logits = np.asarray(forward(padded[None]), np.float64)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        losses += [-log_p[t, target] for t, target in enumerate(row[1:])]
    assert len(losses) == count - 1
    assert result.loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert result.bits_per_byte == pytest.approx(np.sum(losses) / math.log(2) / file.num_bytes, rel=1e-5)


def test_windows_count_by_their_tokens() -> None:
    """A window that is hardly filled weighs little: sums are divided once, at the end."""

    def eval_step(params: float, batch: Batch) -> EvalSums:
        count = jnp.float32(batch.mask.sum())
        return EvalSums(params * batch.tokens[0, 0] * count, count)

    full, rest = np.ones((2, 4), np.float32), np.zeros((2, 4), np.float32)
    rest[0, :2] = 1
    batches = [
        make_batch(np.full((2, 5), token), end_of_text=None, mask=mask) for token, mask in ((1, full), (6, rest))
    ]
    result = evaluate(eval_step, 0.5, batches, token_file(11, 40))
    assert result.loss == pytest.approx(0.5 * (8 * 1 + 2 * 6) / 10)
    assert result.bits_per_byte == pytest.approx(result.loss / math.log(2) / 4)


def test_bits_per_byte_of_chance() -> None:
    """A token of two bytes guessed among 256 equally likely ones costs eight bits."""
    assert bits_per_byte(math.log(256), 2.0) == pytest.approx(4.0)


@pytest.mark.parametrize("data", [b"abc" * 1000, bytes(range(256)) * 7, b"x"])
def test_compressors_are_those_of_the_standard_library(data: bytes) -> None:
    assert compressed_bits_per_byte(data) == {
        "gzip -9": 8 * len(gzip.compress(data, compresslevel=9)) / len(data),
        "xz -9": 8 * len(lzma.compress(data, preset=9)) / len(data),
    }
