"""Which parameters a tuning run adapts and trains: names and patterns, and what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from rwkv_jax.config import ConfigError, ModelConfig, TuningConfig
from rwkv_jax.models import abstract_model
from rwkv_jax.models.packed import Int4Matrix, Int8Matrix
from rwkv_jax.models.tuned import (
    adapted_matrices,
    adapter_shapes,
    is_trained,
    kept_shapes,
    trained_in_full,
    tuned_shapes,
)

MODEL = ModelConfig(vocab_size=300, num_layers=3, width=64, ffn_width=80)
LORA = TuningConfig("lora", rank=4)


def change(**fields: Any) -> TuningConfig:
    return dataclasses.replace(LORA, **fields)


def names(tuning: TuningConfig, model: ModelConfig = MODEL) -> list[str]:
    """Official names of the adapted matrices."""
    return sorted(
        f"{layer}.{'.'.join(path[1:])}"
        for path, matrix in adapted_matrices(tuning, model).items()
        for layer, is_adapted in zip(matrix.layers, matrix.is_adapted, strict=True)
        if is_adapted
    )


def test_targets_are_names_and_patterns_in_chosen_layers() -> None:
    assert len(names(LORA)) == 3 * 6
    assert names(change(targets=("att.key", "ffn.*"), layers=(0, 2))) == [
        "0.att.key", "0.ffn.key", "0.ffn.value", "2.att.key", "2.ffn.key", "2.ffn.value",
    ]  # fmt: skip
    assert names(change(targets=("blocks.1.att.key", "blocks.[02].ffn.value"))) == [
        "0.ffn.value", "1.att.key", "2.ffn.value",
    ]  # fmt: skip


@pytest.mark.parametrize("generation", ["4", "5.2", "6"])
def test_matrices_of_other_generations(generation: str) -> None:
    model = ModelConfig(generation, vocab_size=300, num_layers=2, width=64)
    found = names(change(targets=("att.*", "ffn.receptance")), model)
    assert {"0.att.key", "1.att.output", "1.ffn.receptance"} <= set(found)
    assert not any("time" in name or "ln" in name for name in found)


WRONG: list[tuple[TuningConfig, str]] = [
    (change(targets=("att.kee",)), "tuning.targets = att.kee: matches no matrix; there are att.key, att.output, "),
    (change(targets=("att.w1",)), "tuning.targets = att.w1: matches no matrix"),
    (change(targets=("emb",)), "tuning.targets = emb: matches no matrix"),
    (change(targets=("blocks.7.att.key",)), "tuning.targets = blocks.7.att.key: matches no matrix"),
    (change(targets=("att.key", "att.*")), r"tuning.targets = att.\*: has att.key of layer \d, and so has att.key; "),
    (change(rank=65), r"tuning.rank = 65: is above the matrix att.key, \[64, 64\]"),
    (change(adapter="bat", rank=24), r"tuning.rank = 24: bat cuts att.key \[64, 64\] into blocks, so it must divide"),
    (change(also=("att.w0",)), "tuning.also = att.w0: matches no parameter; name ln, time, or such as blocks"),
    (change(also=("blocks.1.att.w0",)), r"tuning.also = blocks.1.att.w0: of att.w0 it matches layers \[1\], and "),
    (change(also=("blocks.*.att.key.weight",)), r"tuning.also = .*: att.key.weight has an adapter; leave out one"),
]


@pytest.mark.parametrize(("tuning", "message"), WRONG, ids=[message.split(":")[0] for _, message in WRONG])
def test_what_fits_no_matrix_is_refused(tuning: TuningConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        trained_in_full(tuning, MODEL)


def test_an_architecture_without_official_names_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^tuning.adapter = 'lora': a Transformer has no official names; only RWKV"):
        adapted_matrices(LORA, ModelConfig(architecture="transformer"))


def test_what_is_trained_besides() -> None:
    norms = trained_in_full(TuningConfig(also=("ln",)), MODEL)
    assert ("ln_out", "bias") in norms
    assert ("first_block", "ln0", "weight") in norms
    assert ("blocks", "att", "ln_x", "weight") in norms
    vectors = {".".join(path[1:]) for path in trained_in_full(TuningConfig(also=("time",)), MODEL)}
    of_att = {*(f"x_{name}" for name in "rwkvag"), "w0", "a0", "v0", "k_k", "k_a", "r_k"}
    assert vectors == {*(f"att.{name}" for name in of_att), "ffn.x_k"}
    head = TuningConfig(also=("head.weight", "blocks.*.att.w0"))
    assert trained_in_full(head, MODEL) == {("head", "weight"), ("first_block", "att", "w0"), ("blocks", "att", "w0")}
    assert not is_trained(head, MODEL, ("emb", "weight"))


def test_shapes_of_parts_and_what_checkpoints_hold() -> None:
    shapes = adapter_shapes(change(adapter="pissa", targets=("ffn.key",)), MODEL)
    parts = jax.tree.map(lambda x: x.shape, shapes["blocks"]["ffn"]["key"])
    low = {"lora_A": (2, 4, 64), "lora_B": (2, 80, 4)}
    assert parts == low | {f"init_{name}": shape for name, shape in low.items()}
    miss = adapter_shapes(change(adapter="miss", targets=("ffn.key",)), MODEL)["first_block"]["ffn"]["key"]
    assert miss["miss_block"].shape == (4, 80)
    bat = adapter_shapes(change(adapter="bat", targets=("ffn.key",)), MODEL)["first_block"]["ffn"]["key"]
    assert bat["miss_block"].shape == (20, 4, 4)
    kept = kept_shapes(change(also=("ln",), targets=("ffn.key",)), MODEL)
    assert kept.keys() == {"adapter", "first_block", "blocks", "ln_out"}
    assert kept["blocks"]["att"].keys() == {"ln_x"}


def test_only_frozen_matrices_in_layers_are_packed() -> None:
    tuning = change(quantize="int4", targets=("att.key",), also=("blocks.*.att.value.weight",))
    blocks = tuned_shapes(abstract_model(MODEL)[1], tuning, MODEL)["blocks"]
    assert isinstance(blocks["att"]["key"]["weight"], Int4Matrix)
    assert isinstance(blocks["ffn"]["value"]["weight"], Int8Matrix)  # 80 inputs are no groups of 32
    assert blocks["att"]["value"]["weight"].dtype == np.float32
    assert blocks["att"]["w1"].dtype == np.float32
    assert blocks["att"]["key"]["weight"].shape == (2, 64, 64)
