"""What a tuning run holds: its base once, and optimizer state for what it trains alone."""

from __future__ import annotations

import math
from typing import Any

import jax
import pytest

from rwkv_jax.config import DataConfig, ModelConfig, StepConfig, TrainConfig, TuningConfig
from rwkv_jax.plan.costs import product_flops
from rwkv_jax.plan.program import parse_module
from rwkv_jax.plan.run import count_work
from rwkv_jax.training.functions import abstract_batch, abstract_state, make_train_functions

MODEL = ModelConfig(vocab_size=65536, num_layers=24, width=1024)
"""The released model of 0.4B."""


def run(**tuning: Any) -> TrainConfig:
    given: Any = {"initial_weights": "base", "data": DataConfig(tokenizer="world")} if tuning else {}
    return TrainConfig(model=MODEL, tuning=TuningConfig(**tuning), **given)


def num_bytes(tree: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.mark.parametrize(("quantize", "share"), [(None, 1.15), ("bfloat16", 0.77), ("int8", 0.60), ("int4", 0.53)])
def test_an_adapter_run_is_little_more_than_its_base(quantize: Any, share: float) -> None:
    state = abstract_state(make_train_functions(run(adapter="lora", rank=32, quantize=quantize)))
    base = 4 * MODEL.num_parameters()
    low_rank = 24 * (4 * 2 * 32 * 1024 + 2 * 32 * (1024 + 4096))
    assert num_bytes(state.params["adapter"]) == 4 * low_rank
    assert num_bytes(state.opt_state) == 2 * 4 * low_rank + 8  # two moments, and two counts of steps
    assert num_bytes(state) < share * base < 1.3 * base


def test_a_step_has_no_gradients_of_frozen_matrices() -> None:
    whole, lora = count_work(run()), count_work(run(adapter="lora", rank=32))
    assert 0.65 < lora.model_flops / whole.model_flops < 0.75


@pytest.mark.long
def test_the_compiled_step_computes_no_gradient_of_a_frozen_matrix() -> None:
    """Its products are the forward ones, those to the inputs, and the adapter's; a whole step has a third more."""
    model = ModelConfig(vocab_size=512, num_layers=3, width=256)

    def flops(**tuning: Any) -> int:
        given: Any = {"initial_weights": "base", "data": DataConfig(tokenizer="bytes")} if tuning else {}
        training = StepConfig(batch_size=2, sequence_length=64, loss_chunk=None)
        config = TrainConfig(model=model, training=training, tuning=TuningConfig(**tuning), **given)
        functions = make_train_functions(config)
        step = jax.jit(functions.train_step).lower(abstract_state(functions), abstract_batch(functions, config))
        return sum(product_flops(parse_module(step.compile().as_text() or "")).values())

    whole = flops()
    for kind in ("lora", "dora", "miss"):
        assert 0.6 < flops(adapter=kind, rank=4) / whole < 0.75
