"""The generations of models, and which sizes each has."""

from __future__ import annotations

import dataclasses
from typing import Literal

Generation = Literal["4", "5.0", "5.1", "5.2", "6", "7", "transformer"]
"""RWKV-4 (Dove), the two previews of RWKV-5, RWKV-5 (Eagle), RWKV-6 (Finch), RWKV-7 (Goose), and the Transformer that
they are compared with."""

OWN_FIELDS: dict[str, tuple[Generation, ...]] = {
    "mix_rank": ("6",),
    "decay_rank": ("6", "7"),
    "iclr_rank": ("7",),
    "value_rank": ("7",),
    "gate_rank": ("7",),
    "context_length": ("transformer",),
}
"""Sizes that not every generation has."""


def architecture_name(generation: Generation) -> str:
    """As in a sentence: RWKV-7, Transformer."""
    return "Transformer" if generation == "transformer" else f"RWKV-{generation}"


@dataclasses.dataclass(frozen=True)
class ResolvedSizes:
    """The sizes of a model that a config may leave open, none left open; 0 where the generation has no such size."""

    ffn_width: int
    mix_rank: int = 0
    decay_rank: int = 0
    iclr_rank: int = 0
    value_rank: int = 0
    gate_rank: int = 0
    context_length: int = 0
