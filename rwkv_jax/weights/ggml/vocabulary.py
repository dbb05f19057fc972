"""Tokenizers in GGUF files: llama.cpp's kind "rwkv", the longest match over bytes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rwkv_jax.data.tokenizers import ByteTokenizer, Tokenizer, WorldTokenizer
from rwkv_jax.weights.ggml.gguf_file import MAGIC, Texts, read_gguf
from rwkv_jax.weights.tensors import WeightsError

_LOG = logging.getLogger(__name__)

_KIND = "tokenizer.ggml.model"
_TOKENS = "tokenizer.ggml.tokens"
_WORLD_IDS = 2**16
_KNOWN = (WorldTokenizer, ByteTokenizer)

# A text that is in no text of UTF-8: llama.cpp would find it in texts, as it finds every other token.
_UNUSED_TEXT = "\\xff[{}]"

# As `rwkv_jax.chat.formats.WORLD` writes chats, for programs that ask the file.
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


def vocabulary_for(path: Path, tokenizer: Tokenizer | None, vocab_size: int) -> Vocabulary | None:
    """The vocabulary for a GGUF file: the tokenizer's; without one, World's for 65536 ids, and else none.

    Raises:
      ConfigError: llama.cpp has no such tokenizer, or the World tokenizer is not installed.
    """
    if tokenizer is None:
        if vocab_size != _WORLD_IDS:
            _LOG.warning("%s: there is no tokenizer to write into it, programs must be given ids", path)
            return None
        _LOG.warning("%s: gets the World tokenizer, since the model has its %d ids", path, _WORLD_IDS)
        tokenizer = WorldTokenizer()
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


def _if_same(tokenizer: Tokenizer, texts: Iterator[bytes]) -> Tokenizer | None:
    """The tokenizer if its tokens have these texts, apart from those that are no text."""
    for token, text in enumerate(texts):
        is_text = token != tokenizer.end_of_text and tokenizer.is_named(token)
        if is_text and text != _escaped(tokenizer.token_bytes(token)):
            return None
    return tokenizer


def if_in_gguf(tokenizer: Tokenizer | None, source: Path) -> Tokenizer | None:
    """The tokenizer of some weights if a GGUF file can hold it; else None, and a warning."""
    if tokenizer is None or isinstance(tokenizer, _KNOWN):
        return tokenizer
    _LOG.warning("%s: its tokenizer (%s) cannot be put into GGUF, World and bytes can", source, tokenizer.saved.name)
    return None
