"""Tokenizers: one protocol and four kinds of it, streaming, and how they are saved and found again.

What `decode(encode(text))` gives back:

    sentencepiece   every text, exactly; a model that could lose anything is refused
    World           every text, exactly
    bytes           every text, exactly; with 256 ids there is none for NUL, and a text that has it is refused
    Hugging Face    the text as the file's normalizer leaves it: GPT-NeoX composes characters (NFC), so that an e and a
                    combining accent come back as one character; texts that are composed already come back exactly

`prepare_corpus` counts the documents that come back changed, and says so.
"""

from rwkv_jax.data.tokenizers.byte_values import ByteTokenizer
from rwkv_jax.data.tokenizers.hugging_face import HuggingFaceTokenizer
from rwkv_jax.data.tokenizers.loading import TOKENIZER_FILES, fits_model, load_tokenizer, save_tokenizer
from rwkv_jax.data.tokenizers.protocol import SavedTokenizer, StreamingDecoder, Tokenizer
from rwkv_jax.data.tokenizers.sentence_piece import END_OF_TEXT, SentencePieceTokenizer, train_sentencepiece
from rwkv_jax.data.tokenizers.world import WorldTokenizer

__all__ = [
    "END_OF_TEXT",
    "TOKENIZER_FILES",
    "ByteTokenizer",
    "HuggingFaceTokenizer",
    "SavedTokenizer",
    "SentencePieceTokenizer",
    "StreamingDecoder",
    "Tokenizer",
    "WorldTokenizer",
    "fits_model",
    "load_tokenizer",
    "save_tokenizer",
    "train_sentencepiece",
]
