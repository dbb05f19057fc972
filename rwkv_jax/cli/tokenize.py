"""`rwkv tokenize`: converts text to token files (.bin and .idx)."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import tyro

from rwkv_jax.config import ConfigError, DataConfig


@dataclasses.dataclass(frozen=True)
class Tokenize:
    """Tokenize text into TARGET.bin and TARGET.idx, the token files of the official trainer and of `rwkv train`."""

    source: tyro.conf.Positional[str]
    """A text file, a folder, or JSON records (.jsonl, .json), optionally compressed (.gz, .bz2, .xz, .zst), a table
    (.parquet, .arrow, .feather), or python-stdlib."""
    target: tyro.conf.Positional[Path]
    """Path of both files without .bin and .idx; they must not exist yet."""
    tokenizer: str
    """world, bytes, a sentencepiece model, a tokenizer.json, or a folder that contains one."""
    vocab_size: int = 65536
    """Vocabulary size of the models to train, which the tokenizer must match; World's by default."""
    glob: str = "**/*"
    """Pattern of the files to read in a folder."""
    text_field: str = "text"
    """Field of a JSON record, or column of a table, with the text."""

    def run(self) -> None:
        """Writes the files; prints the number of tokens and the magic primes of the official order."""
        from rwkv_jax.data.tokenize import tokenize
        from rwkv_jax.data.tokenizers import load_tokenizer
        from rwkv_jax.data.tokens.order import magic_primes

        data = DataConfig(source=self.source, glob=self.glob, text_field=self.text_field, tokenizer=self.tokenizer)
        tokenizer = load_tokenizer(self.tokenizer, self.vocab_size)
        try:
            made = tokenize(data, tokenizer, self.target, print)
        except ConfigError as error:  # name this command's flags instead of config fields
            flags = {"data.source": "source", "data.glob": "--glob", "data.text_field": "--text-field"}
            raise ConfigError(re.sub("|".join(flags), lambda field: flags[field[0]], str(error))) from error
        print(f"{made.bin_path} and {made.idx_path.name}: {made.num_tokens} tokens, {made.num_documents} documents")
        for sequence_length, prime in magic_primes(made.num_tokens).items():
            print(f"magic prime for sequences of {sequence_length}: {prime}")
