"""Chat templates by name."""

from __future__ import annotations

from pathlib import Path

from rwkv_jax.chat.formats import G1, PILE_QA, RAVEN, WORLD, ChatFormat
from rwkv_jax.chat.jinja_template import JinjaTemplate
from rwkv_jax.chat.template import ChatTemplate
from rwkv_jax.config import ConfigError

FORMATS: dict[str, ChatFormat] = {"g1": G1, "world": WORLD, "raven": RAVEN, "pile-qa": PILE_QA}
"""Formats by the names with which commands ask for them."""


def named_template(name: str, field: str = "template") -> ChatTemplate:
    """The template of a name in `FORMATS`, or of a Jinja file; `field` is where it was named, for messages.

    Raises:
      ConfigError: neither, or as `JinjaTemplate.from_file`.
    """
    if name in FORMATS:
        return FORMATS[name]
    path = Path(name).expanduser()
    if not path.is_file():
        raise ConfigError(f"{field} = {name!r}: is none of {', '.join(FORMATS)}, and no file of a Jinja template")
    return JinjaTemplate.from_file(path)
