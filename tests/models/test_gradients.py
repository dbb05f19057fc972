"""Gradients of every generation: what reaches what, and that nothing depends on how they are computed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from numpy.typing import NDArray

from rwkv_jax.config import ModelConfig, Remat
from rwkv_jax.models.state import State
from rwkv_jax.training.loss import sum_losses
from tests.golden import QUICK, assert_close, relative_error
from tests.models.parameters import SMALL, abstract, merge, random_params, to_official
from tests.models.small_models import (
    FLOAT32,
    PACKED,
    ROWS,
    TIME,
    TOKENS,
    every_generation,
    one_by_one,
    segments_of,
)

# Lookups have a gradient of their own, which test_rosa.py looks at.
briefly = pytest.mark.parametrize(
    "generation",
    [
        pytest.param(name, marks=() if name in ("4", "7") else pytest.mark.long)
        for name, config in SMALL.items()
        if not config.sizes().rosa_bits
    ],
)


@functools.cache
def gradients_program(config: ModelConfig, remat: Remat = "none", chunk: int | None = None) -> Callable[..., Any]:
    """(params, state, added [B, T, C], tokens, targets, mask, segment_ids, lengths) -> loss, gradients of the first 3.

    `added` is added to the embeddings, for their gradient.
    """

    def loss(
        params: Any, state: State, added: Array, tokens: Array, targets: Array, mask: Array, ids: Array, lengths: Array
    ) -> Array:
        model = merge(config, params)
        embeds = model.emb(tokens) + added
        ids_read = tokens if model.reads_tokens else None
        hidden, final = model.hidden(
            ids_read, state, inputs_embeds=embeds, remat=remat, segment_ids=ids, lengths=lengths
        )
        total = sum_losses(model.logits, hidden, targets, mask, chunk)
        final = getattr(final, "recurrence", final)
        return total.nll + 1e-2 * total.peak + 1e-3 * sum(jnp.sum(x) for x in (final.att_shift, final.ffn_shift))

    def run(params: Any, state: State, added: Array, *others: Array) -> Any:
        value, (dparams, dstate, dadded) = gradient(params, state, added, *others)
        # Without those of a cache's position.
        return value, (dparams, [x for x in jax.tree.leaves(dstate) if x.dtype != jax.dtypes.float0], dadded)

    gradient = jax.value_and_grad(loss, argnums=(0, 1, 2), allow_int=True)
    return jax.jit(run, compiler_options=QUICK)


def gradients(generation: str, mask: NDArray, segment_ids: NDArray, lengths: Any) -> tuple[Any, Any]:
    """Sizes of the gradients of a masked loss: of embeddings [B, T], and of each array of the state [B]."""
    config = SMALL[generation]
    ends = np.asarray(lengths, np.int32)
    inputs = (TOKENS, np.roll(TOKENS, -1, axis=1), mask.astype(np.float32), segment_ids, ends)
    state = one_by_one(generation)[1][9]
    program = gradients_program(config)
    added = np.zeros((ROWS, TIME, 32))
    _, (_, dstate, dadded) = jax.device_get(program(random_params(config), state, added, *inputs))
    largest = jax.tree.map(lambda x: np.abs(x).reshape((*x.shape[:2], -1)).max(axis=(0, 2)), dstate)
    return np.abs(dadded).max(axis=-1), largest


@briefly
def test_nothing_reaches_where_it_must_not(float64: None, generation: str) -> None:
    """By gradient: of one token's loss with respect to every embedding and to the state, which are exactly zero.

    Row 0 is one text, row 1 holds three, row 2 ends early, row 3 is three texts and ends within the second.
    """
    segment_ids = np.stack([segments_of(20), segments_of(6, 5, 9), segments_of(20), segments_of(6, 5, 9)])
    lengths = np.array([20, 20, 11, 9])
    begin = np.array([[0] * 20, [0] * 6 + [6] * 5 + [11] * 9, [0] * 20, [0] * 6 + [6] * 5 + [11] * 9])
    positions = np.arange(TIME)
    # Without the loss of any token only the final shifts are left, a function of each row's last segment.
    base, base_state = gradients(generation, np.zeros((ROWS, TIME)), segment_ids, lengths)
    for position in (0, 5, 6, 7, 8, 10, 11, 19):
        mask = np.zeros((ROWS, TIME))
        mask[:, position] = position < lengths
        size, of_state = gradients(generation, mask, segment_ids, lengths)
        for row in range(ROWS):
            counts = position < lengths[row]
            seen = (positions >= begin[row, position]) & (positions <= position) & counts
            ending = (positions >= begin[row, lengths[row] - 1]) & (positions < lengths[row])
            np.testing.assert_array_equal(base[row] > 0, ending, err_msg=f"{row=}")
            np.testing.assert_array_equal(size[row] > 0, seen | ending, err_msg=f"{row=} {position=}")
            first = counts and begin[row, position] == 0
            for leaf, base_leaf in zip(jax.tree.leaves(of_state), jax.tree.leaves(base_state), strict=True):
                assert (base_leaf[row] > 0) == (begin[row, lengths[row] - 1] == 0)
                assert (leaf[row] > 0) == (first or begin[row, lengths[row] - 1] == 0)


@briefly
def test_loss_and_gradients_do_not_depend_on_how_they_are_computed(float64: None, generation: str) -> None:
    """By chunks with all kept and all logits at once, or step by step with each block and logits recomputed."""
    config = SMALL[generation]
    params, state = random_params(config), one_by_one(generation)[1][9]
    segment_ids = np.stack([segments_of(*lengths) for lengths in PACKED])
    rng = np.random.default_rng(1)
    mask = rng.integers(0, 2, (ROWS, TIME)).astype(np.float32)
    lengths = np.array([20, 7, 20, 18], np.int32)
    targets = np.roll(TOKENS, -1, axis=1)
    inputs = (params, state, np.zeros((ROWS, TIME, 32)), TOKENS, targets, mask, segment_ids, lengths)
    loss, (gradient, *others) = gradients_program(config)(*inputs)
    scan = dataclasses.replace(config, wkv_implementation="scan")
    other_loss, (other_gradient, *other_others) = gradients_program(scan, "full", 16)(*inputs)
    assert relative_error(other_loss, loss) < 1e-12
    assert_close(to_official(config, other_gradient), to_official(config, gradient), 1e-11)
    for x, expected in zip(jax.tree.leaves(other_others), jax.tree.leaves(others), strict=True):
        assert relative_error(x, expected) < 1e-11
    assert all(np.any(x) for x in to_official(config, gradient).values())


@every_generation
def test_remat_keeps_less_for_the_backward_pass(generation: str) -> None:
    config = dataclasses.replace(FLOAT32[generation], num_layers=12)
    tokens = jnp.zeros((8, 256), jnp.int32)

    def kept(remat: Remat) -> int:
        def hidden(params: Any) -> Array:
            return merge(config, params).hidden(tokens, remat=remat)[0]

        return sum(
            x.size for x in jax.tree.leaves(jax.eval_shape(lambda p: jax.vjp(hidden, p)[1], abstract(config)[1]))
        )

    block_inputs = config.num_layers * tokens.size * config.width
    full, operator, none = (kept(remat) for remat in ("full", "operator", "none"))
    assert block_inputs < full < 2 * block_inputs
    assert 2 * full < operator < none
