"""Writes a tokenizer for transformers and what is built on it: tokenizer.json and what lies beside it."""

from __future__ import annotations

import json
from pathlib import Path

from rwkv_jax.atomic import new_file, refuse_existing
from rwkv_jax.chat.formats import g1_in_jinja
from rwkv_jax.chat.jinja_template import TEMPLATE_FILE, read_foreign_template
from rwkv_jax.config import ConfigError
from rwkv_jax.data.tokenizers.base import Tokenizer
from rwkv_jax.data.tokenizers.byte_level import ENDS_OF_TEXT
from rwkv_jax.data.tokenizers.byte_values import ByteTokenizer
from rwkv_jax.data.tokenizers.word_piece import word_piece_of
from rwkv_jax.data.tokenizers.world import WorldTokenizer

CHAT_TEMPLATE = TEMPLATE_FILE
"""Name of the file of a chat template."""


def write_hugging_face_tokenizer(
    tokenizer: Tokenizer, folder: Path, *, vocab_size: int | None = None, chat_template: str | None = None
) -> list[Path]:
    """Writes tokenizer.json, tokenizer_config.json and, where there is a template, chat_template.jinja into a folder.

    World and bytes are written as `word_piece_of` says; a tokenizer that is a tokenizer.json already stays as it is.
    transformers puts nothing before a text, and pads on the left.

    Args:
      folder: of the weights; is made if it is missing.
      vocab_size: the model's number of ids; those beyond the tokenizer's get placeholders.
      chat_template: text of a Jinja template; None for `g1_in_jinja` with World's vocabulary, and else none.

    Returns:
      The files.

    Raises:
      ConfigError: another kind of tokenizer, one that lacks a byte, or a file that is there already.
    """
    files = hugging_face_files(tokenizer, vocab_size=vocab_size, chat_template=chat_template)
    for name in files:  # before the first is written
        refuse_existing(folder / name)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        with new_file(folder / name) as file:
            file.write(content)
    return [folder / name for name in files]


def hugging_face_files(
    tokenizer: Tokenizer, *, vocab_size: int | None = None, chat_template: str | None = None
) -> dict[str, bytes]:
    """The files that `write_hugging_face_tokenizer` writes, by name. Raises ConfigError as that does."""
    if isinstance(tokenizer, WorldTokenizer | ByteTokenizer):
        content = word_piece_of(tokenizer, vocab_size)
    elif tokenizer.saved.name == "tokenizer.json":
        content = tokenizer.saved.content
    else:
        raise ConfigError(
            f"the tokenizer {tokenizer.saved.name} cannot be written as tokenizer.json; World, bytes, and what is a "
            "tokenizer.json already can"
        )
    end = _name_of_end(tokenizer, content)
    config = {
        "clean_up_tokenization_spaces": False,
        "eos_token": end,
        "pad_token": end,
        "padding_side": "left",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": end,
    }
    files = {"tokenizer.json": content, "tokenizer_config.json": (json.dumps(config, indent=2) + "\n").encode()}
    if chat_template is None and isinstance(tokenizer, WorldTokenizer):
        chat_template = g1_in_jinja()
    return files if chat_template is None else files | {TEMPLATE_FILE: chat_template.encode()}


def chat_template_beside(folder: Path) -> str | None:
    """The text of a chat template of other people's in a folder of weights, or None; ConfigError if it is damaged.

    The one that `write_hugging_face_tokenizer` writes is None: models have its format without it.
    """
    found = read_foreign_template(folder)
    return None if found is None else found[0]


def _name_of_end(tokenizer: Tokenizer, content: bytes) -> str:
    """The text of the token between documents in a tokenizer.json that has been read."""
    description = json.loads(content)
    added = description.get("added_tokens") or ()
    ids = {**description["model"]["vocab"], **{token["content"]: token["id"] for token in added}}
    return next(text for text in ENDS_OF_TEXT if ids.get(text) == tokenizer.end_of_text)
