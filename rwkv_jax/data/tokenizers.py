"""Tokenizers: what the rest of the project asks of one, the sentencepiece one, and its training.

A tokenizer here loses nothing: `decode(encode(text)) == text` for every text.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import sentencepiece

from rwkv_jax.config import ConfigError

END_OF_TEXT = "<|endoftext|>"

_SPACE_MARK = "\u2581"  # sentencepiece writes a space as this character

_STRETCH = 4096  # characters of text that sentencepiece is handed at a time

# sentencepiece drops a whole sentence that has one of these (it would learn the first as a space). They are spelled
# in bytes instead.
_UNLEARNABLE = re.compile("[\u2581\u2585\t\x00]+")

# Texts that tokenizers which are not made for every text change: spaces at the ends and in runs, line ends, tabs,
# compatibility characters that normalisation rewrites, and characters too rare for a vocabulary.
_PROBE = (
    " a  b \r\n\n\t\tdef \ufb01\u2460\u00bd e\u0301 \u00e9 \x00\x7f \u65e5\u672c \U0001f469\u200d\U0001f467 \u2581 "
)


class Tokenizer(Protocol):
    """Text to token ids and back, losing nothing."""

    @property
    def vocab_size(self) -> int:
        """Number of ids; each id is in [0, vocab_size)."""
        ...

    @property
    def end_of_text(self) -> int:
        """Id that stands between documents; `encode` never produces it, whatever the text spells."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hex digest of everything that decides what `encode` gives."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        ...

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of ids; bytes that are no UTF-8 (half a character) become U+FFFD, end_of_text becomes nothing."""
        ...

    def token_bytes(self, token: int) -> bytes:
        """UTF-8 bytes that one id stands for, perhaps only part of a character; none for end_of_text."""
        ...


class StreamingDecoder:
    """Decodes ids one by one and never gives out half a character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """For ids of this tokenizer."""
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """Text that this id completes, perhaps none; all pushes and the flush together equal `decode`."""
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    def flush(self) -> str:
        """U+FFFD for a character that was begun and not completed, else nothing; ready for the next text."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


class SentencePieceTokenizer:
    """A sentencepiece model with byte fallback, identity normalisation and an end-of-text piece (its `eos`)."""

    def __init__(self, model: bytes, origin: str) -> None:
        """From the bytes of a model file; `origin` names it in errors. Raises ConfigError if it could lose text."""
        if not model:
            raise ConfigError(f"{origin} is empty, not a sentencepiece model")
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ConfigError(f"{origin} is not a sentencepiece model; name a .model file") from error
        if self._processor.eos_id() < 0:
            raise ConfigError(f"{origin} has no end-of-sentence piece to put between documents; train it with eos_id")
        self._bytes = [self._piece_bytes(token) for token in range(self.vocab_size)]
        self._mark = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()]
        self._fingerprint = hashlib.blake2b(model, digest_size=16).hexdigest()
        if self.decode(self.encode(_PROBE)) != _PROBE:
            raise ConfigError(
                f"{origin} does not give back the text it is given; train it with byte_fallback=True, "
                "normalization_rule_name=identity, add_dummy_prefix=False and remove_extra_whitespaces=False, "
                "or leave data.tokenizer unset to have one trained"
            )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SentencePieceTokenizer:
        """The tokenizer of a model file. Raises ConfigError if the file is missing or unsuitable."""
        return cls(_read_model(path), str(path))

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return self._processor.vocab_size()

    @property
    def end_of_text(self) -> int:
        """Id that stands between documents."""
        return self._processor.eos_id()

    @property
    def fingerprint(self) -> str:
        """Hex digest of the model file."""
        return self._fingerprint

    def encode(self, text: str) -> list[int]:
        """Ids of a text. Raises UnicodeEncodeError for lone surrogates, which no UTF-8 text holds."""
        text.encode()
        # The mark itself would come back as a space, so it is spelled in bytes.
        first, *others = (self._processor.encode(part) for part in text.split(_SPACE_MARK))
        for part in others:
            first += self._mark + part
        return first

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of ids."""
        return b"".join(self._bytes[token] for token in tokens).decode("utf-8", errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """UTF-8 bytes that one id stands for."""
        return self._bytes[token]

    def _piece_bytes(self, token: int) -> bytes:
        processor = self._processor
        piece = processor.id_to_piece(token)
        if processor.is_byte(token):
            return bytes([int(piece[3:5], 16)])
        if processor.is_control(token):
            return b""
        if processor.is_unknown(token):
            return "\ufffd".encode()
        return piece.replace(_SPACE_MARK, " ").encode()


def load_tokenizer(path: str | os.PathLike[str], vocab_size: int) -> Tokenizer:
    """The tokenizer of a file, checked against the model's vocabulary.

    Raises ConfigError if the file is missing, is of no known kind, or has another number of entries.
    """
    tokenizer = SentencePieceTokenizer.load(path)
    if tokenizer.vocab_size != vocab_size:
        raise ConfigError(
            f"data.tokenizer = {str(path)!r}: a sentencepiece model that does not match, it has "
            f"{tokenizer.vocab_size} entries and model.vocab_size = {vocab_size}; "
            f"set model.vocab_size to {tokenizer.vocab_size}, or leave data.tokenizer unset to have one trained"
        )
    return tokenizer


def train_sentencepiece(texts: Iterable[str], vocab_size: int, path: str | os.PathLike[str], stride: int = 1) -> None:
    """Train a byte-pair encoding of exactly `vocab_size` entries and write its model file, whole or not at all.

    Only every `stride`-th stretch of the texts is learned from. The same texts give the same file.
    Raises ConfigError if the texts are too few for so many entries, or need more, or if the file is there already.
    """
    target = Path(path)
    if target.exists():
        raise ConfigError(f"{target} exists already and is not overwritten; move it away or name another file")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_training_stretches(texts, stride),
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
            max_sentence_length=8 * _STRETCH,
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
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(model.getvalue())
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, target)


def _training_stretches(texts: Iterable[str], stride: int) -> Iterator[str]:
    count = 0
    for text in texts:
        for start in range(0, len(text), _STRETCH):
            if count % stride == 0:
                yield from (part for part in _UNLEARNABLE.split(text[start : start + _STRETCH]) if part)
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


def _read_model(path: str | os.PathLike[str]) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"data.tokenizer = {str(path)!r}: cannot read it: {error.strerror}") from error
