"""The model of a run: its generation and sizes, and the parameters and operations that they come to."""

from __future__ import annotations

import dataclasses
import math
import typing
from typing import Literal

from rwkv_jax.checks import require, require_positive
from rwkv_jax.config.generations import OWN_FIELDS, Generation, ResolvedSizes, architecture_name


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The generation and the shape of a language model."""

    generation: Generation = "7"
    """Which RWKV: 4 (Dove), 5.2 (Eagle) or its previews 5.0 and 5.1, 6 (Finch), 7 (Goose); or transformer, to compare
    them with."""
    vocab_size: int = 8192
    """V: number of token ids; the tokenizer is trained to this size, or checked against it."""
    num_layers: int = 6
    """L: number of blocks; at least 2, since the official initialization divides by L - 1."""
    width: int = 512
    """C: size of the residual stream; a multiple of head_dim."""
    head_dim: int = 64
    """N: size of one head of the time mixing or attention; 64 in every released model. RWKV-4 has no heads."""
    ffn_width: int | None = None
    """F: hidden size of the channel mixing; None is the official function of width: 4 C, or 3.5 C for 5.1, 5.2, 6."""
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
    context_length: int | None = None
    """S: most tokens of one text that a Transformer's state holds; None is 2048. RWKV's states hold any number."""
    exponential_bonus: bool = False
    """RWKV-5.0 and 5.1 only: the bonus is e^time_first, as in the first of them, rather than time_faaaa."""
    unused_value_residual: bool = False
    """RWKV-7 only: layer 0 holds v0, v1 and v2 too, which nothing reads. Files straight out of the official trainer do,
    and so what is loaded can be saved again as it was."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Compute dtype of matrix products and activations; parameters are trained in float32 (float64 if that is asked
    for), and the recurrence always runs in at least float32."""
    wkv_implementation: str | None = None
    """Implementation of the WKV operator; None takes the fastest that is valid on the platform."""

    def __post_init__(self) -> None:
        generations = typing.get_args(Generation)
        require(
            self.generation in generations,
            "model.generation",
            self.generation,
            f"must be one of {', '.join(generations)}",
        )
        require_positive(self, "model", "vocab_size", "width", "head_dim")
        require(self.num_layers >= 2, "model.num_layers", self.num_layers, "RWKV needs at least 2 layers")
        require(self.width >= 2, "model.width", self.width, "must be at least 2")
        if self.generation != "4":
            require(
                self.width % self.head_dim == 0,
                "model.width",
                self.width,
                f"must be a multiple of model.head_dim = {self.head_dim}; "
                f"the nearest are {self._nearest_widths()[0]} and {self._nearest_widths()[1]}",
            )
            require(self.head_dim >= 2, "model.head_dim", self.head_dim, "must be at least 2")
        for name in ("ffn_width", *OWN_FIELDS):
            value = getattr(self, name)
            require(value is None or value > 0, f"model.{name}", value, "must be positive, or None for the default")
        for name, owners in OWN_FIELDS.items():
            value = getattr(self, name)
            require(
                value is None or self.generation in owners,
                f"model.{name}",
                value,
                f"{self.architecture} has no such size, only {self._named(owners)}; leave it out",
            )
        require(
            not self.exponential_bonus or self.generation in ("5.0", "5.1"),
            "model.exponential_bonus",
            self.exponential_bonus,
            f"{self.architecture} has no such form, only RWKV-5.0 and 5.1; leave it out",
        )
        require(
            not self.unused_value_residual or self.generation == "7",
            "model.unused_value_residual",
            self.unused_value_residual,
            f"{self.architecture} has no value residual, only RWKV-7; leave it out",
        )
        if self.generation == "transformer":
            require(
                self.head_dim % 2 == 0,
                "model.head_dim",
                self.head_dim,
                "must be even: positions rotate pairs of channels",
            )
            require(
                self.wkv_implementation is None,
                "model.wkv_implementation",
                self.wkv_implementation,
                "a Transformer has no WKV operator; leave it out",
            )
        require(
            self.dtype in ("float32", "bfloat16", "float64"),
            "model.dtype",
            self.dtype,
            "must be float32, bfloat16 or float64",
        )

    def _nearest_widths(self) -> tuple[int, int]:
        below = max(self.width // self.head_dim, 1) * self.head_dim
        return below, below + self.head_dim

    @staticmethod
    def _named(owners: tuple[Generation, ...]) -> str:
        return "a Transformer" if owners == ("transformer",) else f"RWKV-{' and '.join(owners)}"

    @property
    def architecture(self) -> str:
        """The model's name in a sentence: RWKV-7, Transformer."""
        return architecture_name(self.generation)

    @property
    def num_heads(self) -> int:
        """H = C / N."""
        return self.width // self.head_dim

    @property
    def parameter_dtype(self) -> str:
        """Dtype in which parameters are created and trained, and in which the recurrence and its state are kept.

        A loaded model may hold its parameters in the dtype of its file.
        """
        return "float64" if self.dtype == "float64" else "float32"

    def sizes(self) -> ResolvedSizes:
        """The sizes that may be left to the official functions of the width."""
        width = self.width
        if self.generation in ("4", "5.0"):
            return ResolvedSizes(self.ffn_width or 4 * width)
        if self.generation == "transformer":
            return ResolvedSizes(self.ffn_width or 4 * width, context_length=self.context_length or 2048)
        # At least 32: the official rounding would leave nothing of a narrow model.
        narrow_ffn_width = self.ffn_width or max(32, 7 * width // 2 // 32 * 32)
        if self.generation in ("5.1", "5.2"):
            return ResolvedSizes(narrow_ffn_width)
        if self.generation == "6":
            wide = 2 if width >= 4096 else 1  # as released: the trainer's own sizes do not depend on the width
            return ResolvedSizes(
                narrow_ffn_width, mix_rank=self.mix_rank or 32 * wide, decay_rank=self.decay_rank or 64 * wide
            )

        def rank(factor: float) -> int:
            # Python's round is half-to-even, as in the official trainer: width 1024 gives 64, not 96.
            return max(32, round(factor * math.sqrt(width) / 32) * 32)

        return ResolvedSizes(
            ffn_width=self.ffn_width or 4 * width,
            decay_rank=self.decay_rank or rank(2.5),
            iclr_rank=self.iclr_rank or rank(2.5),
            value_rank=self.value_rank or rank(1.7),
            gate_rank=self.gate_rank or rank(5.0),
        )

    def resolved(self) -> ModelConfig:
        """The same model with every None that its generation has a size for replaced by that size."""
        return dataclasses.replace(
            self, **{name: size or None for name, size in dataclasses.asdict(self.sizes()).items()}
        )

    def transformer_of_equal_size(self, context_length: int | None = None) -> ModelConfig:
        """A Transformer with this model's depth, width, heads and vocabulary, and as many parameters.

        Both have 12 C^2 parameters a layer, or nearly so. What this model has besides, such as RWKV-7's low-rank maps,
        the Transformer gets as feed-forward width, to the nearest multiple of 32.

        Args:
          context_length: most tokens of one text that its state holds; None is the default.

        Raises:
          ConfigError: a width that is no multiple of head_dim, as RWKV-4 may have it, or an odd head_dim.
        """
        plain = ModelConfig(
            generation="transformer",
            vocab_size=self.vocab_size,
            num_layers=self.num_layers,
            width=self.width,
            head_dim=self.head_dim,
            context_length=context_length,
            dtype=self.dtype,
        )
        of_one_step = self.num_layers * 2 * self.width * 32
        steps = round((self.num_parameters() - plain.num_parameters()) / of_one_step)
        return dataclasses.replace(plain, ffn_width=max(plain.sizes().ffn_width + 32 * steps, 32))

    def num_parameters(self) -> int:
        """Number of parameters, in closed form."""
        sizes, width = self.sizes(), self.width
        if self.generation == "transformer":
            block = 4 * width * width + 2 * width * sizes.ffn_width + 4 * width
            return 2 * self.vocab_size * width + self.num_layers * block + 2 * width
        vectors, matrices, ranks = self._time_mix_terms()
        heads = 2 * self.num_heads if self.generation in ("5.0", "5.1") else 0  # a decay and a bonus for each head
        time_mix = vectors * width + heads + matrices * width * width + 2 * width * ranks
        channel_mix = 2 * width * sizes.ffn_width
        channel_mix += width if self.generation == "7" else 2 * width + width * width
        block = time_mix + channel_mix + 4 * width
        first_layer = 2 * width
        if self.generation == "7" and not self.unused_value_residual:
            first_layer -= width + 2 * width * sizes.value_rank
        return 2 * self.vocab_size * width + self.num_layers * block + first_layer + 2 * width

    def _time_mix_terms(self) -> tuple[int, int, int]:
        """How many vectors [C] and matrices [C, C] a layer's time mixing has, and the sum of its maps' ranks."""
        sizes = self.sizes()
        if self.generation == "4":
            return 3 + 2, 4, 0  # blends; decay, bonus; R, K, V, O
        if self.generation == "5.0":
            return 3 + 2, 4, 0  # blends; ln_x; R, K, V, O
        if self.generation == "5.1":
            return 4 + 2, 5, 0  # and a gate G with its blend
        if self.generation == "5.2":
            return 4 + 2 + 2, 5, 0  # and decay, bonus
        if self.generation == "6":
            return 6 + 2 + 2, 5, 5 * sizes.mix_rank + sizes.decay_rank
        ranks = sizes.decay_rank + sizes.iclr_rank + sizes.value_rank + sizes.gate_rank
        return 6 + 3 + 3 + 2, 4, ranks  # blends; w0, a0, v0; k_k, k_a, r_k; ln_x; R, K, V, O

    def flops_per_token(self, sequence_length: int | None = None) -> int:
        """Floating-point operations of one token's forward pass; training costs three times as many.

        Two for each weight of a matrix product, and for the recurrence of each head 9 N^2 in RWKV-7 (decay, rank-one
        removal, rank-one write, read) and 5 N^2 in RWKV-5 and 6 (decay, write, read); 12 a channel in RWKV-4. In a
        Transformer 4 N for each head and key that a token sees (score, weighted sum of values).

        Args:
          sequence_length: T of the texts over whose tokens a Transformer's figure is the mean, (T + 1) / 2 keys being
            seen; None is its context length. RWKV's figure does not depend on it.
        """
        sizes, width = self.sizes(), self.width
        if self.generation == "transformer":
            weights = self.num_layers * (4 * width * width + 2 * width * sizes.ffn_width) + self.vocab_size * width
            return 2 * weights + self.num_layers * 2 * width * ((sequence_length or sizes.context_length) + 1)
        _, matrices, ranks = self._time_mix_terms()
        weights = matrices * width * width + 2 * width * ranks + 2 * width * sizes.ffn_width
        if self.generation != "7":
            weights += width * width
        weights = self.num_layers * weights - 2 * width * sizes.value_rank + self.vocab_size * width
        recurrence = {"4": 12, "7": 9 * self.head_dim}.get(self.generation, 5 * self.head_dim)
        return 2 * weights + self.num_layers * recurrence * width
