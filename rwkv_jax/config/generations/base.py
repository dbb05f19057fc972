"""What a generation of models is: everything that can be said of it without building one."""

from __future__ import annotations

import abc
import dataclasses
import importlib
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from rwkv_jax.config.step import OptimizerConfig

if TYPE_CHECKING:
    from rwkv_jax.config.model import ModelConfig
    from rwkv_jax.config.run import TrainConfig

Shapes = Mapping[str, tuple[int, ...]]
"""The shape of each tensor of a file, by official name."""


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
    """Tokens of a text that a state has room for; 0 where it has the same size after any number."""


class StateArray(NamedTuple):
    """One array of a block's state, for one text."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    """What each axis means: a field of `rwkv_jax.parallel.rules.Rules`; None for one that is not split."""
    dtype: str


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How the released models of a generation were trained; rwkv_jax/recipes.py has the sources."""

    corpus: str
    """Path of the binidx corpus."""
    num_tokens: int
    """Of the corpus, which is read once."""
    tokenizer: str
    vocab_size: int
    sequence_length: int
    optimizer: OptimizerConfig
    """With the learning rates of no model in particular."""
    has_embedding_bound: bool = False
    """Whether token vectors begin uniform within +- the highest learning rate, as in RWKV-v4neo."""
    sizes: Mapping[int, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    """Sizes of released models that are not the functions of the width that today's trainer has, by width."""


class GenerationSpec(abc.ABC):
    """One generation: its own fields, sizes, counts, state, tensor names and recipe. Has no state, and needs no JAX."""

    name: str
    """The value of model.generation, or of model.architecture where that is no RWKV: 7, transformer."""
    model_class: str
    """MODULE:CLASS of its model, which is imported when one is built."""
    own_fields: tuple[str, ...] = ()
    """Optional fields of `ModelConfig` that not every generation has, and this one has."""
    operator: str | None
    """Its WKV operator in `rwkv_kernels.OPERATORS`; None without one."""
    has_heads: bool = True
    """Whether time mixing works on heads, which parallel.tensor must not cut; otherwise on single channels."""
    heads_tensor: str | None = None
    """Official name within layer 0 of a tensor whose first axis is H; None without one."""
    has_official_names: bool = True
    """Whether there are official files, whose names and shapes its parameters have."""
    tensors: frozenset[str] = frozenset()
    """Official names within a layer, such as att.r_k, any of which tells that a file is of this generation or later."""
    low_rank: frozenset[str] = frozenset()
    """Official names within a layer of the low-rank maps, which are held as [in, out]."""
    low_rank_decay: frozenset[str] = frozenset()
    """Those of `low_rank` that make the decay, whose errors add up over a text."""
    recipe: Recipe | None = None
    """How its released models were trained; None where no config file trains one."""

    @property
    def title(self) -> str:
        """The name in a sentence."""
        return f"RWKV-{self.name}"

    def load_model_class(self) -> type[Any]:
        """The class of its models, a `rwkv_jax.models.LanguageModel`."""
        module, _, name = self.model_class.partition(":")
        return getattr(importlib.import_module(module), name)

    # Sizes and counts

    def check(self, config: ModelConfig) -> None:
        """Raises ConfigError for values of a model that contradict each other."""
        del config

    def check_run(self, run: TrainConfig) -> None:
        """Raises ConfigError for a run that models of this generation cannot go through."""
        del run

    @abc.abstractmethod
    def sizes(self, config: ModelConfig) -> ResolvedSizes:
        """The sizes that a config may leave to functions of its width."""

    @abc.abstractmethod
    def matrix_parameters(self, config: ModelConfig, *, first: bool) -> int:
        """Parameters of a layer that a token is multiplied by: two operations each.

        Args:
          first: whether it is layer 0.
        """

    @abc.abstractmethod
    def other_parameters(self, config: ModelConfig, *, first: bool) -> int:
        """All other parameters of a layer: vectors, norms, what nothing reads."""

    @abc.abstractmethod
    def mixing_flops(self, config: ModelConfig, sequence_length: int | None) -> int:
        """Operations of a layer for one token besides matrix products: the recurrence, or attention to other tokens."""

    # State

    @abc.abstractmethod
    def state(self, config: ModelConfig) -> tuple[StateArray, ...]:
        """The arrays of a block's state, in the order of the leaves of the model's `initial_block_state`."""

    def prefill_implementation(self, platform: str) -> tuple[str | None, str]:
        """The implementation of the operator that is fastest forward on a platform, and why, in a sentence.

        Its name; None for the one that training takes too.
        """
        return None, "it is the fastest forward, too"

    # Files

    def recognizes(self, in_layers: Collection[str], shapes: Shapes) -> bool:
        """Whether a file is of this generation, once all later ones have been asked.

        Args:
          in_layers: names within layers, such as att.r_k.
        """
        return not self.tensors.isdisjoint(in_layers)

    def read_fields(self, shapes: Shapes) -> dict[str, Any]:
        """The `own_fields` of a file's model; None for a size whose tensor is missing."""
        return {}


class MatrixStateSpec(GenerationSpec):
    """A generation whose recurrence has a matrix [N, N] for each head."""

    state_flops = 5
    """Operations for each number of the state: decayed (1), k v^T added (2), read (2)."""

    def mixing_flops(self, config: ModelConfig, sequence_length: int | None) -> int:
        """Of N numbers for each channel."""
        return self.state_flops * config.head_dim * config.width

    def state(self, config: ModelConfig) -> tuple[StateArray, ...]:
        """Last inputs of both mixings, and the matrices."""
        shift = StateArray((config.width,), (None,), config.dtype)
        heads = (config.num_heads, config.head_dim, config.head_dim)
        return shift, shift, StateArray(heads, ("heads", None, None), config.parameter_dtype)


def size_of(shapes: Shapes, name: str, axis: int) -> int | None:
    """Size of one axis of a tensor; None where it is missing, or has no such axis, which whoever loads it says."""
    shape = shapes.get(name, ())
    return shape[axis] if axis < len(shape) else None
