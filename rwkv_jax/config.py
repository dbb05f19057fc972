"""Every knob of a run, as frozen dataclasses that refuse contradictory values when they are built.

Standard library only, so that a config file, a test or a planner can be read without loading JAX.
Shape letters, here and in the whole project: B batch, T time, C width, H heads, N head size, F feed-forward
width, D low rank, V vocabulary, L layers.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping
from typing import Any, Literal


class ConfigError(ValueError):
    """A config value that cannot work; the message names the field, the value and the remedy."""


def _require(condition: bool, field: str, value: object, remedy: str) -> None:
    if not condition:
        raise ConfigError(f"{field} = {value!r}: {remedy}")


def _require_positive(config: object, prefix: str, *fields: str) -> None:
    for name in fields:
        value = getattr(config, name)
        _require(value > 0, f"{prefix}.{name}", value, "must be greater than zero")


Generation = Literal["4", "5.0", "5.1", "5.2", "6", "7", "transformer"]
"""RWKV-4 (Dove), the two previews of RWKV-5, RWKV-5 (Eagle), RWKV-6 (Finch), RWKV-7 (Goose), and the Transformer that
they are compared with."""

Remat = Literal["none", "operator", "full"]
"""What a block's backward pass recomputes."""

_OWN_FIELDS: dict[str, tuple[Generation, ...]] = {
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
class Sizes:
    """The sizes of a model that a config may leave open, none left open; 0 where the generation has no such size."""

    ffn_width: int
    mix_rank: int = 0
    decay_rank: int = 0
    iclr_rank: int = 0
    value_rank: int = 0
    gate_rank: int = 0
    context_length: int = 0


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The generation and the shape of a language model."""

    generation: Generation = "7"
    """Which RWKV: 4 (Dove), 5.2 (Eagle) or its previews 5.0 and 5.1, 6 (Finch), 7 (Goose); or transformer, to compare
    them with."""
    vocab_size: int = 8192
    """V: number of token ids; the tokenizer is trained to this size, or checked against it."""
    num_layers: int = 6
    """L: number of blocks; at least 2, since the official initialisation divides by L - 1."""
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
        _require(
            self.generation in generations,
            "model.generation",
            self.generation,
            f"must be one of {', '.join(generations)}",
        )
        _require_positive(self, "model", "vocab_size", "width", "head_dim")
        _require(self.num_layers >= 2, "model.num_layers", self.num_layers, "RWKV needs at least 2 layers")
        _require(self.width >= 2, "model.width", self.width, "must be at least 2")
        if self.generation != "4":
            _require(
                self.width % self.head_dim == 0,
                "model.width",
                self.width,
                f"must be a multiple of model.head_dim = {self.head_dim}; "
                f"the nearest are {self._nearest_widths()[0]} and {self._nearest_widths()[1]}",
            )
            _require(self.head_dim >= 2, "model.head_dim", self.head_dim, "must be at least 2")
        for name in ("ffn_width", *_OWN_FIELDS):
            value = getattr(self, name)
            _require(value is None or value > 0, f"model.{name}", value, "must be positive, or None for the default")
        for name, owners in _OWN_FIELDS.items():
            value = getattr(self, name)
            _require(
                value is None or self.generation in owners,
                f"model.{name}",
                value,
                f"{self.architecture} has no such size, only {self._named(owners)}; leave it out",
            )
        _require(
            not self.exponential_bonus or self.generation in ("5.0", "5.1"),
            "model.exponential_bonus",
            self.exponential_bonus,
            f"{self.architecture} has no such form, only RWKV-5.0 and 5.1; leave it out",
        )
        _require(
            not self.unused_value_residual or self.generation == "7",
            "model.unused_value_residual",
            self.unused_value_residual,
            f"{self.architecture} has no value residual, only RWKV-7; leave it out",
        )
        if self.generation == "transformer":
            _require(
                self.head_dim % 2 == 0,
                "model.head_dim",
                self.head_dim,
                "must be even: positions rotate pairs of channels",
            )
            _require(
                self.wkv_implementation is None,
                "model.wkv_implementation",
                self.wkv_implementation,
                "a Transformer has no WKV operator; leave it out",
            )
        _require(
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

    def sizes(self) -> Sizes:
        """The sizes that may be left to the official functions of the width."""
        width = self.width
        if self.generation in ("4", "5.0"):
            return Sizes(self.ffn_width or 4 * width)
        if self.generation == "transformer":
            return Sizes(self.ffn_width or 4 * width, context_length=self.context_length or 2048)
        # At least 32: the official rounding would leave nothing of a narrow model.
        narrow_ffn_width = self.ffn_width or max(32, 7 * width // 2 // 32 * 32)
        if self.generation in ("5.1", "5.2"):
            return Sizes(narrow_ffn_width)
        if self.generation == "6":
            wide = 2 if width >= 4096 else 1  # as released: the trainer's own sizes do not depend on the width
            return Sizes(narrow_ffn_width, mix_rank=self.mix_rank or 32 * wide, decay_rank=self.decay_rank or 64 * wide)

        def rank(factor: float) -> int:
            # Python's round is half-to-even, as in the official trainer: width 1024 gives 64, not 96.
            return max(32, round(factor * math.sqrt(width) / 32) * 32)

        return Sizes(
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


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and how it becomes tokens."""

    source: str = "python-stdlib"
    """`python-stdlib` (the source text of the running Python's standard library), or the path of a text file, of a
    folder, of a JSON-lines file (.jsonl), of a table (.parquet, .arrow, .feather), or of tokens (binidx: PATH.bin with
    PATH.idx beside it, by either name or by PATH)."""
    mixture: tuple[tuple[str, float], ...] = ()
    """Several sources and the share of the rows that each gives, as PATH 0.7 PATH 0.3, instead of data.source."""
    glob: str = "**/*"
    """Which files of a folder are read."""
    text_field: str = "text"
    """Field of a JSON-lines record, or column of a table, that holds its text."""
    held_out: float = 0.05
    """Share of the documents (of the bytes, for a single document) that is never trained on but evaluated; of binidx
    the last ones. 0 trains on all."""
    order: Literal["windows", "official"] = "windows"
    """Which tokens each row of a step reads: windows in an order of each epoch's own, or the official trainer's order
    (cubes modulo the magic prime)."""
    magic_prime: int | None = None
    """Prime of the official order; None takes the largest that the official scripts would give for these tokens."""
    tokenizer: str | None = None
    """`world`, `bytes`, or the path of a sentencepiece model, a Hugging Face tokenizer.json or a folder that holds one;
    None trains a sentencepiece model of model.vocab_size entries on the training documents."""
    cache_dir: str = "runs/corpora"
    """Folder in which token files and trained tokenizers are kept, one sub-folder a corpus."""

    def __post_init__(self) -> None:
        _require(bool(self.source), "data.source", self.source, "name a file, a folder or python-stdlib")
        _require(0 <= self.held_out < 1, "data.held_out", self.held_out, "must lie in [0, 1); 0 holds out nothing")
        _require(self.order in ("windows", "official"), "data.order", self.order, "must be windows or official")
        _require(
            self.magic_prime is None or self.order == "official",
            "data.magic_prime",
            self.magic_prime,
            f"data.order = {self.order!r} has no such number; leave it out, or set data.order to official",
        )
        if self.mixture:
            self._check_mixture()

    def _check_mixture(self) -> None:
        sources = [source for source, _ in self.mixture]
        for source, weight in self.mixture:
            place = f"data.mixture, weight of {source!r}"
            _require(0 < weight < math.inf, place, weight, "must be positive; leave out what is not to be read")
        _require(all(sources), "data.mixture", self.mixture, "each source needs a path")
        _require(
            len(set(sources)) == len(sources), "data.mixture", self.mixture, "names a source twice; add its weights"
        )
        default = type(self).source
        _require(
            self.source == default,
            "data.source",
            self.source,
            "data.mixture names the sources; leave this out, or name it in data.mixture with its weight",
        )
        _require(
            self.tokenizer is not None,
            "data.tokenizer",
            self.tokenizer,
            "the sources of data.mixture share one tokenizer; name it",
        )
        _require(
            self.order == "windows",
            "data.order",
            self.order,
            "the official order is one of a single source; leave out data.order or data.mixture",
        )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Adam with RWKV's parameter groups: weight decay on the large matrices only, `w0` at twice the rate."""

    learning_rate: float = 1e-3
    """Highest learning rate, reached after the warm-up."""
    final_learning_rate: float = 1e-4
    """Learning rate at the last step."""
    schedule: Literal["cosine", "linear", "wsd", "exponential", "constant"] = "cosine"
    """How the rate falls from one to the other: cosine, linear, wsd (warm-up, stable, linear decay), exponential
    (likewise, but by the same factor each step), constant."""
    warmup_steps: int = 10
    """Steps over which the rate rises linearly from 1% of its highest value."""
    decay_fraction: float = 0.2
    """Share of the steps, the last ones, in which a wsd or exponential schedule decays."""
    beta1: float = 0.9
    """Adam's decay of the gradient mean."""
    beta2: float = 0.99
    """Adam's decay of the squared gradient mean."""
    epsilon: float = 1e-18
    """Adam's epsilon; the official 1e-18 needs float32 moments, which is what we keep."""
    weight_decay: float = 0.1
    """Decoupled weight decay of the matrices (embedding, head, projections)."""
    clip_norm: float = 1.0
    """Global norm above which gradients are scaled down; 0 switches clipping off."""

    def __post_init__(self) -> None:
        _require_positive(self, "optimizer", "learning_rate", "epsilon")
        _require(self.warmup_steps >= 0, "optimizer.warmup_steps", self.warmup_steps, "must not be negative")
        _require(
            self.final_learning_rate >= 0, "optimizer.final_learning_rate", self.final_learning_rate, "must be >= 0"
        )
        _require(
            self.final_learning_rate <= self.learning_rate,
            "optimizer.final_learning_rate",
            self.final_learning_rate,
            f"must not exceed optimizer.learning_rate = {self.learning_rate}",
        )
        for name in ("beta1", "beta2"):
            _require(0 <= getattr(self, name) < 1, f"optimizer.{name}", getattr(self, name), "must lie in [0, 1)")
        _require(0 < self.decay_fraction <= 1, "optimizer.decay_fraction", self.decay_fraction, "must lie in (0, 1]")
        _require(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "must not be negative")
        _require(self.clip_norm >= 0, "optimizer.clip_norm", self.clip_norm, "must not be negative")
        _require(
            self.schedule in ("cosine", "linear", "wsd", "exponential", "constant"),
            "optimizer.schedule",
            self.schedule,
            "must be cosine, linear, wsd, exponential or constant",
        )
        _require(
            self.schedule != "exponential" or self.final_learning_rate > 0,
            "optimizer.final_learning_rate",
            self.final_learning_rate,
            "must be greater than zero, which an exponential decay never reaches; or set optimizer.schedule to wsd",
        )


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """The shape of a step."""

    num_steps: int = 1000
    """Optimizer steps in the whole run."""
    batch_size: int = 8
    """B: sequences in one optimizer step, over all micro-batches."""
    sequence_length: int = 512
    """T: tokens in one sequence."""
    accumulation_steps: int = 1
    """Micro-batches into which a step's batch is split; divides batch_size."""
    reset_at_documents: bool = True
    """Begin each document with the empty state: nothing of the text before it in the same row is seen. The official
    trainer does not."""
    carry_state: bool = False
    """Truncated backpropagation: each row goes on, with the state that it was left with, where it stopped a step ago,
    so that documents longer than sequence_length are read whole."""
    remat: Remat = "none"
    """What the backward pass recomputes rather than keeps: none (of the matrix products), operator (all but what the
    WKV operator read), full (all but each block's input)."""
    loss_chunk: int | None = None
    """Tokens whose logits exist at one time; None holds all [B * T, V] of them."""
    l2wrap: float = 1e-4
    """Strength of L2Wrap, the official pull of each token's largest logit towards zero; 0 switches it off."""
    max_bad_steps: int = 10
    """Consecutive steps with a loss or gradient that is not finite (each skipped) after which the run stops."""

    def __post_init__(self) -> None:
        _require_positive(
            self, "training", "num_steps", "batch_size", "sequence_length", "accumulation_steps", "max_bad_steps"
        )
        _require(
            self.batch_size % self.accumulation_steps == 0,
            "training.batch_size",
            self.batch_size,
            f"must be a multiple of training.accumulation_steps = {self.accumulation_steps}",
        )
        _require(
            self.loss_chunk is None or self.loss_chunk > 0, "training.loss_chunk", self.loss_chunk, "must be positive"
        )
        _require(self.l2wrap >= 0, "training.l2wrap", self.l2wrap, "must not be negative")


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """How a run is split over devices; the four sizes multiply to their number."""

    data: int | Literal["auto"] = "auto"
    """Devices that share a step's rows, each with the whole model; auto takes those that remain."""
    fsdp: int | Literal["auto"] = "auto"
    """Devices that share rows and, scattered between them, each weight; auto takes the fewest whose memory holds it."""
    tensor: int = 1
    """Devices that share heads, feed-forward width and vocabulary of each row; divides the number of heads."""
    sequence: int = 1
    """Devices that share the tokens of each row; divides training.sequence_length."""
    offload_optimizer: bool = False
    """Keep the optimizer's moments in the hosts' memory between steps."""

    def __post_init__(self) -> None:
        for name in ("data", "fsdp", "tensor", "sequence"):
            size = getattr(self, name)
            auto = name in ("data", "fsdp")
            remedy = "must be a whole number from 1" + (", or auto" if auto else "")
            _require((auto and size == "auto") or (type(size) is int and size >= 1), f"parallel.{name}", size, remedy)


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """The processes of a run on several hosts; each is started with the same command, and knows which one it is."""

    coordinator: str | None = None
    """HOST:PORT at which the others reach process 0. None asks SLURM, Open MPI or the TPU pod, where there is one;
    elsewhere the run has one process."""
    num_processes: int | None = None
    """Processes in all; goes with coordinator."""
    process_id: int | None = None
    """Which of them this one is, from 0; goes with coordinator."""
    detect: bool = True
    """Ask SLURM, Open MPI or the TPU pod when no coordinator is named; False runs one process in an allocation."""
    join_seconds: int = 300
    """How long processes wait for each other at the start."""
    heartbeat_seconds: int = 60
    """How long a process may be silent before it counts as lost, and all others end."""

    def __post_init__(self) -> None:
        _require_positive(self, "distributed", "join_seconds")
        _require(
            self.heartbeat_seconds >= 2, "distributed.heartbeat_seconds", self.heartbeat_seconds, "must be at least 2"
        )
        given = {name: getattr(self, name) for name in ("coordinator", "num_processes", "process_id")}
        missing = [f"distributed.{name}" for name, value in given.items() if value is None]
        if len(missing) == len(given):
            return
        if self.coordinator is None or self.num_processes is None or self.process_id is None:
            name, value = next((name, value) for name, value in given.items() if value is not None)
            raise ConfigError(
                f"distributed.{name} = {value!r}: goes with {' and '.join(missing)}; give all three, or none"
            )
        host, _, port = self.coordinator.rpartition(":")
        _require(
            bool(host) and port.isdecimal() and 0 < int(port) < 2**16,
            "distributed.coordinator",
            self.coordinator,
            "must be HOST:PORT of process 0, such as node0:1234, with a port from 1 to 65535",
        )
        _require_positive(self, "distributed", "num_processes")
        _require(
            0 <= self.process_id < self.num_processes,
            "distributed.process_id",
            self.process_id,
            f"must lie between 0 and {self.num_processes - 1}, since distributed.num_processes = {self.num_processes}",
        )


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Held-out loss and samples."""

    every: int = 200
    """Steps between evaluations; the last step is always evaluated."""
    batches: int = 16
    """Batches of held-out text in an evaluation during the run; the last evaluation reads all of it."""
    sample_prompts: tuple[str, ...] = ("def", "class", "import")
    """Texts to continue; one is sampled at each evaluation, all of them at the end."""
    sample_tokens: int = 128
    """Tokens in a sample."""
    sample_temperature: float = 0.8
    """Sampling temperature."""
    sample_top_p: float = 0.9
    """Nucleus of the sampling distribution."""

    def __post_init__(self) -> None:
        _require_positive(self, "evaluation", "every", "batches", "sample_tokens")
        _require(self.sample_temperature >= 0, "evaluation.sample_temperature", self.sample_temperature, "must be >= 0")
        _require(0 < self.sample_top_p <= 1, "evaluation.sample_top_p", self.sample_top_p, "must lie in (0, 1]")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """What is saved, and when."""

    every: int = 200
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 2
    """How many of the newest checkpoints stay; the best one stays beside them."""

    def __post_init__(self) -> None:
        _require_positive(self, "checkpoint", "every", "keep")


@dataclasses.dataclass(frozen=True)
class LoggingConfig:
    """Where figures go besides the console and metrics.jsonl."""

    every: int = 10
    """Steps between lines of metrics.jsonl; their losses are means over these steps."""
    tensorboard: bool = False
    """Write TensorBoard events beside metrics.jsonl (needs the `tensorboard` extra)."""
    wandb: str | None = None
    """Weights & Biases project to log to (needs the `wandb` extra)."""

    def __post_init__(self) -> None:
        _require_positive(self, "logging", "every")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training run."""

    run_dir: str = "runs/default"
    """Folder of the run: checkpoints, metrics, samples. A run that is there already is resumed."""
    seed: int = 0
    """Seed of the initial parameters, of the order of the data and of the samples."""
    initial_weights: str | None = None
    """Weights to start from, to fine-tune them: a file, a folder, a run or a name on the hub, as `rwkv convert` reads
    them; data.tokenizer names their tokenizer. None starts from the official initial values. A run that was begun goes
    on from its own checkpoints."""
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)
    distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    logging: LoggingConfig = dataclasses.field(default_factory=LoggingConfig)
    profile: tuple[int, int] | None = None
    """First and last step to trace; the trace is written to RUN_DIR/profile."""

    def __post_init__(self) -> None:
        _require(bool(self.run_dir), "run_dir", self.run_dir, "name a folder")
        _require(
            self.initial_weights is None or self.data.tokenizer is not None,
            "data.tokenizer",
            self.data.tokenizer,
            f"initial_weights = {self.initial_weights!r} were trained with a tokenizer; name it, or its folder",
        )
        _require(0 <= self.seed < 2**32, "seed", self.seed, "must fit in 32 bits and not be negative")
        _require(
            self.training.sequence_length % self.parallel.sequence == 0,
            "training.sequence_length",
            self.training.sequence_length,
            f"must be a multiple of parallel.sequence = {self.parallel.sequence}",
        )
        if self.model.generation == "transformer":
            self._check_transformer()
        _require(
            self.optimizer.warmup_steps < self.training.num_steps,
            "optimizer.warmup_steps",
            self.optimizer.warmup_steps,
            f"must be less than training.num_steps = {self.training.num_steps}",
        )
        _require(
            not self.training.carry_state or self.data.order == "windows",
            "data.order",
            self.data.order,
            "training.carry_state reads each row on from where it stopped; leave data.order out, or switch it off",
        )
        if self.profile is not None:
            first, last = self.profile
            _require(0 <= first <= last, "profile", self.profile, "must be FIRST LAST with 0 <= FIRST <= LAST")

    def _check_transformer(self) -> None:
        _require(
            self.initial_weights is None,
            "initial_weights",
            self.initial_weights,
            "a Transformer has no official weights; leave it out",
        )
        _require(
            self.parallel.sequence == 1,
            "parallel.sequence",
            self.parallel.sequence,
            "a Transformer's attention is not split over time; use parallel.data, fsdp or tensor",
        )
        _require(
            not self.training.carry_state,
            "training.carry_state",
            self.training.carry_state,
            "a Transformer's state has room for model.context_length tokens only, not for rows that go on for ever; "
            "switch it off, or train an RWKV",
        )
        context_length = self.model.sizes().context_length
        _require(
            self.training.sequence_length <= context_length,
            "training.sequence_length",
            self.training.sequence_length,
            f"must be at most model.context_length = {context_length}; make one shorter or the other longer",
        )


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain nested dicts, ready for JSON."""
    return dataclasses.asdict(config)


def from_dict(values: Mapping[str, Any]) -> TrainConfig:
    """The config that `to_dict`, after a trip through JSON, came from; fields that are missing take their default.

    Raises:
      ConfigError: a field that this version does not have, or a value that cannot work.
    """
    return _from_dict(TrainConfig, values, "")


def _from_dict(kind: type, values: Mapping[str, Any], prefix: str) -> Any:
    types = typing.get_type_hints(kind)
    unknown = sorted(values.keys() - types.keys())
    _require(not unknown, prefix + ", ".join(unknown), [values[name] for name in unknown], "no such field")
    arguments = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(types[name]):
            value = _from_dict(types[name], value, f"{prefix}{name}.")  # pyright: ignore[reportArgumentType]
        if name == "remat" and isinstance(value, bool):  # as runs of before there were three kinds have it
            value = "full" if value else "none"
        arguments[name] = _tuples(value)
    return kind(**arguments)


def _tuples(value: Any) -> Any:
    """Lists, at any depth, as the tuples that JSON has not."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
