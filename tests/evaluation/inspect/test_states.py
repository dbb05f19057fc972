"""Half-lives, norms and ranks of states, probes of them, and edits."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rwkv_jax.checks import ConfigError
from rwkv_jax.evaluation.inspect import (
    edit_state,
    fit_probe,
    half_lives,
    read_texts,
    recall_by_distance,
    record,
    state_direction,
    state_features,
    state_history,
    state_matrices,
)
from rwkv_jax.evaluation.inspect.layers import Recording
from rwkv_jax.models.decoding import unstacked
from tests.evaluation.inspect.looked_into import TOKENS, small_model


def recording(operator: str, log_w: Any, shape: tuple[int, ...]) -> Recording:
    return Recording(operator, {"log_w": np.asarray(log_w), "k": np.zeros(shape)}, np.zeros(shape))


def test_half_lives_of_decays_that_are_parameters() -> None:
    found = half_lives([recording("wkv5", [[-math.log(2), 0], [-1, -2]], (1, 5, 2, 2))] * 3, (0.5, 0.9))
    assert not found.depends_on_text
    assert found.tokens.shape == (2, 3, 4)
    np.testing.assert_allclose(found.tokens[:, 2], [[1, math.inf, math.log(2), math.log(2) / 2]] * 2)


def test_half_lives_of_decays_that_depend_on_the_text_are_quantiles() -> None:
    log_w = -math.log(2) / np.arange(1, 12).reshape(1, 11, 1, 1)
    found = half_lives([recording("wkv7", log_w, (1, 11, 1, 1))])
    assert found.depends_on_text
    np.testing.assert_allclose(found.tokens[:, 0, 0], [2, 6, 10])


def test_half_lives_of_a_model_are_those_of_its_parameters() -> None:
    model = small_model("4")
    log_w = -np.exp(np.asarray(model.block(1).att.time_decay[...]))
    np.testing.assert_allclose(half_lives(record(model, TOKENS)).tokens[0, 1], math.log(0.5) / log_w)


def test_nothing_decays_in_a_transformer() -> None:
    with pytest.raises(ConfigError, match="has no decays"):
        half_lives(record(small_model("transformer"), TOKENS))
    with pytest.raises(ConfigError, match="Transformer keeps no matrix"):
        state_history(small_model("transformer"), TOKENS)
    with pytest.raises(ConfigError, match=r"shares = \(1.5,\): must lie from 0 to 1"):
        half_lives([recording("wkv5", [[-1.0]], (1, 1, 1, 1))], (1.5,))


@pytest.mark.parametrize("name", ["4", "6"])
def test_a_history_is_that_of_the_states(name: str) -> None:
    model = small_model(name)
    history = state_history(model, TOKENS, every=3)
    np.testing.assert_array_equal(history.positions, [3, 6])
    matrices = state_matrices(model, read_texts(model, TOKENS[:, :3]))
    assert history.norm.shape == (2, *matrices.shape[:3])
    np.testing.assert_allclose(history.norm[0], np.sqrt(np.sum(matrices**2, axis=(-1, -2))))
    most = 1 if name == "4" else 3  # as many tokens as were read
    assert np.all(history.effective_rank[0] <= most + 1e-6)
    assert np.all(history.stable_rank <= history.effective_rank + 1e-6)
    assert np.all(history.stable_rank >= 1 - 1e-6)


def test_ranks_of_known_matrices() -> None:
    from rwkv_jax.evaluation.inspect.states import matrix_ranks

    norm, effective, stable = matrix_ranks(np.stack([np.eye(4), np.diag([2.0, 0, 0, 0]), np.zeros((4, 4))]))
    np.testing.assert_allclose(norm, [2, 2, 0])
    np.testing.assert_allclose(effective, [4, 1, 0], atol=1e-12)
    np.testing.assert_allclose(stable, [4, 1, 0], atol=1e-12)


@pytest.mark.parametrize("name", ["4", "6"])
def test_an_edit_moves_the_matrices_and_nothing_else(name: str) -> None:
    model = small_model(name)
    direction = state_direction(model, TOKENS[[0, 0], :3], TOKENS[[1, 1], :3])
    state = read_texts(model, TOKENS[:, :3])
    moved = edit_state(state, direction)
    before, after = state_matrices(model, state), state_matrices(model, moved)
    np.testing.assert_allclose(after, before + direction[:, None], atol=1e-12)
    np.testing.assert_allclose(after[:, 0], before[:, 1], atol=1e-12)  # from the one text to the other
    np.testing.assert_array_equal(moved.att_shift, state.att_shift)
    split = jax.tree.map(lambda x: x[0], state), jax.tree.map(lambda x: x[1], state)
    assert not unstacked(model).is_stacked  # whose states have this form
    np.testing.assert_allclose(state_matrices(model, edit_state(split, direction)), after)
    with pytest.raises(ConfigError, match="direction: of shape"):
        edit_state(state, direction[..., :3])
    with pytest.raises(ConfigError, match="direction: has 1 layers where the state has 2"):
        edit_state(split, direction[:1])
    with pytest.raises(ConfigError, match="this model keeps no matrix"):
        edit_state(jnp.zeros(3), direction)


@pytest.mark.parametrize("samples", [40, 400])
def test_a_probe_is_the_ridge_regression(samples: int) -> None:
    """In both forms of the solution: more features than samples, and fewer."""
    rng = np.random.default_rng(0)
    x, labels = rng.standard_normal((samples, 60)), rng.integers(0, 3, samples)
    x[:, :3] += 2 * np.eye(3)[labels]
    probe = fit_probe(x, labels, penalty=0.1, seed=3)
    train = np.random.default_rng(3).permutation(samples)[samples // 4 :]
    centered, y = x[train] - x[train].mean(axis=0), np.eye(3)[labels[train]]
    strength = 0.1 * np.trace(centered @ centered.T) / len(train)
    gradient = centered.T @ (centered @ probe.weights - (y - y.mean(axis=0))) + strength * probe.weights
    np.testing.assert_allclose(gradient, 0, atol=1e-9)
    assert probe.num_test == samples // 4
    assert probe.train_accuracy > 0.9
    assert (probe.test_accuracy > 0.8) == (samples == 400)


def test_recall_falls_with_the_distance() -> None:
    model = small_model("5.2")
    recall = recall_by_distance(model, (0, 1, 2, 12), tokens=[3, 8, 20, 33], num_texts=400)
    assert recall.accuracy[0] > 0.95
    assert np.all(np.diff(recall.accuracy) <= 0)
    assert recall.accuracy[-1] < recall.accuracy[0] - 0.3
    assert (recall.chance, recall.num_test) == (0.25, 100)


def test_what_cannot_be_probed_is_refused() -> None:
    x, labels = np.zeros((8, 2)), np.arange(8) % 2
    for arguments, message in [
        ((x, labels[:4]), "labels: int64 of shape"),
        ((x, labels + 0.5), "must be one integer"),
        ((x, labels * 0), "at least two"),
        ((x, labels - 1), "classes from 0"),
    ]:
        with pytest.raises(ConfigError, match=message):
            fit_probe(*arguments)
    with pytest.raises(ConfigError, match="penalty = 0: must be positive"):
        fit_probe(x, labels, penalty=0)
    with pytest.raises(ConfigError, match=r"test_share = 1.0: leaves 8 of 8"):
        fit_probe(x, labels, test_share=1.0)
    model = small_model("5.2")
    with pytest.raises(ConfigError, match="layers = 2: there are 0 to 1"):
        state_features(model, TOKENS, [2])
    with pytest.raises(ConfigError, match="tokens = "):
        recall_by_distance(model, [0], tokens=[3, 3])
    with pytest.raises(ConfigError, match="distances = "):
        recall_by_distance(model, [-1], tokens=[3, 4])
    with pytest.raises(ConfigError, match="every = 0: must be at least 1"):
        state_history(model, TOKENS, every=0)


@pytest.mark.parametrize("name", ["4", *(pytest.param(name, marks=pytest.mark.long) for name in ("5.2", "6", "7"))])
def test_deeper_layers_hold_longer_at_the_start(name: str) -> None:
    """By the official initial values: the median channel's half-life grows with every layer."""
    from tests.models.parameters import SMALL, initial_params, merge

    config = dataclasses.replace(SMALL[name], num_layers=3)
    model = merge(config, jax.tree.map(jnp.asarray, initial_params(config)))
    medians = np.median(half_lives(record(model, TOKENS)).tokens[1], axis=-1)
    assert np.all(np.diff(medians) > 0)


def test_a_plain_rnn_is_refused() -> None:
    model = small_model("rnn")
    with pytest.raises(ConfigError, match="has no operator that can be recorded"):
        record(model, TOKENS)
    with pytest.raises(ConfigError, match="keeps no matrix"):
        state_matrices(model, model.initial_state(2))
