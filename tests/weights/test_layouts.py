"""Other projects' names lead to the official ones and back, bit for bit; what is of no layout is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from rwkv_jax.weights.layouts import LAYOUTS, from_layout, hub_config, to_layout
from rwkv_jax.weights.safetensors import read_safetensors, write_safetensors
from rwkv_jax.weights.tensors import BFLOAT16, DerivedTensors, WeightsError, tensor_spec
from tests.golden import tiny_model
from tests.weights.official_tensors import FLA, HUB, PAIRS, C, F, L, N, V, assert_same, matrices, norm, official, rows

_LONG = {"k": "key", "v": "value", "r": "receptance", "g": "gate"}


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BFLOAT16])
@pytest.mark.parametrize(("layout", "generation"), PAIRS)
def test_there_and_back_is_bit_exact(layout: str, generation: int, dtype: Any, tmp_path: Path) -> None:
    tensors = official(generation, dtype)
    foreign = to_layout(tensors, layout)
    assert not foreign.keys() & tensors.keys() - {"head.weight"}
    found, back = from_layout(foreign)
    assert found == layout
    assert_same(back, tensors)
    write_safetensors(tmp_path / "x.safetensors", foreign)
    found, back = from_layout(read_safetensors(tmp_path / "x.safetensors"))
    assert found == layout
    assert_same(back, tensors)
    assert_same(to_layout(back, layout), {name: foreign[name] for name in foreign})


@pytest.mark.parametrize("generation", [4, 5, 6, 7])
def test_official_names_stay(generation: int) -> None:
    tensors = official(generation)
    layout, found = from_layout(tensors)
    assert layout == "official"
    assert found is tensors
    assert to_layout(tensors, "official") is tensors


# What the libraries' own models of two layers have (`state_dict()` of transformers 5.23.0 and flash-linear-attention
# 0.6.0), at the widths of this file.
_TRANSFORMERS_4 = {
    "head.weight": (V, C),
    "rwkv.embeddings.weight": (V, C),
    **norm("rwkv.ln_out"),
    **norm("rwkv.blocks.0.pre_ln"),
} | {
    f"rwkv.blocks.{layer}.{name}": shape
    for layer in range(L)
    for name, shape in {
        **norm("ln1"),
        **norm("ln2"),
        **matrices(*(f"attention.{name}" for name in ("key", "output", "receptance", "value"))),
        "attention.time_decay": (C,),
        "attention.time_first": (C,),
        **rows(*(f"attention.time_mix_{name}" for name in ("key", "receptance", "value"))),
        "feed_forward.key.weight": (F, C),
        "feed_forward.value.weight": (C, F),
        **matrices("feed_forward.receptance"),
        **rows("feed_forward.time_mix_key", "feed_forward.time_mix_receptance"),
    }.items()
}
_FLA_COMMON = {
    "lm_head.weight": (V, C),
    "model.embeddings.weight": (V, C),
    **norm("model.norm"),
    **norm("model.layers.0.pre_norm"),
}
_FLA_6 = _FLA_COMMON | {
    f"model.layers.{layer}.{name}": shape
    for layer in range(L)
    for name, shape in {
        **norm("attn_norm"),
        **norm("ffn_norm"),
        **norm("attn.g_norm"),
        "attn.x_bias": (5, C),
        "attn.bonus": (C // N, N),
        "attn.x_proj.0.mu": (C,),
        "attn.x_proj.0.linear.weight": (15, C),
        "attn.x_proj.2.weight": (C, 15),
        **matrices(*(f"attn.{x}_proj.linear" for x in "rkvg"), "attn.o_proj"),
        "attn.w_proj.linear.lora.0.weight": (2, C),
        "attn.w_proj.linear.lora.2.weight": (C, 2),
        "attn.w_proj.linear.lora.2.bias": (C,),
        "ffn.key.mu": (C,),
        "ffn.key.linear.weight": (F, C),
        "ffn.value.weight": (C, F),
        "ffn.receptance.mu": (C,),
        "ffn.receptance.linear.weight": (C, C),
    }.items()
}
_FLA_7 = _FLA_COMMON | {
    f"model.layers.{layer}.{name}": shape
    for layer in range(L)
    for name, shape in {
        **norm("attn_norm"),
        **norm("ffn_norm"),
        **norm("attn.g_norm"),
        **rows(*(f"attn.x_{x}" for x in "rwkvag")),
        "attn.k_k": (C,),
        "attn.k_a": (C,),
        "attn.r_k": (C // N, N),
        **matrices(*(f"attn.{x}_proj" for x in "rkvo")),
        **{
            f"attn.{x}_lora.lora.{part}": shape
            for x, rank in {"w": 2, "a": 3, "g": 5, **({"v": 6} if layer else {})}.items()
            for part, shape in {"0.weight": (rank, C), "2.weight": (C, rank), "2.bias": (C,)}.items()
            if (x, part) != ("g", "2.bias")
        },
        "ffn.x_k": (C,),
        "ffn.key.weight": (F, C),
        "ffn.value.weight": (C, F),
    }.items()
}


_HUB_7 = {
    "head.weight" if name == "head.weight" else f"rwkv7.{name}": tensor.shape for name, tensor in official(7).items()
} | {"rwkv7.blocks.0.att.v0": (1, 1, C), "rwkv7.blocks.0.att.v1": (C, 6), "rwkv7.blocks.0.att.v2": (6, C)}


@pytest.mark.parametrize(
    ("layout", "generation", "expected"),
    [("transformers", 4, _TRANSFORMERS_4), (FLA, 6, _FLA_6), (FLA, 7, _FLA_7), (HUB, 7, _HUB_7)],
)
def test_names_and_shapes_are_those_of_the_libraries(
    layout: str, generation: int, expected: dict[str, tuple[int, ...]]
) -> None:
    foreign = to_layout(official(generation), layout)
    assert {name: tensor_spec(foreign, name).shape for name in foreign} == expected


def test_low_rank_matrices_keep_their_meaning() -> None:
    tensors = official(7)
    foreign = to_layout(tensors, FLA)
    x = np.ones(C, np.float32)
    inner, outer = (foreign[f"model.layers.1.attn.v_lora.lora.{i}.weight"] for i in (0, 2))
    expected = x @ tensors["blocks.1.att.v1"] @ tensors["blocks.1.att.v2"]
    np.testing.assert_allclose(outer @ (inner @ x), expected, rtol=1e-5)


def test_mixes_of_rwkv6_keep_their_meaning() -> None:
    tensors = official(6)
    foreign = to_layout(tensors, FLA)
    name = "model.layers.1.attn"
    x = np.linspace(-1, 1, C, dtype=np.float32)
    # As flash-linear-attention's layer computes them, and as the official one does.
    hidden = np.tanh(foreign[f"{name}.x_proj.0.linear.weight"] @ x).reshape(5, -1)
    theirs = np.einsum("nr,hnr->nh", hidden, foreign[f"{name}.x_proj.2.weight"].reshape(C, 5, -1))
    theirs = dict(zip("rwkvg", theirs + foreign[f"{name}.x_bias"], strict=True))
    hidden = np.tanh(x @ tensors["blocks.1.att.time_maa_w1"]).reshape(5, 1, -1)
    ours = dict(zip("wkvrg", (hidden @ tensors["blocks.1.att.time_maa_w2"])[:, 0], strict=True))
    for letter, mix in ours.items():
        expected = mix + tensors[f"blocks.1.att.time_maa_{letter}"].reshape(-1)
        np.testing.assert_allclose(theirs[letter], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("layout", "generation"), PAIRS)
def test_all_are_views_but_the_mixes_of_rwkv6(layout: str, generation: int) -> None:
    tensors = official(generation)
    made = {"x_bias", "x_proj.0.linear.weight", "x_proj.2.weight", *(f"rwkv7.blocks.0.att.v{i}" for i in range(3))}
    foreign = to_layout(tensors, layout)
    for name in foreign:
        is_view = any(np.shares_memory(foreign[name], tensor) for tensor in tensors.values())
        assert is_view == (name.split(".attn.")[-1] not in made), name
    kept = {name: foreign[name] for name in foreign}
    _, back = from_layout(kept)
    for name in back:
        is_view = any(np.shares_memory(back[name], tensor) for tensor in kept.values())
        assert is_view == (not name.endswith(("time_maa_w1", "time_maa_w2"))), name


def test_shapes_are_known_without_the_bytes() -> None:
    tensors = official(4)
    tensors["emb.weight"] = tensors["head.weight"] = np.broadcast_to(np.float32(0), (10**6, 10**6))  # 4 TB
    foreign = to_layout(tensors, "transformers")
    assert isinstance(foreign, DerivedTensors)
    assert foreign.spec("head.weight") == ((10**6, 10**6), np.float32)
    assert hub_config("transformers", tensors)["vocab_size"] == 10**6


def test_the_unused_first_value_residual_is_dropped() -> None:
    tensors = official(7)
    unused = {f"blocks.0.att.v{i}": tensors[f"blocks.1.att.v{i}"] for i in range(3)}
    foreign = to_layout(tensors | unused, FLA)
    assert not [name for name in foreign if "layers.0.attn.v_lora" in name]
    assert_same(from_layout(foreign)[1], tensors)


def test_mixes_in_one_tensor_are_read() -> None:
    tensors = official(7)
    foreign = dict(to_layout(tensors, FLA))
    for layer in range(L):
        mixes = [foreign.pop(f"model.layers.{layer}.attn.x_{x}") for x in "rwkvag"]
        foreign[f"model.layers.{layer}.attn.x_x"] = np.concatenate(mixes).reshape(6, C)
    layout, back = from_layout(foreign)
    assert layout == FLA
    assert_same(back, tensors)


@pytest.mark.parametrize("generation", [5, 6])
def test_rwkv5_and_6_of_the_hub_are_read(generation: int) -> None:
    tensors = official(generation)
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
    assert_same(back, tensors)


def test_converted_files_of_the_rwkv_package_are_refused() -> None:
    message = r"converted by the rwkv package with strategy 'cpu fp32': .*; name the original file"
    with pytest.raises(WeightsError, match=message):
        from_layout(official(4), {"_strategy": "cpu fp32", "_rescale_layer": 0, "_version": "0.7"})


def test_unknown_names_are_listed() -> None:
    tensors = official(7)
    with pytest.raises(
        WeightsError, match=r"no known layout: blocks.0.att.extra; known are official, transformers, fl"
    ):
        from_layout(tensors | {"blocks.0.att.extra": np.zeros(1)})
    with pytest.raises(WeightsError, match=r"no known layout: model.layers.1.attn.extra; known are"):
        from_layout(dict(to_layout(tensors, FLA)) | {"model.layers.1.attn.extra": np.zeros(1)})
    with pytest.raises(WeightsError, match=r"no known layout: x0, x1, x2, x3, x4, x5, x6, x7 and 2 more; known are"):
        from_layout({f"x{i}": np.zeros(1) for i in range(10)})
    for name in ("blocks.00.ln1.weight", "blocks.{}.ln1.weight", "blocks.-1.ln1.weight", "blocks.1.1.ln1.weight"):
        with pytest.raises(WeightsError, match=r"these names are of no known layout: blocks"):
            from_layout({name: np.zeros(1)})
    with pytest.raises(WeightsError, match="there are no tensors"):
        from_layout({})


def test_a_tensor_that_is_there_twice_is_refused() -> None:
    foreign = dict(to_layout(official(7), FLA))
    foreign["model.layers.0.attn.x_x"] = np.zeros((6, C), np.float32)
    with pytest.raises(WeightsError, match=r"x_r and model.layers.0.attn.x_x are both blocks.0.att.x_r; remove one"):
        from_layout(foreign)


def test_shapes_that_cannot_be_right_are_refused() -> None:
    foreign = dict(to_layout(official(6), FLA))
    name = "model.layers.1.attn.x_proj.2.weight"
    with pytest.raises(WeightsError, match=rf"blocks.1.att.time_maa_w2 cannot be made of {name} \[8, 16\] float32: .*"):
        from_layout(foreign | {name: np.zeros((C, 16), np.float32)})
    with pytest.raises(WeightsError, match=r"time_maa_\w cannot be made of model.layers.0.attn.x_bias \[2, 8\]"):
        from_layout(foreign | {"model.layers.0.attn.x_bias": np.zeros((2, C), np.float32)})


def test_what_a_layout_cannot_hold_is_refused() -> None:
    tensors = official(6)
    with pytest.raises(WeightsError, match=r"layout = 'gguf': must be one of official, transformers, flash-linear"):
        to_layout(tensors, "gguf")
    for layout, generation, held in (
        ("transformers", 6, "RWKV-4"),
        (FLA, 5, "RWKV-6 and RWKV-7"),
        (HUB, 6, "RWKV-7"),
    ):
        title = {5: "RWKV-5.2"}.get(generation, f"RWKV-{generation}")
        for refused in (to_layout, lambda tensors, layout: hub_config(layout, tensors)):
            with pytest.raises(WeightsError, match=rf"{layout} has {held}, not {title}; write the official"):
                refused(official(generation), layout)
    with pytest.raises(WeightsError, match=r"has no place for blocks.0.att.gate_w1; write the official layout"):
        to_layout(tensors | {"blocks.0.att.gate_w1": np.zeros(1)}, FLA)
    with pytest.raises(WeightsError, match=r"these are no tensors of RWKV-4 to 7 under their official names"):
        to_layout({"rwkv.embeddings.weight": np.zeros((1, 1))}, FLA)
    del tensors["blocks.1.att.time_maa_g"]
    with pytest.raises(WeightsError, match=r"layers.1.attn.x_bias of flash.* needs blocks.1.att.time_maa_g, not among"):
        to_layout(tensors, FLA)
    tensors["blocks.1.att.time_maa_g"] = np.zeros((1, 1, C), BFLOAT16)
    with pytest.raises(
        WeightsError, match=r"x_bias joins tensors of several dtypes \(.*time_maa_g \[1, 1, 8\] bfloat16"
    ):
        to_layout(tensors, FLA)


def test_configs_describe_the_tensors() -> None:
    common = {"vocab_size": V, "hidden_size": C, "intermediate_size": F, "num_hidden_layers": L, "use_cache": True}
    expected: dict[tuple[str, int], dict[str, Any]] = {
        ("transformers", 4): {"model_type": "rwkv", "attention_hidden_size": C, "rescale_every": 0},
        (FLA, 6): {"model_type": "rwkv6", "num_heads": 2, "proj_low_rank_dim": 3, "gate_low_rank_dim": 2},
        (FLA, 7): {
            "model_type": "rwkv7",
            "num_heads": 2,
            "head_dim": N,
            "decay_low_rank_dim": 2,
            "a_low_rank_dim": 3,
            "gate_low_rank_dim": 5,
            "v_low_rank_dim": 6,
            "value_dim": [C, C],
            "fuse_norm": False,
        },
        (HUB, 7): {
            "architectures": ["Rwkv7ForCausalLM"],
            "model_type": "rwkv7",
            "num_heads": 2,
            "head_dim": N,
            "decay_low_rank_dim": 2,
            "a_low_rank_dim": 3,
            "gate_low_rank_dim": 5,
            "v_low_rank_dim": 6,
            "norm_eps": 1e-5,
            "norm_bias": True,
            "wkv_state_dtype": "float32",
            "wkv_implementation": "eager",
            "tie_word_embeddings": False,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "pad_token_id": 0,
        },
    }
    for layout, generation in PAIRS:
        config = hub_config(layout, official(generation, BFLOAT16))
        if layout == HUB:
            assert config.keys() == {*common, *expected[layout, generation], "dtype"}
        assert config.items() >= (common | expected[layout, generation] | {"dtype": "bfloat16"}).items()
    assert hub_config("transformers", official(4, np.float16))["rescale_every"] == 6
    with pytest.raises(
        WeightsError, match=r"a config.json exists for transformers, flash-linear-attention, huggingface only"
    ):
        hub_config(LAYOUTS[0], official(7))
    with pytest.raises(WeightsError, match=r"emb.weight is missing; a config is made of a whole model"):
        hub_config(FLA, {name: tensor for name, tensor in official(7).items() if name != "emb.weight"})


@pytest.mark.parametrize("name", ["4v0-660K", "5v2-730K", "6v0-1m"])
def test_the_golden_files_are_official(name: str) -> None:
    tensors = read_safetensors(tiny_model(f"{name}.safetensors"))
    assert from_layout(tensors) == ("official", tensors)
    layout = {"4": "transformers", "6": FLA}.get(name[0])
    if layout is not None:
        assert_same(from_layout(to_layout(tensors, layout))[1], tensors)
