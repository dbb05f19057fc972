"""The generations of models, one file each, with everything known about one without building it.

`GENERATIONS` is the only list of them. Nothing outside this package compares a generation with a name: differences are
looked up in `ModelConfig.spec` or in the model's class, which the spec names. docs/extending.md describes how to add
one.

    base.py          GenerationSpec, the interface
    rwkv4.py         Dove
    rwkv5.py         Eagle, and its previews 5.0 and 5.1
    rwkv6.py         Finch
    rwkv7.py         Goose
    rwkv7a.py        Goose with tables by token, and with attention besides (7b)
    rosa.py          RWKV-8's lookups, alone and beside RWKV-7
    rc00.py          RWKV-8's experimental release with a vector a token
    transformer.py   the Transformer, to compare with
    llama.py         Llama and Qwen, to learn from
    hybrid.py        attention replaced by RWKV-7's time mixing in chosen layers (`ModelConfig.rwkv_layers`)
    baseline.py      what the other baselines have in common: gla.py, mamba2.py, deltanet.py, gated_deltanet.py, rnn.py,
                     lstm.py (docs/baselines.md)
"""

from __future__ import annotations

from typing import Literal

from rwkv_jax.checks import require
from rwkv_jax.config.generations.base import (
    GenerationSpec,
    Recipe,
    ResolvedSizes,
    Shapes,
    StateArray,
    size_of,
)
from rwkv_jax.config.generations.deltanet import DeltaNetSpec
from rwkv_jax.config.generations.gated_deltanet import GatedDeltaNetSpec
from rwkv_jax.config.generations.gla import GLASpec
from rwkv_jax.config.generations.hybrid import (
    HYBRID_KINDS,
    RWKV_LAYER,
    TIME_MIX_FIELDS,
    HybridSpec,
    hybrid_of,
    time_mix_config,
)
from rwkv_jax.config.generations.llama import LlamaSpec
from rwkv_jax.config.generations.lstm import LSTMSpec
from rwkv_jax.config.generations.mamba2 import Mamba2Spec
from rwkv_jax.config.generations.rc00 import RC00Spec
from rwkv_jax.config.generations.rnn import RNNSpec
from rwkv_jax.config.generations.rosa import RosaBesideRWKV7Spec, RosaSpec
from rwkv_jax.config.generations.rwkv4 import RWKV4Spec
from rwkv_jax.config.generations.rwkv5 import RWKV5Spec
from rwkv_jax.config.generations.rwkv6 import RWKV6Spec
from rwkv_jax.config.generations.rwkv7 import RWKV7Spec
from rwkv_jax.config.generations.rwkv7a import RWKV7aSpec, RWKV7bSpec
from rwkv_jax.config.generations.transformer import TransformerSpec

__all__ = [
    "GENERATIONS",
    "HYBRID_KINDS",
    "OTHER_ARCHITECTURES",
    "RWKV_LAYER",
    "TIME_MIX_FIELDS",
    "Architecture",
    "Generation",
    "GenerationSpec",
    "HybridSpec",
    "RWKV5Spec",
    "Recipe",
    "ResolvedSizes",
    "Shapes",
    "StateArray",
    "all_specs",
    "check_generation",
    "find_spec",
    "hybrid_of",
    "is_low_rank",
    "named_in_a_sentence",
    "recognize",
    "size_of",
    "time_mix_config",
]

Generation = Literal["4", "5.0", "5.1", "5.2", "6", "7", "7a", "7b", "7-rosa", "8-rosa", "8-rc00"]
"""RWKV-4 (Dove), the two previews of RWKV-5, RWKV-5 (Eagle), RWKV-6 (Finch) and RWKV-7 (Goose), also with
DeepEmbed (7a), and with DEA besides (7b); RWKV-8's ROSA beside RWKV-7, and alone, and
its experimental release rc00, RWKV-7 with a vector a token."""

Architecture = Literal["rwkv", "transformer", "llama", "gla", "mamba2", "deltanet", "gated_deltanet", "rnn", "lstm"]
"""RWKV, or what to compare it with."""

GENERATIONS: dict[str, GenerationSpec] = {
    "4": RWKV4Spec(),
    "5.0": RWKV5Spec("5.0", has_gate=False),
    "5.1": RWKV5Spec("5.1"),
    "5.2": RWKV5Spec("5.2", has_channel_decay=True),
    "6": RWKV6Spec(),
    "7": RWKV7Spec(),
    "7a": RWKV7aSpec(),
    "7b": RWKV7bSpec(),
    "7-rosa": RosaBesideRWKV7Spec(),
    "8-rosa": RosaSpec(),
    "8-rc00": RC00Spec(),
}
"""RWKV's generations by name, oldest first. A config file or test may add its own before building a config."""

OTHER_ARCHITECTURES: dict[str, GenerationSpec] = {
    "transformer": TransformerSpec(),
    "llama": LlamaSpec(),
    "gla": GLASpec(),
    "mamba2": Mamba2Spec(),
    "deltanet": DeltaNetSpec(),
    "gated_deltanet": GatedDeltaNetSpec(),
    "rnn": RNNSpec(),
    "lstm": LSTMSpec(),
}
"""Architectures other than RWKV, by the value of model.architecture."""


DEFAULT_GENERATION: Generation = "7"
"""Default of `ModelConfig.generation`."""


def all_specs() -> tuple[GenerationSpec, ...]:
    """Specs of every architecture."""
    return (*GENERATIONS.values(), *OTHER_ARCHITECTURES.values())


def check_generation(architecture: str, generation: str) -> None:
    """Raises ConfigError for an unknown generation, or one given with an architecture that has none."""
    remedy = f"must be one of {', '.join(GENERATIONS)}"
    if generation in OTHER_ARCHITECTURES:
        remedy += f"; or set model.architecture to {generation}"
    require(generation in GENERATIONS, "model.generation", generation, remedy)
    if (other := OTHER_ARCHITECTURES.get(architecture)) is not None:
        remedy = f"{other.a_title} has no generations; leave it out"
        require(generation == DEFAULT_GENERATION, "model.generation", generation, remedy)


def find_spec(architecture: str, generation: str) -> GenerationSpec:
    """The spec for a model's architecture and generation."""
    return OTHER_ARCHITECTURES[architecture] if architecture in OTHER_ARCHITECTURES else GENERATIONS[generation]


def recognize(shapes: Shapes) -> GenerationSpec | None:
    """The generation of a file, from its tensors' names and shapes; None if unknown.

    The newest are tried first: a generation may have all names of an earlier one, and more.
    """
    in_layers = {name.split(".", 2)[2] for name in shapes if name.startswith("blocks.") and name.count(".") >= 2}
    return next((spec for spec in reversed(GENERATIONS.values()) if spec.recognizes(in_layers, shapes)), None)


def is_low_rank(name: str, *, decay_only: bool = False) -> bool:
    """Whether an official name is that of a low-rank map in a time mixing, blocks.I.att.NAME, stored as [in, out].

    Those elsewhere, such as 7a's ffn.s1 and 7b's qkv.k1, are not, and so they are never packed.

    Args:
      decay_only: only those of the decay.
    """
    block, _, within = name.partition(".att.")
    names = (spec.low_rank_decay if decay_only else spec.low_rank for spec in GENERATIONS.values())
    return block.startswith("blocks.") and any(f"att.{within}" in own for own in names)


def named_in_a_sentence(specs: list[GenerationSpec]) -> str:
    """RWKV-6 and 7, a Transformer, or RWKV-7, a DeltaNet and a Gated DeltaNet."""

    def in_a_row(names: list[str]) -> str:
        return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)

    rwkv = [spec.name for spec in specs if spec.name in GENERATIONS]
    others = [spec.a_title for spec in specs if spec.name not in GENERATIONS]
    return in_a_row([*([f"RWKV-{in_a_row(rwkv)}"] if rwkv else []), *others])
