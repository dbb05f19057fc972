"""Prefixes that wrappers of models put before every name are taken off, and tied weights get a head."""

from __future__ import annotations

import numpy as np
import pytest

from rwkv_jax.weights.layouts import from_layout, to_layout
from rwkv_jax.weights.tensors import WeightsError
from tests.weights.official_tensors import FLA, PAIRS, assert_same, official


def test_the_prefix_of_deepspeed_is_taken_off() -> None:
    tensors = official(7)
    prefixed = {f"_forward_module.{name}": tensor for name, tensor in tensors.items()}
    layout, found = from_layout(prefixed)
    assert layout == "official"
    assert_same(found, tensors)
    with pytest.raises(WeightsError, match=r"some names begin with '_forward_module.' and these do not: emb.weight;"):
        from_layout(prefixed | {"emb.weight": tensors["emb.weight"]})


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "_orig_mod.",
        "model.",
        "module.model.",
        "base_model.model.",
        "_forward_module.model._orig_mod.",
        "module._fsdp_wrapped_module._orig_mod.base_model.model.model.",
    ],
)
@pytest.mark.parametrize(("layout", "generation"), [("official", 7), ("official", 4), *PAIRS])
def test_prefixes_of_wrappers_are_taken_off_and_said_to_be(layout: str, generation: int, prefix: str) -> None:
    tensors, said = official(generation), []
    foreign = {f"{prefix}{name}": tensor for name, tensor in to_layout(tensors, layout).items()}
    found, back = from_layout(foreign, report=said.append)
    assert found == layout
    assert_same(back, tensors)
    assert said == [f"every name begins with {prefix!r}, which is taken off"]


def test_a_prefix_that_only_some_names_have_is_refused() -> None:
    tensors = {f"module.{name}": tensor for name, tensor in official(7).items()}
    with pytest.raises(WeightsError, match=r"some names begin with 'module\.' and these do not: ema\.x; two models"):
        from_layout(tensors | {"ema.x": np.zeros(1)})
    with pytest.raises(WeightsError, match=r"no known layout: "):  # without end
        from_layout({f"{'module.' * 100}{name}": tensor for name, tensor in official(4).items()})


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize(("layout", "generation"), PAIRS)
def test_tied_weights_have_the_embedding_for_a_head(layout: str, generation: int, prefix: str) -> None:
    tensors, said = official(generation), []
    tied = tensors | {"head.weight": tensors["emb.weight"]}
    head = "lm_head.weight" if layout == FLA else "head.weight"
    foreign = {f"{prefix}{name}": tensor for name, tensor in to_layout(tied, layout).items() if name != head}
    for says in (None, True):
        assert_same(from_layout(foreign, tied=says, report=said.append)[1], tied)
        assert said.pop() == "there is no head: its matrix is the embedding's (tied weights)"
    assert "head.weight" not in from_layout(foreign, tied=False)[1]


def test_a_head_is_missing_where_a_config_says_that_it_is_not_tied() -> None:
    tensors = official(7)
    untied = {name: tensor for name, tensor in tensors.items() if name != "head.weight"}
    assert from_layout(untied, tied=False)[1] is untied
    assert_same(from_layout(untied)[1], untied | {"head.weight": tensors["emb.weight"]})
    assert from_layout(tensors, tied=True)[1] is tensors  # there is one, whatever a config says
