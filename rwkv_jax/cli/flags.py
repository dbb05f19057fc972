"""Flags shared by commands: the model and sampling."""

from __future__ import annotations

import dataclasses
import functools
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from rwkv_jax.cli.machine import find_devices
from rwkv_jax.config import ConfigError

if TYPE_CHECKING:
    from rwkv_jax.chat.template import ChatTemplate
    from rwkv_jax.data.tokenizers import Tokenizer
    from rwkv_jax.inference.sampling.params import SamplingParams
    from rwkv_jax.models import LanguageModel
    from rwkv_jax.tuning.adapter import Adapter

Quantize = Literal["int8", "int4", "bfloat16"]
"""Formats of `rwkv_jax.weights.quantized`."""


License = Annotated[
    str | None,
    tyro.conf.arg(
        help="License for the model card of a folder, the hub's identifier, such as apache-2.0. None: the card says "
        "that none is stated, and `rwkv push` asks for one."
    ),
]
"""The type of a field that has the license of what is written."""


@dataclasses.dataclass(frozen=True)
class PinFlags:
    """Which weights exactly SOURCE stands for."""

    revision: Annotated[str | None, tyro.conf.arg(metavar="REVISION")] = None
    """Branch, tag or commit of a model on the Hugging Face hub; None takes its main branch."""
    sha256: Annotated[str | None, tyro.conf.arg(metavar="HEX")] = None
    """SHA-256 that the file of weights must have, compared before it is opened; `rwkv info --hash` tells it."""

    def find(self, source: str) -> Path:
        """`find_weights`."""
        from rwkv_jax.weights.sources import find_weights

        return find_weights(source, revision=self.revision, sha256=self.sha256)


Pinned = Annotated[PinFlags, tyro.conf.arg(name="")]
"""The type of a field with these flags."""


@dataclasses.dataclass(frozen=True)
class WeightsFlags:
    """A model with its tokenizer."""

    source: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="SOURCE")]]
    """A run folder, a file or folder of weights, or OWNER/NAME[/FILE] on the Hugging Face hub."""
    checkpoint: Literal["newest", "best"] = "newest"
    """Checkpoint of a run to use."""
    ema: bool = False
    """Use the averages of a run's weights (training.ema_decay)."""
    tokenizer: str | None = None
    """world, bytes, a sentencepiece model or a tokenizer.json; None takes the one saved with the weights."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """dtype of weights and computation; None takes the file's."""
    quantize: Quantize | None = None
    """Quantize the matrices, everything else becomes float32; None keeps the weights as they are."""
    tables: Literal["device", "folded", "host"] = "device"
    """Where RWKV-7a, 7b and 8-rc00 have their tables by token. folded adds what 7a and 7b add to their rows beforehand;
    host does, too, and keeps them in the host's memory, of which a step fetches its tokens' rows."""
    pinned: Pinned = dataclasses.field(default_factory=PinFlags)

    @functools.cached_property
    def place(self) -> Path:
        """The file or the run that SOURCE stands for, found when it is asked for first; raises as `find_weights`."""
        return self.pinned.find(self.source)

    def load(self, adapter: TunedFlags | None = None) -> tuple[LanguageModel, Tokenizer]:
        """Loads the tokenizer, then the model, with an adapter if the flags name one.

        Raises:
          ConfigError: no device, incompatible flags, or as `from_pretrained` and `load_tokenizer`.
        """
        find_devices()
        model, tokenizer = self._load_from(self.place)
        return (model if adapter is None else adapter.put_into(model, self)), tokenizer

    def load_with_template(
        self, name: str | None, adapter: TunedFlags | None = None
    ) -> tuple[LanguageModel, Tokenizer, ChatTemplate]:
        """Loads as `load`, and the chat template of a name, or else the model's own.

        That of a run on chats is what wrote them.

        Raises:
          ConfigError: as `load`, `named_template` and `choose_template`.
        """
        from rwkv_jax.chat.choice import named_template
        from rwkv_jax.inference.chat.choice import choose_template

        named = None if name is None else named_template(name)
        find_devices()
        place = self.place
        if named is None and (format_of_run := chat_format_of(place)) is not None:
            named = named_template(format_of_run)
        model, tokenizer = self._load_from(place)
        if adapter is not None:
            model = adapter.put_into(model, self)
        return model, tokenizer, choose_template(place, tokenizer) if named is None else named

    def _load_from(self, place: Path) -> tuple[LanguageModel, Tokenizer]:
        from rwkv_jax.weights.pretrained import from_pretrained

        if place.is_dir():
            return self._load_run(place)
        if self.checkpoint != "newest":
            raise ConfigError(
                f"checkpoint = {self.checkpoint!r}: {place} is no run, it has no checkpoints to choose from"
            )
        if self.ema:
            raise ConfigError(f"ema = True: {place} is no run, which alone has averages of its weights; leave it out")
        tokenizer = self._find_tokenizer(place)
        return from_pretrained(place, dtype=self.dtype, quantize=self.quantize, tables=self.tables), tokenizer

    def _load_run(self, run_dir: Path) -> tuple[LanguageModel, Tokenizer]:
        from flax import nnx

        from rwkv_jax.run_folder import load_run_tokenizer
        from rwkv_jax.weights.pretrained import from_pretrained, load_run
        from rwkv_jax.weights.table_places import with_tables

        if self.tokenizer is not None or self.dtype is not None:
            raise ConfigError(f"{run_dir}: a run has its own tokenizer and dtype; leave --tokenizer and --dtype out")
        if self.quantize is not None and (self.checkpoint != "newest" or self.ema):
            raise ConfigError(
                f"quantize = {self.quantize!r}: packs a run's newest checkpoint; leave --checkpoint and --ema out, or "
                "--quantize"
            )
        tokenizer = load_run_tokenizer(run_dir)
        if self.quantize is not None:
            return from_pretrained(run_dir, quantize=self.quantize, tables=self.tables), tokenizer
        loaded = load_run(run_dir, self.checkpoint, ema=self.ema)
        return with_tables(nnx.merge(loaded.graphdef, loaded.params), self.tables), tokenizer

    def _find_tokenizer(self, place: Path) -> Tokenizer:
        tokenizer, vocab_size = tokenizer_for(place, self.tokenizer)
        if tokenizer is None:
            raise ConfigError(
                f"{place}: no tokenizer lies beside it; name one with --tokenizer (world for a World model, whose "
                "vocabulary has 65536 ids, 20B_tokenizer.json for a Pile model with 50277; this one has "
                f"{vocab_size})"
            )
        return tokenizer


def _tunes_a_state(path: Path) -> bool:
    """Whether a path is the folder of a run that tunes a state."""
    from rwkv_jax.run_folder import RUN_FILE, run_config

    return (path / RUN_FILE).is_file() and run_config(path).tuning.state


def tell_of_state(source: str, target: object) -> None:
    """Says so if a source is a run that tunes a state, which no file of weights has."""
    if _tunes_a_state(Path(source).expanduser()):
        print(f"{source}: its tuned state is not in {target}; write it with rwkv_jax.tuning.save_tuned_state")


@dataclasses.dataclass(frozen=True)
class TunedFlags:
    """What was tuned of the model: the state in which texts begin, and adapters."""

    state: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """Tuned state in which every text begins: a .pth or safetensors file, or the folder of a run that tunes one. None:
    that of SOURCE if it is such a run, else none."""
    adapter: Annotated[tuple[str, ...], tyro.conf.arg(metavar="[NAME=]PATH ...")] = ()
    """Adapter to use: a folder of Hugging Face's peft or a .pth by RWKV-PEFT, not merged. A server takes several, which
    requests name as their model: NAME, by default that of the file or folder."""
    adapter_alpha: float | None = None
    """alpha of a LoRA adapter by RWKV-PEFT, whose file does not have it: as it was trained with."""
    allow_other_base: bool = False
    """Take the state or adapter even if it was trained with another model of the same sizes."""

    def arguments(self, weights: WeightsFlags, *, is_server: bool = False) -> dict[str, Any]:
        """Arguments of an `Engine`. Raises ConfigError for a file that is none, before weights are loaded.

        Args:
          weights: those of the model; a state of their run is of the same checkpoint.
          is_server: whether clients bring tuned states of their own.
        """
        if self.state is None:
            if _tunes_a_state(Path(weights.source).expanduser()):
                from rwkv_jax.tuning.pretrained_state import open_tuned_state

                own = open_tuned_state(weights.source, which=weights.checkpoint, ema=weights.ema)
                # Merged with what else the run has trained, the model is no longer the state's base.
                own = dataclasses.replace(own, base_digest=None)
                return {"initial_state": own, "allow_other_base": self.allow_other_base}
            if is_server:
                return {"allow_other_base": self.allow_other_base}
            if self.allow_other_base and not self.adapter:
                raise ConfigError(
                    "allow_other_base = True: is for a tuned state or an adapter; name one with --state or --adapter"
                )
            return {}
        from rwkv_jax.tuning.pretrained_state import open_tuned_state

        return {"initial_state": open_tuned_state(self.state), "allow_other_base": self.allow_other_base}

    def adapters(self) -> dict[str, Adapter]:
        """The adapters by name.

        Raises:
          ConfigError: as `open_adapter`, two of one name, or an alpha without an adapter.
        """
        if not self.adapter:
            if self.adapter_alpha is not None:
                raise ConfigError(
                    f"adapter_alpha = {self.adapter_alpha}: there is no --adapter; give one, or leave it out"
                )
            return {}
        from rwkv_jax.tuning.files import open_adapter

        found: dict[str, Adapter] = {}
        for given in self.adapter:
            name, path = _named(given)
            if name in found:
                raise ConfigError(f"adapter = {given!r}: another one is called {name}; give it a name, NAME={path}")
            found[name] = open_adapter(path, alpha=self.adapter_alpha)
        return found

    def checked(self, adapters: dict[str, Adapter], model: LanguageModel, weights: WeightsFlags) -> dict[str, Adapter]:
        """Holds adapters against the model of some weights; raises as `check_for`.

        Returns:
          Them without their base's digest: the weights' numbers have it, and not the model's if those were rounded.
        """
        from rwkv_jax.tuning.pretrained import check_for

        if adapters:
            check_for(
                model,
                list(adapters.values()),
                weights.place,
                which=weights.checkpoint,
                ema=weights.ema,
                allow_other_base=self.allow_other_base,
            )
        return {name: dataclasses.replace(adapter, base_digest=None) for name, adapter in adapters.items()}

    def put_into(self, model: LanguageModel, weights: WeightsFlags) -> LanguageModel:
        """The model with the one adapter that the flags name; itself if they name none."""
        if len(self.adapter) > 1:
            raise ConfigError(
                f"adapter: {len(self.adapter)} are given; give one, or merge them with their weights (rwkv merge)"
            )
        adapters = self.checked(self.adapters(), model, weights)
        if not adapters:
            return model
        from rwkv_jax.tuning.grafting import adapted_model

        return adapted_model(model, *adapters.values())


def _named(given: str) -> tuple[str, str]:
    """Name and path of [NAME=]PATH; a path may have the sign, too: runs/lr=1e-3."""
    name, is_named, path = given.partition("=")
    if is_named and re.fullmatch(r"[\w.:-]+", name) and not Path(given).expanduser().exists():
        return name, path
    return Path(given).stem, given


def chat_format_of(place: Path) -> str | None:
    """What wrote the chats that a run was trained on; None for weights, and for runs on text."""
    from rwkv_jax.config import from_dict
    from rwkv_jax.run_folder import RUN_FILE, read_run_file

    if not (place / RUN_FILE).is_file():
        return None
    data = from_dict(read_run_file(place)["config"]).data
    return None if data.chat is None else data.chat_format


def tokenizer_for(place: Path, named: str | None) -> tuple[Tokenizer | None, int]:
    """The tokenizer for a file of weights, and V: the one named, or else the one beside the file, if any.

    Raises:
      ConfigError: as `load_tokenizer`, or the file does not contain weights.
    """
    from rwkv_jax.weights.pretrained import find_tokenizer
    from rwkv_jax.weights.sources import open_weights, prefix_errors

    weights = open_weights(place, warn=False)
    with prefix_errors(place):
        vocab_size = weights.model_config().vocab_size
    return find_tokenizer(place, vocab_size, named), vocab_size


def require_text(place: str, text: str) -> None:
    """Rejects terminal or command-line input that is not text.

    Raises:
      ConfigError: bytes that are not UTF-8, which arrive as lone surrogates.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{place}: is not UTF-8; convert it, or set the terminal to UTF-8") from error


def _preset_of(metavar: str) -> Any:
    """For flags whose default depends on the preset."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint="(default: the preset's)")


@dataclasses.dataclass(frozen=True)
class SamplingFlags:
    """Sampling: a preset, and changes to it."""

    preset: Literal["plain", "openai", "rwkv"] = "plain"
    """Defaults of the flags below. plain: temperature 0.8, top-p 0.9. openai: as that API, the model's unmodified
    probabilities. rwkv: as the official package, top-p 0.85, both penalties 0.2, decay 0.996, temperature last."""
    temperature: Annotated[float | None, _preset_of("FLOAT")] = None
    """Divides the logits; 0 always takes the most likely token."""
    top_p: Annotated[float | None, _preset_of("FLOAT")] = None
    """Keep the most likely tokens whose probabilities add up to this; 1 keeps all, 0 is greedy."""
    top_k: Annotated[int | None, _preset_of("INT")] = None
    """Keep this many of the most likely tokens; 0 keeps all."""
    min_p: Annotated[float | None, _preset_of("FLOAT")] = None
    """Keep tokens at least this many times as likely as the most likely one; 0 keeps all."""
    typical_p: Annotated[float | None, _preset_of("FLOAT")] = None
    """Keep the most typical tokens whose probabilities add up to this; 1 keeps all."""
    repetition_penalty: Annotated[float | None, _preset_of("FLOAT")] = None
    """Divides positive logits of tokens that have occurred, multiplies negative ones; 1 is none."""
    presence_penalty: Annotated[float | None, _preset_of("FLOAT")] = None
    """Subtracted from the logits of tokens that have occurred."""
    frequency_penalty: Annotated[float | None, _preset_of("FLOAT")] = None
    """Subtracted from the logit of a token for each of its occurrences."""
    penalty_decay: Annotated[float | None, _preset_of("FLOAT")] = None
    """Factor on the weight of earlier occurrences at each token; 1 is no decay."""
    penalize_prompt: bool = False
    """Whether tokens of the prompt count as occurrences, like generated ones."""

    def sampling(self) -> SamplingParams:
        """The sampling parameters. Raises ConfigError for an invalid value."""
        from rwkv_jax.inference.sampling.params import SamplingParams

        changes: dict[str, Any] = {
            name: value for name, value in dataclasses.asdict(self).items() if name != "preset" and value is not None
        }
        if self.preset == "rwkv":
            return SamplingParams.rwkv(**changes)
        if self.preset == "openai":
            return SamplingParams.openai(**changes)
        plain: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9}
        return SamplingParams(**(plain | changes))
