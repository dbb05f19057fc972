"""Preferences as tokens: read, checked, split and counted; rows of any step."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from rwkv_jax.chat.choice import named_template
from rwkv_jax.config import ConfigError, TrainConfig
from rwkv_jax.data.fingerprint import fingerprint_of
from rwkv_jax.data.preference.records import Preference, read_labeled, read_pair
from rwkv_jax.data.text.sources import read_source_records
from rwkv_jax.data.text.split import choose_held_out
from rwkv_jax.data.tokenizers import Tokenizer, load_tokenizer
from rwkv_jax.data.tokens.permutation import shuffle_epochs

_VERSION = 1  # raised when the same preferences would become other rows
_MAX_OTHERS = 1000  # looked at for a reply to another prompt


class Example(NamedTuple):
    """A prompt with two replies as tokens, each text between end-of-text tokens."""

    place: str
    """File and line."""
    prompt: int
    """Tokens of the prompt."""
    first: np.ndarray
    """int32 [n]: end of text, prompt, reply, end of text."""
    second: np.ndarray
    """The same with the rejected reply; for KTO, a prompt with the reply to another one, which may be cut."""
    label: bool | None = None


class PairRows(NamedTuple):
    """Rows of replies: inputs, targets, and where these are of the reply."""

    tokens: np.ndarray
    """int32 [n, T]."""
    targets: np.ndarray
    """int32 [n, T]."""
    mask: np.ndarray
    """float32 [n, T]."""


@dataclasses.dataclass(frozen=True, eq=False)
class Pairs:
    """The examples of one side of the split."""

    examples: tuple[Example, ...]
    sequence_length: int
    """T."""

    def __len__(self) -> int:
        return len(self.examples)

    def rows(self, indices: Sequence[int]) -> tuple[PairRows, PairRows]:
        """First and second replies of some examples; an index beyond the last is an empty row."""
        chosen = [self.examples[index] if index < len(self) else None for index in indices]
        first = _fill([(each.first, each.prompt) if each else None for each in chosen], self.sequence_length)
        second = _fill([(each.second, each.prompt) if each else None for each in chosen], self.sequence_length)
        return first, second

    @functools.cached_property
    def labels(self) -> np.ndarray | None:
        """bool [examples]; None for pairs."""
        if self.examples[0].label is None:
            return None
        return np.array([example.label for example in self.examples], bool)


@dataclasses.dataclass(frozen=True, eq=False)
class PairCorpus:
    """Preferences to train on and to evaluate with."""

    training: Pairs
    held_out: Pairs | None
    tokenizer: Tokenizer
    fingerprint: str
    """Hex digest of all tokens and labels, in order."""
    bytes_per_token: float | None = None
    """Only replies count, of which bits per byte would say nothing."""

    def order(self, step: int, *, batch_size: int, seed: int) -> np.ndarray:
        """int64 [B]: the examples of a step; each epoch is reshuffled."""
        index = step * batch_size + np.arange(batch_size, dtype=np.int64)
        return shuffle_epochs(index, len(self.training), f"preferences {seed}")


def prepare_pairs(config: TrainConfig, report: Callable[[str], None]) -> PairCorpus:
    """The preferences of a run, in memory; the same in every process with the same files. `report` gets lines to print.

    Raises:
      ConfigError: a record that `read_pair` or `read_labeled` refuses, with file, line and field, or nothing to train
        on.
    """
    data, training = config.data, config.training
    assert data.tokenizer is not None  # as the config has checked
    tokenizer = load_tokenizer(data.tokenizer, config.model.vocab_size)
    is_labeled = training.objective == "kto"
    read, too_long = list(_read(config, is_labeled)), 0
    examples, names = list[Example](), list[str]()
    texts = [_encoded(preference, tokenizer) for _, preference in read]
    room = training.sequence_length + 1
    for index, (place, preference) in enumerate(read):
        text = texts[index]
        if is_labeled:
            # KTO's estimate of the KL divergence reads each prompt with the reply to another one.
            text = text._replace(second=_reply_to_another(texts, index, room))
        example = _example(place, text, preference.label, tokenizer.end_of_text)
        if is_labeled:
            example = example._replace(second=example.second[:room])
        if max(len(example.first), len(example.second)) > room:
            too_long += 1
            continue
        examples.append(example)
        names.append(hashlib.blake2b(preference.prompt.encode(), digest_size=16).hexdigest())
    what = "labeled replies" if is_labeled else "pairs"
    if too_long:
        report(
            f"{data.source}: {too_long} of {len(read)} {what} are longer than training.sequence_length = "
            f"{training.sequence_length} and left out"
        )
    if not examples:
        raise ConfigError(
            f"data.source = {data.source!r}: none of its {len(read)} {what} fits into training.sequence_length = "
            f"{training.sequence_length}"
        )
    held_out = choose_held_out(names, data.held_out) if data.held_out > 0 else frozenset()
    sides = [
        tuple(example for example, name in zip(examples, names, strict=True) if (name in held_out) is is_held_out)
        for is_held_out in (False, True)
    ]
    trained, evaluated = (Pairs(side, training.sequence_length) if side else None for side in sides)
    assert trained is not None  # choose_held_out never takes all
    fingerprint = fingerprint_of([_VERSION, data.held_out], _content(sides))
    corpus = PairCorpus(trained, evaluated, tokenizer, fingerprint)
    report(f"{data.source}: {len(sides[0])} {what} to train on, {len(sides[1])} held out; fingerprint {fingerprint}")
    return corpus


def _read(config: TrainConfig, is_labeled: bool) -> Iterator[tuple[str, Preference]]:
    """Place and content of each record, checked."""
    template = named_template(config.data.chat_format)
    for place, record in read_source_records(config.data, "preferences"):
        try:
            if is_labeled and "label" not in record and "chosen" in record:
                raise ConfigError("label: is missing; kto reads single replies with labels, pairs are for dpo")
            yield place, (read_labeled if is_labeled else read_pair)(record, template)
        except ConfigError as error:
            raise ConfigError(f"{place}: {error}") from error


class _Encoded(NamedTuple):
    """A preference as tokens, each text apart, so that a prompt has the tokens that it has when the model is asked."""

    prompt: list[int]
    first: list[int]
    second: list[int]
    """Empty for a single reply."""


def _encoded(preference: Preference, tokenizer: Tokenizer) -> _Encoded:
    texts = (preference.prompt, preference.first, preference.second or "")
    return _Encoded(*(tokenizer.encode(text) for text in texts))


def _reply_to_another(texts: Sequence[_Encoded], index: int, room: int) -> list[int]:
    """The reply to the next other prompt that fits behind this one, between two end-of-text tokens.

    The next other one whatever its length, to be cut, if none of the following thousand fits; the prompt's own if there
    is no other prompt.
    """
    prompt, next_other = texts[index].prompt, None
    after = (texts[number % len(texts)] for number in range(index + 1, index + len(texts)))
    for text in itertools.islice((text for text in after if text.prompt != prompt), _MAX_OTHERS):
        if len(prompt) + len(text.first) + 2 <= room:
            return text.first
        next_other = next_other or text.first
    return next_other or texts[index].first


def _example(place: str, text: _Encoded, label: bool | None, end: int) -> Example:
    first, second = (np.array([end, *text.prompt, *reply, end], np.int32) for reply in (text.first, text.second))
    return Example(place, len(text.prompt), first, second, label)


def _fill(texts: Iterable[tuple[np.ndarray, int] | None], length: int) -> PairRows:
    """Rows of [n] texts, zeros behind their ends."""
    texts = list(texts)
    tokens, targets = (np.zeros((len(texts), length), np.int32) for _ in range(2))
    mask = np.zeros((len(texts), length), np.float32)
    for row, text in enumerate(texts):
        if text is not None:
            ids, prompt = text
            tokens[row, : len(ids) - 1], targets[row, : len(ids) - 1] = ids[:-1], ids[1:]
            mask[row, prompt : len(ids) - 1] = 1
    return PairRows(tokens, targets, mask)


def _content(sides: Sequence[Sequence[Example]]) -> Iterator[bytes]:
    for side in sides:
        for example in side:
            shape = [len(example.first), len(example.second), example.prompt, example.label]
            yield json.dumps(shape).encode() + example.first.tobytes() + example.second.tobytes()
        yield b"|"
