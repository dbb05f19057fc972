"""From text to batches: sources, tokenizers, prepared corpora on disk, and batches as a function of the step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rwkv_jax.lazy import lazy_names

if TYPE_CHECKING:
    from rwkv_jax.data.corpus import prepare_corpus
    from rwkv_jax.data.tokenizers import Tokenizer, load_tokenizer, save_tokenizer
    from rwkv_jax.data.tokens.rows import TrainingRows, training_rows
    from rwkv_jax.data.tokens.token_file import Corpus, TokenFile

__all__ = [
    "Corpus",
    "TokenFile",
    "Tokenizer",
    "TrainingRows",
    "load_tokenizer",
    "prepare_corpus",
    "save_tokenizer",
    "training_rows",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "corpus": ("prepare_corpus",),
        "tokenizers": ("Tokenizer", "load_tokenizer", "save_tokenizer"),
        "tokens.rows": ("TrainingRows", "training_rows"),
        "tokens.token_file": ("Corpus", "TokenFile"),
    },
)
