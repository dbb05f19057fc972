"""Tokenizers: an interface and six implementations, streaming, saving and loading.

What `decode(encode(text))` returns:

    sentencepiece   every text, exactly; a model that could lose anything is rejected
    World           every text, exactly
    longest match   every text, exactly: World's way with another vocabulary, from a tokenizer.json
    bytes           every text, exactly; with 256 ids NUL has none, and `encode` rejects it
    Hugging Face    the text as the file's normalizer leaves it: GPT-NeoX composes characters (NFC), so that an e and a
                    combining accent become one character; composed texts are returned exactly
    symbols         texts of a synthetic task's symbols, with one blank before each

`prepare_corpus` reports the number of documents that change.
"""

from rwkv_jax.data.tokenizers.base import SavedTokenizer, StreamingDecoder, Tokenizer
from rwkv_jax.data.tokenizers.byte_values import ByteTokenizer
from rwkv_jax.data.tokenizers.hugging_face import HuggingFaceTokenizer
from rwkv_jax.data.tokenizers.hugging_face_folder import (
    CHAT_TEMPLATE,
    chat_template_beside,
    hugging_face_files,
    write_hugging_face_tokenizer,
)
from rwkv_jax.data.tokenizers.loading import TOKENIZER_FILES, fits_model, load_tokenizer, save_tokenizer
from rwkv_jax.data.tokenizers.longest_match import LongestMatchTokenizer
from rwkv_jax.data.tokenizers.sentence_piece import END_OF_TEXT, SentencePieceTokenizer, train_sentencepiece
from rwkv_jax.data.tokenizers.symbols import SymbolTokenizer
from rwkv_jax.data.tokenizers.world import WorldTokenizer

__all__ = [
    "CHAT_TEMPLATE",
    "END_OF_TEXT",
    "TOKENIZER_FILES",
    "ByteTokenizer",
    "HuggingFaceTokenizer",
    "LongestMatchTokenizer",
    "SavedTokenizer",
    "SentencePieceTokenizer",
    "StreamingDecoder",
    "SymbolTokenizer",
    "Tokenizer",
    "WorldTokenizer",
    "chat_template_beside",
    "fits_model",
    "hugging_face_files",
    "load_tokenizer",
    "save_tokenizer",
    "train_sentencepiece",
    "write_hugging_face_tokenizer",
]
