"""The model of a run: its generation and sizes, and the resulting numbers of parameters and operations."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from rwkv_jax.checks import checker, is_number, is_whole, require_choices, require_positive
from rwkv_jax.config.generations import (
    DEFAULT_GENERATION,
    Architecture,
    Generation,
    GenerationSpec,
    ResolvedSizes,
    all_specs,
    check_generation,
    find_spec,
    hybrid_of,
    named_in_a_sentence,
)

IMPLEMENTATIONS = ("wkv_implementation", "output_implementation", "step_implementation")
"""Fields that name an implementation."""

_SIZES_OF_SOME = (
    "mix_rank",
    "decay_rank",
    "iclr_rank",
    "value_rank",
    "gate_rank",
    "deep_embed_rank",
    "dea_width",
    "dea_rank",
    "state_size",
    "context_length",
    "rosa_bits",
    "rosa_window",
    "attention_heads",
    "kv_heads",
)
_SIZES = ("ffn_width", *_SIZES_OF_SOME)  # whole numbers, or None for the default

_FIELDS_OF_SOME = {
    **dict.fromkeys(_SIZES_OF_SOME, "such size"),
    "rwkv_layers": "such choice",
    "exponential_bonus": "such form",
    "unused_value_residual": "value residual",
    "unused_norms": "such norms",
    "rosa_implementation": "lookups",
    "negative_eigenvalues": "such choice",
    "embedding_bound": "such choice",
    **dict.fromkeys(("rotary_base", "rotary_scaling"), "such positions"),
    "norm_epsilon": "such choice",
    "qkv_bias": "such biases",
    "qk_norm": "such norms",
    "tied_head": "such head",
    "output_implementation": "such kernel",
    "step_implementation": "such kernel",
}
"""Fields that not every generation has (`GenerationSpec.own_fields`), and what the message says the others lack."""


def student_of(teacher: ModelConfig, rwkv_layers: Sequence[int] | None = None) -> ModelConfig:
    """The model that a Transformer is converted into: its own sizes, with time mixing in the place of attention.

    Args:
      rwkv_layers: the layers in which it is; None is all of them.

    Raises:
      ConfigError: as `ModelConfig`, such as for an architecture without attention.
    """
    layers = tuple(range(teacher.num_layers)) if rwkv_layers is None else tuple(rwkv_layers)
    room = None if len(layers) == teacher.num_layers else teacher.context_length
    return dataclasses.replace(teacher, rwkv_layers=layers, context_length=room)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The generation and the shape of a language model."""

    generation: Generation | str = DEFAULT_GENERATION
    """RWKV generation: 4 (Dove), 5.2 (Eagle) or its previews 5.0 and 5.1, 6 (Finch), 7 (Goose). RWKV-LM: my_testing."""
    architecture: Architecture = dataclasses.field(default="rwkv", kw_only=True)
    """rwkv, or what it is compared with (docs/baselines.md), which has no generations."""
    vocab_size: int = 8192
    """V: number of token ids; the tokenizer is trained to this size, or checked against it. RWKV-LM: vocab_size."""
    num_layers: int = 6
    """L: number of blocks; at least 2, since the official initialization divides by L - 1. RWKV-LM: n_layer."""
    width: int = 512
    """C: size of the residual stream; a multiple of head_dim. RWKV-LM: n_embd."""
    head_dim: int = 64
    """N: size of one head of the time mixing or attention; 64 in every released model. RWKV-4 has no heads. RWKV-LM:
    head_size, head_size_a."""
    ffn_width: int | None = None
    """F: hidden size of the channel mixing; None is the official function of width: 4 C, or 3.5 C for 5.1, 5.2, 6.
    RWKV-LM: dim_ffn."""
    mix_rank: int | None = None
    """D of the token shift's low-rank maps (time_maa_w1, time_maa_w2) of RWKV-6; None is the official size."""
    decay_rank: int | None = None
    """D of the decay's low-rank map (w1, w2) of RWKV-6 and 7; None is the official function of width."""
    iclr_rank: int | None = None
    """D of the in-context learning rate's low-rank map (a1, a2) of RWKV-7; None is the official function of width."""
    value_rank: int | None = None
    """D of the value residual's low-rank map (v1, v2) of RWKV-7; None is the official function of width."""
    gate_rank: int | None = None
    """D of the output gate's low-rank map (g1, g2) of RWKV-7; None is the official function of width."""
    deep_embed_rank: int | None = None
    """D of DeepEmbed, of RWKV-7a and 7b: D x D numbers a token in each layer; None is 32."""
    dea_width: int | None = None
    """Size of the queries and keys of RWKV-7b's attention; None is 256."""
    dea_rank: int | None = None
    """D of the low-rank maps to the keys and values of RWKV-7b's attention; None is 32."""
    state_size: int | None = None
    """S of Mamba-2: size of a head's keys, with which its state grows; None is 128."""
    context_length: int | None = None
    """S: maximum tokens of a text in a Transformer's or Llama's state; None is 2048, and 4096 for RWKV-7b, the one RWKV
    that has a limit."""
    rwkv_layers: tuple[int, ...] = ()
    """Layers of a Transformer or Llama, from 0, that have RWKV-7's time mixing in the place of attention
    (docs/conversion.md): a hybrid, or, if these are all layers, a model with a state of constant size and no
    context_length."""
    attention_heads: int | None = None
    """H of a Llama: heads of its queries, whose head_dim need not add up to the width; None is width / head_dim."""
    kv_heads: int | None = None
    """G of a Llama: heads of keys and values, each of which H / G queries share; None is H."""
    rotary_base: float | None = None
    """Llama only: pair i of a head's channels rotates by rotary_base^(-2 i / N) per position; None is 10000."""
    rotary_scaling: tuple[float, float, float, float] | None = None
    """Llama only: Llama 3's stretching of slow rotations: factor, low_freq_factor, high_freq_factor and
    original_max_position_embeddings; None leaves all rotations as they are."""
    norm_epsilon: float | None = None
    """Llama only: added to the mean square in each norm; None is 1e-5."""
    qkv_bias: bool = False
    """Llama only: queries, keys and values have biases, as in Qwen2."""
    qk_norm: bool = False
    """Llama only: each head's queries and keys are normalized before they are rotated, as in Qwen3."""
    tied_head: bool = False
    """Llama only: the output head is the embedding."""
    exponential_bonus: bool = False
    """RWKV-5.0 and 5.1 only: the bonus is e^time_first, as in the first of these models, rather than time_faaaa."""
    unused_value_residual: bool = False
    """RWKV-7 only: layer 0 has v0, v1 and v2 too, which are unused. The official trainer's files have them, so loading
    and saving such a file keeps it unchanged."""
    negative_eigenvalues: bool = False
    """RWKV-7 and DeltaNets only: the in-context learning rate (a, beta) lies in (0, 2) rather than (0, 1). What a token
    removes may then come back with the opposite sign, an eigenvalue of -1, as tracking a state needs (arXiv
    2411.12537). The DeltaNets' eigenvalues stay within [-1, 1]; RWKV-7's, w - a where a key has one channel, reach
    0.545 - 2 = -1.455: nothing but training keeps such a state from growing without bound."""
    rosa_bits: int | None = None
    """ROSA only: channels whose signs are a symbol that is looked up; None is 4, and 1 beside RWKV-7. No tensor tells:
    our files say it."""
    rosa_window: int | None = None
    """ROSA only: tokens that a lookup goes back, S, with which its cost a token and its state grow; None is 1024."""
    unused_norms: bool = False
    """ROSA alone only: layers after the first have ln0 too, which is unused, as in the official files."""
    embedding_bound: float | None = None
    """RWKV-4 only: initial token vectors are uniform within +- this, as in RWKV-v4neo, which uses its highest learning
    rate; None is the first trainer's orthogonal matrix."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Compute dtype of matrix products and activations; parameters are trained in float32 (float64 if dtype is
    float64), and the recurrence always runs in at least float32. RWKV-LM: precision."""
    wkv_implementation: str | None = None
    """Implementation of the WKV operator; None takes the default of the platform. RWKV-LM: kernel."""
    output_implementation: str | None = None
    """RWKV-7 only: implementation of what follows the operator in a head: norm, bonus and gate
    (`rwkv_kernels.wkv7_output`); None leaves them to the model's own equations."""
    step_implementation: str | None = None
    """RWKV-7 only: implementation of a single token of the operator and what follows it, as in decoding
    (`rwkv_kernels.wkv7_step`); None takes the two above."""

    rosa_implementation: Literal["scan", "host"] | None = None
    """ROSA only: where texts are looked up (docs/rosa.md): `scan` on the device, in S operations a token; `host` by an
    automaton for whole texts, as in training, of at most rosa_window tokens; None is `scan`."""

    def __post_init__(self) -> None:
        require_choices(self, "model")
        check = checker(self, "model")
        check_generation(self.architecture, self.generation)
        require_positive(self, "model", "vocab_size", "width", "head_dim")
        check(self.num_layers >= 2, "num_layers", "RWKV needs at least 2 layers")
        check(self.width >= 2, "width", "must be at least 2")
        if self.spec.has_heads and self.attention_heads is None:
            below = max(self.width // self.head_dim, 1) * self.head_dim
            check(
                self.width % self.head_dim == 0,
                "width",
                f"must be a multiple of model.head_dim = {self.head_dim}; "
                f"the nearest are {below} and {below + self.head_dim}",
            )
        check(self.head_dim >= 2 or not self.spec.has_heads, "head_dim", "must be at least 2")
        for name in _SIZES:
            value = getattr(self, name)
            positive = value is None or (is_whole(value) and value > 0)
            check(positive, name, "must be positive, or None for the default: a whole number")
        for name in ("embedding_bound", "rotary_base", "norm_epsilon"):
            value = getattr(self, name)
            positive = value is None or (is_number(value) and value > 0)
            check(positive, name, "must be positive, or None for the default: a number")
        for name in IMPLEMENTATIONS:
            value = getattr(self, name)  # a program may pass a `rwkv_kernels.dispatch.Implementation`
            names_one = value is None or hasattr(value, "refuses") or (isinstance(value, str) and value != "")
            check(names_one, name, "must be a name, or None for the default")
        for name, what in _FIELDS_OF_SOME.items():
            value = getattr(self, name)
            owners = named_in_a_sentence([spec for spec in all_specs() if name in spec.own_fields])
            check(
                value is None or value is False or value == () or name in self.spec.own_fields,
                name,
                f"{self.title} has no {what}, only {owners}; leave it out",
            )
        self.spec.check(self)

    @property
    def spec(self) -> GenerationSpec:
        """The spec of this generation."""
        spec = find_spec(self.architecture, self.generation)
        return hybrid_of(spec) if self.rwkv_layers and "rwkv_layers" in spec.own_fields else spec

    @property
    def title(self) -> str:
        """The model's name for messages: RWKV-7, Transformer."""
        return self.spec.title

    @property
    def num_heads(self) -> int:
        """H; C / N, but for Llamas that say otherwise."""
        return self.attention_heads or self.width // self.head_dim

    @property
    def num_kv_heads(self) -> int:
        """G, heads of keys and values: H, unless several queries share them."""
        return self.kv_heads or self.num_heads

    @property
    def parameter_dtype(self) -> str:
        """Dtype in which parameters are created and trained, and in which the recurrence and its state are kept.

        A loaded model may hold its parameters in the dtype of its file.
        """
        return "float64" if self.dtype == "float64" else "float32"

    def sizes(self) -> ResolvedSizes:
        """All sizes, with None replaced by the official functions of the width."""
        return self.spec.sizes(self)

    def resolved(self) -> ModelConfig:
        """The same config with every size that is None replaced by its resolved value."""
        return dataclasses.replace(
            self, **{name: size or None for name, size in dataclasses.asdict(self.sizes()).items()}
        )

    def transformer_of_equal_size(self, context_length: int | None = None) -> ModelConfig:
        """A Transformer with this model's depth, width, heads and vocabulary, and as many parameters.

        Both have about 12 C^2 parameters per layer. Additional ones, such as RWKV-7's low-rank maps, are compensated by
        the Transformer's feed-forward width, to the nearest multiple of 32.

        Args:
          context_length: maximum tokens of a text in its state; None is the default.

        Raises:
          ConfigError: a width that is not a multiple of head_dim, as RWKV-4 allows, or an odd head_dim.
        """
        return self.of_equal_size("transformer", context_length=context_length)

    def of_equal_size(self, architecture: Architecture, **own_fields: Any) -> ModelConfig:
        """A model of another architecture with this one's depth, width, heads and vocabulary, and as many parameters.

        What mixers have more or less of them is compensated by the feed-forward width, to the nearest multiple of 32.

        Args:
          own_fields: of the other architecture, such as context_length or negative_eigenvalues.

        Raises:
          ConfigError: a width or head_dim that the other one cannot have, or fields that it does not have.
        """
        plain = ModelConfig(
            architecture=architecture,
            vocab_size=self.vocab_size,
            num_layers=self.num_layers,
            width=self.width,
            head_dim=self.head_dim,
            dtype=self.dtype,
            **own_fields,
        )
        return plain.with_num_parameters(self.num_parameters())

    def with_num_parameters(self, num_parameters: int, multiple: int = 32) -> ModelConfig:
        """The same model with the feed-forward width at which it has nearly so many parameters.

        Args:
          multiple: the width changes by multiples of it, and is at least as large.
        """
        base = self.sizes().ffn_width
        wider = dataclasses.replace(self, ffn_width=base + multiple)
        steps = round((num_parameters - self.num_parameters()) / (wider.num_parameters() - self.num_parameters()))
        return dataclasses.replace(self, ffn_width=max(base + multiple * steps, multiple))

    def num_parameters(self) -> int:
        """Number of parameters, in closed form."""
        others = sum(self.spec.layer_other_parameters(self, layer) for layer in range(self.num_layers))
        return self.spec.outer_parameters(self) + self._matrix_parameters() + others

    def flops_per_token(self, sequence_length: int | None = None) -> int:
        """Floating-point operations of one token's forward pass; training costs three times as many.

        Two per weight of a matrix product, plus each layer's recurrence or attention (`GenerationSpec.mixing_flops`).

        Args:
          sequence_length: T; a Transformer's number is the mean over T tokens, which see (T + 1) / 2 keys on average.
            None is its context length. RWKV's number does not depend on it.
        """
        weights = self._matrix_parameters() + self.vocab_size * self.width
        mixing = sum(self.spec.layer_mixing_flops(self, layer, sequence_length) for layer in range(self.num_layers))
        return 2 * weights + mixing

    def _matrix_parameters(self) -> int:
        """Matrix parameters of all layers."""
        return sum(self.spec.layer_matrix_parameters(self, layer) for layer in range(self.num_layers))
