"""A Transformer from its initial values on: parameters, training, and runs from beginning to end."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from rwkv_jax import from_pretrained
from rwkv_jax.config import (
    ModelConfig,
    OptimizerConfig,
    StepConfig,
    TrainConfig,
)
from rwkv_jax.models import Transformer, model_type
from rwkv_jax.models.transformer import AttentionModel
from rwkv_jax.training.batch import make_batch
from rwkv_jax.training.functions import abstract_batch, abstract_state, make_train_functions
from rwkv_jax.training.loop import train
from rwkv_jax.training.optimizer import parameter_groups
from rwkv_jax.weights.pretrained import initial_params
from tests.golden import QUICK
from tests.models import parameters
from tests.models.parameters import abstract, named_config
from tests.models.small_transformers import FLOAT32, SMALL
from tests.small_runs import small_config, train_and_learn

# Parameters


def test_its_class() -> None:
    assert model_type(SMALL) is Transformer


@pytest.mark.parametrize(
    "config", [SMALL, ModelConfig("7", 50304, 12, 768, architecture="transformer")], ids=["small", "0.2B"]
)
def test_the_number_of_parameters(config: ModelConfig) -> None:
    shapes = jax.tree.leaves(abstract(config)[1])
    assert {x.dtype.name for x in shapes} == {config.parameter_dtype}
    assert sum(x.size for x in shapes) == config.num_parameters()


def test_initial_values() -> None:
    """Those of GPT-2: normal, of standard deviation 0.02, and less where the residual stream is written."""
    config = ModelConfig(architecture="transformer", vocab_size=512, num_layers=8, width=128, head_dim=32)
    for path, x in jax.tree.leaves_with_path(parameters.initial_params(config)):
        names = [entry.key for entry in path]
        if names[-2].startswith("ln"):
            np.testing.assert_array_equal(x, float(names[-1] == "weight"))
            continue
        scale = 0.02 / 4 if names[-2] == "output" or names[-3:-1] == ["ffn", "value"] else 0.02
        assert x.std() == pytest.approx(scale, rel=0.03), names
        assert abs(x.mean()) < 0.03 * scale, names
        assert (np.abs(x) < scale).mean() == pytest.approx(0.6827, abs=0.01), names


def test_matrices_decay_and_all_learn_alike() -> None:
    params = abstract(SMALL)[1]
    factors, decays = parameter_groups(params, Transformer.parameter_group)
    assert set(jax.tree.leaves(factors)) == {1.0}
    for path, is_decayed in jax.tree.leaves_with_path(decays):
        assert is_decayed != path[-2].key.startswith("ln")


# Training


@pytest.mark.long  # tests/test_configs.py has another generation's
@pytest.mark.parametrize(
    ("name", "own"),
    [("transformer", {}), ("llama", {"attention_heads": 4, "kv_heads": 2, "qk_norm": True, "tied_head": True})],
)
def test_a_run_from_beginning_to_end_goes_on_with_more_room(tmp_path: Path, name: str, own: dict[str, Any]) -> None:
    small = named_config(name, vocab_size=300, num_layers=2, width=32, head_dim=16, context_length=64, **own)
    config = small_config(small, tmp_path)
    params = train_and_learn(config).params
    model = from_pretrained(config.run_dir)
    assert isinstance(model, AttentionModel)
    np.testing.assert_array_equal(model.emb.weight[...], params["emb"]["weight"])
    # Another run can begin with its weights.
    jax.tree.map(np.testing.assert_array_equal, initial_params(config.run_dir, config.model), params)
    # The room of a state is none of the run's business.
    longer = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, context_length=128),
        training=dataclasses.replace(config.training, num_steps=14),
    )
    assert int(train(longer).state.step) == 14


def test_it_learns_to_copy() -> None:
    """The second half of each row repeats the first, which takes attention to tell."""
    config = TrainConfig(
        model=ModelConfig(
            architecture="transformer", vocab_size=8, num_layers=2, width=32, head_dim=16, context_length=16
        ),
        optimizer=OptimizerConfig(learning_rate=1e-2, final_learning_rate=1e-3, warmup_steps=10),
        training=StepConfig(num_steps=100, batch_size=32, sequence_length=11, reset_at_documents=False),
    )
    trainer = make_train_functions(config)
    state = jax.jit(trainer.init, compiler_options=QUICK)(jax.random.key(0))
    step = jax.jit(trainer.train_step, compiler_options=QUICK)
    draws = np.random.default_rng(4)
    mask = np.tile((np.arange(11) >= 5).astype(np.float32), (32, 1))
    losses = []
    for _ in range(config.training.num_steps):
        rows = np.tile(draws.integers(0, 8, (32, 6)).astype(np.int32), (1, 2))
        state, metrics = step(state, make_batch(rows, end_of_text=None, mask=mask))
        losses.append(float(metrics.loss))
    assert losses[0] > 2
    assert losses[-1] < 0.05


def lowered_step(context_length: int, sequence_length: int) -> Any:
    """A training step of the small model, before it is compiled."""
    config = TrainConfig(
        model=dataclasses.replace(FLOAT32, context_length=context_length),
        training=StepConfig(batch_size=2, sequence_length=sequence_length),
    )
    trainer = make_train_functions(config)
    return jax.jit(trainer.train_step).lower(abstract_state(trainer), abstract_batch(trainer, config))


def test_training_has_no_cache() -> None:
    assert "x654321x" not in lowered_step(654_321, 64).as_text()


@pytest.mark.long
def test_memory_of_training_does_not_hold_all_scores() -> None:
    longest = 4096
    compiled = lowered_step(longest, longest).compile(compiler_options=QUICK)
    scores = 4 * 2 * FLOAT32.num_heads * longest**2
    assert compiled.memory_analysis().temp_size_in_bytes < scores / 2
