"""The tables of `layouts`: each tensor of another project's layout, the official ones in it, and its config.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rwkv_jax.config.generations import GENERATIONS
from rwkv_jax.models.language_model import SHARED_AXES
from rwkv_jax.weights.hub_rwkv7 import HEAD, MODEL_TYPES, PREFIXES
from rwkv_jax.weights.hub_rwkv7 import LAYOUT as HUGGINGFACE

Change = Callable[[NDArray], NDArray]
"""From one tensor to another, as a view."""
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
    unpack: tuple[Change, ...]


def unchanged(tensor: NDArray) -> NDArray:
    """Returns the tensor itself, for layouts that only rename."""
    return tensor


def transposed(tensor: NDArray) -> NDArray:
    """The last two axes exchanged."""
    return tensor.swapaxes(-1, -2)


def as_vector(tensor: NDArray) -> NDArray:
    """All numbers on one axis."""
    return tensor.reshape(-1)


def as_row(tensor: NDArray) -> NDArray:
    """All numbers as [1, 1, C], as official files have them."""
    return tensor.reshape(1, 1, -1)


def renamed(names: Mapping[str, str], pack: Change = unchanged, unpack: Change = unchanged) -> list[Rule]:
    """Rules for single tensors, from official names to those of the other layout."""
    return [Rule(foreign, (official,), pack, (unpack,)) for official, foreign in names.items()]


def _moved(
    official: str, foreign: str, names: Iterable[str], pack: Change = unchanged, unpack: Change = unchanged
) -> list[Rule]:
    """Rules for single tensors that have the same name within another module."""
    return renamed({official + name: foreign + name for name in names}, pack, unpack)


def _stacked_rows(foreign: str, official: Sequence[str]) -> Rule:
    """Official rows [1, 1, C] as one tensor [rows, C]."""

    def pack(*rows: NDArray) -> NDArray:
        return np.concatenate([row.reshape(1, -1) for row in rows])

    return Rule(foreign, tuple(official), pack, tuple(row_at(i) for i in range(len(official))))


def row_at(i: int) -> Change:
    """Takes one of several rows, as [1, 1, C]."""
    return lambda rows: as_row(rows[i])


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
    return renamed({f"{a}.{part}": f"{b}.{part}" for a, b in names.items() for part in ("weight", "bias")})


_LONG = {"k": "key", "v": "value", "r": "receptance", "g": "gate"}
_ATT, _FFN = "blocks.{}.att.", "blocks.{}.ffn."  # official

_ATTENTION, _FEED_FORWARD = "rwkv.blocks.{}.attention.", "rwkv.blocks.{}.feed_forward."
_MATRICES = ("key.weight", "value.weight", "receptance.weight")

_TRANSFORMERS_4 = [
    *renamed({"emb.weight": "rwkv.embeddings.weight", "head.weight": "head.weight"}),
    *_norms({"ln_out": "rwkv.ln_out", "blocks.{}.ln0": "rwkv.blocks.{}.pre_ln"}),
    *_norms({"blocks.{}.ln1": "rwkv.blocks.{}.ln1", "blocks.{}.ln2": "rwkv.blocks.{}.ln2"}),
    *renamed({f"{_ATT}time_mix_{x}": f"{_ATTENTION}time_mix_{_LONG[x]}" for x in "kvr"}),
    *renamed({f"{_FFN}time_mix_{x}": f"{_FEED_FORWARD}time_mix_{_LONG[x]}" for x in "kr"}),
    *_moved(_ATT, _ATTENTION, ["time_decay", "time_first", *_MATRICES, "output.weight"]),
    *_moved(_FFN, _FEED_FORWARD, _MATRICES),
]

_TRANSFORMERS_5_AND_6 = [
    *_norms({f"{_ATT}ln_x": f"{_ATTENTION}ln_x"}),
    *renamed({f"{_ATT}time_mix_g": f"{_ATTENTION}time_mix_gate"}),
    *_moved(_ATT, _ATTENTION, ["gate.weight", "time_faaaa", "time_decay_w1", "time_decay_w2"]),
    *_moved(_ATT, _ATTENTION, [f"time_maa_{part}" for part in (*"xwkvrg", "w1", "w2")]),
    *_moved(_FFN, _FEED_FORWARD, ["time_maa_k", "time_maa_r"]),
]

_FLA_ATT, _FLA_FFN = "model.layers.{}.attn.", "model.layers.{}.ffn."

_FLA = [
    *renamed({"emb.weight": "model.embeddings.weight", "head.weight": "lm_head.weight"}),
    *_norms({"ln_out": "model.norm", "blocks.{}.ln0": "model.layers.{}.pre_norm"}),
    *_norms({"blocks.{}.ln1": "model.layers.{}.attn_norm", "blocks.{}.ln2": "model.layers.{}.ffn_norm"}),
    *_norms({f"{_ATT}ln_x": f"{_FLA_ATT}g_norm"}),
    *renamed({f"{_ATT}output.weight": f"{_FLA_ATT}o_proj.weight"}),
    *_moved(_FFN, _FLA_FFN, ["value.weight"]),
]

_FLA_6 = [
    *_FLA,
    *renamed({f"{_ATT}{_LONG[x]}.weight": f"{_FLA_ATT}{x}_proj.linear.weight" for x in "rkvg"}),
    *renamed({f"{_ATT}time_faaaa": f"{_FLA_ATT}bonus"}),
    *renamed({f"{_ATT}time_maa_x": f"{_FLA_ATT}x_proj.0.mu"}, as_vector, as_row),
    *renamed({f"{_ATT}time_maa_w1": f"{_FLA_ATT}x_proj.0.linear.weight"}, _pack_mix_w1, _unpack_mix_w1),
    *renamed({f"{_ATT}time_maa_w2": f"{_FLA_ATT}x_proj.2.weight"}, _pack_mix_w2, _unpack_mix_w2),
    _stacked_rows(f"{_FLA_ATT}x_bias", [f"{_ATT}time_maa_{x}" for x in _FUSED_MIXES]),
    *renamed({f"{_ATT}time_decay": f"{_FLA_ATT}w_proj.linear.lora.2.bias"}, as_vector, as_row),
    *renamed({f"{_ATT}time_decay_w1": f"{_FLA_ATT}w_proj.linear.lora.0.weight"}, transposed, transposed),
    *renamed({f"{_ATT}time_decay_w2": f"{_FLA_ATT}w_proj.linear.lora.2.weight"}, transposed, transposed),
    *renamed({f"{_FFN}time_maa_{x}": f"{_FLA_FFN}{_LONG[x]}.mu" for x in "kr"}, as_vector, as_row),
    *renamed({f"{_FFN}{_LONG[x]}.weight": f"{_FLA_FFN}{_LONG[x]}.linear.weight" for x in "kr"}),
]

_FLA_7 = [
    *_FLA,
    *renamed({f"{_ATT}{_LONG[x]}.weight": f"{_FLA_ATT}{x}_proj.weight" for x in "rkv"}),
    *_moved(_ATT, _FLA_ATT, [*(f"x_{x}" for x in "rwkvag"), "r_k"]),
    *_moved(_ATT, _FLA_ATT, ["k_k", "k_a"], as_vector, as_row),
    *renamed({f"{_ATT}{x}0": f"{_FLA_ATT}{x}_lora.lora.2.bias" for x in "wav"}, as_vector, as_row),
    *renamed({f"{_ATT}{x}1": f"{_FLA_ATT}{x}_lora.lora.0.weight" for x in "wavg"}, transposed, transposed),
    *renamed({f"{_ATT}{x}2": f"{_FLA_ATT}{x}_lora.lora.2.weight" for x in "wavg"}, transposed, transposed),
    *_moved(_FFN, _FLA_FFN, ["x_k"], as_vector, as_row),
    *_moved(_FFN, _FLA_FFN, ["key.weight"]),
]

# Files from before 2025-04 have the six mixes of RWKV-7 in one tensor.
_FLA_7_OLD = [_stacked_rows(f"{_FLA_ATT}x_x", [f"{_ATT}x_{x}" for x in "rwkvag"])]


def _huggingface_7(prefix: str) -> list[Rule]:
    """The official names of RWKV-7 behind a prefix, but for the head's."""
    names = [name for rule in _FLA_7 for name in rule.official]
    return renamed({name: name if name == HEAD else prefix + name for name in names})


_HF, _HF_ATT, _HF_MLP = "model.layers.{}.", "model.layers.{}.self_attn.", "model.layers.{}.mlp."

LLAMA_RULES = [
    *renamed({"emb.weight": "model.embed_tokens.weight", "head.weight": "lm_head.weight"}),
    *renamed({"ln_out.weight": "model.norm.weight", "blocks.{}.ln1.weight": f"{_HF}input_layernorm.weight"}),
    *renamed({"blocks.{}.ln2.weight": f"{_HF}post_attention_layernorm.weight"}),
    *renamed({f"{_ATT}{_LONG[x]}.{part}": f"{_HF_ATT}{x}_proj.{part}" for x in "kv" for part in ("weight", "bias")}),
    *renamed({f"{_ATT}query.{part}": f"{_HF_ATT}q_proj.{part}" for part in ("weight", "bias")}),
    *renamed({f"{_ATT}output.weight": f"{_HF_ATT}o_proj.weight"}),
    *renamed({f"{_ATT}ln_query.weight": f"{_HF_ATT}q_norm.weight", f"{_ATT}ln_key.weight": f"{_HF_ATT}k_norm.weight"}),
    *renamed({f"{_FFN}gate.weight": f"{_HF_MLP}gate_proj.weight", f"{_FFN}key.weight": f"{_HF_MLP}up_proj.weight"}),
    *renamed({f"{_FFN}value.weight": f"{_HF_MLP}down_proj.weight"}),
    Rule(f"{_HF_ATT}rotary_emb.inv_freq", (), unchanged, ()),  # in files of old versions; the config tells it
]

LLAMA = "llama"
"""Layout of `transformers` for Llama, Qwen2 and Qwen3; only read, together with a config.json."""


def _official_rules() -> list[Rule]:
    """The official names of every generation, unchanged."""
    names = set()
    for spec in GENERATIONS.values():
        for name in SHARED_AXES | spec.load_model_class().block_axes:
            names.add(name if name.startswith(("emb.", "ln_out.", "head.")) else f"blocks.{{}}.{name}")
    return renamed({name: name for name in sorted(names)})


def _table(rules: Iterable[Rule]) -> dict[str, Rule]:
    return {rule.foreign: rule for rule in rules}


def read_tables() -> list[tuple[str, dict[str, Rule]]]:
    """Layouts that can be read, with rules by names in the file; a layout may have several tables."""
    return [
        ("official", _table(_official_rules())),
        ("transformers", _table([*_TRANSFORMERS_4, *_TRANSFORMERS_5_AND_6])),
        ("flash-linear-attention", _table(_FLA_6)),
        ("flash-linear-attention", _table([*_FLA_7, *_FLA_7_OLD])),
        *((HUGGINGFACE, _table(_huggingface_7(prefix))) for prefix in PREFIXES),
        (LLAMA, _table(LLAMA_RULES)),
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


def _huggingface_7_config(common: dict[str, Any], shape: ShapeOf) -> dict[str, Any]:
    num_heads, head_size = shape("blocks.0.att.r_k")
    ranks = {"decay": "w1", "a": "a1", "v": "v1", "gate": "g1"}
    return {
        "architectures": ["Rwkv7ForCausalLM"],
        "model_type": "rwkv7",
        **common,
        "num_heads": num_heads,
        "head_dim": head_size,
        **{f"{name}_low_rank_dim": shape(f"blocks.0.att.{map_in}")[1] for name, map_in in ranks.items()},
        "norm_eps": 1e-5,
        "norm_bias": True,
        "wkv_state_dtype": "float32",
        "wkv_implementation": "eager",
        "pad_token_id": 0,
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
    **{(HUGGINGFACE, name): Written(_huggingface_7(PREFIXES[0]), _huggingface_7_config) for name in MODEL_TYPES},
}
"""By layout and generation."""
