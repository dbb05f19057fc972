"""Training rows, each a pure function of seed, step and row."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from rwkv_jax.config import ConfigError
from rwkv_jax.data.tokens.mixture import assign_sources
from rwkv_jax.data.tokens.order import (
    RowOrder,
    check_magic_prime,
    find_magic_prime,
    num_windows,
    official_starts,
    shuffled_windows,
    stream_starts,
)
from rwkv_jax.data.tokens.token_file import Corpus, TokenFile, first_wrong_token


class RowStarts(NamedTuple):
    """Start positions of rows; two [n] int64 arrays."""

    sources: np.ndarray
    """Index of the source."""
    starts: np.ndarray
    """Position of the first token in that source."""


class Rows(NamedTuple):
    """Rows of tokens, for training or evaluation."""

    tokens: np.ndarray
    """int32 [n, T + 1]: the first T tokens are inputs, the last T targets."""
    mask: np.ndarray | None = None
    """float32 [n, T], 1 where the target counts; None if all do."""
    targets: np.ndarray | None = None
    """int32 [n, T], where targets are not the next tokens; None if they are."""

    def select(self, rows: slice) -> Rows:
        """The selected rows."""
        mask, targets = (None if part is None else part[rows] for part in (self.mask, self.targets))
        return Rows(self.tokens[rows], mask, targets)


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingRows:
    """Reads the rows of any step; created by `training_rows`, which checks that the values fit together."""

    sources: tuple[TokenFile, ...]
    shares: tuple[int, ...]
    """Rows of each source in a period of the mixture."""
    order: RowOrder
    seed: int
    batch_size: int
    """B."""
    sequence_length: int
    """T."""
    vocab_size: int
    """Number of ids; reading a token beyond it is an error."""
    magic_prime: int | None = None
    """p of the official order; None for other orders."""

    @property
    def num_tokens(self) -> int:
        """Number of training tokens of all sources."""
        return sum(source.num_tokens for source in self.sources)

    def locate(self, step: int, rows: slice = slice(None)) -> RowStarts:
        """Start positions of the selected rows of a step."""
        return self._find(step * self.batch_size + np.arange(self.batch_size, dtype=np.int64)[rows])

    def _find(self, row_index: np.ndarray) -> RowStarts:
        """Start positions of rows by how many were read before."""
        one_source = np.zeros(len(row_index), np.int64)
        num_tokens = self.sources[0].num_tokens
        if self.magic_prime is not None:
            starts = official_starts(row_index, magic_prime=self.magic_prime, sequence_length=self.sequence_length)
            return RowStarts(one_source, starts)
        if self.order == "streams":
            shape = {"batch_size": self.batch_size, "sequence_length": self.sequence_length}
            return RowStarts(one_source, stream_starts(row_index, num_tokens=num_tokens, seed=self.seed, **shape))
        if len(self.sources) == 1:
            return RowStarts(one_source, self._window_starts(0, row_index))
        sources, members = assign_sources(row_index, self.shares, self.seed)
        starts = np.empty_like(members)
        for source in np.unique(sources):
            chosen = sources == source
            starts[chosen] = self._window_starts(int(source), members[chosen])
        return RowStarts(sources, starts)

    def read(self, step: int, rows: slice = slice(None)) -> Rows:
        """Reads the selected rows of a step, with a mask if any source has one.

        `rows` selects from the B rows, so that each process reads only its part.
        Raises ConfigError with file and position for a token outside the vocabulary.
        """
        return self._read(self.locate(step, rows))

    def read_rows(self, row_index: np.ndarray) -> Rows:
        """Rows by how many were read before, [n] int64; as `read`."""
        return self._read(self._find(row_index))

    def _read(self, located: RowStarts) -> Rows:
        length = self.sequence_length + 1
        sources, starts = located
        result = Rows(np.empty((len(starts), length), np.int32))
        if any(source.mask is not None for source in self.sources):
            result = result._replace(mask=np.ones((len(starts), length - 1), np.float32))
        for row, (source, start) in enumerate(zip(sources.tolist(), starts.tolist(), strict=True)):
            file = self.sources[source]
            tokens = _read_ring(file.tokens, start, length)
            wrong = first_wrong_token(tokens, self.vocab_size)  # before the cast, which would wrap around
            if wrong is not None:
                position = (start + wrong) % file.num_tokens
                raise ConfigError(
                    f"{file.path}: token {position} is {tokens[wrong]}, and the vocabulary has {self.vocab_size}; the "
                    "file is damaged, or was made by another tokenizer than data.tokenizer"
                )
            result.tokens[row] = tokens
            if result.mask is not None and file.mask is not None:
                result.mask[row] = _read_ring(file.mask, start, length)[1:]
        return result

    def row_locations(self, step: int, rows: slice = slice(None)) -> list[str]:
        """Start of each row for messages: `minipile.bin, token 941248`."""
        return self._named(self.locate(step, rows))

    def locations(self, row_index: np.ndarray) -> list[str]:
        """The same of rows as `read_rows` has them."""
        return self._named(self._find(row_index))

    def epochs(self, num_rows: float) -> float:
        """How often so many rows read all tokens."""
        return num_rows * self.sequence_length / self.num_tokens

    def _named(self, located: RowStarts) -> list[str]:
        pairs = zip(located.sources.tolist(), located.starts.tolist(), strict=True)
        return [f"{self.sources[source].path}, token {start}" for source, start in pairs]

    def _window_starts(self, source: int, row_index: np.ndarray) -> np.ndarray:
        num_tokens = self.sources[source].num_tokens
        return shuffled_windows(
            row_index, num_tokens=num_tokens, seed=self.seed, sequence_length=self.sequence_length
        ).start


def _read_ring(values: np.ndarray, start: int, length: int) -> np.ndarray:
    """Consecutive values, continuing at the first after the last."""
    found = np.asarray(values)[start : start + length]  # slicing a memmap is slower
    return found if len(found) == length else np.concatenate([found, values[: length - len(found)]])


def training_rows(
    corpus: Corpus,
    *,
    order: RowOrder,
    seed: int,
    batch_size: int,
    sequence_length: int,
    magic_prime: int | None = None,
) -> TrainingRows:
    """The rows of a run; checks that the corpus has enough tokens.

    Args:
      corpus: the corpus to read.
      order: `streams` if states are carried across steps, else `data.order`.
      seed: for the order; unused by the official one.
      batch_size: B.
      sequence_length: T.
      magic_prime: for the official order; None computes it.

    Raises:
      ConfigError: too few tokens, an invalid magic prime, or an order that mixtures do not support.
    """
    shape = {"batch_size": batch_size, "sequence_length": sequence_length}
    if len(corpus.sources) == 1:
        _check_corpus_fits(corpus.train.num_tokens, **shape)
    else:
        _check_mixture_fits(corpus, order, sequence_length)
    if order == "official":
        num_tokens = corpus.train.num_tokens
        if magic_prime is None:
            magic_prime = find_magic_prime(num_tokens, sequence_length)
        else:
            check_magic_prime(magic_prime, num_tokens, sequence_length)
    return TrainingRows(
        sources=corpus.sources,
        shares=corpus.shares,
        order=order,
        seed=seed,
        vocab_size=corpus.tokenizer.vocab_size,
        magic_prime=magic_prime if order == "official" else None,
        **shape,
    )


def source_rows(
    source: TokenFile, *, seed: int, batch_size: int, sequence_length: int, vocab_size: int
) -> TrainingRows:
    """The rows of one source of a mixture, by themselves. Raises ConfigError for less than a row."""
    _check_source_fits(source, sequence_length)
    return TrainingRows((source,), (1,), "windows", seed, batch_size, sequence_length, vocab_size)


def _check_corpus_fits(num_tokens: int, *, batch_size: int, sequence_length: int) -> None:
    """Raises ConfigError if there are too few training tokens for one batch of distinct windows."""
    sequences = num_windows(num_tokens, sequence_length)
    if sequences >= batch_size:
        return
    remedies = ["use more text"]
    if (num_tokens - 1) // batch_size >= 1:
        remedies.insert(0, f"set training.sequence_length to at most {(num_tokens - 1) // batch_size}")
    if sequences >= 1:
        remedies.insert(0, f"set training.batch_size to at most {sequences}")
    raise ConfigError(
        f"training.batch_size = {batch_size}: the corpus is shorter than one batch, its {num_tokens} training tokens "
        f"give {sequences} sequences of training.sequence_length = {sequence_length} (one batch takes "
        f"{batch_size * sequence_length + 1} tokens); {', or '.join(remedies)}"
    )


def _check_mixture_fits(corpus: Corpus, order: RowOrder, sequence_length: int) -> None:
    if order != "windows":
        raise ConfigError(
            f"data.mixture: there is no {order} order of several sources, whose rows follow from one stream of tokens; "
            + (
                "switch training.carry_state off, or give one source with data.source"
                if order == "streams"
                else "set data.order to windows, or give one source with data.source"
            )
        )
    for source in corpus.sources:
        _check_source_fits(source, sequence_length)


def _check_source_fits(source: TokenFile, sequence_length: int) -> None:
    if num_windows(source.num_tokens, sequence_length) == 0:
        raise ConfigError(
            f"data.mixture: {source.path} has {source.num_tokens} training tokens, less than one sequence of "
            f"training.sequence_length = {sequence_length} and the token after it; shorten it, or leave the source "
            "out"
        )
