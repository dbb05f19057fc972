"""The data of a run: sources, their order, the tokenizer."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from rwkv_jax.checks import checker, require, require_choices

ChatForm = Literal["messages", "sharegpt", "alpaca", "completion"]
"""Forms of records that hold chats; data/chat/records.py has their fields."""

ChatLoss = Literal["assistant", "last", "all"]
"""Which tokens of a chat count."""

SYNTHETIC = "synthetic:"
"""With which the source of a synthetic task begins."""

CHATS = "chat:"
"""With which a source of a mixture begins that is of chats."""

_CHAT_OPTIONS = ("chat", "chat_format", "chat_loss", "chat_rows", "chat_too_long")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and how it becomes tokens."""

    source: str = "python-stdlib"
    """`python-stdlib` (the source text of the running Python's standard library), or the path of a text file, of a
    folder, of JSON records (.jsonl, .json), optionally compressed (.gz, .bz2, .xz, .zst), of a table (.parquet,
    .arrow, .feather), of tokens (binidx: PATH.bin with PATH.idx beside it, by either name or by PATH), or of whole
    numbers (.npy), which are the tokens; or a synthetic task, as synthetic:NAME or synthetic:NAME(field=value, ...).
    RWKV-LM: data_file."""
    mixture: tuple[tuple[str, float], ...] = ()
    """Several sources and their shares of the rows, as PATH 0.7 PATH 0.3, instead of data.source. With data.chat those
    written chat:PATH are chats and the others texts, such as chat:PATH 0.8 PATH 0.2."""
    glob: str = "**/*"
    """Pattern of the files to read in a folder."""
    text_field: str = "text"
    """Field of a JSON record, or column of a table, with the text."""
    held_out: float = 0.05
    """Share of the documents (of the bytes, for a single document) held out for evaluation; the last ones of a binidx.
    0 trains on all. Of a synthetic task other rows are drawn, whatever the share."""
    order: Literal["windows", "official"] = "windows"
    """Order of the rows: windows, reshuffled each epoch, or the official trainer's (cubes modulo the magic prime).
    RWKV-LM: magic_prime."""
    magic_prime: int | None = None
    """Prime of the official order; None computes it like the official scripts.
    RWKV-LM: magic_prime."""
    tokenizer: str | None = None
    """`world`, `bytes`, or the path of a sentencepiece model, a Hugging Face tokenizer.json or a folder with one;
    None trains a sentencepiece model of model.vocab_size entries on the training documents."""
    cache_dir: str = "runs/corpora"
    """Folder for token files and trained tokenizers, one sub-folder per corpus."""
    chat: Literal["auto", "messages", "sharegpt", "alpaca", "completion"] | None = None
    """Form of the records, if the source holds chats or instructions rather than text: messages (OpenAI's), sharegpt,
    alpaca, completion (prompt and completion), or auto, which sees it from their fields. None reads text."""
    chat_format: str = "g1"
    """What writes chats, and messages of preferences and prompts, as text: g1, world, raven, pile-qa, or the path of a
    Jinja template."""
    chat_loss: ChatLoss = "assistant"
    """Tokens of a chat that count: assistant, what the assistant says and the end of it; last, of the last reply alone;
    all."""
    chat_rows: Literal["packed", "apart"] = "packed"
    """How chats become rows, none of which sees another: packed, as many whole ones in a row as fit; apart, one a row,
    padded. Not asked with training.carry_state, where rows go on from step to step."""
    chat_too_long: Literal["refuse", "drop", "truncate"] = "refuse"
    """What happens to chats longer than training.sequence_length; they are counted in any case. truncate keeps the
    beginning, if any of it counts. Not asked with training.carry_state, which reads them whole."""

    def __post_init__(self) -> None:
        require_choices(self, "data")
        check = checker(self, "data")
        check(bool(self.source), "source", "name a file, a folder or python-stdlib")
        alone = f"{CHATS} is for data.mixture; leave it out, and set data.chat"
        check(not self.source.startswith(CHATS), "source", alone)
        check(0 <= self.held_out < 1, "held_out", "must lie in [0, 1); 0 holds out nothing")
        check(
            self.magic_prime is None or self.order == "official",
            "magic_prime",
            f"data.order = {self.order!r} has no such number; leave it out, or set data.order to official",
        )
        if self.is_synthetic:
            self._check_synthetic()
        if self.is_numbers:
            has_own = f"{self.source} holds numbers, which have ids of their own; leave this out"
            check(self.tokenizer is None, "tokenizer", has_own)
            check(self.chat is None, "chat", f"{self.source} holds numbers, not chats; leave this out")
        if self.chat is not None:
            self._check_chat()
        else:
            for name in ("chat_loss", "chat_rows", "chat_too_long"):
                is_default = getattr(self, name) == getattr(type(self), name)
                check(is_default, name, "is of chats, and none are read; set data.chat, or leave it out")
        if self.mixture:
            self._check_mixture()

    @property
    def is_synthetic(self) -> bool:
        """Whether the source is a synthetic task."""
        return self.source.startswith(SYNTHETIC)

    @property
    def is_numbers(self) -> bool:
        """Whether the source is an array of whole numbers, each a token."""
        return self.source.endswith(".npy") and not self.mixture

    def of_source(self, source: str) -> DataConfig:
        """The config of one source of the mixture by itself."""
        if source.startswith(CHATS):
            return dataclasses.replace(self, source=source.removeprefix(CHATS), mixture=())
        defaults = {name: getattr(type(self), name) for name in _CHAT_OPTIONS}
        return dataclasses.replace(self, source=source, mixture=(), **defaults)

    def _check_synthetic(self) -> None:
        check = checker(self, "data")
        check(self.tokenizer is None, "tokenizer", f"{self.source} has symbols of its own; leave this out")
        check(self.order == "windows", "order", f"{self.source} draws its rows; leave this out")

    def _check_chat(self) -> None:
        check = checker(self, "data")
        default = "name the file or folder of chats with data.source"
        given = not self.is_synthetic and self.source != type(self).source
        check(given or bool(self.mixture), "source", default)
        check(
            not self.mixture or any(source.startswith(CHATS) for source, _ in self.mixture),
            "mixture",
            f"data.chat = {self.chat!r}, and no source is of chats; write {CHATS}PATH for those that are",
        )
        check(self.tokenizer is not None, "tokenizer", "chats do not train one; name that of the model to tune")
        check(self.order == "windows", "order", "chats have an order of their own; leave this out")

    def _check_mixture(self) -> None:
        check = checker(self, "data")
        sources = [source for source, _ in self.mixture]
        for source, weight in self.mixture:
            place = f"data.mixture, weight of {source!r}"
            require(0 < weight < math.inf, place, weight, "must be positive; leave out what is not to be read")
        check(all(source.removeprefix(CHATS) for source in sources), "mixture", "each source needs a path")
        chats = [source for source in sources if source.startswith(CHATS)]
        check(self.chat is not None or not chats, "mixture", f"{chats} are chats; set data.chat, to auto or their form")
        drawn = [source for source in sources if source.startswith(SYNTHETIC)]
        check(not drawn, "mixture", f"a synthetic task is no part of a mixture; name {drawn} with data.source alone")
        check(len(set(sources)) == len(sources), "mixture", "names a source twice; add its weights")
        default = type(self).source
        check(
            self.source == default,
            "source",
            "data.mixture names the sources; leave this out, or name it in data.mixture with its weight",
        )
        numbers = [source for source in sources if source.endswith(".npy")]
        check(not numbers, "mixture", f"numbers are no part of a mixture; name {numbers} with data.source alone")
        check(self.tokenizer is not None, "tokenizer", "the sources of data.mixture share one tokenizer; name it")
        check(
            self.order == "windows",
            "order",
            "the official order is one of a single source; leave out data.order or data.mixture",
        )
