"""Cross-entropy and L2Wrap against other implementations, autodiff and each other."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from rwkv_jax.training.loss import TokenLosses, sum_losses, token_losses
from tests.golden import assert_close, load_golden, relative_error

BATCH, TIME, WIDTH, VOCAB = 2, 7, 5, 11
L2WRAP = 1e-4


@pytest.mark.parametrize(("dtype", "bound"), [("float64", 1e-12), ("float32", 1e-6)])
def test_losses_equal_the_official_trainers(dtype: str, bound: float) -> None:
    golden = load_golden("op/l2wrap_s0.npz")
    with jax.enable_x64(dtype == "float64"):
        logits = jnp.asarray(golden["logits"], dtype).reshape(14, -1)
        targets = jnp.asarray(golden["targets"].reshape(14))

        def loss(logits: Array, l2wrap: float) -> Array:
            nll, peak = token_losses(logits, targets)
            return jnp.mean(nll) + l2wrap * jnp.mean(peak)

        plain, dplain = jax.value_and_grad(loss)(logits, 0.0)
        dwrapped = jax.grad(loss)(logits, L2WRAP)
    assert relative_error(plain, golden["loss"]) < bound
    assert relative_error(dplain.reshape(2, 7, -1), golden["grad_logits_plain"]) < bound
    assert relative_error(dwrapped.reshape(2, 7, -1), golden["grad_logits_l2wrap"]) < bound
    # What L2Wrap adds is small; it must be right by itself.
    added, expected = dwrapped - dplain, golden["grad_logits_l2wrap"] - golden["grad_logits_plain"]
    assert relative_error(added.reshape(2, 7, -1), expected) < 1e5 * bound


def test_the_gradient_by_hand_is_that_of_autodiff(float64: None) -> None:
    rng = np.random.default_rng(0)
    logits, targets = jnp.asarray(rng.standard_normal((6, VOCAB))), jnp.asarray(rng.integers(0, VOCAB, 6))
    weight = jnp.asarray(rng.standard_normal((2, 6)))

    def ours(logits: Array) -> Array:
        nll, peak = token_losses(logits, targets)
        return jnp.sum(weight[0] * nll + weight[1] * peak)

    def reference(logits: Array) -> Array:
        nll = -jax.nn.log_softmax(logits)[jnp.arange(6), targets]
        return jnp.sum(weight[0] * nll + weight[1] * 0.5 * jnp.max(logits, axis=-1) ** 2)

    value, gradient = jax.value_and_grad(ours)(logits)
    expected_value, expected_gradient = jax.value_and_grad(reference)(logits)
    assert relative_error(value, expected_value) < 1e-14
    assert relative_error(gradient, expected_gradient) < 1e-14


def test_l2wrap_pulls_at_the_first_of_equal_logits() -> None:
    logits = jnp.asarray([[1.0, 3.0, 3.0, 2.0, 3.0]])
    gradient = jax.grad(lambda x: jnp.sum(token_losses(x, jnp.asarray([0]))[1]))(logits)
    np.testing.assert_array_equal(gradient, [[0, 3, 0, 0, 0]])


def test_l2wrap_pulls_a_negative_peak_up() -> None:
    gradient = jax.grad(lambda x: jnp.sum(token_losses(x, jnp.asarray([0]))[1]))(jnp.asarray([[-5.0, -2.0]]))
    np.testing.assert_array_equal(gradient, [[0, -2]])


@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_large_logits_do_not_overflow(shift: float) -> None:
    logits, targets = jnp.asarray([[0.0, 1.0, 2.0]]) + shift, jnp.asarray([1])
    nll, gradient = jax.value_and_grad(lambda x: jnp.sum(token_losses(x, targets)[0]))(logits)
    np.testing.assert_allclose(nll, np.log(np.exp([0, 1, 2]).sum()) - 1, rtol=1e-3)
    assert np.all(np.isfinite(gradient))


# Over a batch


def batch() -> tuple[Array, Array, Array, Array]:
    """Hidden vectors, targets, a mask and the head's weight."""
    rng = np.random.default_rng(1)
    hidden, head = rng.standard_normal((BATCH, TIME, WIDTH)), rng.standard_normal((VOCAB, WIDTH))
    targets, mask = rng.integers(0, VOCAB, (BATCH, TIME)), rng.integers(0, 2, (BATCH, TIME))
    return jnp.asarray(hidden), jnp.asarray(targets), jnp.asarray(mask), jnp.asarray(head)


def losses_and_gradients(mask: Array | None, chunk: int | None) -> dict[str, Array]:
    hidden, targets, _, head = batch()

    def run(hidden: Array, head: Array) -> tuple[Array, TokenLosses]:
        total = sum_losses(lambda x: x @ head.T, hidden, targets, mask, chunk)
        return total.nll + 0.3 * total.peak, total

    gradient = jax.jit(jax.value_and_grad(run, argnums=(0, 1), has_aux=True))
    (_, total), (dhidden, dhead) = gradient(hidden, head)
    return total._asdict() | {"dhidden": dhidden, "dhead": dhead}


@pytest.mark.parametrize("masked", [False, True])
def test_sums_over_a_batch(float64: None, masked: bool) -> None:
    hidden, targets, mask, head = batch()
    total = losses_and_gradients(mask if masked else None, None)
    keep = np.asarray(mask, bool) if masked else np.ones((BATCH, TIME), bool)
    logits = np.asarray(hidden @ head.T)[keep]
    expected = np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(logits)), np.asarray(targets)[keep]]
    np.testing.assert_allclose(total["nll"], expected.sum(), rtol=1e-12)
    np.testing.assert_allclose(total["peak"], (0.5 * logits.max(-1) ** 2).sum(), rtol=1e-12)
    assert total["count"] == keep.sum()
    assert np.all(np.any(np.asarray(total["dhidden"]) != 0, axis=-1) == keep)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("chunk", [1, 4, 7, 13, 14, 100])
def test_any_chunk_gives_the_same(float64: None, masked: bool, chunk: int) -> None:
    mask = batch()[2] if masked else None
    assert_close(losses_and_gradients(mask, chunk), losses_and_gradients(mask, None), 1e-13)


def test_chunks_hold_no_more_logits_than_theirs() -> None:
    hidden, targets, _, head = batch()

    def loss(hidden: Array) -> Array:
        return sum_losses(lambda x: x @ head.T, hidden, targets, chunk=2).nll

    text = str(jax.make_jaxpr(jax.grad(loss))(hidden))
    assert f"[2,{VOCAB}]" in text
    assert f"[{BATCH * TIME},{VOCAB}]" not in text
    assert f"[{BATCH * TIME // 2},2,{VOCAB}]" not in text
