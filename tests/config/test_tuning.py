"""What a run trains of its base: contradictory choices are refused, and none is ignored."""

from __future__ import annotations

from typing import Any

import pytest

from rwkv_jax.config import ConfigError, DataConfig, ModelConfig, TrainConfig, TuningConfig

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"rank": 8}, "tuning.rank = 8: is of an adapter; set tuning.adapter, or leave it out"),
    ({"alpha": 8.0}, "tuning.alpha = 8.0: is of an adapter"),
    ({"dropout": 0.1, "also": ("ln",)}, "tuning.dropout = 0.1: is of an adapter"),
    ({"targets": ("att.key",)}, r"tuning.targets = \('att.key',\): is of an adapter"),
    ({"layers": (0,)}, r"tuning.layers = \(0,\): is of an adapter"),
    ({"decay": True}, "tuning.decay = True: is of an adapter"),
    ({"adapter": "ia3"}, "tuning.adapter = 'ia3': must be lora, rslora, dora, pissa, miss, bat or None"),
    ({"adapter": "lora", "rank": 0}, "tuning.rank = 0: must be a whole number from 1"),
    ({"adapter": "lora", "alpha": 0.0}, "tuning.alpha = 0.0: must be greater than zero"),
    ({"adapter": "miss", "alpha": 16.0}, "tuning.alpha = 16.0: tuning.adapter = 'miss' has no such factor"),
    ({"adapter": "lora", "dropout": 1.0}, "tuning.dropout = 1.0: must be from 0 to less than 1"),
    ({"adapter": "bat", "dropout": 0.1}, "tuning.dropout = 0.1: bat changes the matrix itself"),
    ({"adapter": "lora", "targets": ()}, r"tuning.targets = \(\): name at least one matrix"),
    ({"adapter": "lora", "targets": ("att.key", "att.key")}, "tuning.targets = .*: must be names, each once"),
    ({"also": ("ln", "ln")}, "tuning.also = .*: must be names, each once"),
    ({"adapter": "lora", "layers": (1, 1)}, r"tuning.layers = \(1, 1\): must be numbers from 0, each once"),
    ({"adapter": "lora", "layers": (-1,)}, r"tuning.layers = \(-1,\): must be numbers from 0, each once"),
    ({"quantize": "int8"}, "tuning.quantize = 'int8': the whole model is trained"),
    ({"state_shifts": True}, "tuning.state_shifts = True: is a part of the state; set tuning.state, too"),
    ({"allow_other_base": True}, "tuning.allow_other_base = True: the whole model is trained"),
]


@pytest.mark.parametrize(("values", "message"), WRONG, ids=[message.split(":")[0] for _, message in WRONG])
def test_what_would_be_ignored_or_contradicts_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        TuningConfig(**values)


def test_the_factor_of_a_kind() -> None:
    factors = [
        TuningConfig("lora"),
        TuningConfig("lora", rank=8, alpha=12),
        TuningConfig("rslora", rank=16, alpha=8),
        TuningConfig("miss"),
    ]
    assert [tuning.factor for tuning in factors] == [1.0, 1.5, 2.0, 1.0]


def test_a_part_of_a_model_needs_the_rest() -> None:
    lora = TuningConfig("lora", layers=(1, 6))
    with pytest.raises(ConfigError, match=r"^initial_weights = None: tuning trains a part of a model; name"):
        TrainConfig(tuning=lora)
    with pytest.raises(ConfigError, match=r"^tuning.layers = \(1, 6\): must be less than model.num_layers = 6"):
        TrainConfig(tuning=lora, initial_weights="model.pth", data=DataConfig(tokenizer="world"))
    assert not TuningConfig().is_partial
    assert TuningConfig(state=True).is_partial


@pytest.mark.parametrize(
    ("tuning", "place"),
    [
        (TuningConfig("lora"), "adapter = 'lora'"),
        (TuningConfig(also=("time",)), r"also = \('time',\)"),
        (TuningConfig(state=True), "state = True"),
    ],
    ids=["adapter", "also", "state"],
)
@pytest.mark.parametrize("layers", [(0, 2, 3), (0, 1, 2, 3)])
def test_models_with_time_mixing_in_the_place_of_attention_are_not_tuned(
    layers: tuple[int, ...], tuning: TuningConfig, place: str
) -> None:
    model = ModelConfig(architecture="transformer", num_layers=4, width=64, rwkv_layers=layers)
    with pytest.raises(ConfigError, match=rf"^tuning.{place}: model.rwkv_layers = .*; leave it out, and freeze parts"):
        TrainConfig(model=model, tuning=tuning, initial_weights="run", data=DataConfig(tokenizer="world"))
