"""RWKV-7 with an in-context learning rate of up to 2: the same model by every path, and no file that forgets it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rwkv_jax import run_folder
from rwkv_jax.cli.info import Info
from rwkv_jax.config import ConfigError
from rwkv_jax.data.tokenizers import ByteTokenizer
from rwkv_jax.inference.state.state_file import model_identity, parameters_digest
from rwkv_jax.weights import from_pretrained, save_pretrained
from rwkv_jax.weights.pretrained import check_initial_weights, convert
from rwkv_jax.weights.tensors import WeightsError
from tests.golden import relative_error
from tests.models.parameters import SMALL, in_dtype, merge, random_params
from tests.models.small_models import ROWS, TIME, TOKENS, empty_state, rows_program, token_program
from tests.models.test_named_kernels import KERNEL, PLAIN, decode
from tests.training.saved import CONFIG


def test_how_far_eigenvalues_reach() -> None:
    """Of diag(w) - kappa^T (a kappa): w > 0.545, and a < 1 as released, a < 2 in the wide range."""
    generator = np.random.default_rng(0)
    least_decay = np.exp(-np.exp(-0.5))
    for wide in (1, 2):
        lowest = 0.0
        for size in (1, 2, 8) * 40:
            key = generator.normal(size=size)
            key /= np.linalg.norm(key)
            w, a = generator.uniform(least_decay, 1, size), wide * generator.uniform(0.9, 1, size)
            lowest = min(lowest, np.linalg.eigvals(np.diag(w) - np.outer(key, a * key)).real.min())
        assert least_decay - wide < lowest < least_decay - 0.8 * wide


WIDE = dataclasses.replace(SMALL["7"], negative_eigenvalues=True)
MODEL = dataclasses.replace(WIDE, dtype="float32", num_layers=2)


def test_chunks_and_single_tokens_give_the_same(float64: None) -> None:
    params, rows = random_params(WIDE), (np.zeros((ROWS, TIME), np.int32), np.full(ROWS, TIME, np.int32))
    expected, _ = rows_program(WIDE)(params, TOKENS, empty_state(WIDE), *rows)
    state, logits = empty_state(WIDE), []
    for token in TOKENS.T:
        one, state = token_program(WIDE)(params, token[:, None], state)
        logits.append(one)
    assert relative_error(np.concatenate(logits, axis=1), expected) < 1e-12


def test_kernels_of_single_tokens_have_the_range() -> None:
    found, expected = (decode(dataclasses.replace(config, negative_eigenvalues=True)) for config in (KERNEL, PLAIN))
    for x, exact in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, exact, atol=3e-5 * np.abs(exact).max())
    assert relative_error(decode(PLAIN)[0], expected[0]) > 1e-2


@pytest.fixture(scope="module")
def model() -> Any:
    return merge(MODEL, jax.tree.map(jnp.asarray, in_dtype(random_params(MODEL), MODEL)))


@pytest.mark.parametrize("name", ["model.safetensors", "folder"])
def test_files_keep_it_through_conversions(
    tmp_path: Path, model: Any, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save_pretrained(model, tmp_path / name)
    convert(tmp_path / name, tmp_path / "other", dtype="bfloat16")
    for path in (tmp_path / name, tmp_path / "other"):
        assert from_pretrained(path).config.negative_eigenvalues
    Info(str(tmp_path / name)).run()
    assert "RWKV-7, negative eigenvalues, 2 layers" in capsys.readouterr().out
    quantized = from_pretrained(tmp_path / name, quantize="int8")
    save_pretrained(quantized, tmp_path / "packed")
    assert from_pretrained(tmp_path / "packed").config.negative_eigenvalues
    narrow = dataclasses.replace(MODEL, negative_eigenvalues=False)
    check_initial_weights(tmp_path / name, MODEL, ByteTokenizer())
    with pytest.raises(WeightsError, match=r"negative_eigenvalues = False here and True there.*--model.negative-eigen"):
        check_initial_weights(tmp_path / name, narrow, ByteTokenizer())


def test_files_that_cannot_say_it_are_not_written(tmp_path: Path, model: Any) -> None:
    for name, layout in (("a.pth", "official"), ("a", "flash-linear-attention")):
        with pytest.raises(WeightsError, match=r"model\.negative_eigenvalues = True, which .* cannot say"):
            save_pretrained(model, tmp_path / name, layout=layout)
    save_pretrained(model, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"model\.negative_eigenvalues = True, which a \.pth file cannot say"):
        convert(tmp_path / "model.safetensors", tmp_path / "a.pth")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors"]


def test_states_and_runs_of_the_other_range_are_of_another_model(model: Any) -> None:
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    narrow = merge(dataclasses.replace(MODEL, negative_eigenvalues=False), params)
    assert model_identity(narrow, ByteTokenizer()).model == parameters_digest(params)
    assert model_identity(model, ByteTokenizer()).model != parameters_digest(params)
    saved = run_folder.identity(CONFIG, "corpus", "tokenizer")
    changed = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, negative_eigenvalues=True))
    with pytest.raises(ConfigError, match=r"negative_eigenvalues +- +True"):
        run_folder.refuse_difference(saved, run_folder.identity(changed, "corpus", "tokenizer"), "x")
    # A run of a version without the field goes on.
    del saved["model.negative_eigenvalues"]
    run_folder.refuse_difference(saved, run_folder.identity(CONFIG, "corpus", "tokenizer"), "x")
