"""Runs of models with RWKV-7's time mixing in the place of attention, from beginning to end."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rwkv_jax import Engine, from_pretrained
from rwkv_jax.config import ConfigError, ModelConfig
from rwkv_jax.inference.sampling.params import SamplingParams
from rwkv_jax.run_folder import load_run_tokenizer
from rwkv_jax.training.loop import train
from tests.small_runs import assert_same_bits, small_config, train_and_learn

SIZES: dict[str, Any] = {"vocab_size": 300, "num_layers": 3, "width": 32, "head_dim": 16}
ALL = ModelConfig(architecture="transformer", rwkv_layers=(0, 1, 2), **SIZES)
SOME = ModelConfig(architecture="transformer", rwkv_layers=(1,), context_length=64, **SIZES)


def longer(config: Any, num_steps: int) -> Any:
    return dataclasses.replace(config, training=dataclasses.replace(config.training, num_steps=num_steps))


@pytest.mark.long  # as every run does, tests/test_resume.py
@pytest.mark.parametrize("model", [pytest.param(ALL, id="all"), pytest.param(SOME, id="some")])
def test_a_run_goes_on_bit_for_bit_and_writes_text(tmp_path: Path, model: ModelConfig) -> None:
    """Without attention, with states that rows carry on."""
    config = small_config(model, tmp_path)
    carries = not model.sizes().context_length
    config = dataclasses.replace(
        config, training=dataclasses.replace(config.training, carry_state=carries, reset_at_documents=not carries)
    )
    train_and_learn(config)
    resumed = train(longer(config, 14)).state
    at_once = train(dataclasses.replace(longer(config, 14), run_dir=str(tmp_path / "at_once"))).state
    assert_same_bits(resumed.params, at_once.params)
    assert_same_bits(resumed.recurrent_state, at_once.recurrent_state)

    trained = from_pretrained(config.run_dir)
    np.testing.assert_array_equal(trained.emb.weight[...], resumed.params["emb"]["weight"])
    engine = Engine(trained, load_run_tokenizer(Path(config.run_dir)))
    greedy = SamplingParams.greedy()
    text = engine.generate("def f", max_tokens=40, sampling=greedy).text
    assert len(text) > 10
    if carries:  # no cache that a longer text fills
        assert len(engine.generate("def f", max_tokens=100, sampling=greedy, stop_ids=()).ids) == 100


def test_another_choice_of_layers_is_another_run(tmp_path: Path) -> None:
    config = small_config(SOME, tmp_path)
    train(longer(config, 4))
    other = dataclasses.replace(config, model=dataclasses.replace(SOME, rwkv_layers=(2,)))
    with pytest.raises(ConfigError, match=r"model\.rwkv_layers"):
        train(longer(other, 6))
