"""`rwkv tokenize`: text to official token files."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import tyro

from rwkv_jax.config import ConfigError, DataConfig


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
        tokenizer = load_tokenizer(self.tokenizer, self.vocab_size)
        try:
            made = tokenize(data, tokenizer, self.target, print)
        except ConfigError as error:  # in the words of this command, which has no config
            flags = {"data.source": "source", "data.glob": "--glob", "data.text_field": "--text-field"}
            raise ConfigError(re.sub("|".join(flags), lambda field: flags[field[0]], str(error))) from error
        print(f"{made.bin_path} and {made.idx_path.name}: {made.num_tokens} tokens, {made.num_documents} documents")
        for sequence_length, prime in magic_primes(made.num_tokens).items():
            print(f"magic prime for sequences of {sequence_length}: {prime}")
