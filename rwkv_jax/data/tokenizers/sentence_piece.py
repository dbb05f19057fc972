"""Sentencepiece models, and their training for corpora without a given tokenizer."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

from typing_extensions import override

from rwkv_jax.atomic import new_file, refuse_existing
from rwkv_jax.config import ConfigError
from rwkv_jax.data.tokenizers.base import NO_TEXT, PROBE, SavedTokenizer, Tokenizer

END_OF_TEXT = "<|endoftext|>"

_SPACE_MARK = "\u2581"  # sentencepiece writes a space as this character

_SPAN_LENGTH = 4096  # characters passed to sentencepiece at a time

# sentencepiece drops a whole sentence that has one of these (it would learn the first as a space). They are encoded
# as bytes instead.
_UNLEARNABLE = re.compile("[\u2581\u2585\t\x00]+")


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model with byte fallback, identity normalization and an end-of-text piece (its `eos`).

    Preserves every text exactly: a model that could lose anything is rejected.
    """

    def __init__(self, model: bytes, origin: str) -> None:
        """From the bytes of a model file; `origin` names it in errors. Raises ConfigError if it could lose text."""
        if not model:
            raise ConfigError(f"{origin} is empty, not a sentencepiece model")
        package = _sentencepiece(origin)
        try:
            self._processor = package.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, UnicodeDecodeError) as error:  # the latter of its own message
            raise ConfigError(f"{origin} is not a sentencepiece model; name a .model file") from error
        try:
            self._load(model, origin)
        except (RuntimeError, UnicodeDecodeError, IndexError) as error:
            raise ConfigError(f"{origin} is a damaged sentencepiece model ({error}); get it again") from error

    def _load(self, model: bytes, origin: str) -> None:
        if self._processor.eos_id() < 0:
            raise ConfigError(f"{origin} has no end-of-sentence piece to put between documents; train it with eos_id")
        self._mark = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()]
        super().__init__(
            table=[self._piece_bytes(token) for token in range(self._processor.vocab_size())],
            end_of_text=self._processor.eos_id(),
            saved=SavedTokenizer("tokenizer.model", model),
        )
        if self.decode(self.encode(PROBE)) != PROBE:
            raise ConfigError(
                f"{origin} does not give back the text it is given; train it with byte_fallback=True, "
                "normalization_rule_name=identity, add_dummy_prefix=False and remove_extra_whitespaces=False, "
                "or leave data.tokenizer unset to have one trained"
            )

    @override
    def encode(self, text: str) -> list[int]:
        text.encode()
        # The mark itself would decode to a space, so it is encoded as bytes.
        first, *others = (self._processor.encode(part) for part in text.split(_SPACE_MARK))
        for part in others:
            first += self._mark + part
        return first

    def _piece_bytes(self, token: int) -> bytes:
        processor = self._processor
        piece = processor.id_to_piece(token)
        if processor.is_byte(token):
            return bytes([_byte_of(piece)])
        if processor.is_control(token):
            return b""
        if processor.is_unknown(token):
            return NO_TEXT
        return piece.replace(_SPACE_MARK, " ").encode()


def _byte_of(piece: str) -> int:
    """The value of a piece such as <0x0A>. Raises RuntimeError, as the package does, for another."""
    if re.fullmatch("<0x[0-9A-F]{2}>", piece) is None:
        raise RuntimeError(f"the piece {piece!r} names no byte")
    return int(piece[3:5], 16)


def train_sentencepiece(texts: Iterable[str], vocab_size: int, path: str | os.PathLike[str], stride: int = 1) -> None:
    """Train a byte-pair encoding of exactly `vocab_size` entries and write its model file atomically.

    Trains on every `stride`-th span of the texts. The same texts give the same file.
    Raises ConfigError if the texts are too few for this vocabulary or need a larger one, or if the file exists.
    """
    target = Path(path)
    refuse_existing(target)
    model = io.BytesIO()
    try:
        _sentencepiece("data.tokenizer = None").SentencePieceTrainer.train(
            sentence_iterator=_training_spans(texts, stride),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            split_digits=True,
            # Bytes a token of the held-out standard library, at 4096 entries: 2.1 without runs of spaces in pieces, 3.1
            # with them, 3.3 with pieces that may also join letters and punctuation ("self.", "):\n"). A trigram model
            # gives the last two the same bits per byte, so the shorter sequence wins.
            allow_whitespace_only_pieces=True,
            split_by_unicode_script=False,
            max_sentence_length=8 * _SPAN_LENGTH,
            eos_id=0,
            eos_piece=END_OF_TEXT,
            unk_id=1,
            bos_id=-1,
            pad_id=-1,
            num_threads=1,  # the count is written into the file, which must not depend on the machine
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _training_error(vocab_size, str(error)) from error
    with new_file(target) as file:
        file.write(model.getvalue())


def _sentencepiece(user: str) -> ModuleType:
    try:
        import sentencepiece
    except ImportError as error:
        raise ConfigError(f"{user}: needs the package sentencepiece: pip install sentencepiece") from error
    return sentencepiece


def _training_spans(texts: Iterable[str], stride: int) -> Iterator[str]:
    count = 0
    for text in texts:
        for start in range(0, len(text), _SPAN_LENGTH):
            if count % stride == 0:
                yield from (part for part in _UNLEARNABLE.split(text[start : start + _SPAN_LENGTH]) if part)
            count += 1


def _training_error(vocab_size: int, message: str) -> ConfigError:
    where = f"model.vocab_size = {vocab_size}"
    if match := re.search(r"Please set it to a value <= (\d+)", message):
        return ConfigError(
            f"{where}: the training text has pairs for {match[1]} entries only; "
            f"set model.vocab_size to at most {match[1]}, or give more text"
        )
    if match := re.search(r"Vocabulary size is smaller than required_chars\. \d+ vs (\d+)", message):
        return ConfigError(
            f"{where}: the 256 bytes and the characters of the training text alone need {match[1]} entries; "
            f"set model.vocab_size to at least {match[1]}"
        )
    if "sentences_.empty()" in message:
        return ConfigError(f"{where}: the training text has nothing to learn a tokenizer from; give more text")
    return ConfigError(f"{where}: sentencepiece could not be trained: {message}")
