"""Command lines: the config of train.py, and the `rwkv` command."""

from __future__ import annotations

import dataclasses
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from rwkv_jax.config import ConfigError, DataConfig, ModelConfig, TrainConfig

if TYPE_CHECKING:
    from rwkv_jax.data.tokenizers import Tokenizer


def load_config(path: Path) -> TrainConfig:
    """The TrainConfig that a config file's `config()` returns.

    Raises:
      ConfigError: there is no such file, or it has no `config()` that returns a TrainConfig.
    """
    if not path.is_file():
        raise ConfigError(f"{str(path)!r}: no such config file; configs/ holds those that come with the project")
    function = runpy.run_path(str(path)).get("config")
    config = function() if callable(function) else None
    if not isinstance(config, TrainConfig):
        raise ConfigError(f"{str(path)!r}: must define config() -> TrainConfig")
    return config


def parse_train_config(arguments: Sequence[str]) -> TrainConfig:
    """The config of `train.py [CONFIG_FILE] [--field value ...]`; exits on --help and on fields that do not exist.

    Raises:
      ConfigError: the file, or a value, cannot work.
    """
    arguments = list(arguments)
    default, place = TrainConfig(), "train.py [CONFIG_FILE]"
    if arguments and not arguments[0].startswith("-"):
        place = f"train.py {arguments[0]}"
        default = load_config(Path(arguments.pop(0)))
    return tyro.cli(
        TrainConfig,
        args=arguments,
        default=default,
        prog=place,
        description="Train a language model. Defaults shown are those of CONFIG_FILE, if one is named.",
    )


@dataclasses.dataclass(frozen=True)
class Generate:
    """Sample from a training run, or from weights of any generation in any format that `convert` reads."""

    source: tyro.conf.Positional[str]
    """A run folder, a file or folder of weights, or OWNER/NAME[/FILE] on the Hugging Face hub."""
    prompt: str = ""
    """Text to continue."""
    tokens: int = 256
    """Most tokens to write; the text ends earlier where the model ends it."""
    temperature: float = 0.8
    """Divides the logits; 0 always takes the likeliest token."""
    top_p: float = 0.9
    """Keep the likeliest tokens whose probabilities add up to this."""
    top_k: int = 0
    """Keep this many of the likeliest tokens; 0 keeps all."""
    seed: int = 0
    """Seed of the draws: the same seed writes the same text."""
    checkpoint: Literal["newest", "best"] = "newest"
    """Which of a run's checkpoints to use."""
    tokenizer: str | None = None
    """world, bytes, a sentencepiece model or a tokenizer.json; None takes the one beside the weights."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """In which to hold weights and compute; None is what the weights are in."""

    def run(self) -> None:
        """Loads the model and writes its text to stdout as it comes."""
        from rwkv_jax.inference.generate import Generator
        from rwkv_jax.inference.sampling import Sampling

        if self.tokens < 1:
            raise ConfigError(f"tokens = {self.tokens}: must be at least 1")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed = {self.seed}: must fit in 32 bits and not be negative")
        try:
            self.prompt.encode()
        except UnicodeEncodeError as error:  # a command line's stray bytes arrive as lone surrogates
            raise ConfigError(f"prompt = {self.prompt!r}: is not UTF-8") from error
        sampling = Sampling(self.temperature, self.top_p, self.top_k)
        graphdef, params, model, tokenizer = self._load()
        generator = Generator(graphdef, model, tokenizer)
        print(self.prompt, end="", flush=True)
        for text in generator.stream(params, self.prompt, self.tokens, sampling, self.seed):
            print(text, end="", flush=True)
        print()

    def _load(self) -> tuple[Any, Any, ModelConfig, Tokenizer]:
        from flax import nnx

        from rwkv_jax.data.tokenizers import load_tokenizer
        from rwkv_jax.training.checkpoints import load_model, load_run_tokenizer
        from rwkv_jax.weights.pretrained import find_tokenizer, from_pretrained
        from rwkv_jax.weights.sources import find_weights

        place = find_weights(self.source)
        if place.is_dir():
            if self.tokenizer is not None or self.dtype is not None:
                raise ConfigError(f"{place}: a run has its own tokenizer and dtype; leave --tokenizer and --dtype out")
            tokenizer = load_run_tokenizer(place)
            loaded = load_model(place, self.checkpoint)
            return loaded.graphdef, loaded.params, loaded.config.model, tokenizer
        if self.checkpoint != "newest":
            raise ConfigError(
                f"checkpoint = {self.checkpoint!r}: {place} is no run, it has no checkpoints to choose from"
            )
        model = from_pretrained(place, dtype=self.dtype)
        vocab_size = model.config.vocab_size
        if self.tokenizer is None:
            tokenizer = find_tokenizer(place, vocab_size)
        else:
            tokenizer = load_tokenizer(self.tokenizer, vocab_size)
        if tokenizer is None:
            raise ConfigError(
                f"{place}: no tokenizer lies beside it; name one with --tokenizer (world for a World model, whose "
                "vocabulary has 65536 ids, 20B_tokenizer.json for a Pile model with 50277; this one has "
                f"{vocab_size})"
            )
        return *nnx.split(model, nnx.Param), model.config, tokenizer


@dataclasses.dataclass(frozen=True)
class Convert:
    """Write weights anew in another format; reads official .pth, safetensors, transformers, fla and training runs."""

    source: tyro.conf.Positional[str]
    """A file or folder of weights, a run folder, or OWNER/NAME[/FILE] on the Hugging Face hub."""
    target: tyro.conf.Positional[Path]
    """FILE.pth, FILE.safetensors, or a folder, which gets model.safetensors and the tokenizer; must not exist yet."""
    layout: Literal["official", "transformers", "flash-linear-attention"] = "official"
    """Whose names the tensors get: transformers reads RWKV-4, flash-linear-attention RWKV-6 and 7."""
    dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = None
    """To which tensors are rounded; None leaves every bit as it is."""
    tokenizer: str | None = None
    """To write beside the weights: world, bytes or a file; None takes the one beside the source."""

    def run(self) -> None:
        """Converts tensor by tensor and says what was written."""
        from rwkv_jax.weights.pretrained import convert

        model = convert(self.source, self.target, layout=self.layout, dtype=self.dtype, tokenizer=self.tokenizer)
        print(
            f"{self.target}: RWKV-{model.generation} {model.num_layers} x {model.width}, "
            f"{model.num_parameters() / 1e6:.1f}M parameters, vocabulary {model.vocab_size}, {self.layout} names"
        )


@dataclasses.dataclass(frozen=True)
class Tokenize:
    """Write text as official token files, TARGET.bin and TARGET.idx, from which train.py and others can train."""

    source: tyro.conf.Positional[str]
    """A text file, a folder, a .jsonl file, a table (.parquet, .arrow, .feather), or python-stdlib."""
    target: tyro.conf.Positional[Path]
    """What is common to the names of both files, which must not exist yet."""
    tokenizer: str
    """world, bytes, a sentencepiece model, a tokenizer.json, or a folder that holds one."""
    vocab_size: int = 65536
    """V of the models that will be trained, which the tokenizer must match; World's by default."""
    glob: str = "**/*"
    """Which files of a folder are read."""
    text_field: str = "text"
    """Field of a JSON-lines record, or column of a table, that holds its text."""

    def run(self) -> None:
        """Writes the files and says how many tokens they have, and the primes of the official order for them."""
        from rwkv_jax.data.order import magic_primes
        from rwkv_jax.data.tokenize import tokenize
        from rwkv_jax.data.tokenizers import load_tokenizer

        data = DataConfig(source=self.source, glob=self.glob, text_field=self.text_field, tokenizer=self.tokenizer)
        made = tokenize(data, load_tokenizer(self.tokenizer, self.vocab_size), self.target, print)
        print(f"{made.bin_path} and {made.idx_path.name}: {made.num_tokens} tokens, {made.num_documents} documents")
        for sequence_length, prime in magic_primes(made.num_tokens).items():
            print(f"magic prime for sequences of {sequence_length}: {prime}")


@dataclasses.dataclass(frozen=True)
class Plan:
    """Compile a run's training step for devices that need not be there: memory, FLOPs, collectives, best speed."""

    config_file: tyro.conf.Positional[Path]
    """The run, as train.py takes it; comes first, and its fields can be changed by flags such as --parallel.fsdp 64."""
    topology: str
    """HOSTSxGPUS such as h100:8x8 (also h200, a100-80g), a TPU slice such as v5p:4x4x4 or v5e:16x16 (also v4, v6e), or
    a number of CPU devices such as cpu:8."""
    json: Path | None = None
    """File that gets the plan as JSON, too; must not exist yet."""
    config: Annotated[TrainConfig, tyro.conf.arg(name="")] = dataclasses.field(default_factory=TrainConfig)

    def run(self) -> None:
        """Compiles, which takes from seconds to minutes, and prints what came of it."""
        from rwkv_jax.parallel.devices import parse_topology, prepare_compiler

        topology = parse_topology(self.topology)
        if self.json is not None and self.json.exists():
            raise ConfigError(f"json = {str(self.json)!r}: is there already; name another file")
        if self.json is not None and not self.json.parent.is_dir():
            raise ConfigError(f"json = {str(self.json)!r}: there is no folder {str(self.json.parent)!r}; make it first")
        prepare_compiler(topology)

        from rwkv_jax.parallel.plan_report import describe, write_json
        from rwkv_jax.training.plan import plan_run

        plan = plan_run(self.config, topology)
        print(describe(plan))
        if self.json is not None:
            write_json(plan, self.json)


def parse_plan(arguments: Sequence[str]) -> Plan:
    """The command `rwkv plan CONFIG_FILE --topology NAME [--field value ...]`; exits as `parse_train_config` does.

    Raises:
      ConfigError: no file comes first, or the file, or a value, cannot work.
    """
    first = arguments[0] if arguments else ""
    if first in ("-h", "--help"):
        return tyro.cli(Plan, args=arguments, default=Plan(tyro.MISSING, tyro.MISSING), prog="rwkv plan")
    if not first or first.startswith("-"):  # a file behind flags would be named, but not read
        raise ConfigError(
            f"plan: {first!r} stands where the config file does; name that first, since flags change what it says: "
            "rwkv plan CONFIG_FILE --topology NAME [--field value ...]"
        )
    path = Path(first)
    default = Plan(path, tyro.MISSING, config=load_config(path))
    return tyro.cli(Plan, args=arguments, default=default, prog=f"rwkv plan {path}")


def main() -> None:
    """The `rwkv` command."""
    commands = {"generate": Generate, "convert": Convert, "tokenize": Tokenize, "plan": Plan}
    try:
        if sys.argv[1:2] == ["plan"]:  # its defaults are those of the file that it names
            return parse_plan(sys.argv[2:]).run()
        tyro.extras.subcommand_cli_from_dict(commands, prog="rwkv", description="RWKV in JAX.").run()
    except (ConfigError, OSError) as error:  # OSError: a full disk, say
        sys.exit(f"rwkv: {error}")
