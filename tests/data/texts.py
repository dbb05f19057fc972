"""Texts that tokenizers get wrong, and the names of the kinds."""

from __future__ import annotations

from hypothesis import strategies as st

from rwkv_jax.data.tokenizers import END_OF_TEXT

KINDS = ["sentencepiece", "hugging face", "longest match", "world", "257 bytes", "256 bytes"]

_SPACES = ["\r\n", "\r", "\n", "\t", "\x00", " ", "  ", "\u2581", "\u2585", "\u2047", "\ufeff", "\u2028", "\x85"]
_CHARACTERS = ["ﬁ", "e\u0301", "👩\u200d👧", "日本", "\U0010ffff", "\x7f", "\ufffd"]
_WORDS = [END_OF_TEXT, "<|padding|>", "<unk>", "<0x0A>", "</s>", "def ", "return", "_1", "Ġ", "       "]
_TRICKY = st.sampled_from([*_SPACES, *_CHARACTERS, *_WORDS])

TEXTS = st.lists(_TRICKY | st.text(st.characters(exclude_categories=["Cs"]), max_size=4), max_size=30).map("".join)
"""Any text, often with what is hard."""
