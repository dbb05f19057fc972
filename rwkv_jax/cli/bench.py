"""`rwkv bench`: measures latency, throughput and memory of a model, loaded or random."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from rwkv_jax.checks import require_counts
from rwkv_jax.cli.flags import PinFlags, Pinned, Quantize, WeightsFlags
from rwkv_jax.cli.machine import describe_machine, find_devices
from rwkv_jax.config import Architecture, ConfigError, Generation, ModelConfig
from rwkv_jax.tables import format_table

if TYPE_CHECKING:
    from rwkv_jax.bench.measure import Timing
    from rwkv_jax.data.tokenizers import Tokenizer
    from rwkv_jax.inference.engine.engine import Engine
    from rwkv_jax.models import LanguageModel


@dataclasses.dataclass(frozen=True)
class BenchedModel:
    """The model to measure."""

    source: tyro.conf.Positional[Annotated[str | None, tyro.conf.arg(metavar="[SOURCE]")]] = None
    """A run folder, a file or folder of weights, or OWNER/NAME[/FILE] on the Hugging Face hub; or give --random."""
    random: str | None = None
    """LAYERSxWIDTH such as 12x768: random weights of that shape instead."""
    generation: Generation | str = "7"
    """With --random: RWKV generation."""
    architecture: Architecture = "rwkv"
    """With --random: rwkv or transformer."""
    vocab_size: int = 65536
    """With --random: vocabulary size."""
    tokenizer: str | None = None
    """world, bytes, a sentencepiece model or a tokenizer.json; None takes the one saved with the weights."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """dtype of weights and computation; None takes the file's, or float32 with --random."""
    quantize: Quantize | None = None
    """Quantize the matrices, everything else becomes float32; None keeps the weights as they are."""
    tune: Literal["auto", "never"] = "auto"
    """auto takes what is fastest by measurement on this device, measured now if need be; never, the tables' choices."""
    pinned: Pinned = dataclasses.field(default_factory=PinFlags)

    def load(self) -> tuple[LanguageModel, Tokenizer]:
        """The model and a tokenizer.

        Raises:
          ConfigError: neither or both of source and random, an invalid shape, no device, or as
            `WeightsFlags.load`.
        """
        if (self.source is None) == (self.random is None):
            raise ConfigError("bench: name weights or give --random LAYERSxWIDTH, one of the two")
        if self.source is not None:
            flags = WeightsFlags(
                self.source, tokenizer=self.tokenizer, dtype=self.dtype, quantize=self.quantize, pinned=self.pinned
            )
            return flags.load()

        from rwkv_jax.bench.random_model import NumberTokenizer, random_model

        config = self.random_config()
        find_devices()
        return random_model(config, self.quantize), NumberTokenizer(config.vocab_size)

    def random_config(self) -> ModelConfig:
        """Config of the --random model. Raises ConfigError for an invalid shape."""
        assert self.random is not None
        shape = re.fullmatch(r"(\d+)x(\d+)", self.random)
        if shape is None:
            raise ConfigError(f"random = {self.random!r}: must be LAYERSxWIDTH, such as 12x768")
        if self.tokenizer is not None:
            raise ConfigError(f"tokenizer = {self.tokenizer!r}: random weights have one of their own; leave it out")
        if self.quantize is not None and self.dtype is not None:
            raise ConfigError(f"dtype = {self.dtype!r}: random weights that are packed are in float32; leave it out")
        return ModelConfig(
            generation=self.generation,
            architecture=self.architecture,
            vocab_size=self.vocab_size,
            num_layers=int(shape[1]),
            width=int(shape[2]),
            dtype=self.dtype or "float32",
        )

    def describe(self, model: LanguageModel) -> str:
        """One-line description of the model."""
        from rwkv_jax.bench.measure import weights_format

        config = model.config
        return (
            f"{config.title}, {config.num_layers} x {config.width}, vocabulary {config.vocab_size}, "
            f"{config.num_parameters() / 1e6:.1f}M parameters in {weights_format(model)}"
            f"{', random weights' if self.random else ''}"
        )


@dataclasses.dataclass(frozen=True)
class Latency:
    """Time per token after contexts of several lengths, one text at a time."""

    model: Annotated[BenchedModel, tyro.conf.arg(name="")] = dataclasses.field(default_factory=BenchedModel)
    contexts: tuple[int, ...] = (512, 2048, 8192)
    """Numbers of tokens before the timed ones."""
    tokens: int = 32
    """Tokens timed per repetition, rounded up to whole bursts of 8."""
    repetitions: int = 5
    """Repetitions, of which the median is taken; contexts are interleaved."""
    json: bool = False
    """Print JSON rather than a table."""

    def run(self) -> None:
        """Measures and prints."""
        from rwkv_jax.bench.measure import latency
        from rwkv_jax.inference.engine.engine import Engine, EngineOptions

        require_counts(contexts=self.contexts, tokens=(self.tokens,), repetitions=(self.repetitions,))
        if self.model.random is not None:
            _require_constant_state(self.model.random_config())
        model, tokenizer = self.model.load()
        _require_constant_state(model.config)

        engine = Engine(model, tokenizer, EngineOptions(num_slots=1, prefix_bytes=0, tune=self.model.tune))
        del model  # the engine has its own copy of the layers
        found = latency(engine, self.contexts, num_tokens=self.tokens, repetitions=self.repetitions)
        columns = ("tokens before", "ms a token", "lowest - highest")
        rows = [(f"{context:,}", f"{1e3 * timing.median:.4g}", _spread(timing)) for context, timing in found.items()]
        values = {str(context): _record(timing) for context, timing in found.items()}
        _report(self.model.describe(engine.model), columns, rows, {"seconds_per_token": values}, self.json)


@dataclasses.dataclass(frozen=True)
class Throughput:
    """Tokens per second of several texts at once."""

    model: Annotated[BenchedModel, tyro.conf.arg(name="")] = dataclasses.field(default_factory=BenchedModel)
    batch_sizes: tuple[int, ...] = (1, 4, 16, 64)
    """Numbers of texts at once, each in an engine with as many slots."""
    tokens: int = 32
    """Tokens timed per text and repetition, rounded up to whole bursts of 8."""
    repetitions: int = 5
    """Repetitions, of which the median is taken; numbers of texts are interleaved."""
    json: bool = False
    """Print JSON rather than a table."""

    def run(self) -> None:
        """Measures and prints."""
        from rwkv_jax.bench.measure import throughput
        from rwkv_jax.inference.engine.engine import Engine, EngineOptions
        from rwkv_jax.models.decoding import unstacked

        require_counts(batch_sizes=self.batch_sizes, tokens=(self.tokens,), repetitions=(self.repetitions,))
        model, tokenizer = self.model.load()

        model = unstacked(model)  # once, for all engines

        def engine_of(size: int) -> Engine:
            options = EngineOptions(num_slots=size, batch_sizes=(size,), prefix_bytes=0, tune=self.model.tune)
            return Engine(model, tokenizer, options)

        engines = {size: engine_of(size) for size in sorted(set(self.batch_sizes))}
        found = throughput(engines, num_tokens=self.tokens, repetitions=self.repetitions)
        columns = ("texts at once", "tokens/s", "ms a token of each", "lowest - highest")
        rows = [
            (f"{size}", f"{size / timing.median:,.1f}", f"{1e3 * timing.median:.4g}", _spread(timing))
            for size, timing in found.items()
        ]
        values = {str(size): _record(timing) for size, timing in found.items()}
        _report(self.model.describe(model), columns, rows, {"seconds_per_token_of_each": values}, self.json)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of the parameters, and of a text's state compared with the cache of a Transformer of equal size."""

    model: Annotated[BenchedModel, tyro.conf.arg(name="")] = dataclasses.field(default_factory=BenchedModel)
    contexts: tuple[int, ...] = (512, 2048, 8192, 32768, 131072)
    """Lengths of the text in tokens."""
    json: bool = False
    """Print JSON rather than a table."""

    def run(self) -> None:
        """Counts and prints."""
        from rwkv_jax.bench.measure import memory

        require_counts(contexts=self.contexts)
        model, _ = self.model.load()

        use = memory(model, self.contexts)
        held = ", ".join(f"{size / 1e6:,.1f} MB of {name}" for name, size in use.parameters.items())
        agrees = "as" if use.state == use.state_expected else f"NOT {use.state_expected:,} as"
        lines = (
            f"parameters: {held}",
            f"state of a text: {use.state:,} bytes, {agrees} in closed form; an engine adds {use.logits:,} of logits",
            f"Transformer of equal size: {use.transformer}",
        )
        columns = ("tokens of a text", "state", "Transformer's keys and values", "ratio")
        rows = [
            (f"{context:,}", f"{use.state / 1e6:,.2f} MB", f"{size / 1e6:,.2f} MB", f"{size / use.state:,.1f}")
            for context, size in use.caches.items()
        ]
        _report("\n".join((self.model.describe(model), *lines)), columns, rows, dataclasses.asdict(use), self.json)


@dataclasses.dataclass(frozen=True)
class Bench:
    """Measure latency, throughput or memory on this machine, which should be idle otherwise."""

    what: Annotated[
        Annotated[Latency, tyro.conf.subcommand("latency")]
        | Annotated[Throughput, tyro.conf.subcommand("throughput")]
        | Annotated[Memory, tyro.conf.subcommand("memory")],
        tyro.conf.arg(name=""),
    ]

    def run(self) -> None:
        """Measures and prints."""
        self.what.run()


def _report(
    model: str, columns: tuple[str, ...], rows: list[tuple[str, ...]], values: dict[str, Any], as_json: bool
) -> None:
    if as_json:
        print(json.dumps({"machine": describe_machine(), "model": model.splitlines()[0]} | values))
        return
    print(describe_machine())
    print(f"{model}\n")
    print(format_table([columns, *rows], ">" * len(columns), indent=""))


def _record(timing: Timing) -> dict[str, Any]:
    return {"median": timing.median, "all": timing.seconds}


def _spread(timing: Timing) -> str:
    """Milliseconds."""
    return f"{1e3 * min(timing.seconds):.2f} - {1e3 * max(timing.seconds):.2f}"


def _require_constant_state(config: ModelConfig) -> None:
    """Rejects a Transformer, because the engine would not measure its latency fairly.

    Its cache always has room for the longest context, and bursts copy whole rows of it.
    """
    if config.sizes().context_length:
        raise ConfigError(
            "bench latency: a Transformer's cache in an engine is as long after a short context as after the longest; "
            "run benchmarks/decode_context.py of the source code, where each context has a cache of its own"
        )
