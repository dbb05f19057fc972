"""Models with adapters that are not merged: golden logits, packed bases, several adapters, layers without one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rwkv_jax import from_pretrained
from rwkv_jax.models.adapted import AdaptedMatrix
from rwkv_jax.models.decoding import unstacked
from rwkv_jax.models.initial_state import state_shapes
from rwkv_jax.tuning import load_initial_state, save_tuned_state
from rwkv_jax.tuning.adapter import AdapterError, merged_matrix
from rwkv_jax.tuning.grafting import adapted_model
from rwkv_jax.tuning.merge import merge_weights
from rwkv_jax.tuning.pretrained_state import base_digest
from rwkv_jax.weights.digest import weights_digest
from tests.tuning.test_adapter_files import BASE, LORA, THEIRS, off_by, opened
from tests.weights.files import logits_of, tensors_in

TOKENS = np.array([[5, 17, 240, 3]])


QUICKLY = ("rwkvpeft_lora_ln", "hfpeft_saved_modules")
"""Of the kind that compiles the quickest; all others are long, their products being held in tests/models."""


@pytest.mark.parametrize(
    "name", [name if name in QUICKLY else pytest.param(name, marks=pytest.mark.long) for name in THEIRS]
)
def test_logits_are_those_of_their_trainers(name: str) -> None:
    file, alpha = THEIRS[name]
    with jax.enable_x64(True):
        model = from_pretrained(BASE, adapter=LORA / file, adapter_alpha=alpha, dtype="float64")
        assert off_by(name, model) < 1e-11


@pytest.mark.parametrize("name", ["rwkvpeft_lora", "hfpeft_dora"])
@pytest.mark.long
def test_logits_in_float32(name: str) -> None:
    file, alpha = THEIRS[name]
    assert off_by(name, from_pretrained(BASE, adapter=LORA / file, adapter_alpha=alpha, dtype="float32")) < 1e-5


@pytest.mark.long
def test_a_packed_base_stays_packed() -> None:
    model = from_pretrained(BASE, adapter=LORA / "hfpeft_lora_s0", quantize="int8")
    key: Any = model.blocks.att.key.weight.get_value()
    assert type(key) is AdaptedMatrix
    plain = from_pretrained(BASE, quantize="int8")
    packed: Any = plain.blocks.att.key.weight.get_value()
    base: Any = key.base
    np.testing.assert_array_equal(base.codes, packed.codes)
    assert np.abs(logits_of(model, TOKENS) - logits_of(plain, TOKENS)).max() > 0.1


def test_the_given_model_stays_as_it_is() -> None:
    model = from_pretrained(BASE)
    adapted = adapted_model(model, opened("hfpeft_saved_modules"))
    assert isinstance(adapted.blocks.att.receptance.weight.get_value(), AdaptedMatrix)
    assert isinstance(model.blocks.att.receptance.weight.get_value(), jax.Array)
    assert (model.head.weight.get_value() != adapted.head.weight.get_value()).any()
    assert adapted.emb.weight.get_value() is model.emb.weight.get_value()


def test_zeros_change_no_bit() -> None:
    zeros = {name: dict(x) | {"lora_B": np.zeros_like(x["lora_B"])} for name, x in opened("hfpeft_lora").parts.items()}
    adapter = dataclasses.replace(opened("hfpeft_lora"), parts=zeros)
    with_zeros, without = (from_pretrained(BASE, dtype="float32", adapter=each) for each in (adapter, None))
    np.testing.assert_array_equal(logits_of(with_zeros, TOKENS), logits_of(without, TOKENS))


@pytest.mark.long
def test_several_with_weights_are_the_merged_model(tmp_path: Path) -> None:
    names = ["hfpeft_rslora", "hfpeft_miss", "rwkvpeft_pissa"]
    adapters, weights = [opened(name) for name in names], [0.5, -1.0, 0.25]
    with jax.enable_x64(True):
        merge_weights(BASE, adapters, tmp_path / "m.safetensors", weights=weights, dtype="float64")
        together = from_pretrained(BASE, adapter=adapters, adapter_weights=weights, dtype="float64")
        merged = from_pretrained(tmp_path / "m.safetensors")
        np.testing.assert_allclose(logits_of(together, TOKENS), logits_of(merged, TOKENS), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["hfpeft_dora", "hfpeft_bat", "rwkvpeft_lora_ln"])
def test_what_is_not_weighted_unmerged(name: str) -> None:
    with pytest.raises(AdapterError, match=r"merge (it into its base|the adapters into their base) \(rwkv merge\)"):
        from_pretrained(BASE, adapter=opened(name), adapter_weights=[0.5])


@pytest.mark.parametrize("name", ["hfpeft_dora", "hfpeft_miss"])
@pytest.mark.long
def test_layers_without_an_adapter_and_several_ranks(tmp_path: Path, name: str) -> None:
    whole = opened(name)
    parts = {key: dict(x) for key, x in whole.parts.items() if key != "blocks.1.att.key"}
    if name == "hfpeft_miss":
        parts["blocks.1.ffn.key"] = {"miss_block": parts["blocks.1.ffn.key"]["miss_block"][:5]}
    adapter = dataclasses.replace(
        whole, parts=parts, scales=dict.fromkeys(parts, 1.5 if name == "hfpeft_dora" else 1.0)
    )
    with jax.enable_x64(True):
        merge_weights(BASE, [adapter], tmp_path / "m.safetensors", dtype="float64")
        merged = logits_of(from_pretrained(tmp_path / "m.safetensors"), TOKENS)
        model = unstacked(from_pretrained(BASE, adapter=adapter, dtype="float64"))
        np.testing.assert_allclose(logits_of(model, TOKENS), merged, rtol=0, atol=1e-12)


def test_a_row_of_zeros_stays_one_with_dora() -> None:
    weight = np.array([[0.0, 0.0], [3.0, 4.0]], np.float32)
    parts = {
        "lora_A": np.ones((1, 2), np.float32),
        "lora_B": np.zeros((2, 1), np.float32),
        "lora_magnitude_vector": np.array([2.0, 10.0], np.float32),
    }
    matrix = AdaptedMatrix(jnp.asarray(weight), jax.tree.map(jnp.asarray, parts), jnp.float32(1), kind="dora")
    for merged in (matrix.merged(), merged_matrix("dora", parts, 1.0, weight)):
        np.testing.assert_allclose(merged, [[0, 0], [6, 8]], rtol=1e-6)


def test_a_tuned_state_is_held_against_the_base_of_adapted_matrices(tmp_path: Path) -> None:
    plain, adapted = from_pretrained(BASE), from_pretrained(BASE, adapter=LORA / "hfpeft_lora_s0")
    digest = base_digest(plain)
    assert digest == base_digest(adapted) == base_digest(unstacked(adapted)) == weights_digest(tensors_in(BASE))
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), state_shapes(plain.config, shifts=False))
    save_tuned_state(tmp_path / "state.safetensors", zeros, base_digest=digest)
    load_initial_state(tmp_path / "state.safetensors", adapted)
