"""Tokenizers in GGUF files: llama.cpp's kind "rwkv", the longest match over bytes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rwkv_jax.checks import shown
from rwkv_jax.data.tokenizers import ByteTokenizer, Tokenizer, WorldTokenizer, fits_model
from rwkv_jax.weights.ggml.gguf_file import MAGIC, Texts, read_gguf
from rwkv_jax.weights.tensors import WeightsError

_LOG = logging.getLogger(__name__)

_KIND = "tokenizer.ggml.model"
_TOKENS = "tokenizer.ggml.tokens"
_WORLD_IDS = 2**16
_KNOWN = (WorldTokenizer, ByteTokenizer)

# A text that is in no text of UTF-8: llama.cpp would find it in texts, as it finds every other token.
_UNUSED_TEXT = "\\xff[{}]"

# As `rwkv_jax.chat.formats.WORLD` writes chats, for programs that ask the file; blank lines within a message stay.
_CHAT_TEMPLATE = """{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{{- 'User: ' + message['content'] | trim + '\\n\\n' -}}
{%- elif message['role'] == 'assistant' -%}
{{- 'Assistant: ' + message['content'] | trim + '\\n\\n' -}}
{%- else -%}
{{- 'System: ' + message['content'] | trim + '\\n\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- 'Assistant:' -}}
{%- endif -%}"""


class Vocabulary(NamedTuple):
    """What a GGUF file says of a tokenizer."""

    texts: list[bytes]
    """Of each token, escaped as llama.cpp reads them."""
    kinds: list[Literal["normal", "control", "unused"]]
    end_of_text: int
    end_of_turn: int | None
    """A token at which chats stop as well."""
    chat_template: str | None


def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary | None:
    """A tokenizer as llama.cpp's kind "rwkv"; None if it is none."""
    if not isinstance(tokenizer, _KNOWN):
        return None
    texts: list[bytes] = []
    kinds: list[Literal["normal", "control", "unused"]] = []
    for token in range(tokenizer.vocab_size):
        if token == tokenizer.end_of_text or not tokenizer.is_named(token):
            texts.append(_UNUSED_TEXT.format(token).encode())
            kinds.append("control" if token == tokenizer.end_of_text else "unused")
        else:
            texts.append(_escaped(tokenizer.token_bytes(token)))
            kinds.append("normal")
    if isinstance(tokenizer, ByteTokenizer):
        return Vocabulary(texts, kinds, tokenizer.end_of_text, None, None)
    return Vocabulary(texts, kinds, tokenizer.end_of_text, tokenizer.encode("\n\n")[0], _CHAT_TEMPLATE)


def _escaped(content: bytes) -> bytes:
    return repr(content)[2:-1].encode()


def vocabulary_for(path: Path, tokenizer: Tokenizer | None) -> Vocabulary | None:
    """The vocabulary for a GGUF file, None without a tokenizer; WeightsError for one that llama.cpp does not have."""
    if tokenizer is None:
        return None
    found = vocabulary_of(tokenizer)
    if found is None:
        raise WeightsError(
            f"{path}: the tokenizer {tokenizer.saved.name} cannot be put into GGUF, World and bytes can; write to "
            "a folder"
        )
    return found


def tokenizer_in(path: Path, vocab_size: int) -> Tokenizer | None:
    """The tokenizer in a GGUF file; None for other files, and where the file has none that is known here.

    Raises:
      ConfigError: the World tokenizer is in it, and not installed.
    """
    with path.open("rb") as file:
        if file.read(4) != MAGIC:
            return None
    found = read_gguf(path)
    listed: Any = found.metadata.get(_TOKENS)
    if found.metadata.get(_KIND) != "rwkv" or not isinstance(listed, Texts) or listed.count != vocab_size:
        return None
    if vocab_size in ByteTokenizer.SIZES:
        return _if_same(ByteTokenizer(vocab_size), found.texts(_TOKENS))
    return _if_same(WorldTokenizer(), found.texts(_TOKENS)) if vocab_size == _WORLD_IDS else None


def describe_tokenizer(path: Path) -> str | None:
    """What a GGUF file says of its tokenizer, for a message; None for other files, and where it says nothing."""
    with path.open("rb") as file:
        if file.read(4) != MAGIC:
            return None
    metadata = read_gguf(path).metadata
    kind, listed = metadata.get(_KIND), metadata.get(_TOKENS)
    if not isinstance(kind, str) or not isinstance(listed, Texts):
        return None
    return f"in the file, of llama.cpp's kind {shown(kind)}, with {listed.count} tokens"


def _if_same(tokenizer: Tokenizer, texts: Iterator[bytes]) -> Tokenizer | None:
    """The tokenizer if its tokens have these texts, apart from those that are no text."""
    for token, text in enumerate(texts):
        is_text = token != tokenizer.end_of_text and tokenizer.is_named(token)
        if is_text and text != _escaped(tokenizer.token_bytes(token)):
            return None
    return tokenizer


def tokenizer_for_gguf(source: Path, tokenizer: Tokenizer | None, vocab_size: int) -> Tokenizer | None:
    """The tokenizer to write into a GGUF file if none was asked for; None, with a warning, if there is none.

    Args:
      source: what messages name.
      tokenizer: that of the weights; if the file cannot hold it, it gets none, and not World's either.

    Raises:
      ConfigError: the model has World's 65536 ids and no tokenizer, and the World tokenizer is not installed.
    """
    if tokenizer is not None:
        fits = fits_model(tokenizer, vocab_size)
        if fits and isinstance(tokenizer, _KNOWN):
            return tokenizer
        trouble = "cannot be put into GGUF, World and bytes can" if fits else f"does not fit {vocab_size} ids"
        _LOG.warning("%s: its tokenizer (%s) %s; programs must be given ids", source, tokenizer.saved.name, trouble)
        return None
    if vocab_size == _WORLD_IDS:
        _LOG.warning("%s: the file gets the World tokenizer, since the model has its %d ids", source, _WORLD_IDS)
        return WorldTokenizer()
    _LOG.warning("%s: has no tokenizer to write into the file, programs must be given ids", source)
    return None
