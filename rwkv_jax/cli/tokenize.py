"""`rwkv tokenize`: text to official token files."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import tyro

from rwkv_jax.config import DataConfig


@dataclasses.dataclass(frozen=True)
class Tokenize:
    """Write text as official token files, TARGET.bin and TARGET.idx, from which train.py and others can train."""

    source: tyro.conf.Positional[str]
    """A text file, a folder, JSON records (.jsonl, .json), each perhaps compressed (.gz, .bz2, .xz, .zst), a table
    (.parquet, .arrow, .feather), or python-stdlib."""
    target: tyro.conf.Positional[Path]
    """What is common to the names of both files, which must not exist yet."""
    tokenizer: str
    """world, bytes, a sentencepiece model, a tokenizer.json, or a folder that holds one."""
    vocab_size: int = 65536
    """V of the models that will be trained, which the tokenizer must match; World's by default."""
    glob: str = "**/*"
    """Which files of a folder are read."""
    text_field: str = "text"
    """Field of a JSON record, or column of a table, that holds its text."""

    def run(self) -> None:
        """Writes the files and says how many tokens they have, and the primes of the official order for them."""
        from rwkv_jax.data.tokenize import tokenize
        from rwkv_jax.data.tokenizers import load_tokenizer
        from rwkv_jax.data.tokens.order import magic_primes

        data = DataConfig(source=self.source, glob=self.glob, text_field=self.text_field, tokenizer=self.tokenizer)
        made = tokenize(data, load_tokenizer(self.tokenizer, self.vocab_size), self.target, print)
        print(f"{made.bin_path} and {made.idx_path.name}: {made.num_tokens} tokens, {made.num_documents} documents")
        for sequence_length, prime in magic_primes(made.num_tokens).items():
            print(f"magic prime for sequences of {sequence_length}: {prime}")
