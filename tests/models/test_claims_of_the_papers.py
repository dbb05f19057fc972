"""What the papers claim of the architecture, as far as it can be read off the program."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rwkv_jax.config import ModelConfig
from rwkv_jax.models import abstract_model
from rwkv_kernels import wkv5, wkv6

TIME = 7
"""Unlike every other size."""


def scans_over(jaxpr: Any, length: int) -> Iterator[Any]:
    """Equations of all scans of so many steps, however deep."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan" and equation.params["length"] == length:
            yield equation
        for value in equation.params.values():
            for part in value if isinstance(value, (tuple, list)) else (value,):
                if hasattr(inner := getattr(part, "jaxpr", part), "eqns"):
                    yield from scans_over(inner, length)


@pytest.mark.parametrize("generation", ["4", "5.2", "6", "7"])
def test_no_matrix_of_the_model_is_in_the_loop_over_time(generation: str) -> None:
    """Gates, keys and values depend on inputs alone, not on the state: that is why training is parallel."""
    config = ModelConfig(generation, vocab_size=11, num_layers=3, width=32, head_dim=16, wkv_implementation="scan")
    graphdef, params = abstract_model(config)
    tokens = jax.ShapeDtypeStruct((1, TIME), jnp.int32)
    traced = jax.make_jaxpr(lambda params, tokens: nnx.merge(graphdef, params)(tokens).logits)(params, tokens)
    scans = list(scans_over(traced.jaxpr, TIME))
    assert len(scans) == 2  # of the first block, and of the others, within the loop over layers
    matrices = {leaf.shape[-2:] for leaf in jax.tree.leaves(params) if min(leaf.shape[-2:], default=1) > 1}
    assert (32, 32) in matrices
    heads = {(2, 16), (16, 16)}
    for scan in scans:
        constants = [x.aval.shape for x in scan.invars[: scan.params["num_consts"]]]
        carried = [x.aval.shape for x in scan.invars[scan.params["num_consts"] :]]
        assert not [shape for shape in constants if shape[-2:] in matrices - heads]
        assert any(TIME in shape for shape in carried)  # what was made of the inputs before the loop


@pytest.mark.parametrize("operator", [wkv5, wkv6])
def test_what_is_left_of_a_token_falls_as_the_decay_to_the_power_of_its_age(operator: Any) -> None:
    """Decay is what tells positions apart: no other position is given to the operator."""
    rng = np.random.default_rng(0)
    log_w = -rng.uniform(0.05, 1, (2, 16)).astype(np.float32)
    x = np.zeros((1, TIME, 2, 16), np.float32)
    key = x.copy()
    key[:, 0] = 1
    value = key[..., :1]
    u = np.zeros((2, 16), np.float32)
    for channel in (0, 5):
        r = x.copy()
        r[..., channel] = 1
        decay = log_w if operator is wkv5 else np.broadcast_to(log_w, x.shape)
        y = operator(r, decay, key, value, u, implementation="scan")[0]
        expected = np.exp(log_w[:, channel] * (np.arange(1, TIME)[:, None] - 1))
        np.testing.assert_allclose(y[0, 1:, :, 0], expected, rtol=1e-5)
