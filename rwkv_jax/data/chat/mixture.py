"""Chats and texts in one run, such as chats to learn from and texts so that a model does not forget.

Each row is of one source, which is chosen as in a mixture of texts: exact shares in every period of rows, in an order
that follows from the seed. Rows of texts count whole, rows of chats where these count.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

from rwkv_jax.config import ConfigError, TrainConfig
from rwkv_jax.config.data import CHATS
from rwkv_jax.data.chat.rows import PackedRows, packed_rows
from rwkv_jax.data.chat.source import ChatCorpus, ChatCounts, held_out_rows, prepare_chats
from rwkv_jax.data.corpus import mix, prepare_source
from rwkv_jax.data.tokenizers import Tokenizer
from rwkv_jax.data.tokens.mixture import assign_sources, mixture_fingerprint, period_shares
from rwkv_jax.data.tokens.rows import Rows, TrainingRows, source_rows
from rwkv_jax.data.tokens.token_file import Corpus, TokenFile


@dataclasses.dataclass(frozen=True, eq=False)
class MixedCorpus:
    """The sources of a mixture of which some are chats."""

    names: tuple[str, ...]
    """As `data.mixture` has them."""
    parts: tuple[ChatCorpus | Corpus, ...]
    """One a source, in the same order."""
    shares: tuple[int, ...]
    """Rows of each in a period of the mixture."""
    tokenizer: Tokenizer
    fingerprint: str
    """Hex digest of those of the parts, and of the shares."""
    held_out_texts: TokenFile | None
    """Held-out tokens of all sources that are no chats, joined; None if there are none."""
    bytes_per_token: float | None = None
    """Of chats only some tokens count, of which bits per byte would say nothing."""

    @property
    def chats(self) -> tuple[ChatCorpus, ...]:
        """The sources that are chats; at least one."""
        return tuple(part for part in self.parts if isinstance(part, ChatCorpus))

    @property
    def held_out(self) -> bool | None:
        """None if nothing is held out."""
        return None if self.chats[0].held_out is None else True

    @property
    def counts(self) -> ChatCounts:
        """What became of the records of all sources that are chats."""
        return ChatCounts.of_all([part.counts for part in self.chats])

    def held_out_chats(self, config: TrainConfig, num_batches: int | None) -> Iterator[Rows]:
        """Batches of the held-out chats of each source, which must be there."""
        for part in self.chats:
            yield from held_out_rows(part, config, num_batches)


@dataclasses.dataclass(frozen=True, eq=False)
class MixedRows:
    """The rows of a mixture of chats and texts."""

    names: tuple[str, ...]
    parts: tuple[PackedRows | TrainingRows, ...]
    """The rows of each source by themselves."""
    shares: tuple[int, ...]
    """Rows of each in a period of the mixture."""
    seed: int
    batch_size: int
    """B."""
    sequence_length: int
    """T."""

    def read(self, step: int, rows: slice = slice(None)) -> Rows:
        """The selected ones of a step's B rows, with targets and a mask, which is ones for texts."""
        sources, members = self._locate(step, rows)
        shape = (len(sources), self.sequence_length)
        tokens = np.empty((len(sources), self.sequence_length + 1), np.int32)
        targets, mask = np.empty(shape, np.int32), np.ones(shape, np.float32)
        for source in np.unique(sources).tolist():
            chosen = sources == source
            found = self.parts[source].read_rows(members[chosen])
            tokens[chosen] = found.tokens
            targets[chosen] = found.tokens[:, 1:] if found.targets is None else found.targets
            if found.mask is not None:
                mask[chosen] = found.mask
        return Rows(tokens, mask, targets)

    def row_locations(self, step: int, rows: slice = slice(None)) -> list[str]:
        """What each row begins with, for messages."""
        pairs = zip(*self._locate(step, rows), strict=True)
        return [self.parts[source].locations(np.array([member]))[0] for source, member in pairs]

    def describe(self, num_steps: int) -> str:
        """What so many steps read."""
        num_rows, period = num_steps * self.batch_size, sum(self.shares)
        listed = (
            f"{name} {share / period:.2%} ({part.epochs(num_rows * share / period):.2f} epochs)"
            for name, part, share in zip(self.names, self.parts, self.shares, strict=True)
        )
        return f"rows of {', '.join(listed)}"

    def _locate(self, step: int, rows: slice) -> tuple[np.ndarray, np.ndarray]:
        """The source of each selected row, and the row's index within that source."""
        row_index = step * self.batch_size + np.arange(self.batch_size, dtype=np.int64)[rows]
        return assign_sources(row_index, self.shares, self.seed)


def prepare_mixed(config: TrainConfig, report: Callable[[str], None]) -> MixedCorpus:
    """Opens the sources of `data.mixture`, of which some are chats. `report` gets lines to print.

    Raises:
      ConfigError: streams, which a mixture has not, or as `prepare_chats` and `prepare_corpus`.
    """
    data = config.data
    if config.training.carry_state:
        raise ConfigError(
            "training.carry_state = True: rows of a mixture do not go on from step to step; switch it off, or give one "
            "source with data.source"
        )
    names, shares = tuple(source for source, _ in data.mixture), period_shares(data.mixture)
    parts = list[ChatCorpus | Corpus]()
    for name in names:
        own = dataclasses.replace(config, data=data.of_source(name))
        is_chats = name.startswith(CHATS)
        parts.append(
            prepare_chats(own, report) if is_chats else prepare_source(own.data, config.model.vocab_size, report)
        )
    texts = [part for part in parts if isinstance(part, Corpus)]
    fingerprint = mixture_fingerprint([part.fingerprint for part in parts], shares)
    listed = ", ".join(f"{name} {share / sum(shares):.2%}" for name, share in zip(names, shares, strict=True))
    report(f"mixture: {listed}; fingerprint {fingerprint}")
    return MixedCorpus(
        names,
        tuple(parts),
        shares,
        parts[0].tokenizer,
        fingerprint,
        mix(texts, [1] * len(texts)).held_out if texts else None,
    )


def mixed_rows(corpus: MixedCorpus, config: TrainConfig) -> MixedRows:
    """The rows of a run. Raises ConfigError for a text without a whole row."""
    training = config.training
    shape = {"batch_size": training.batch_size, "sequence_length": training.sequence_length}

    def rows_of(part: ChatCorpus | Corpus) -> PackedRows | TrainingRows:
        end_of_text, vocab_size = corpus.tokenizer.end_of_text, corpus.tokenizer.vocab_size
        if isinstance(part, Corpus):
            return source_rows(part.train, seed=config.seed, vocab_size=vocab_size, **shape)
        apart = config.data.chat_rows == "apart"
        return packed_rows(part.training, apart=apart, seed=config.seed, end_of_text=end_of_text, **shape)

    parts = tuple(rows_of(part) for part in corpus.parts)
    return MixedRows(corpus.names, parts, corpus.shares, config.seed, **shape)
