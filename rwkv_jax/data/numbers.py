"""Sequences of whole numbers as data: PATH.npy, of which every number is a token of its own.

No tokenizer is trained or named. Number n has the id n + 1, and id 0, end of text, lies between sequences. The file
holds one sequence, [n], or one a row, [rows, n], of any integer dtype, none negative. PATH.txt beside it may name the
numbers, one a line from 0 on, such as notes, bases or amino acids; otherwise they are called 0, 1, 2 and so on, as
`rwkv generate` writes them. Bits per byte are of the numbers in the smallest of 1, 2 and 4 bytes, so that they can be
compared with what gzip makes of the same array.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from rwkv_jax.checks import require
from rwkv_jax.config import ConfigError, DataConfig
from rwkv_jax.data.tokenizers import SymbolTokenizer
from rwkv_jax.data.tokens.token_file import Corpus, TokenFile

_VERSION = 1  # of how numbers become tokens
_MAX_IDS = 2**24


def open_numbers(path: Path) -> np.ndarray:
    """The array of a file, [rows, n], memory-mapped.

    Raises:
      ConfigError: it is missing, no array of whole numbers of one or two axes, empty, or has a negative number.
    """
    place = f"data.source = {str(path)!r}"
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise ConfigError(f"{place}: there is no such file") from error
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"{place}: cannot be read as an array of NumPy ({error}); write it by numpy.save") from error
    if array.dtype.kind not in "iu" or array.ndim not in (1, 2) or 0 in array.shape:
        raise ConfigError(
            f"{place}: is {array.dtype} of shape {array.shape}; it must be whole numbers, [n] for one sequence or "
            "[rows, n] for one a row"
        )
    if (lowest := int(array.min())) < 0:
        raise ConfigError(f"{place}: has the number {lowest}; numbers begin at 0, so add {-lowest} to all")
    return np.atleast_2d(array)


def number_tokenizer(path: Path, vocab_size: int, largest: int | None = None) -> SymbolTokenizer:
    """The tokenizer of a file's numbers, with the names in PATH.txt if it is there.

    Args:
      vocab_size: ids of the model, which may be more.
      largest: number in the file; None finds it.

    Raises:
      ConfigError: names that are missing, double or have blanks, or more ids than the model has.
    """
    largest = int(open_numbers(path).max()) if largest is None else largest
    place, beside = f"data.source = {str(path)!r}", path.with_suffix(".txt")
    require(largest + 2 <= _MAX_IDS, "data.source", str(path), f"has the number {largest}; at most {_MAX_IDS - 2}")
    names = [str(number) for number in range(largest + 1)]
    if beside.is_file():
        try:
            names = beside.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{beside}: cannot be read as the numbers' names ({error}), one a line") from error
        if len(names) <= largest:
            raise ConfigError(f"{beside}: names {len(names)} numbers, and {path.name} has {largest}; name all, from 0")
    try:
        tokenizer = SymbolTokenizer(names)
    except ConfigError as error:
        raise ConfigError(f"{beside}: {error}") from error
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"model.vocab_size = {vocab_size}: {place} has {len(names)} numbers or names, which are "
            f"{tokenizer.vocab_size} ids with end of text; set it to {tokenizer.vocab_size} or more"
        )
    return tokenizer


def prepare_numbers(data: DataConfig, vocab_size: int, report: Callable[[str], None]) -> Corpus:
    """The corpus of a file of numbers, in memory; the last rows, or the end of a single one, are held out.

    Raises:
      ConfigError: as `open_numbers` and `number_tokenizer`, or nothing would be left on one of the two sides.
    """
    path = Path(data.source).expanduser()
    require(data.tokenizer is None, "data.tokenizer", data.tokenizer, f"{data.source} has its own ids; leave it out")
    numbers = open_numbers(path)
    tokenizer = number_tokenizer(path, vocab_size, int(numbers.max()))
    digest = hashlib.blake2b(f"{_VERSION} {data.held_out} {numbers.shape} ".encode(), digest_size=16)
    for row in numbers:
        digest.update(np.ascontiguousarray(row, "<i8").data)
    rows, length = numbers.shape
    if rows == 1:
        count = max(1, round(data.held_out * length)) if data.held_out > 0 else 0
        parts = numbers[:, : length - count], numbers[:, length - count :]
    else:
        count = max(1, round(data.held_out * rows)) if data.held_out > 0 else 0
        parts = numbers[: rows - count], numbers[rows - count :]
    if parts[0].size == 0:
        raise ConfigError(
            f"data.held_out = {data.held_out}: {path.name} of shape {numbers.shape} has nothing left to train on; set "
            "it to 0"
        )
    width = next(size for size in (1, 2, 4) if int(numbers.max()) < 256**size)
    train, held_out = (_file(path, part, width, tokenizer) if part.size else None for part in parts)
    assert train is not None  # as just checked
    for side, file in (("training", train), ("held-out", held_out)):
        if file is not None:
            report(f"{path}, {side}: {file.num_documents} sequences, {file.num_bytes // width:,} numbers")
    corpus = Corpus(
        sources=(train,),
        shares=(1,),
        held_out=held_out,
        held_out_bytes=functools.partial(_bytes, parts[1], width),
        tokenizer=tokenizer,
        fingerprint=digest.hexdigest(),
    )
    report(f"{len(tokenizer.symbols):,} different numbers of {width} bytes, fingerprint {corpus.fingerprint}")
    return corpus


def _file(path: Path, numbers: np.ndarray, width: int, tokenizer: SymbolTokenizer) -> TokenFile:
    """Tokens of sequences: end of text first, and after each."""
    tokens = np.zeros((len(numbers), numbers.shape[1] + 1), np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32)
    tokens[:, :-1] = numbers
    tokens[:, :-1] += 1
    flat = np.concatenate([np.zeros(1, tokens.dtype), tokens.reshape(-1)])
    return TokenFile(path, flat, num_bytes=numbers.size * width, num_documents=len(numbers))


def _bytes(numbers: np.ndarray, width: int) -> bytes:
    return np.ascontiguousarray(numbers, f"<u{width}").tobytes()
