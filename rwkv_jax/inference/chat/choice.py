"""Which chat template a model takes."""

from __future__ import annotations

from pathlib import Path

from rwkv_jax.chat.formats import G1, PILE_QA, RAVEN, WORLD
from rwkv_jax.chat.jinja_template import JinjaTemplate, read_foreign_template
from rwkv_jax.chat.template import ChatTemplate
from rwkv_jax.data.tokenizers import HuggingFaceTokenizer, Tokenizer

_PILE_IDS = 50277  # of 20B_tokenizer.json, with which the RWKV-4 models of the Pile and Raven were trained


def choose_template(place: Path, tokenizer: Tokenizer) -> ChatTemplate:
    """The template for weights that nobody has named one for.

    That in Jinja beside them, if any, unless it is the one that we write for others; else Raven's or World's where the
    name of the file or folder says so, that of the Pile for its tokenizer, and G1's for all others, which is World's
    with more.

    Args:
      place: run folder or file of weights.

    Raises:
      ConfigError: as `JinjaTemplate.beside`.
    """
    folder = place if place.is_dir() else place.parent
    if (found := read_foreign_template(folder)) is not None:
        return JinjaTemplate(*found)
    name = place.name.lower()
    if "raven" in name:
        return RAVEN
    if isinstance(tokenizer, HuggingFaceTokenizer) and tokenizer.vocab_size == _PILE_IDS:
        return PILE_QA
    return WORLD if "world" in name else G1
