"""`rwkv data`: shows chats as they are trained on, with what counts and what is cut, or counts them."""

from __future__ import annotations

import dataclasses
import itertools
import operator
import os
import sys
from typing import TYPE_CHECKING, Literal

import tyro

from rwkv_jax.checks import checker
from rwkv_jax.config import ConfigError, DataConfig
from rwkv_jax.config.data import ChatLoss

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rwkv_jax.data.chat.samples import Sample
    from rwkv_jax.data.tokenizers import Tokenizer

_COUNTS, _CUT, _RESET = "\x1b[32m", "\x1b[31m", "\x1b[0m"
_END = "<end>"


@dataclasses.dataclass(frozen=True)
class Data:
    """Show chats as a run trains on them: text, tokens that count, tokens that are cut; or count them."""

    action: tyro.conf.Positional[Literal["show", "stats"]]
    """show prints the first chats; what counts is green, or stands in [[ ]] where the output is no terminal. stats
    reads all of them and prints numbers."""
    source: tyro.conf.Positional[str]
    """A file of records or a folder of them, as data.source of a run."""
    chat: Literal["auto", "messages", "sharegpt", "alpaca", "completion"] = "auto"
    """Form of the records, as data.chat."""
    chat_format: str = "g1"
    """What writes chats as text: g1, world, raven, pile-qa, or the path of a Jinja template."""
    chat_loss: ChatLoss = "assistant"
    """Tokens that count, as data.chat_loss."""
    chat_too_long: Literal["drop", "truncate"] = "truncate"
    """What happens to chats longer than --sequence-length."""
    sequence_length: int | None = None
    """training.sequence_length of the run; None cuts nothing."""
    tokenizer: str = "world"
    """world, bytes, a sentencepiece model, a tokenizer.json, or a folder that contains one, such as a run's."""
    vocab_size: int | None = None
    """Vocabulary size of the model, which the tokenizer must match; None takes the tokenizer's."""
    glob: str = "**/*"
    """Pattern of the files to read in a folder."""
    num: int = 3
    """Chats to show."""

    def run(self) -> None:
        """Prints. Raises ConfigError with file, line and field for what a run would refuse."""
        from rwkv_jax.data.chat.source import ChatCounts, describe_counts, read_chats, shortened
        from rwkv_jax.data.tokenizers import load_tokenizer

        check = checker(self)
        check(self.num > 0, "num", "must be at least 1")
        check(self.sequence_length is None or self.sequence_length > 0, "sequence_length", "must be at least 1")
        data = self._config()
        tokenizer = load_tokenizer(self.tokenizer, self.vocab_size)
        counts, colored = ChatCounts(), sys.stdout.isatty() and "NO_COLOR" not in os.environ
        lengths: list[int] = []
        try:
            for chat in read_chats(data, tokenizer, counts, print):
                sample, kept = chat.sample, shortened(chat.sample, self.sequence_length, self.chat_too_long, counts)
                lengths.append(len(sample.tokens))
                if kept is not None:
                    counts.training += 1
                    counts.training_tokens += len(kept.tokens)
                    counts.counted_tokens += int(kept.mask.sum())
                if self.action == "show":
                    print(_header(chat.place, sample, kept))
                    print(show_sample(sample, 0 if kept is None else len(kept.tokens), tokenizer, colored=colored))
                    if counts.chats == self.num:
                        break
        except ConfigError as error:
            raise ConfigError(_with_flags(str(error))) from error
        if self.action == "stats":
            for line in describe_counts(counts, data, self.sequence_length):
                print(_with_flags(line))
            print(_quantiles(lengths))

    def _config(self) -> DataConfig:
        return DataConfig(
            source=self.source,
            glob=self.glob,
            chat=self.chat,
            chat_format=self.chat_format,
            chat_loss=self.chat_loss,
            chat_too_long=self.chat_too_long,
            tokenizer=self.tokenizer,
        )


def show_sample(sample: Sample, kept: int, tokenizer: Tokenizer, *, colored: bool) -> str:
    """The text of a sample: what counts marked, and in red or {{cut: }} what its first `kept` targets leave out.

    <end> is the end-of-text token as the target of a reply's last token.
    """
    marks = {"": ("", ""), "counts": ("[[", "]]"), "cut": ("{{cut: ", "}}")}
    if colored:
        marks |= {"counts": (_COUNTS, _RESET), "cut": (_CUT, _RESET)}
    shown = []
    for kind, group in itertools.groupby(_parts(sample, kept, tokenizer.end_of_text), key=operator.itemgetter(0)):
        text = ""
        for is_end, run in itertools.groupby((token for _, token in group), key=lambda token: token is None):
            tokens = [token for token in run if token is not None]
            text += _END if is_end else tokenizer.decode(tokens)
        before, after = marks[kind]
        shown.append(before + text + after)
    return "".join(shown)


def _parts(sample: Sample, kept: int, end_of_text: int) -> Iterator[tuple[str, int | None]]:
    """Each token of the text, None for the end of a reply, and what it is: `counts`, `cut`, or nothing of that."""
    for place, (target, counts) in enumerate(zip(sample.targets.tolist(), sample.mask.tolist(), strict=True)):
        kind = "cut" if place >= kept else "counts" if counts else ""
        is_end = counts and target == end_of_text
        if is_end:
            yield kind, None
        if place + 1 < len(sample.tokens):  # behind a reply's end the text goes on, which does not count
            yield kind if kind == "cut" or not is_end else "", int(sample.tokens[place + 1])


def _header(place: str, sample: Sample, kept: Sample | None) -> str:
    total, counted = len(sample.tokens), int(sample.mask.sum())
    lost = ""
    if kept is None:
        lost = ", too long: left out"
    elif len(kept.tokens) < total:
        lost = f", too long: {total - len(kept.tokens)} tokens are cut, {int(kept.mask.sum())} count of what is left"
    return f"--- {place}: {total} tokens, {counted} count{lost} ---"


def _quantiles(lengths: list[int]) -> str:
    import numpy as np

    shares = (0, 0.1, 0.5, 0.9, 0.99, 1)
    values = np.quantile(lengths, shares, method="higher")
    listed = ", ".join(f"{share:.0%} {value}" for share, value in zip(shares, values.tolist(), strict=True))
    return f"tokens of a chat, by the share of chats that have at most as many: {listed}"


def _with_flags(text: str) -> str:
    """This command's flags in place of config fields."""
    for name in ("chat_format", "chat_loss", "chat_too_long", "chat", "tokenizer", "glob"):
        text = text.replace(f"data.{name}", "--" + name.replace("_", "-"))
    return text.replace("training.sequence_length", "--sequence-length").replace("data.source", "source")
