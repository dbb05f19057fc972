"""Start positions of rows in the token file: pure functions of row_index, which counts rows over the whole run.

Row b of step s has row_index s B + b, so any step is computed without the ones before. Shape letters: B rows, T time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from rwkv_jax.config import ConfigError
from rwkv_jax.data.tokens.permutation import ROUNDS, permute, random_words

RowOrder = Literal["windows", "official", "streams"]
"""Windows, reshuffled each epoch; the official trainer's order; B streams that continue across steps."""


class Windows(NamedTuple):
    """The windows that rows read; three [n] int64 arrays."""

    epoch: np.ndarray
    """Number of complete passes over the corpus before this row."""
    window: np.ndarray
    """Index of the window within the epoch."""
    start: np.ndarray
    """Position of the row's first token in the token file."""


def num_windows(num_tokens: int, sequence_length: int) -> int:
    """Number of windows of T predicted tokens in an epoch."""
    return max(num_tokens - 1, 0) // sequence_length


def shuffled_windows(row_index: np.ndarray, *, num_tokens: int, seed: int, sequence_length: int) -> Windows:
    """Windows that cover the tokens once per epoch, with a permutation and an offset drawn for each epoch.

    A row that runs past the last token continues at the first, so that no offset loses tokens.

    Args:
      row_index: rows of the run, [n] int64.
      num_tokens: tokens in the file; at least T + 1.
      seed: for permutations and offsets.
      sequence_length: T.
    """
    windows_per_epoch = num_windows(num_tokens, sequence_length)
    epoch, epoch_position = np.divmod(row_index, windows_per_epoch)
    window, offset = np.empty_like(epoch_position), np.empty_like(epoch_position)
    for number in np.unique(epoch):
        members = epoch == number
        keys = random_words(f"{seed} {number}", ROUNDS + 1)
        window[members] = permute(epoch_position[members], windows_per_epoch, keys)
        offset[members] = keys[ROUNDS] % sequence_length
    return Windows(epoch, window, (window * sequence_length + offset) % num_tokens)


def official_starts(row_index: np.ndarray, *, magic_prime: int, sequence_length: int) -> np.ndarray:
    """Start positions of rows in the official trainer's order, [n] int64; no seed, no epochs, no offset.

    Sample i = 1, 2, ... begins at token T ((f i^3) mod p), where f is p over the golden ratio, rounded down. Since
    p = 3 n + 2, cubing is a bijection modulo p, and p samples read each of p windows once. The trainer's mini-epochs
    of 40320 samples do not affect this. Source: RWKV-LM, RWKV-v7/train_temp/src/dataset.py.

    Args:
      row_index: rows of the run, [n] int64; sample i is row i - 1.
      magic_prime: p; must pass `check_magic_prime`.
      sequence_length: T.
    """
    factor = int(magic_prime * ((math.sqrt(5) - 1) / 2))
    # Python integers: the cube overflows 64 bits after two million rows.
    cubes = (factor * (index + 1) ** 3 % magic_prime for index in row_index.tolist())
    return np.array([cube * sequence_length for cube in cubes], np.int64)


def stream_starts(
    row_index: np.ndarray, *, num_tokens: int, seed: int, batch_size: int, sequence_length: int
) -> np.ndarray:
    """Start positions of rows that continue the previous step's, [n] int64, for recurrent states carried across steps.

    At step s, row b reads from (offset + b (n // B) + s T) mod n, wrapping around: B evenly spaced streams with a
    common offset drawn from the seed.
    """
    steps, rows = np.divmod(row_index, batch_size)
    offset = int(random_words(f"streams {seed}", 1)[0]) % num_tokens
    return (offset + rows * (num_tokens // batch_size) + steps * sequence_length) % num_tokens


def find_magic_prime(num_tokens: int, sequence_length: int) -> int:
    """The prime of the official order, computed like the official scripts do.

    The largest prime p = 3 n + 2 that is at most num_tokens // T - 1. Raises ConfigError if there is none or if the
    official trainer would reject it, which happens only with fewer than 228 sequences.
    Source: RWKV-LM, RWKV-v5/compute_magic_prime.py.
    """
    num_sequences = num_tokens // sequence_length
    prime = _largest_magic_prime(num_sequences)
    if prime is not None and not _leaves_out_too_many(prime, num_sequences):
        return prime
    wrong = "fewer than three" if prime is None else f"{prime} would leave out more than a tenth of {num_sequences}"
    raise ConfigError(
        f"data.order = 'official': {num_tokens} tokens are too few sequences of training.sequence_length = "
        f"{sequence_length} for a magic prime ({wrong}); use more text, shorter sequences or data.order = 'windows'"
    )


def magic_primes(num_tokens: int, sequence_lengths: Sequence[int] = (512, 1024, 2048, 4096, 8192)) -> dict[int, int]:
    """The magic prime for each sequence length; lengths with too few tokens for one are left out."""
    found = {length: _largest_magic_prime(num_tokens // length) for length in sequence_lengths}
    return {
        length: prime
        for length, prime in found.items()
        if prime is not None and not _leaves_out_too_many(prime, num_tokens // length)
    }


def check_magic_prime(magic_prime: int, num_tokens: int, sequence_length: int) -> None:
    """Raises ConfigError for a number that the official trainer rejects or that needs more tokens than there are."""
    num_sequences = num_tokens // sequence_length
    wrong = None
    if not _is_prime(magic_prime):
        wrong = "is no prime"
    elif magic_prime % 3 != 2:
        wrong = f"leaves {magic_prime % 3} when divided by 3, and cubing is a bijection only where 2 is left"
    elif magic_prime > num_windows(num_tokens, sequence_length):
        wrong = f"is more than the {num_windows(num_tokens, sequence_length)} sequences that there are"
    elif _leaves_out_too_many(magic_prime, num_sequences):
        wrong = f"leaves out more than a tenth of the {num_sequences} sequences that there are"
    if wrong is not None:
        raise ConfigError(
            f"data.magic_prime = {magic_prime}: {wrong} (in {num_tokens} training tokens at training.sequence_length = "
            f"{sequence_length}); leave it out to have it computed, and see whether data.held_out took tokens away"
        )


def _largest_magic_prime(num_sequences: int) -> int | None:
    candidates = range(num_sequences - 1, 1, -1)
    return next((number for number in candidates if number % 3 == 2 and _is_prime(number)), None)


def _leaves_out_too_many(magic_prime: int, num_sequences: int) -> bool:
    """Whether the official trainer rejects a prime because more than a tenth of the sequences would not be read."""
    return magic_prime <= 0.9 * num_sequences


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))
