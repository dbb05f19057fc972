"""What can be read off a state: linear probes, by ridge regression in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rwkv_jax.checks import ConfigError, require
from rwkv_jax.evaluation.inspect.layers import as_tokens
from rwkv_jax.evaluation.inspect.states import read_texts, state_matrices
from rwkv_jax.models import LanguageModel


class Probe(NamedTuple):
    """A linear classifier, and how it does on samples that it was fitted to and on others."""

    weights: NDArray
    """[D, K]: a class's score of features x is (x - mean) @ weights + bias; the greatest wins."""
    mean: NDArray
    """[D]."""
    bias: NDArray
    """[K]: each class's share of the training samples."""
    train_accuracy: float
    """On the samples that it was fitted to."""
    test_accuracy: float
    """On samples that it has not seen."""
    chance: float
    """Accuracy, on the same unseen samples, of always naming the most frequent class of the training samples."""
    num_test: int
    """Number of unseen samples; the standard error of the accuracy p is sqrt(p (1 - p) / num_test)."""

    def classes(self, features: NDArray) -> NDArray:
        """The class of each sample, [S, D] -> [S]."""
        return np.argmax((features - self.mean) @ self.weights + self.bias, axis=-1)


def fit_probe(
    features: NDArray, labels: NDArray, *, penalty: float = 1e-2, test_share: float = 0.25, seed: int = 0
) -> Probe:
    """Fits min |X W - Y|^2 + lambda |W|^2 of centered features to one-hot labels, and tests it on a random part.

    Args:
      features: [S, D], such as `state_features`; where D is greater than S, the S by S form of the solution is used.
      labels: int [S], classes from 0.
      penalty: lambda, in units of the mean eigenvalue of X X^T.
      test_share: share of the samples that are kept for the test.
      seed: of the choice of those.

    Raises:
      ConfigError: shapes that do not go together, fewer than two classes, no sample left for either part, a penalty
        that is not positive.
    """
    features, labels = np.asarray(features, np.float64), np.asarray(labels)
    samples = len(labels)
    if features.ndim != 2 or labels.shape != (len(features),) or not np.issubdtype(labels.dtype, np.integer):
        raise ConfigError(
            f"labels: {labels.dtype} of shape {labels.shape} must be one integer for each row of features "
            f"{features.shape}"
        )
    require(penalty > 0, "penalty", penalty, "must be positive")
    num_test = round(test_share * samples)
    require(0 < num_test < samples, "test_share", test_share, f"leaves {num_test} of {samples} samples for the test")
    order = np.random.default_rng(seed).permutation(samples)
    test, train = order[:num_test], order[num_test:]
    if labels.min(initial=0) < 0 or len(np.unique(labels[train])) < 2:
        raise ConfigError("labels: must be classes from 0, of which the training samples have at least two")

    one_hot = np.eye(labels.max() + 1)[labels[train]]
    mean, bias = features[train].mean(axis=0), one_hot.mean(axis=0)
    x, y = features[train] - mean, one_hot - bias
    strength = penalty * max(float(np.sum(x * x)) / len(x), np.finfo(float).tiny)
    if x.shape[1] > len(x):  # W = X^T (X X^T + lambda)^-1 Y = (X^T X + lambda)^-1 X^T Y
        weights = x.T @ np.linalg.solve(x @ x.T + strength * np.eye(len(x)), y)
    else:
        weights = np.linalg.solve(x.T @ x + strength * np.eye(x.shape[1]), x.T @ y)

    probe = Probe(weights, mean, bias, 0.0, 0.0, float(np.mean(labels[test] == np.argmax(bias))), num_test)
    train_accuracy, test_accuracy = (float(np.mean(probe.classes(features[s]) == labels[s])) for s in (train, test))
    return probe._replace(train_accuracy=train_accuracy, test_accuracy=test_accuracy)


def state_features(
    model: LanguageModel, tokens: ArrayLike, layers: Sequence[int] | None = None, *, batch_size: int = 64
) -> NDArray:
    """The state matrices after texts as vectors, float64 [B, D].

    Args:
      tokens: [B, T].
      layers: which, in this order; None is all.
      batch_size: texts read at a time.

    Raises:
      ConfigError: as `as_tokens` and `state_matrices`; a layer that the model does not have.
    """
    layers = range(model.config.num_layers) if layers is None else layers
    for layer in layers:
        require(0 <= layer < model.config.num_layers, "layers", layer, f"there are 0 to {model.config.num_layers - 1}")
    ids = as_tokens(model, tokens)
    parts = []
    for begin in range(0, len(ids), batch_size):
        first = max(min(begin, len(ids) - batch_size), 0)  # the last batch is as large as the others: one program
        state = read_texts(model, ids[first : first + batch_size])
        matrices = state_matrices(model, state)[list(layers), begin - first :]
        parts.append(np.moveaxis(matrices, 1, 0).reshape(matrices.shape[1], -1))
    return np.concatenate(parts)


class Recall(NamedTuple):
    """How well probes read earlier tokens off the state at the end of a text."""

    distances: NDArray
    """int [D]: 0 is the text's last token."""
    accuracy: NDArray
    """[D], on texts that the probe was not fitted to."""
    chance: float
    """One over the number of different tokens."""
    num_test: int
    """Texts that the accuracies are of."""


def recall_by_distance(
    model: LanguageModel,
    distances: Sequence[int],
    *,
    tokens: Sequence[int],
    layers: Sequence[int] | None = None,
    num_texts: int = 512,
    seed: int = 0,
    penalty: float = 1e-2,
) -> Recall:
    """Reads random texts, and fits a probe of the state for the token at each distance from the end.

    Args:
      distances: of the tokens to be found, from 0.
      tokens: the different token ids that texts are drawn from, independently and with equal probability, so that
        nothing but the state can tell.
      layers: whose states are read; None is all.
      num_texts: of one more token than the greatest distance, and of one more.

    Raises:
      ConfigError: as `state_features` and `fit_probe`; fewer than two tokens, or a negative distance.
    """
    kinds = np.unique(np.asarray(tokens))
    require(len(kinds) >= 2, "tokens", list(tokens), "must be at least two different ids")
    require(len(distances) > 0 and min(distances) >= 0, "distances", list(distances), "must be at least one, from 0")
    drawn = np.random.default_rng(seed).integers(0, len(kinds), (num_texts, max(distances) + 2))
    features = state_features(model, kinds[drawn], layers)
    probes = [fit_probe(features, drawn[:, -1 - n], penalty=penalty, seed=seed) for n in distances]
    accuracy = np.asarray([probe.test_accuracy for probe in probes])
    return Recall(np.asarray(distances), accuracy, 1 / len(kinds), probes[0].num_test)
