"""Interface of a generation: everything known about its models without building one."""

from __future__ import annotations

import abc
import dataclasses
import importlib
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from rwkv_jax.checks import checker
from rwkv_jax.config.step import OptimizerConfig

if TYPE_CHECKING:
    from rwkv_jax.config.model import ModelConfig
    from rwkv_jax.config.run import TrainConfig

OFFICIAL_OPTIMIZER = OptimizerConfig(
    schedule="cosine",
    schedule_origin="official",
    warmup_steps=10,
    beta1=0.9,
    beta2=0.99,
    epsilon=1e-18,
    clip_norm=1.0,
    clip_epsilon=1e-6,
)
"""What the recipes have in common since RWKV-6."""

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of a file's tensors by official name."""


@dataclasses.dataclass(frozen=True)
class ResolvedSizes:
    """A model's sizes with the defaults resolved; 0 where the generation has no such size."""

    ffn_width: int
    mix_rank: int = 0
    decay_rank: int = 0
    iclr_rank: int = 0
    value_rank: int = 0
    gate_rank: int = 0
    deep_embed_rank: int = 0
    dea_width: int = 0
    dea_rank: int = 0
    state_size: int = 0
    context_length: int = 0
    """Tokens that a state has room for; 0 where its size is constant."""
    rosa_bits: int = 0
    rosa_window: int = 0
    attention_heads: int = 0
    kv_heads: int = 0
    rotary_base: float = 0
    norm_epsilon: float = 0


class StateArray(NamedTuple):
    """One array of a block's state, for one text."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    """Logical name of each axis: a field of `rwkv_jax.parallel.rules.Rules`; None for one that is never split."""
    dtype: str


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How the released models of a generation were trained; rwkv_jax/recipes.py has the sources."""

    corpus: str
    """Path of the binidx corpus."""
    num_tokens: int
    """Tokens of the corpus, which is read once."""
    tokenizer: str
    vocab_size: int
    sequence_length: int
    optimizer: OptimizerConfig
    """Optimizer settings, with learning rates of no particular model."""
    has_embedding_bound: bool = False
    """Whether initial token vectors are uniform within +- the highest learning rate, as in RWKV-v4neo."""
    sizes: Mapping[int, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    """Sizes of released models, by width, that differ from today's trainer's functions of the width."""


class GenerationSpec(abc.ABC):
    """One generation: its fields, sizes, counts, state shapes, tensor names and recipe. Stateless, without JAX."""

    name: str
    """The value of model.generation, or of model.architecture if that is not RWKV: 7, transformer."""
    model_class: str
    """MODULE:CLASS of its model, imported when one is built."""
    article: str = "an"
    """What goes before its title."""
    own_fields: tuple[str, ...] = ()
    """Optional fields of `ModelConfig` that this generation has and others lack."""
    fields_beside_tensors: tuple[str, ...] = ()
    """Those, sizes or true or false, that no name or shape of a tensor tells: where they are not the default, files say
    so in their metadata, or are not written."""
    operator: str | None
    """Its WKV operator in `rwkv_kernels.OPERATORS`; None without one."""
    has_heads: bool = True
    """Whether time mixing works on heads, which parallel.tensor must not split; otherwise on single channels."""
    heads_tensor: str | None = None
    """Official name within layer 0 of a tensor whose first axis is H; None without one."""
    has_matrix_state: bool = False
    """Whether a block's state is two last inputs and a matrix [N, N] for each head, which can be tuned."""
    harmful_state_rate: float | None = None
    """Learning rate of a tuned state from which on models are known to get worse; None if none is known."""
    has_official_names: bool = True
    """Whether its parameters have official names and shapes."""
    packs: bool = True
    """Whether its matrices may be packed into int8, int4 or bfloat16."""
    tensors: frozenset[str] = frozenset()
    """Official names within a layer, such as att.r_k, any of which identifies this generation or a later one."""
    low_rank: frozenset[str] = frozenset()
    """Official names within a layer of the low-rank maps, which are stored as [in, out]."""
    low_rank_decay: frozenset[str] = frozenset()
    """Those of `low_rank` that compute the decay, whose errors accumulate over a text."""
    flat_vectors: frozenset[str] = frozenset()
    """Official names within a layer of vectors [1, 1, C] that files may hold as [C]."""
    table_maps: Mapping[str, str] = {}
    """Of tables by token, by official name within a layer: the matrix W of W e_t that is added to the token's row."""
    recipe: Recipe | None = None
    """How its released models were trained; None if no config file trains one."""

    @property
    def title(self) -> str:
        """The name for messages."""
        return f"RWKV-{self.name}"

    @property
    def a_title(self) -> str:
        """The title with its article."""
        return f"{self.article} {self.title}"

    def load_model_class(self) -> type[Any]:
        """The class of its models, a `rwkv_jax.models.LanguageModel`."""
        module, _, name = self.model_class.partition(":")
        return getattr(importlib.import_module(module), name)

    # Sizes and counts

    def check(self, config: ModelConfig) -> None:
        """Raises ConfigError for contradictory values of a model."""
        del config

    def check_run(self, run: TrainConfig) -> None:
        """Raises ConfigError for settings of a run that models of this generation do not support."""
        del run

    @abc.abstractmethod
    def sizes(self, config: ModelConfig) -> ResolvedSizes:
        """The sizes of which a config may leave the default to functions of its width."""

    @abc.abstractmethod
    def matrix_parameters(self, config: ModelConfig, *, first: bool) -> int:
        """Matrix parameters of a layer: two operations each per token.

        Args:
          first: whether it is layer 0.
        """

    @abc.abstractmethod
    def other_parameters(self, config: ModelConfig, *, first: bool) -> int:
        """All other parameters of a layer: vectors, norms, unused ones."""

    def outer_parameters(self, config: ModelConfig) -> int:
        """Parameters outside the layers: embedding, head, last norm."""
        return 2 * config.vocab_size * config.width + 2 * config.width

    @abc.abstractmethod
    def mixing_flops(self, config: ModelConfig, sequence_length: int | None) -> int:
        """Operations of a layer per token besides matrix products: the recurrence or attention."""

    def table_row(self, config: ModelConfig) -> int:
        """Numbers of a token in a layer's tables by token; 0 without any."""
        return 0

    # Of single layers, where they differ

    def layer_kinds(self, config: ModelConfig) -> tuple[str, ...]:
        """The kind of each layer: layers of one kind have equal parameters, but for those of layer 0, and states."""
        return ("",) * config.num_layers

    def layer_matrix_parameters(self, config: ModelConfig, layer: int) -> int:
        """`matrix_parameters` of one layer."""
        return self.matrix_parameters(config, first=layer == 0)

    def layer_other_parameters(self, config: ModelConfig, layer: int) -> int:
        """`other_parameters` of one layer."""
        return self.other_parameters(config, first=layer == 0)

    def layer_mixing_flops(self, config: ModelConfig, layer: int, sequence_length: int | None) -> int:
        """`mixing_flops` of one layer."""
        return self.mixing_flops(config, sequence_length)

    def layer_state(self, config: ModelConfig, layer: int) -> tuple[StateArray, ...]:
        """`state` of one layer."""
        return self.state(config)

    def attention_matrices(self, config: ModelConfig) -> int:
        """Matrix parameters of a layer's attention, of architectures that have `rwkv_layers`."""
        raise NotImplementedError

    def attention_vectors(self, config: ModelConfig) -> int:
        """All other parameters of a layer's attention, of architectures that have `rwkv_layers`."""
        raise NotImplementedError

    # State

    def num_operator_layers(self, config: ModelConfig) -> int:
        """Layers that call the operator."""
        return config.num_layers

    def operator_sizes(self, config: ModelConfig) -> tuple[int, int, int]:
        """H, N and M of the operator's calls: heads, and the sizes of their keys and values."""
        return (config.num_heads, config.head_dim, config.head_dim) if self.has_heads else (config.width, 1, 1)

    @abc.abstractmethod
    def state(self, config: ModelConfig) -> tuple[StateArray, ...]:
        """The arrays of a block's state, in the order of the leaves of the model's `initial_block_state`.

        Where layers are of several kinds, these are the arrays of one layer of each.
        """

    def prefill_implementation(self, platform: str) -> tuple[str | None, str]:
        """The fastest forward implementation of the operator on a platform, and the reason in a sentence.

        The name is None for the same as in training.
        """
        return None, "it is the fastest forward, too"

    # Files

    def recognizes(self, in_layers: Collection[str], shapes: Shapes) -> bool:
        """Whether a file is of this generation, given that it is of no later one.

        Args:
          in_layers: names within layers, such as att.r_k.
        """
        return not self.tensors.isdisjoint(in_layers)

    def read_fields(self, shapes: Shapes) -> dict[str, Any]:
        """The `own_fields` of a file's model; None for a size if its tensor is missing."""
        return {}

    def fields_in_name(self, name: str) -> dict[str, Any]:
        """Those of `fields_beside_tensors` that the official name of a file tells, whose metadata tell more."""
        return {}


class CacheSpec(GenerationSpec):
    """A generation whose state grows with the text, up to `context_length` tokens."""

    def check_run(self, run: TrainConfig) -> None:
        """Requires rows that fit into the cache, are not split over devices, and start with an empty state."""
        check = checker(run)
        check(
            run.parallel.sequence == 1,
            "parallel.sequence",
            f"{self.a_title}'s attention is not split over time; use parallel.data, fsdp or tensor",
        )
        check(
            not run.training.carry_state,
            "training.carry_state",
            f"{self.a_title}'s state has room for model.context_length tokens only, not for rows that go on for ever; "
            "switch it off, or train a model whose state has a constant size",
        )
        context_length = self.sizes(run.model).context_length
        check(
            run.training.sequence_length <= context_length,
            "training.sequence_length",
            f"must be at most model.context_length = {context_length}; make one shorter or the other longer",
        )


class MatrixStateSpec(GenerationSpec):
    """A generation with a recurrent state [N, N] per head."""

    state_flops = 5
    """Operations per number of the state: decay (1), add k v^T (2), read (2)."""

    def mixing_flops(self, config: ModelConfig, sequence_length: int | None) -> int:
        """For N numbers per channel."""
        return self.state_flops * config.head_dim * config.width

    def state(self, config: ModelConfig) -> tuple[StateArray, ...]:
        """Last inputs of both mixings, and the state matrices."""
        shift = StateArray((config.width,), (None,), config.dtype)
        heads = (config.num_heads, config.head_dim, config.head_dim)
        return shift, shift, StateArray(heads, ("heads", None, None), config.parameter_dtype)


def size_of(shapes: Shapes, name: str, axis: int) -> int | None:
    """Size of one axis of a tensor; None if tensor or axis is missing, which loading reports."""
    shape = shapes.get(name, ())
    return shape[axis] if axis < len(shape) else None
