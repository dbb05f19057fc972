"""Prompts to which a model draws replies itself: records, of which reward functions read the other fields."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rwkv_jax.chat.choice import named_template
from rwkv_jax.chat.messages import read_messages
from rwkv_jax.chat.template import ChatTemplate
from rwkv_jax.config import ConfigError, TrainConfig
from rwkv_jax.data.fingerprint import fingerprint_of
from rwkv_jax.data.text.sources import read_source_records
from rwkv_jax.data.text.split import choose_held_out
from rwkv_jax.data.tokenizers import Tokenizer, load_tokenizer
from rwkv_jax.data.tokens.permutation import shuffle_epochs

_VERSION = 1  # raised when the same prompts would become other tokens


class PromptRecord(NamedTuple):
    """A prompt to reply to."""

    place: str
    """File and line."""
    tokens: np.ndarray
    """int32 [n], with the end-of-text token first."""
    text: str
    record: Mapping[str, Any]
    """The whole record, for reward functions."""


@dataclasses.dataclass(frozen=True, eq=False)
class PromptCorpus:
    """Prompts to train on and to evaluate with."""

    training: tuple[PromptRecord, ...]
    held_out: tuple[PromptRecord, ...]
    tokenizer: Tokenizer
    fingerprint: str
    """Hex digest of all records and tokens, in order."""
    bytes_per_token: float | None = None
    """There is no text of which bytes could be counted."""

    def chosen(self, draw: int, *, num_prompts: int, seed: int) -> list[PromptRecord]:
        """The prompts of a draw; each epoch is reshuffled."""
        index = draw * num_prompts + np.arange(num_prompts, dtype=np.int64)
        return [self.training[item] for item in shuffle_epochs(index, len(self.training), f"prompts {seed}")]


def prepare_prompts(config: TrainConfig, report: Callable[[str], None]) -> PromptCorpus:
    """The prompts of a run, in memory. `report` gets lines to print.

    Raises:
      ConfigError: a record without a prompt, with file and line, or no prompt that is short enough.
    """
    data, longest = config.data, config.training.sequence_length - config.grpo.max_tokens
    assert data.tokenizer is not None  # as the config has checked
    tokenizer = load_tokenizer(data.tokenizer, config.model.vocab_size)
    read = list(_read(config, tokenizer))
    kept = [prompt for prompt in read if len(prompt.tokens) <= longest]
    limit = f"training.sequence_length - grpo.max_tokens = {longest}"
    if len(kept) < len(read):
        report(f"{data.source}: {len(read) - len(kept)} of {len(read)} prompts are longer than {limit} and left out")
    if not kept:
        raise ConfigError(f"data.source = {data.source!r}: none of its {len(read)} prompts is as short as {limit}")
    names = [hashlib.blake2b(prompt.text.encode(), digest_size=16).hexdigest() for prompt in kept]
    held_out = choose_held_out(names, data.held_out) if data.held_out > 0 else frozenset()
    sides = [
        tuple(prompt for prompt, name in zip(kept, names, strict=True) if (name in held_out) is is_held_out)
        for is_held_out in (False, True)
    ]
    fingerprint = fingerprint_of([_VERSION, data.held_out], _content(sides))
    report(f"{data.source}: {len(sides[0])} prompts to train on, {len(sides[1])} held out; fingerprint {fingerprint}")
    return PromptCorpus(sides[0], sides[1], tokenizer, fingerprint)


def _read(config: TrainConfig, tokenizer: Tokenizer) -> Iterator[PromptRecord]:
    template = named_template(config.data.chat_format)
    for place, record in read_source_records(config.data, "prompts"):
        try:
            text = _text_of(record, template)
            tokens = np.array([tokenizer.end_of_text, *tokenizer.encode(text)], np.int32)
        except UnicodeEncodeError as error:
            raise ConfigError(f"{place}: prompt: has half a surrogate pair at character {error.start}") from error
        except ConfigError as error:
            raise ConfigError(f"{place}: {error}") from error
        yield PromptRecord(place, tokens, text, record)


def _text_of(record: Mapping[str, Any], template: ChatTemplate) -> str:
    """A prompt as it is, or messages as the chat format writes them and asks for a reply."""
    prompt = record.get("prompt")
    if isinstance(prompt, str) and prompt:
        return prompt
    if not isinstance(prompt, Sequence) or not prompt:
        has = ", ".join(sorted(record)) or "no fields"
        raise ConfigError(f"prompt: must be a text or a list of messages, not empty; the record has {has}")
    try:
        return template.render(read_messages(prompt), thinking="none")
    except ConfigError as error:
        raise ConfigError(str(error).replace("messages[", "prompt[", 1)) from error


def _content(sides: Sequence[Sequence[PromptRecord]]) -> Iterator[bytes]:
    for side in sides:
        for prompt in side:
            yield json.dumps(prompt.record, sort_keys=True, default=str).encode() + prompt.tokens.tobytes()
        yield b"|"
