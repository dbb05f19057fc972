"""The tables of `layouts`: each tensor of another project's layout, the official ones in it, and its config.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rwkv_jax.config.generations import GENERATIONS
from rwkv_jax.models.language_model import SHARED_AXES

_Change = Callable[[NDArray], NDArray]
ShapeOf = Callable[[str], tuple[int, ...]]
"""From a tensor's official name to its shape."""

_MIXES = "wkvrg"  # of RWKV-6, in the official order
_FUSED_MIXES = "rwkvg"  # in that of flash-linear-attention


@dataclasses.dataclass(frozen=True)
class Rule:
    """One tensor of another layout and the official ones in it; `{}` in a name is the layer."""

    foreign: str
    official: tuple[str, ...]
    pack: Callable[..., NDArray]
    unpack: tuple[_Change, ...]


def unchanged(tensor: NDArray) -> NDArray:
    """Returns the tensor itself, for layouts that only rename."""
    return tensor


def _transposed(tensor: NDArray) -> NDArray:
    return tensor.T


def _flat(tensor: NDArray) -> NDArray:
    return tensor.reshape(-1)


def _row(tensor: NDArray) -> NDArray:
    return tensor.reshape(1, 1, -1)


def _renamed(names: Mapping[str, str], pack: _Change = unchanged, unpack: _Change = unchanged) -> list[Rule]:
    """Rules for single tensors, from official names to those of the other layout."""
    return [Rule(foreign, (official,), pack, (unpack,)) for official, foreign in names.items()]


def _stacked_rows(foreign: str, official: Sequence[str]) -> Rule:
    """Official rows [1, 1, C] as one tensor [rows, C]."""

    def pack(*rows: NDArray) -> NDArray:
        return np.concatenate([row.reshape(1, -1) for row in rows])

    return Rule(foreign, tuple(official), pack, tuple(_taking(i) for i in range(len(official))))


def _taking(i: int) -> _Change:
    return lambda rows: rows[i].reshape(1, 1, -1)


def _reordered(blocks: NDArray, old: str, new: str) -> NDArray:
    """Reorders equal blocks of the first axis, one per letter."""
    parts = np.split(blocks, len(old))
    return np.concatenate([parts[old.index(letter)] for letter in new])


def _pack_mix_w1(w1: NDArray) -> NDArray:
    return _reordered(w1.T, _MIXES, _FUSED_MIXES)


def _unpack_mix_w1(weight: NDArray) -> NDArray:
    return _reordered(weight, _FUSED_MIXES, _MIXES).T


def _pack_mix_w2(w2: NDArray) -> NDArray:
    return _reordered(w2.reshape(-1, w2.shape[-1]), _MIXES, _FUSED_MIXES).T


def _unpack_mix_w2(weight: NDArray) -> NDArray:
    return _reordered(weight.T, _FUSED_MIXES, _MIXES).reshape(len(_MIXES), -1, weight.shape[0])


def _norms(names: Mapping[str, str]) -> list[Rule]:
    return _renamed({f"{a}.{part}": f"{b}.{part}" for a, b in names.items() for part in ("weight", "bias")})


_LONG = {"k": "key", "v": "value", "r": "receptance", "g": "gate"}

_TRANSFORMERS_4 = [
    *_renamed({"emb.weight": "rwkv.embeddings.weight", "head.weight": "head.weight"}),
    *_norms({"ln_out": "rwkv.ln_out", "blocks.{}.ln0": "rwkv.blocks.{}.pre_ln"}),
    *_norms({f"blocks.{{}}.ln{i}": f"rwkv.blocks.{{}}.ln{i}" for i in (1, 2)}),
    *_renamed({f"blocks.{{}}.att.time_mix_{x}": f"rwkv.blocks.{{}}.attention.time_mix_{_LONG[x]}" for x in "kvr"}),
    *_renamed({f"blocks.{{}}.ffn.time_mix_{x}": f"rwkv.blocks.{{}}.feed_forward.time_mix_{_LONG[x]}" for x in "kr"}),
    *_renamed(
        {
            f"blocks.{{}}.att.{name}": f"rwkv.blocks.{{}}.attention.{name}"
            for name in (
                "time_decay",
                "time_first",
                *(f"{name}.weight" for name in ("key", "value", "receptance", "output")),
            )
        }
    ),
    *_renamed(
        {
            f"blocks.{{}}.ffn.{name}.weight": f"rwkv.blocks.{{}}.feed_forward.{name}.weight"
            for name in ("key", "value", "receptance")
        }
    ),
]

_TRANSFORMERS_5_AND_6 = [
    *_norms({"blocks.{}.att.ln_x": "rwkv.blocks.{}.attention.ln_x"}),
    *_renamed({"blocks.{}.att.time_mix_g": "rwkv.blocks.{}.attention.time_mix_gate"}),
    *_renamed(
        {
            f"blocks.{{}}.att.{name}": f"rwkv.blocks.{{}}.attention.{name}"
            for name in (
                "gate.weight",
                "time_faaaa",
                "time_decay_w1",
                "time_decay_w2",
                *(f"time_maa_{part}" for part in (*"xwkvrg", "w1", "w2")),
            )
        }
    ),
    *_renamed({f"blocks.{{}}.ffn.time_maa_{x}": f"rwkv.blocks.{{}}.feed_forward.time_maa_{x}" for x in "kr"}),
]

_FLA = [
    *_renamed({"emb.weight": "model.embeddings.weight", "head.weight": "lm_head.weight"}),
    *_norms({"ln_out": "model.norm", "blocks.{}.ln0": "model.layers.{}.pre_norm"}),
    *_norms({"blocks.{}.ln1": "model.layers.{}.attn_norm", "blocks.{}.ln2": "model.layers.{}.ffn_norm"}),
    *_norms({"blocks.{}.att.ln_x": "model.layers.{}.attn.g_norm"}),
    *_renamed({"blocks.{}.att.output.weight": "model.layers.{}.attn.o_proj.weight"}),
    *_renamed({"blocks.{}.ffn.value.weight": "model.layers.{}.ffn.value.weight"}),
]

_FLA_6 = [
    *_FLA,
    *_renamed({f"blocks.{{}}.att.{_LONG[x]}.weight": f"model.layers.{{}}.attn.{x}_proj.linear.weight" for x in "rkvg"}),
    *_renamed({"blocks.{}.att.time_faaaa": "model.layers.{}.attn.bonus"}),
    *_renamed({"blocks.{}.att.time_maa_x": "model.layers.{}.attn.x_proj.0.mu"}, _flat, _row),
    *_renamed(
        {"blocks.{}.att.time_maa_w1": "model.layers.{}.attn.x_proj.0.linear.weight"}, _pack_mix_w1, _unpack_mix_w1
    ),
    *_renamed({"blocks.{}.att.time_maa_w2": "model.layers.{}.attn.x_proj.2.weight"}, _pack_mix_w2, _unpack_mix_w2),
    _stacked_rows("model.layers.{}.attn.x_bias", [f"blocks.{{}}.att.time_maa_{x}" for x in _FUSED_MIXES]),
    *_renamed({"blocks.{}.att.time_decay": "model.layers.{}.attn.w_proj.linear.lora.2.bias"}, _flat, _row),
    *_renamed(
        {
            "blocks.{}.att.time_decay_w1": "model.layers.{}.attn.w_proj.linear.lora.0.weight",
            "blocks.{}.att.time_decay_w2": "model.layers.{}.attn.w_proj.linear.lora.2.weight",
        },
        _transposed,
        _transposed,
    ),
    *_renamed({f"blocks.{{}}.ffn.time_maa_{x}": f"model.layers.{{}}.ffn.{_LONG[x]}.mu" for x in "kr"}, _flat, _row),
    *_renamed({f"blocks.{{}}.ffn.{_LONG[x]}.weight": f"model.layers.{{}}.ffn.{_LONG[x]}.linear.weight" for x in "kr"}),
]

_FLA_7 = [
    *_FLA,
    *_renamed({f"blocks.{{}}.att.{_LONG[x]}.weight": f"model.layers.{{}}.attn.{x}_proj.weight" for x in "rkv"}),
    *_renamed(
        {f"blocks.{{}}.att.{name}": f"model.layers.{{}}.attn.{name}" for name in (*(f"x_{x}" for x in "rwkvag"), "r_k")}
    ),
    *_renamed({f"blocks.{{}}.att.{name}": f"model.layers.{{}}.attn.{name}" for name in ("k_k", "k_a")}, _flat, _row),
    *_renamed({f"blocks.{{}}.att.{x}0": f"model.layers.{{}}.attn.{x}_lora.lora.2.bias" for x in "wav"}, _flat, _row),
    *_renamed(
        {
            f"blocks.{{}}.att.{x}{i}": f"model.layers.{{}}.attn.{x}_lora.lora.{j}.weight"
            for x in "wavg"
            for i, j in ((1, 0), (2, 2))
        },
        _transposed,
        _transposed,
    ),
    *_renamed({"blocks.{}.ffn.x_k": "model.layers.{}.ffn.x_k"}, _flat, _row),
    *_renamed({"blocks.{}.ffn.key.weight": "model.layers.{}.ffn.key.weight"}),
]

# Files from before 2025-04 have the six mixes of RWKV-7 in one tensor.
_FLA_7_OLD = [_stacked_rows("model.layers.{}.attn.x_x", [f"blocks.{{}}.att.x_{x}" for x in "rwkvag"])]


def _official_rules() -> list[Rule]:
    """The official names of every generation, unchanged."""
    names = set()
    for spec in GENERATIONS.values():
        for name in SHARED_AXES | spec.load_model_class().block_axes:
            names.add(name if name.startswith(("emb.", "ln_out.", "head.")) else f"blocks.{{}}.{name}")
    return _renamed({name: name for name in sorted(names)})


def _table(rules: Iterable[Rule]) -> dict[str, Rule]:
    return {rule.foreign: rule for rule in rules}


def read_tables() -> list[tuple[str, dict[str, Rule]]]:
    """Layouts that can be read, with rules by names in the file; a layout may have several tables."""
    return [
        ("official", _table(_official_rules())),
        ("transformers", _table([*_TRANSFORMERS_4, *_TRANSFORMERS_5_AND_6])),
        ("flash-linear-attention", _table(_FLA_6)),
        ("flash-linear-attention", _table([*_FLA_7, *_FLA_7_OLD])),
    ]


def _transformers_4_config(common: dict[str, Any], shape: ShapeOf) -> dict[str, Any]:
    return {
        "architectures": ["RwkvForCausalLM"],
        "model_type": "rwkv",
        **common,
        "attention_hidden_size": shape("blocks.0.att.key.weight")[0],
        "context_length": 1024,
        "layer_norm_epsilon": 1e-5,
        "rescale_every": 6 if common["dtype"] == "float16" else 0,
    }


def _fla_config(architecture: str, common: dict[str, Any]) -> dict[str, Any]:
    return {
        "architectures": [f"{architecture}ForCausalLM"],
        "model_type": architecture.lower(),
        **common,
        "attn": None,
        "attn_mode": "chunk",
        "fuse_norm": False,
        "hidden_act": "sqrelu",
        "hidden_ratio": common["intermediate_size"] / common["hidden_size"],
        "norm_bias": True,
        "norm_eps": 1e-5,
        "norm_first": True,
    }


def _fla_6_config(common: dict[str, Any], shape: ShapeOf) -> dict[str, Any]:
    return _fla_config("RWKV6", common) | {
        "expand_k": 1.0,
        "expand_v": 1.0,
        "num_heads": shape("blocks.0.att.time_faaaa")[0],
        "proj_low_rank_dim": shape("blocks.0.att.time_maa_w2")[1],
        "gate_low_rank_dim": shape("blocks.0.att.time_decay_w1")[1],
    }


def _fla_7_config(common: dict[str, Any], shape: ShapeOf) -> dict[str, Any]:
    num_heads, head_size = shape("blocks.0.att.r_k")
    num_layers = common["num_hidden_layers"]
    return _fla_config("RWKV7", common) | {
        "head_dim": head_size,
        "num_heads": num_heads,
        "value_dim": [common["hidden_size"]] * num_layers,
        "decay_low_rank_dim": shape("blocks.0.att.w1")[1],
        "gate_low_rank_dim": shape("blocks.0.att.g1")[1],
        "a_low_rank_dim": shape("blocks.0.att.a1")[1],
        # A model of one layer has no such matrix, but the field needs a value.
        "v_low_rank_dim": shape("blocks.1.att.v1")[1] if num_layers > 1 else 32,
    }


class Written(NamedTuple):
    """How a generation is written in another project's layout."""

    rules: list[Rule]
    describe: Callable[[dict[str, Any], ShapeOf], dict[str, Any]]
    """Makes its config.json from common fields and the shapes of official tensors."""


WRITTEN = {
    ("transformers", "4"): Written(_TRANSFORMERS_4, _transformers_4_config),
    ("flash-linear-attention", "6"): Written(_FLA_6, _fla_6_config),
    ("flash-linear-attention", "7"): Written(_FLA_7, _fla_7_config),
}
"""By layout and generation."""
