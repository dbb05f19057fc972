"""Which chat template a model takes."""

from __future__ import annotations

from pathlib import Path

from rwkv_jax.config import ConfigError
from rwkv_jax.data.tokenizers import HuggingFaceTokenizer, Tokenizer
from rwkv_jax.inference.chat.formats import G1, PILE_QA, RAVEN, WORLD, ChatFormat
from rwkv_jax.inference.chat.jinja_template import JinjaTemplate
from rwkv_jax.inference.chat.template import ChatTemplate

FORMATS: dict[str, ChatFormat] = {"g1": G1, "world": WORLD, "raven": RAVEN, "pile-qa": PILE_QA}
"""Formats by the names with which commands ask for them."""

_PILE_IDS = 50277  # of 20B_tokenizer.json, with which the RWKV-4 models of the Pile and Raven were trained


def named_template(name: str) -> ChatTemplate:
    """The template of a name in `FORMATS`, or of a Jinja file.

    Raises:
      ConfigError: neither, or as `JinjaTemplate.from_file`.
    """
    if name in FORMATS:
        return FORMATS[name]
    path = Path(name).expanduser()
    if not path.is_file():
        raise ConfigError(f"template = {name!r}: is none of {', '.join(FORMATS)}, and no file of a Jinja template")
    return JinjaTemplate.from_file(path)


def choose_template(place: Path, tokenizer: Tokenizer) -> ChatTemplate:
    """The template for weights that nobody has named one for.

    That in Jinja beside them, if any; else Raven's or World's where the name of the file or folder says so, that of
    the Pile for its tokenizer, and G1's for all others, which is World's with more.

    Args:
      place: run folder or file of weights.

    Raises:
      ConfigError: as `JinjaTemplate.beside`.
    """
    jinja = JinjaTemplate.beside(place if place.is_dir() else place.parent)
    if jinja is not None:
        return jinja
    name = place.name.lower()
    if "raven" in name:
        return RAVEN
    if isinstance(tokenizer, HuggingFaceTokenizer) and tokenizer.vocab_size == _PILE_IDS:
        return PILE_QA
    return WORLD if "world" in name else G1
