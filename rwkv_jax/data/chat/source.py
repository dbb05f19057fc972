"""Chats as the data of a run: read, checked, encoded, split, counted; what stands for a corpus."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from rwkv_jax.chat.choice import FORMATS, named_template
from rwkv_jax.chat.template import Piece
from rwkv_jax.config import ConfigError, DataConfig, TrainConfig
from rwkv_jax.config.data import ChatForm
from rwkv_jax.data.chat.records import Conversation, read_conversation, recognize
from rwkv_jax.data.chat.rows import ChatRows, evaluation_rows, packed_rows, streamed_rows
from rwkv_jax.data.chat.samples import Sample, Samples, make_sample, pieces_of
from rwkv_jax.data.fingerprint import fingerprint_of
from rwkv_jax.data.text.sources import read_source_records
from rwkv_jax.data.text.split import choose_held_out
from rwkv_jax.data.tokenizers import Tokenizer, load_tokenizer
from rwkv_jax.data.tokens.rows import Rows

_VERSION = 1  # raised when the same chats would become other rows


class ReadChat(NamedTuple):
    """A conversation of a source."""

    place: str
    """File and line."""
    conversation: Conversation
    pieces: list[Piece]
    sample: Sample

    @property
    def name(self) -> str:
        """A digest of its text, so that copies are never split between training and held-out."""
        text = "".join(piece.text for piece in self.pieces)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@dataclasses.dataclass
class ChatCounts:
    """What became of the records of a source."""

    chats: int = 0
    """Conversations read."""
    tokens: int = 0
    """Of them all, as they are."""
    longest: int = 0
    longest_place: str = ""
    too_long: int = 0
    dropped: int = 0
    """Too long, and left out."""
    truncated: int = 0
    cut_tokens: int = 0
    """Tokens lost by that."""
    unanswered: int = 0
    """Conversations that went on after the last reply; these messages are left out."""
    changed: int = 0
    """Conversations whose text the tokenizer changes, as by normalization."""
    training: int = 0
    """Conversations to train on."""
    held_out: int = 0
    counted_tokens: int = 0
    """Targets that count, of those to train on."""
    training_tokens: int = 0

    @classmethod
    def of_all(cls, counts: Sequence[ChatCounts]) -> ChatCounts:
        """The counts of several sources, of which there must be one, together."""
        names = [field.name for field in dataclasses.fields(cls) if field.type == "int" and field.name != "longest"]
        longest = max(counts, key=lambda each: each.longest)
        sums = {name: sum(getattr(each, name) for each in counts) for name in names}
        return dataclasses.replace(longest, **sums)


@dataclasses.dataclass(frozen=True, eq=False)
class ChatCorpus:
    """Samples to train on and to evaluate with."""

    training: Samples
    held_out: Samples | None
    tokenizer: Tokenizer
    fingerprint: str
    """Hex digest of all samples and of what became of them."""
    counts: ChatCounts
    bytes_per_token: float | None = None
    """Only some tokens count, of which bits per byte would say nothing."""


def read_chats(
    data: DataConfig, tokenizer: Tokenizer, counts: ChatCounts, report: Callable[[str], None] | None = None
) -> Iterator[ReadChat]:
    """The conversations of `data.source` in order, whole, each checked.

    Raises:
      ConfigError: a source as `read_source_records`, a record of another form than the first one or than `data.chat`,
        or what `read_conversation` and the chat format refuse; with file, line and field.
    """
    template = named_template(data.chat_format, "data.chat_format")
    form, first = data.chat if data.chat != "auto" else None, ""
    for place, record in read_source_records(data, "chats", report):
        try:
            own: ChatForm = form or recognize(record)
            if form is None:
                form, first = own, place
            elif first and recognize(record) != form:
                raise ConfigError(
                    f"is of the form {recognize(record)}, and {first} of {form}; keep the forms in sources of their "
                    "own, or name one with data.chat"
                )
            conversation = read_conversation(record, own)
            pieces = pieces_of(conversation, template, data.chat_loss)
            sample = make_sample(pieces, tokenizer, data.chat_loss)
        except ConfigError as error:
            raise ConfigError(f"{place}: {error}") from error
        text = "".join(piece.text for piece in pieces)
        counts.chats += 1
        counts.tokens += len(sample.tokens)
        if len(sample.tokens) > counts.longest:
            counts.longest, counts.longest_place = len(sample.tokens), place
        counts.unanswered += conversation.left_out > 0
        counts.changed += tokenizer.decode(sample.tokens[1:].tolist()) != text
        yield ReadChat(place, conversation, pieces, sample)


def shortened(
    sample: Sample, limit: int | None, too_long: Literal["refuse", "drop", "truncate"], counts: ChatCounts
) -> Sample | None:
    """A sample of at most `limit` tokens, by what `data.chat_too_long` says; None if it is left out. Counts it."""
    if limit is None or len(sample.tokens) <= limit:
        return sample
    counts.too_long += 1
    beginning = sample.beginning(limit)
    if too_long != "truncate" or not beginning.mask.any():
        counts.dropped += 1
        return None
    counts.truncated += 1
    counts.cut_tokens += len(sample.tokens) - limit
    return beginning


def prepare_chats(config: TrainConfig, report: Callable[[str], None]) -> ChatCorpus:
    """The chats of a run, in memory; the same in every process with the same files. `report` gets lines to print.

    Raises:
      ConfigError: as `read_chats`, or chats that are too long where `data.chat_too_long` refuses them, or too few.
    """
    data, training = config.data, config.training
    assert data.tokenizer is not None  # as the config has checked
    tokenizer = load_tokenizer(data.tokenizer, config.model.vocab_size)
    limit = None if training.carry_state else training.sequence_length
    counts, names, places, samples = ChatCounts(), list[str](), list[str](), list[Sample]()
    for chat in read_chats(data, tokenizer, counts, report):
        sample = shortened(chat.sample, limit, data.chat_too_long, counts)
        if sample is not None:
            names.append(chat.name)
            places.append(chat.place)
            samples.append(sample)
    _check_lengths(data, limit, counts, len(samples))
    held_out = choose_held_out(names, data.held_out) if data.held_out > 0 else frozenset()
    sides = [
        [index for index, name in enumerate(names) if (name in held_out) is is_held_out]
        for is_held_out in (False, True)
    ]
    trained, evaluated = (
        Samples.of([samples[index] for index in side], [places[index] for index in side]) if side else None
        for side in sides
    )
    assert trained is not None  # choose_held_out never takes all
    counts.training, counts.held_out = len(sides[0]), len(sides[1])
    counts.training_tokens, counts.counted_tokens = len(trained.tokens), int(trained.mask.sum())
    corpus = ChatCorpus(trained, evaluated, tokenizer, _fingerprint(data, trained, evaluated), counts)
    for line in describe_counts(counts, data, limit):
        report(line)
    report(f"chats {data.source}, fingerprint {corpus.fingerprint}")
    return corpus


def describe_counts(counts: ChatCounts, data: DataConfig, limit: int | None) -> list[str]:
    """Lines about what was read, and what of it is not trained on."""
    share = counts.counted_tokens / max(counts.training_tokens, 1)
    lines = [
        f"{data.source}: {counts.chats} chats, {counts.tokens} tokens, the longest {counts.longest}; training: "
        f"{counts.training} chats, {counts.training_tokens} tokens, of which {counts.counted_tokens} count "
        f"({share:.1%}); held-out: {counts.held_out} chats"
    ]
    if counts.too_long:
        lines.append(
            f"longer than training.sequence_length = {limit}: {counts.too_long} of {counts.chats} chats; "
            f"{counts.dropped} left out, {counts.truncated} cut at their end, which lost {counts.cut_tokens} tokens"
        )
    if counts.unanswered:
        lines.append(
            f"{counts.unanswered} of {counts.chats} chats went on after their last reply; these messages are left out"
        )
    if counts.changed:
        lines.append(f"the tokenizer changes the text of {counts.changed} of {counts.chats} chats, as by normalization")
    return lines


def chat_rows(corpus: ChatCorpus, config: TrainConfig) -> ChatRows:
    """The rows of a run. Raises ConfigError for too few chats to carry states."""
    training = config.training
    shape = {"batch_size": training.batch_size, "sequence_length": training.sequence_length}
    end_of_text = corpus.tokenizer.end_of_text
    if training.carry_state:
        return streamed_rows(corpus.training, seed=config.seed, end_of_text=end_of_text, **shape)
    apart = config.data.chat_rows == "apart"
    return packed_rows(corpus.training, apart=apart, seed=config.seed, end_of_text=end_of_text, **shape)


def held_out_rows(corpus: ChatCorpus, config: TrainConfig, num_batches: int | None) -> Iterator[Rows]:
    """Batches of held-out chats, which must be there: whole ones, or windows if they may be longer than a row."""
    assert corpus.held_out is not None
    return evaluation_rows(
        corpus.held_out,
        layout="windows" if config.training.carry_state else config.data.chat_rows,
        batch_size=config.training.batch_size,
        sequence_length=config.training.sequence_length,
        end_of_text=corpus.tokenizer.end_of_text,
        num_batches=num_batches,
    )


def _check_lengths(data: DataConfig, limit: int | None, counts: ChatCounts, kept: int) -> None:
    if counts.too_long and data.chat_too_long == "refuse":
        raise ConfigError(
            f"data.chat_too_long = 'refuse': {counts.too_long} of {counts.chats} chats have more than "
            f"training.sequence_length = {limit} tokens, the longest, {counts.longest_place}, {counts.longest}; raise "
            "training.sequence_length, set data.chat_too_long to drop or truncate, or switch training.carry_state on"
        )
    if not kept:
        what = (
            f"none of {counts.chats} chats fits into training.sequence_length = {limit}"
            if counts.chats
            else "has no chats"
        )
        raise ConfigError(f"data.source = {data.source!r}: {what}")


def _fingerprint(data: DataConfig, *sides: Samples | None) -> str:
    template = data.chat_format if data.chat_format in FORMATS else Path(data.chat_format).expanduser().read_text()
    options = [data.held_out, template, data.chat_loss, data.chat_rows, data.chat_too_long]
    arrays = (x for side in sides if side is not None for x in (side.tokens, side.targets, side.mask, side.starts))
    return fingerprint_of([_VERSION, *options], (f"{x.dtype.str} {len(x)} ".encode() + x.tobytes() for x in arrays))
