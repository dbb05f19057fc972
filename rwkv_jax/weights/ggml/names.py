"""llama.cpp's names and shapes of RWKV-6 and 7, as rules from and to the official ones.

llama.cpp keeps low-rank matrices transposed, drops axes of size 1, and joins the blends of a time mixing in one tensor:
w, k, v, r, g in RWKV-6, of which old files have each by itself, and r, w, k, v, a, g in RWKV-7. Layer 0 of RWKV-7 must
have a value residual there, of the rank of its in-context learning rate, which is never used. Decays are stored as they
are in the official file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from rwkv_jax.config import ModelConfig
from rwkv_jax.weights.layout_rules import Change, Rule, as_row, as_vector, renamed, row_at, transposed, unchanged

_ATT, _FFN, _BLOCK = "blocks.{}.att.", "blocks.{}.ffn.", "blk.{}."


def _in_layers(names: dict[str, str], pack: Change = unchanged, unpack: Change = unchanged) -> list[Rule]:
    """Rules for tensors of a layer, from names such as att.w0 to those without `.weight`."""
    whole = {f"blocks.{{}}.{official}": f"{_BLOCK}{foreign}.weight" for official, foreign in names.items()}
    return renamed(whole, pack, unpack)


def _joined(official: Iterable[str]) -> Rule:
    """Blends [1, 1, C] as one tensor [blends, 1, 1, C]."""
    names = tuple(official)

    def pack(*rows: NDArray) -> NDArray:
        return np.stack([row.reshape(1, 1, -1) for row in rows])

    return Rule(f"{_BLOCK}time_mix_lerp_fused.weight", names, pack, tuple(row_at(i) for i in range(len(names))))


_NORMS = {
    "ln_out": "output_norm",
    "blocks.0.ln0": "token_embd_norm",
    "blocks.{}.ln1": f"{_BLOCK}attn_norm",
    "blocks.{}.ln2": f"{_BLOCK}attn_norm_2",
    f"{_ATT}ln_x": f"{_BLOCK}time_mix_ln",
}
_MATRICES = {f"att.{name}.weight": f"time_mix_{name}" for name in ("key", "value", "receptance", "output")} | {
    f"ffn.{name}.weight": f"channel_mix_{name}" for name in ("key", "value")
}

_BOTH = [
    *renamed({"emb.weight": "token_embd.weight", "head.weight": "output.weight"}),
    *renamed({f"{a}.{part}": f"{b}.{part}" for a, b in _NORMS.items() for part in ("weight", "bias")}),
    *_in_layers(_MATRICES),
]

_BLENDS_6, _BLENDS_7 = "wkvrg", "rwkvag"
_LOW_RANK_6 = {"att.time_maa_w1": "time_mix_w1", "att.time_maa_w2": "time_mix_w2"} | {
    f"att.time_decay_w{i}": f"time_mix_decay_w{i}" for i in (1, 2)
}

_RULES_6 = [
    *_BOTH,
    *_in_layers({"att.gate.weight": "time_mix_gate", "ffn.receptance.weight": "channel_mix_receptance"}),
    *_in_layers({"att.time_faaaa": "time_mix_first"}),
    *_in_layers({"att.time_maa_x": "time_mix_lerp_x", "att.time_decay": "time_mix_decay"}, as_vector, as_row),
    *_in_layers({f"ffn.time_maa_{x}": f"channel_mix_lerp_{x}" for x in "kr"}, as_vector, as_row),
    *_in_layers(_LOW_RANK_6, transposed, transposed),
    _joined(f"{_ATT}time_maa_{x}" for x in _BLENDS_6),
]
_OLD_BLENDS_6 = _in_layers({f"att.time_maa_{x}": f"time_mix_lerp_{x}" for x in _BLENDS_6}, as_vector, as_row)

_RULES_7 = [
    *_BOTH,
    *_in_layers({f"att.{x}0": f"time_mix_{x}0" for x in "wav"}, as_vector, as_row),
    *_in_layers({f"att.{x}{i}": f"time_mix_{x}{i}" for x in "wavg" for i in (1, 2)}, transposed, transposed),
    *_in_layers({f"att.{x}": f"time_mix_{x}" for x in ("k_k", "k_a")}, as_vector, as_row),
    *_in_layers({"ffn.x_k": "channel_mix_lerp_k"}, as_vector, as_row),
    _joined(f"{_ATT}x_{x}" for x in _BLENDS_7),
]

_UNUSED_7 = {f"blk.0.time_mix_v{i}.weight": f"blk.0.time_mix_a{i}.weight" for i in range(3)}

_SIZES = {
    "embedding_length": "width",
    "block_count": "num_layers",
    "feed_forward_length": "ffn_width",
    "wkv.head_size": "head_dim",
}
_SIZES_6 = {"time_mix_extra_dim": "mix_rank", "time_decay_extra_dim": "decay_rank"}
_SIZES_7 = {
    "attention.decay_lora_rank": "decay_rank",
    "attention.iclr_lora_rank": "iclr_rank",
    "attention.value_residual_mix_lora_rank": "value_rank",
    "attention.gate_lora_rank": "gate_rank",
}


def _rules_6(head_dim: int) -> list[Rule]:
    del head_dim
    return _RULES_6


def _rules_7(head_dim: int) -> list[Rule]:
    def heads(tensor: NDArray) -> NDArray:
        return tensor.reshape(-1, head_dim)

    return [*_RULES_7, *_in_layers({"att.r_k": "time_mix_r_k"}, as_vector, heads)]


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What llama.cpp calls a generation, and how it has it."""

    name: str
    """As general.architecture."""
    generation: str
    rules: Callable[[int], list[Rule]]
    """Of its tensors, by the size of a head."""
    old_rules: list[Rule]
    """Of tensors that only old files have."""
    unused: dict[str, str]
    """Tensors that it wants and does not use, and those that they are like."""
    size_fields: dict[str, str]
    """Fields of `ModelConfig` by the keys that tell them, without the name before."""

    def sizes(self, model: ModelConfig) -> dict[str, int]:
        """What a file tells of a model beside its tensors, by key."""
        sizes = model.resolved()
        return {f"{self.name}.{key}": getattr(sizes, field) for key, field in self.size_fields.items()}


ARCHITECTURES = {
    found.name: found
    for found in (
        Architecture("rwkv6", "6", _rules_6, _OLD_BLENDS_6, {}, _SIZES | _SIZES_6),
        Architecture("rwkv7", "7", _rules_7, [], _UNUSED_7, _SIZES | _SIZES_7),
    )
}
"""Those that are read and written."""

_DIVIDED = (".att.output.weight", ".ffn.value.weight")

# Of these llama.cpp's operations take float32 only; of vectors and norms, too.
_IN_FLOAT32 = ("lerp", "time_mix_first", "time_mix_w1", "time_mix_w2", "time_mix_decay")


def is_divided(official: str) -> bool:
    """Whether files made for `rescale_every_n_layers` have powers of two divided out of a tensor."""
    return official.endswith(_DIVIDED)


def may_be_narrow(name: str, num_axes: int) -> bool:
    """Whether llama.cpp takes a tensor in less than float32."""
    return num_axes > 1 and not any(part in name for part in _IN_FLOAT32)
