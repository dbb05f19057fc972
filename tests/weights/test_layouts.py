"""Other projects' names lead to the official ones and back, bit for bit; what is of no layout is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from rwkv_jax.weights.layouts import LAYOUTS, LazyTensors, from_layout, hub_config, to_layout
from rwkv_jax.weights.safetensors import read_safetensors, write_safetensors
from rwkv_jax.weights.tensors import BFLOAT16, WeightsError, tensor_spec
from tests.golden import tiny_model

_V, _C, _L, _N, _F = 11, 8, 2, 4, 12
_FLA = "flash-linear-attention"
_LONG = {"k": "key", "v": "value", "r": "receptance", "g": "gate"}


def _norm(name: str) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (_C,), f"{name}.bias": (_C,)}


def _matrices(*names: str) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (_C, _C) for name in names}


def _rows(*names: str) -> dict[str, tuple[int, ...]]:
    return dict.fromkeys(names, (1, 1, _C))


def _attention_shapes(generation: int, layer: int) -> dict[str, tuple[int, ...]]:
    if generation == 4:
        return {
            "time_decay": (_C,),
            "time_first": (_C,),
            **_rows("time_mix_k", "time_mix_v", "time_mix_r"),
            **_matrices("key", "value", "receptance", "output"),
        }
    if generation == 5:
        return {
            **_rows("time_mix_k", "time_mix_v", "time_mix_r", "time_mix_g"),
            "time_decay": (_C // _N, _N),
            "time_faaaa": (_C // _N, _N),
            **_matrices("receptance", "key", "value", "gate", "output"),
            **_norm("ln_x"),
        }
    if generation == 6:
        return {
            **_rows(*(f"time_maa_{x}" for x in "xwkvrg"), "time_decay"),
            "time_maa_w1": (_C, 5 * 3),
            "time_maa_w2": (5, 3, _C),
            "time_decay_w1": (_C, 2),
            "time_decay_w2": (2, _C),
            "time_faaaa": (_C // _N, _N),
            **_matrices("receptance", "key", "value", "gate", "output"),
            **_norm("ln_x"),
        }
    low_ranks = {"w": 2, "a": 3, "g": 5} | ({"v": 6} if layer else {})
    return {
        **_rows(*(f"x_{x}" for x in "rwkvag"), *(f"{x}0" for x in low_ranks if x != "g"), "k_k", "k_a"),
        **{f"{x}1": (_C, rank) for x, rank in low_ranks.items()},
        **{f"{x}2": (rank, _C) for x, rank in low_ranks.items()},
        "r_k": (_C // _N, _N),
        **_matrices("receptance", "key", "value", "output"),
        **_norm("ln_x"),
    }


def _official(generation: int, dtype: Any = np.float32) -> dict[str, NDArray]:
    """Small random tensors with the official names and shapes of RWKV-4, 5.2, 6 or 7."""
    shapes: dict[str, tuple[int, ...]] = {"emb.weight": (_V, _C), "head.weight": (_V, _C), **_norm("ln_out")}
    for layer in range(_L):
        feed_forward = {"key.weight": (_F, _C), "value.weight": (_C, _F)}
        if generation < 7:
            mix = "time_maa" if generation == 6 else "time_mix"
            feed_forward |= _rows(f"{mix}_k", f"{mix}_r") | _matrices("receptance")
        else:
            feed_forward |= _rows("x_k")
        parts = {
            **(_norm("ln0") if layer == 0 else {}),
            **_norm("ln1"),
            **_norm("ln2"),
            **{f"att.{name}": shape for name, shape in _attention_shapes(generation, layer).items()},
            **{f"ffn.{name}": shape for name, shape in feed_forward.items()},
        }
        shapes |= {f"blocks.{layer}.{name}": shape for name, shape in parts.items()}
    rng = np.random.default_rng(generation)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def _assert_same(found: Mapping[str, NDArray], expected: Mapping[str, NDArray]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert tensor_spec(found, name) == (tensor.shape, tensor.dtype), name
        assert found[name].tobytes() == tensor.tobytes(), name


_PAIRS = [("transformers", 4), (_FLA, 6), (_FLA, 7)]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BFLOAT16])
@pytest.mark.parametrize(("layout", "generation"), _PAIRS)
def test_there_and_back_is_bit_exact(layout: str, generation: int, dtype: Any, tmp_path: Path) -> None:
    tensors = _official(generation, dtype)
    foreign = to_layout(tensors, layout)
    assert not foreign.keys() & tensors.keys() - {"head.weight"}
    found, back = from_layout(foreign)
    assert found == layout
    _assert_same(back, tensors)
    write_safetensors(tmp_path / "x.safetensors", foreign)
    found, back = from_layout(read_safetensors(tmp_path / "x.safetensors"))
    assert found == layout
    _assert_same(back, tensors)
    _assert_same(to_layout(back, layout), {name: foreign[name] for name in foreign})


@pytest.mark.parametrize("generation", [4, 5, 6, 7])
def test_official_names_stay(generation: int) -> None:
    tensors = _official(generation)
    layout, found = from_layout(tensors)
    assert layout == "official"
    assert found is tensors
    assert to_layout(tensors, "official") is tensors


# What the libraries' own models of two layers have (`state_dict()` of transformers 5.23.0 and flash-linear-attention
# 0.6.0), at the widths of this file.
_TRANSFORMERS_4 = {
    "head.weight": (_V, _C),
    "rwkv.embeddings.weight": (_V, _C),
    **_norm("rwkv.ln_out"),
    **_norm("rwkv.blocks.0.pre_ln"),
} | {
    f"rwkv.blocks.{layer}.{name}": shape
    for layer in range(_L)
    for name, shape in {
        **_norm("ln1"),
        **_norm("ln2"),
        **_matrices(*(f"attention.{name}" for name in ("key", "output", "receptance", "value"))),
        "attention.time_decay": (_C,),
        "attention.time_first": (_C,),
        **_rows(*(f"attention.time_mix_{name}" for name in ("key", "receptance", "value"))),
        "feed_forward.key.weight": (_F, _C),
        "feed_forward.value.weight": (_C, _F),
        **_matrices("feed_forward.receptance"),
        **_rows("feed_forward.time_mix_key", "feed_forward.time_mix_receptance"),
    }.items()
}
_FLA_COMMON = {
    "lm_head.weight": (_V, _C),
    "model.embeddings.weight": (_V, _C),
    **_norm("model.norm"),
    **_norm("model.layers.0.pre_norm"),
}
_FLA_6 = _FLA_COMMON | {
    f"model.layers.{layer}.{name}": shape
    for layer in range(_L)
    for name, shape in {
        **_norm("attn_norm"),
        **_norm("ffn_norm"),
        **_norm("attn.g_norm"),
        "attn.x_bias": (5, _C),
        "attn.bonus": (_C // _N, _N),
        "attn.x_proj.0.mu": (_C,),
        "attn.x_proj.0.linear.weight": (15, _C),
        "attn.x_proj.2.weight": (_C, 15),
        **_matrices(*(f"attn.{x}_proj.linear" for x in "rkvg"), "attn.o_proj"),
        "attn.w_proj.linear.lora.0.weight": (2, _C),
        "attn.w_proj.linear.lora.2.weight": (_C, 2),
        "attn.w_proj.linear.lora.2.bias": (_C,),
        "ffn.key.mu": (_C,),
        "ffn.key.linear.weight": (_F, _C),
        "ffn.value.weight": (_C, _F),
        "ffn.receptance.mu": (_C,),
        "ffn.receptance.linear.weight": (_C, _C),
    }.items()
}
_FLA_7 = _FLA_COMMON | {
    f"model.layers.{layer}.{name}": shape
    for layer in range(_L)
    for name, shape in {
        **_norm("attn_norm"),
        **_norm("ffn_norm"),
        **_norm("attn.g_norm"),
        **_rows(*(f"attn.x_{x}" for x in "rwkvag")),
        "attn.k_k": (_C,),
        "attn.k_a": (_C,),
        "attn.r_k": (_C // _N, _N),
        **_matrices(*(f"attn.{x}_proj" for x in "rkvo")),
        **{
            f"attn.{x}_lora.lora.{part}": shape
            for x, rank in {"w": 2, "a": 3, "g": 5, **({"v": 6} if layer else {})}.items()
            for part, shape in {"0.weight": (rank, _C), "2.weight": (_C, rank), "2.bias": (_C,)}.items()
            if (x, part) != ("g", "2.bias")
        },
        "ffn.x_k": (_C,),
        "ffn.key.weight": (_F, _C),
        "ffn.value.weight": (_C, _F),
    }.items()
}


@pytest.mark.parametrize(
    ("layout", "generation", "expected"),
    [("transformers", 4, _TRANSFORMERS_4), (_FLA, 6, _FLA_6), (_FLA, 7, _FLA_7)],
)
def test_names_and_shapes_are_those_of_the_libraries(
    layout: str, generation: int, expected: dict[str, tuple[int, ...]]
) -> None:
    foreign = to_layout(_official(generation), layout)
    assert {name: tensor_spec(foreign, name).shape for name in foreign} == expected


def test_low_rank_matrices_keep_their_meaning() -> None:
    tensors = _official(7)
    foreign = to_layout(tensors, _FLA)
    x = np.ones(_C, np.float32)
    inner, outer = (foreign[f"model.layers.1.attn.v_lora.lora.{i}.weight"] for i in (0, 2))
    expected = x @ tensors["blocks.1.att.v1"] @ tensors["blocks.1.att.v2"]
    np.testing.assert_allclose(outer @ (inner @ x), expected, rtol=1e-5)


def test_mixes_of_rwkv6_keep_their_meaning() -> None:
    tensors = _official(6)
    foreign = to_layout(tensors, _FLA)
    name = "model.layers.1.attn"
    x = np.linspace(-1, 1, _C, dtype=np.float32)
    # As flash-linear-attention's layer computes them, and as the official one does.
    hidden = np.tanh(foreign[f"{name}.x_proj.0.linear.weight"] @ x).reshape(5, -1)
    theirs = np.einsum("nr,hnr->nh", hidden, foreign[f"{name}.x_proj.2.weight"].reshape(_C, 5, -1))
    theirs = dict(zip("rwkvg", theirs + foreign[f"{name}.x_bias"], strict=True))
    hidden = np.tanh(x @ tensors["blocks.1.att.time_maa_w1"]).reshape(5, 1, -1)
    ours = dict(zip("wkvrg", (hidden @ tensors["blocks.1.att.time_maa_w2"])[:, 0], strict=True))
    for letter, mix in ours.items():
        expected = mix + tensors[f"blocks.1.att.time_maa_{letter}"].reshape(-1)
        np.testing.assert_allclose(theirs[letter], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("layout", "generation"), _PAIRS)
def test_all_are_views_but_the_mixes_of_rwkv6(layout: str, generation: int) -> None:
    tensors = _official(generation)
    joined = {"x_bias", "x_proj.0.linear.weight", "x_proj.2.weight"}
    foreign = to_layout(tensors, layout)
    for name in foreign:
        is_view = any(np.shares_memory(foreign[name], tensor) for tensor in tensors.values())
        assert is_view == (name.split(".attn.")[-1] not in joined), name
    kept = {name: foreign[name] for name in foreign}
    _, back = from_layout(kept)
    for name in back:
        is_view = any(np.shares_memory(back[name], tensor) for tensor in kept.values())
        assert is_view == (not name.endswith(("time_maa_w1", "time_maa_w2"))), name


def test_shapes_are_known_without_the_bytes() -> None:
    tensors = _official(4)
    tensors["emb.weight"] = tensors["head.weight"] = np.broadcast_to(np.float32(0), (10**6, 10**6))  # 4 TB
    foreign = to_layout(tensors, "transformers")
    assert isinstance(foreign, LazyTensors)
    assert foreign.spec("head.weight") == ((10**6, 10**6), np.float32)
    assert hub_config("transformers", tensors)["vocab_size"] == 10**6


def test_the_unused_first_value_residual_is_dropped() -> None:
    tensors = _official(7)
    unused = {f"blocks.0.att.v{i}": tensors[f"blocks.1.att.v{i}"] for i in range(3)}
    foreign = to_layout(tensors | unused, _FLA)
    assert not [name for name in foreign if "layers.0.attn.v_lora" in name]
    _assert_same(from_layout(foreign)[1], tensors)


def test_mixes_in_one_tensor_are_read() -> None:
    tensors = _official(7)
    foreign = dict(to_layout(tensors, _FLA))
    for layer in range(_L):
        rows = [foreign.pop(f"model.layers.{layer}.attn.x_{x}") for x in "rwkvag"]
        foreign[f"model.layers.{layer}.attn.x_x"] = np.concatenate(rows).reshape(6, _C)
    layout, back = from_layout(foreign)
    assert layout == _FLA
    _assert_same(back, tensors)


@pytest.mark.parametrize("generation", [5, 6])
def test_rwkv5_and_6_of_the_hub_are_read(generation: int) -> None:
    tensors = _official(generation)
    changes = (
        ("att.", "attention."),
        ("ffn.", "feed_forward."),
        ("emb.", "embeddings."),
        (".0.ln0", ".0.pre_ln"),
        *((f"time_mix_{x}", f"time_mix_{long}") for x, long in _LONG.items()),
    )
    foreign: dict[str, NDArray] = {}
    for name, tensor in tensors.items():
        for old, new in changes:
            name = name.replace(old, new) if new not in name else name
        foreign[name if name == "head.weight" else f"rwkv.{name}"] = tensor
    layout, back = from_layout(foreign)
    assert layout == "transformers"
    _assert_same(back, tensors)


def test_the_prefix_of_deepspeed_is_taken_off() -> None:
    tensors = _official(7)
    prefixed = {f"_forward_module.{name}": tensor for name, tensor in tensors.items()}
    layout, found = from_layout(prefixed)
    assert layout == "official"
    _assert_same(found, tensors)
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
@pytest.mark.parametrize(("layout", "generation"), [("official", 7), ("official", 4), *_PAIRS])
def test_prefixes_of_wrappers_are_taken_off_and_said_to_be(layout: str, generation: int, prefix: str) -> None:
    tensors, said = _official(generation), []
    foreign = {f"{prefix}{name}": tensor for name, tensor in to_layout(tensors, layout).items()}
    found, back = from_layout(foreign, report=said.append)
    assert found == layout
    _assert_same(back, tensors)
    assert said == [f"every name begins with {prefix!r}, which is taken off"]


def test_a_prefix_that_only_some_names_have_is_refused() -> None:
    tensors = {f"module.{name}": tensor for name, tensor in _official(7).items()}
    with pytest.raises(WeightsError, match=r"some names begin with 'module\.' and these do not: ema\.x; two models"):
        from_layout(tensors | {"ema.x": np.zeros(1)})
    with pytest.raises(WeightsError, match=r"no known layout: "):  # without end
        from_layout({f"{'module.' * 100}{name}": tensor for name, tensor in _official(4).items()})


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize(("layout", "generation"), _PAIRS)
def test_tied_weights_have_the_embedding_for_a_head(layout: str, generation: int, prefix: str) -> None:
    tensors, said = _official(generation), []
    tied = tensors | {"head.weight": tensors["emb.weight"]}
    head = "lm_head.weight" if layout == _FLA else "head.weight"
    foreign = {f"{prefix}{name}": tensor for name, tensor in to_layout(tied, layout).items() if name != head}
    for says in (None, True):
        _assert_same(from_layout(foreign, tied=says, report=said.append)[1], tied)
        assert said.pop() == "there is no head: its matrix is the embedding's (tied weights)"
    assert "head.weight" not in from_layout(foreign, tied=False)[1]


def test_a_head_is_missing_where_nobody_ties_it() -> None:
    tensors = _official(7)
    untied = {name: tensor for name, tensor in tensors.items() if name != "head.weight"}
    assert from_layout(untied)[1] is untied
    _assert_same(from_layout(untied, tied=True)[1], untied | {"head.weight": tensors["emb.weight"]})
    assert from_layout(tensors, tied=True)[1] is tensors  # there is one, whatever a config says


def test_converted_files_of_the_rwkv_package_are_refused() -> None:
    message = r"converted by the rwkv package with strategy 'cpu fp32': .*; name the original file"
    with pytest.raises(WeightsError, match=message):
        from_layout(_official(4), {"_strategy": "cpu fp32", "_rescale_layer": 0, "_version": "0.7"})


def test_unknown_names_are_listed() -> None:
    tensors = _official(7)
    with pytest.raises(
        WeightsError, match=r"no known layout: blocks.0.att.extra; known are official, transformers, fl"
    ):
        from_layout(tensors | {"blocks.0.att.extra": np.zeros(1)})
    with pytest.raises(WeightsError, match=r"no known layout: model.layers.1.attn.extra; known are"):
        from_layout(dict(to_layout(tensors, _FLA)) | {"model.layers.1.attn.extra": np.zeros(1)})
    with pytest.raises(WeightsError, match=r"no known layout: x0, x1, x2, x3, x4, x5, x6, x7 and 2 more; known are"):
        from_layout({f"x{i}": np.zeros(1) for i in range(10)})
    for name in ("blocks.00.ln1.weight", "blocks.{}.ln1.weight", "blocks.-1.ln1.weight", "blocks.1.1.ln1.weight"):
        with pytest.raises(WeightsError, match=r"these names are of no known layout: blocks"):
            from_layout({name: np.zeros(1)})
    with pytest.raises(WeightsError, match="there are no tensors"):
        from_layout({})


def test_a_tensor_that_is_there_twice_is_refused() -> None:
    foreign = dict(to_layout(_official(7), _FLA))
    foreign["model.layers.0.attn.x_x"] = np.zeros((6, _C), np.float32)
    with pytest.raises(WeightsError, match=r"x_r and model.layers.0.attn.x_x are both blocks.0.att.x_r; remove one"):
        from_layout(foreign)


def test_shapes_that_cannot_be_right_are_refused() -> None:
    foreign = dict(to_layout(_official(6), _FLA))
    name = "model.layers.1.attn.x_proj.2.weight"
    with pytest.raises(WeightsError, match=rf"blocks.1.att.time_maa_w2 cannot be made of {name} \[8, 16\] float32: .*"):
        from_layout(foreign | {name: np.zeros((_C, 16), np.float32)})
    with pytest.raises(WeightsError, match=r"time_maa_\w cannot be made of model.layers.0.attn.x_bias \[2, 8\]"):
        from_layout(foreign | {"model.layers.0.attn.x_bias": np.zeros((2, _C), np.float32)})


def test_what_a_layout_cannot_hold_is_refused() -> None:
    tensors = _official(6)
    with pytest.raises(WeightsError, match=r"layout = 'gguf': must be one of official, transformers, flash-linear"):
        to_layout(tensors, "gguf")
    for layout, generation, held in (("transformers", 6, "RWKV-4"), (_FLA, 5, "RWKV-6 and RWKV-7")):
        title = {5: "RWKV-5.2"}.get(generation, f"RWKV-{generation}")
        for refused in (to_layout, lambda tensors, layout: hub_config(layout, tensors)):
            with pytest.raises(WeightsError, match=rf"{layout} has {held}, not {title}; write the official"):
                refused(_official(generation), layout)
    with pytest.raises(WeightsError, match=r"has no place for blocks.0.att.gate_w1; write the official layout"):
        to_layout(tensors | {"blocks.0.att.gate_w1": np.zeros(1)}, _FLA)
    with pytest.raises(WeightsError, match=r"these are no tensors of RWKV-4 to 7 under their official names"):
        to_layout({"rwkv.embeddings.weight": np.zeros((1, 1))}, _FLA)
    del tensors["blocks.1.att.time_maa_g"]
    with pytest.raises(WeightsError, match=r"layers.1.attn.x_bias of flash.* needs blocks.1.att.time_maa_g, not among"):
        to_layout(tensors, _FLA)
    tensors["blocks.1.att.time_maa_g"] = np.zeros((1, 1, _C), BFLOAT16)
    with pytest.raises(
        WeightsError, match=r"x_bias joins tensors of several dtypes \(.*time_maa_g \[1, 1, 8\] bfloat16"
    ):
        to_layout(tensors, _FLA)


def test_configs_describe_the_tensors() -> None:
    common = {"vocab_size": _V, "hidden_size": _C, "intermediate_size": _F, "num_hidden_layers": _L, "use_cache": True}
    expected: dict[tuple[str, int], dict[str, Any]] = {
        ("transformers", 4): {"model_type": "rwkv", "attention_hidden_size": _C, "rescale_every": 0},
        (_FLA, 6): {"model_type": "rwkv6", "num_heads": 2, "proj_low_rank_dim": 3, "gate_low_rank_dim": 2},
        (_FLA, 7): {
            "model_type": "rwkv7",
            "num_heads": 2,
            "head_dim": _N,
            "decay_low_rank_dim": 2,
            "a_low_rank_dim": 3,
            "gate_low_rank_dim": 5,
            "v_low_rank_dim": 6,
            "value_dim": [_C, _C],
            "fuse_norm": False,
        },
    }
    for layout, generation in _PAIRS:
        config = hub_config(layout, _official(generation, BFLOAT16))
        assert config.items() >= (common | expected[layout, generation] | {"dtype": "bfloat16"}).items()
    assert hub_config("transformers", _official(4, np.float16))["rescale_every"] == 6
    with pytest.raises(WeightsError, match=r"a config.json exists for transformers and flash-linear-attention only"):
        hub_config(LAYOUTS[0], _official(7))
    with pytest.raises(WeightsError, match=r"emb.weight is missing; a config is made of a whole model"):
        hub_config(_FLA, {name: tensor for name, tensor in _official(7).items() if name != "emb.weight"})


@pytest.mark.parametrize("name", ["4v0-660K", "5v2-730K", "6v0-1m"])
def test_the_golden_files_are_official(name: str) -> None:
    tensors = read_safetensors(tiny_model(f"{name}.safetensors"))
    assert from_layout(tensors) == ("official", tensors)
    layout = {"4": "transformers", "6": _FLA}.get(name[0])
    if layout is not None:
        _assert_same(from_layout(to_layout(tensors, layout))[1], tensors)
