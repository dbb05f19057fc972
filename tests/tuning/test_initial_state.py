"""Tuned states against what RWKV-PEFT gives with its own files: logits, masked loss and its gradient by the state."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.typing import NDArray

from rwkv_jax import from_pretrained
from rwkv_jax.config import ConfigError, ModelConfig
from rwkv_jax.models import LanguageModel
from rwkv_jax.models.decoding import unstacked
from rwkv_jax.models.initial_state import begin_texts, state_shapes
from rwkv_jax.training.loss import sum_losses
from rwkv_jax.tuning import load_initial_state, save_tuned_state
from rwkv_jax.tuning.pretrained_state import open_tuned_state
from rwkv_jax.tuning.state_files import TunedStateError, named_tensors
from tests.golden import AS_USERS, GOLDEN_DIR, QUICK, load_golden, relative_error

FILES = GOLDEN_DIR / "tuning" / "state"
BASES = {"6": FILES / "base_v6_s0.safetensors", "7": GOLDEN_DIR / "eval" / "base_v7_s0.safetensors"}


def numbers(generation: str) -> dict[str, NDArray]:
    prefix = f"v{generation}."
    found = load_golden("tuning/state/state_s0.npz")
    return {name.removeprefix(prefix): x for name, x in found.items() if name.startswith(prefix)}


def state_file(generation: str) -> Path:
    return FILES / f"rwkvpeft_state_v{generation}_s0.pth"


def program(model: LanguageModel, generation: str) -> Any:
    """From a state to the mean loss over labels that count with the logits, and its gradient by the state."""
    own = numbers(generation)
    tokens, labels = jnp.asarray(own["tokens"]), own["labels"]
    mask, targets = jnp.asarray(labels >= 0, model.config.parameter_dtype), jnp.asarray(np.maximum(labels, 0))

    def loss(arrays: Any) -> Any:
        hidden, _ = model.hidden(tokens, begin_texts(arrays, model, len(tokens)))
        sums = sum_losses(model.logits, hidden, targets, mask)
        return sums.nll / sums.count, model.logits(hidden)

    options = QUICK if model.config.dtype == "float64" else AS_USERS
    return jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=options)


def check(generation: str, dtype: Any, bound: float, gradient_bound: float) -> None:
    model, own = from_pretrained(BASES[generation], dtype=dtype), numbers(generation)
    arrays = jax.tree.map(jnp.asarray, open_tuned_state(state_file(generation)).arrays(model.config, "file"))
    run = program(model, generation)
    (loss, logits), gradient = run(arrays)
    assert relative_error(logits, own["logits"]) < bound
    assert relative_error(loss, own["loss"]) < bound
    for key, value in named_tensors(gradient).items():
        assert relative_error(value, own[f"grad.{key}"]) < gradient_bound
    # A state with its axes exchanged is another one by far, and one a bit down the gradient is better.
    (_, logits), _ = run(jax.tree.map(lambda x: jnp.swapaxes(x, -1, -2), arrays))
    assert relative_error(logits, own["logits"]) > 0.1
    (lower, _), _ = run(jax.tree.map(lambda x, slope: x - 0.1 * slope, arrays, gradient))
    assert lower < loss


@pytest.mark.parametrize("generation", ["6", "7"])
def test_logits_loss_and_gradients_in_float64(float64: None, generation: str) -> None:
    check(generation, "float64", 1e-11, 1e-11)


@pytest.mark.parametrize("generation", ["6", "7"])
def test_logits_loss_and_gradients_in_float32(generation: str) -> None:
    check(generation, "float32", 1e-5, 1e-5)


@pytest.mark.parametrize("generation", ["6", "7"])
def test_a_state_for_a_call_of_a_model_with_stacked_layers_or_not(generation: str) -> None:
    model, own = from_pretrained(BASES[generation], dtype="float32"), numbers(generation)
    tokens = jnp.asarray(own["tokens"])
    for each in (model, unstacked(model)):
        logits, _ = each(tokens, load_initial_state(state_file(generation), each, batch_size=2))
        assert relative_error(logits, own["logits"]) < 1e-5


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".state"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_file_is_read_as_it_was_written(tmp_path: Path, suffix: str, dtype: str) -> None:
    model = from_pretrained(BASES["7"], dtype="float32")
    arrays = open_tuned_state(state_file("7")).arrays(model.config, "file")
    save_tuned_state(tmp_path / f"out{suffix}", arrays, dtype=dtype)
    again = open_tuned_state(tmp_path / f"out{suffix}").arrays(model.config, "file")
    jax.tree.map(np.testing.assert_array_equal, arrays, again)  # which are exact in bfloat16


def test_a_state_of_another_base_is_refused_unless_told(tmp_path: Path) -> None:
    model = from_pretrained(BASES["7"], dtype="float32")
    arrays = open_tuned_state(state_file("7")).arrays(model.config, "file")
    path = tmp_path / "out.safetensors"
    save_tuned_state(path, arrays, base_digest="0" * 64)
    with pytest.raises(TunedStateError, match=r"was trained with another base \(0000.*allow_other_base"):
        load_initial_state(path, model)
    assert load_initial_state(path, model, allow_other_base=True).wkv.shape == (2, 1, 2, 64, 64)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    six = from_pretrained(BASES["6"], dtype="float32")
    (tmp_path / "other.txt").write_bytes(b"")
    with pytest.raises(TunedStateError, match="there is no such file"):
        load_initial_state(tmp_path / "none.pth", six)
    with pytest.raises(TunedStateError, match="holds no tuned state"):
        load_initial_state(BASES["7"], six)
    more = dataclasses.replace(six.config, num_layers=3)
    with pytest.raises(TunedStateError, match=r"missing      blocks\.2\.att\.time_state"):
        open_tuned_state(state_file("6")).arrays(more, "file")
    vectors = ModelConfig("4", vocab_size=32, num_layers=2, width=128, ffn_width=32)
    with pytest.raises(TunedStateError, match="cannot begin from"):
        open_tuned_state(state_file("6")).arrays(vectors, "file")
    with pytest.raises(ConfigError, match="no matrix for each head"):
        state_shapes(vectors)
    shifted = state_shapes(six.config, shifts=True)
    with pytest.raises(TunedStateError, match=r"no place in a \.pth"):
        save_tuned_state(tmp_path / "out.pth", jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shifted))
