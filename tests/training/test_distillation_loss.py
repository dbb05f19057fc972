"""The losses of distillation, held against a formula in NumPy: values and gradients, at any temperature and k."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.typing import NDArray

from rwkv_jax.training.distillation_loss import (
    DistillationSums,
    Taught,
    TopK,
    sum_distillation,
    taught_by_logits,
    taught_by_top_k,
    top_k_of,
)
from tests.golden import relative_error

BATCH, TIME, WIDTH, VOCAB = 3, 7, 5, 11


def log_softmax(x: NDArray) -> NDArray:
    shifted = x - x.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def expected(
    logits: NDArray, taught: NDArray, targets: NDArray, mask: NDArray, temperature: float, k: int
) -> tuple[float, float, float]:
    """KL divergence, cross-entropy and agreement, with loops over tokens."""
    kl = nll = agreement = 0.0
    for at in np.ndindex(*targets.shape):
        if not mask[at]:
            continue
        log_p, log_q = log_softmax(taught[at] / temperature), log_softmax(logits[at] / temperature)
        order = np.argsort(-log_p)
        first, rest = order[:k], order[k:]
        kl += np.sum(np.exp(log_p[first]) * (log_p[first] - log_q[first]))
        if len(rest):
            p, q = np.exp(log_p[rest]).sum(), np.exp(log_q[rest]).sum()
            kl += p * (np.log(p) - np.log(q))
        nll -= log_softmax(logits[at])[targets[at]]
        agreement += log_p.argmax() == log_q.argmax()
    return float(kl), float(nll), float(agreement)


class Case:
    """Two heads on hidden vectors, and rows of which some tokens count."""

    def __init__(self) -> None:
        draws = np.random.default_rng(3)
        self.hidden, self.taught = draws.standard_normal((2, BATCH, TIME, WIDTH)) * 2
        self.head, self.teacher_head = draws.standard_normal((2, WIDTH, VOCAB))
        self.targets = draws.integers(0, VOCAB, (BATCH, TIME))
        self.mask = draws.integers(0, 2, (BATCH, TIME)).astype(np.float32)

    def sums(self, hidden: Any, temperature: float, k: int | None, chunk: int | None) -> DistillationSums:
        def taught_of(logits: Any, taught: Any) -> Taught:
            return taught_by_logits(taught @ self.teacher_head, logits, temperature=temperature, top_k=k)

        return sum_distillation(
            lambda hidden: hidden @ self.head,
            hidden,
            taught_of,
            (jnp.asarray(self.taught),),
            jnp.asarray(self.targets),
            jnp.asarray(self.mask),
            temperature=temperature,
            chunk=chunk,
        )


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("k", [None, 1, 4, VOCAB])
def test_values_and_gradients_are_those_of_the_formula(float64: None, temperature: float, k: int | None) -> None:
    case = Case()

    def loss(hidden: Any, chunk: int | None) -> Any:
        sums = case.sums(hidden, temperature, k, chunk)
        return 0.7 * sums.kl + 0.3 * sums.nll, sums

    def formula(hidden: NDArray) -> tuple[float, float, float]:
        logits, taught = hidden @ case.head, case.taught @ case.teacher_head
        return expected(logits, taught, case.targets, case.mask, temperature, VOCAB if k is None else k)

    wanted = formula(case.hidden)
    gradients = []
    for chunk in (None, 4):
        (_, sums), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(case.hidden), chunk)
        for ours, theirs in zip(sums, wanted, strict=True):
            assert relative_error(ours, theirs) < 1e-12
        gradients.append(gradient)
    assert relative_error(*gradients) < 1e-13
    # The formula's derivative, by central differences along some directions.
    draws, step = np.random.default_rng(4), 1e-5
    for _ in range(4):
        along = draws.standard_normal(case.hidden.shape)
        ends = [np.dot((0.7, 0.3), formula(case.hidden + sign * step * along)[:2]) for sign in (1, -1)]
        slope = (ends[0] - ends[1]) / (2 * step)
        assert float(np.sum(np.asarray(gradients[0]) * along)) == pytest.approx(slope, rel=1e-7)


def test_the_gradient_is_the_difference_of_the_probabilities(float64: None) -> None:
    """For k tokens too, with the rest as the student shares it out: to the last digits, unlike differences."""
    case, temperature = Case(), 1.7
    logits, taught = (h @ w for h, w in ((case.hidden, case.head), (case.taught, case.teacher_head)))
    q, p = (np.exp(log_softmax(x / temperature)) for x in (logits, taught))
    for k in (3, VOCAB):

        def kl(logits: Any, k: int = k) -> Any:
            def taught_of(logits: Any, given: Any) -> Taught:
                return taught_by_logits(given, logits, temperature=temperature, top_k=k)

            return sum_distillation(
                lambda x: x,
                logits,
                taught_of,
                (jnp.asarray(taught),),
                jnp.asarray(case.targets),
                temperature=temperature,
            ).kl

        is_first = np.argsort(np.argsort(-p, axis=-1), axis=-1) < k
        others = np.where(is_first, 0, q)
        rest = np.where(is_first, 0, p).sum(-1, keepdims=True)
        target = np.where(is_first, p, rest * others / np.maximum(others.sum(-1, keepdims=True), 1e-300))
        gradient = jax.grad(kl)(jnp.asarray(logits))
        assert relative_error(gradient, (q - target) / temperature) < 1e-12


def test_a_teacher_that_is_the_student_teaches_nothing() -> None:
    logits = jnp.asarray(np.random.default_rng(5).standard_normal((1, 20, VOCAB)) * 4, jnp.float32)

    def kl(logits: Any, k: int | None) -> Any:
        def taught_of(logits: Any, given: Any) -> Taught:
            return taught_by_logits(given, logits, temperature=2.0, top_k=k)

        targets = jnp.zeros(logits.shape[:2], jnp.int32)
        return sum_distillation(
            lambda x: x, logits, taught_of, (jax.lax.stop_gradient(logits),), targets, temperature=2.0
        )

    for k, bound in ((None, 0), (4, 1e-5)):
        sums, back = jax.vjp(lambda logits, k=k: kl(logits, k).kl, logits)
        assert abs(float(sums)) <= bound
        assert float(abs(back(jnp.ones(()))[0]).max()) <= bound
        assert float(kl(logits, k).agreement) == 20


def test_rows_beyond_the_vocabulary_have_no_probability(float64: None) -> None:
    """A teacher with fewer rows gives the others none; of one with more they are left out."""
    draws = np.random.default_rng(6)
    logits, taught = draws.standard_normal((2, 4, VOCAB))
    fewer = taught_by_logits(jnp.asarray(taught[:, :-3]), jnp.asarray(logits))
    assert np.all(np.isneginf(fewer.scores[:, -3:]))
    more = taught_by_logits(jnp.asarray(taught), jnp.asarray(logits[:, :-3]))
    np.testing.assert_array_equal(more.scores, taught[:, :-3])
    targets = jnp.zeros((1, 4), jnp.int32)
    whole = sum_distillation(lambda x: x, jnp.asarray(logits)[None], lambda *_: fewer, (), targets)
    p, q = log_softmax(taught[:, :-3]), log_softmax(logits)[:, :-3]
    assert relative_error(whole.kl, np.sum(np.exp(p) * (p - q))) < 1e-12


def test_the_most_likely_tokens_and_the_rest() -> None:
    scores = jnp.log(jnp.asarray([[0.1, 0.5, 0.15, 0.25]]))
    top = top_k_of(scores + 3, 2)
    np.testing.assert_array_equal(top.ids, [[1, 3]])
    np.testing.assert_allclose(jnp.exp(top.log_p), [[0.5, 0.25, 0.25]], rtol=1e-6)
    logits = jnp.log(jnp.asarray([[0.3, 0.2, 0.4, 0.1]]))
    taught = taught_by_top_k(TopK(top.ids, top.log_p.astype(jnp.float16)), logits)
    np.testing.assert_allclose(jnp.exp(taught.scores), [[0.25 * 3 / 7, 0.5, 0.25 * 4 / 7, 0.25]], rtol=1e-3)
    assert taught.likeliest.tolist() == [1]


def test_a_rest_too_small_for_one_minus_the_others_is_kept() -> None:
    """In float32, 1 - sum p would be rounding alone; and nothing is left beside all tokens."""
    scores = jnp.asarray([[0.3, 0.3 - 12 * np.log(10), 0.1, -np.inf]], jnp.float32)
    found = top_k_of(scores, 2).log_p[0]
    np.testing.assert_allclose(found[-1], np.log(1e-12 / (1 + np.exp(-0.2))), rtol=1e-6)
    assert np.isneginf(top_k_of(scores, 3).log_p[0, -1])
    draws = jnp.asarray(np.random.default_rng(7).standard_normal((50, VOCAB)), jnp.float32)
    padded = jnp.pad(draws, ((0, 0), (0, 5)), constant_values=-jnp.inf)
    assert np.all(np.isneginf(top_k_of(padded, VOCAB).log_p[:, -1]))
    taught = taught_by_top_k(top_k_of(padded, VOCAB), jnp.ones_like(padded))
    assert np.all(np.isneginf(taught.scores[:, VOCAB:]))
