"""What the byte-level tokenizers of Hugging Face have in common: how they write bytes, and what ids must be like."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from rwkv_jax.checks import is_whole, shown

MAX_PADDING = 511
"""A model may have up to this many ids more than its tokenizer; they decode to U+FFFD."""

MAX_IDS = 2**22
"""Twelve times the largest vocabulary so far; a table of all ids is made."""

ENDS_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
"""Names of the token between documents; the first that exists is it."""

_NOT_IN_UTF8 = (0xC0, 0xC1, *range(0xF5, 0x100))


def _byte_alphabet() -> dict[str, int]:
    """The character by which byte-level tokenizers represent each byte: its own in Latin-1 if printable, else one from
    U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + index): byte for index, byte in enumerate(others)}


BYTE_OF = _byte_alphabet()
"""The byte of each character of the alphabet."""
CHARACTER_OF = {byte: character for character, byte in BYTE_OF.items()}
"""The character of each byte."""


def spell(content: bytes) -> str:
    """Bytes in the alphabet."""
    return "".join(CHARACTER_OF[byte] for byte in content)


def missing_bytes(pieces: Collection[str]) -> str | None:
    """What is wrong with a vocabulary in which a byte of UTF-8 texts is no entry, or None."""
    needed = sorted(CHARACTER_OF.keys() - _NOT_IN_UTF8)
    if missing := [byte for byte in needed if CHARACTER_OF[byte] not in pieces]:
        return f"{len(missing)} bytes have no entry, {missing[0]:#04x} is the first"
    return None


def ambiguity(ids: Sequence[tuple[str, Any]], known: Mapping[str, int] | None = None) -> str | None:
    """The reason why a text or an id would stand for another than the file says, or None.

    Args:
      ids: (text, id) of all tokens.
      known: what the package tokenizers has made of them, if it was asked.
    """
    owners: dict[int, str] = {}
    given: dict[str, int] = {}
    for text, token in ids:
        if not is_whole(token) or not 0 <= token < MAX_IDS:
            return f"the id of {text!r} is {shown(token)}, and must be a whole number from 0 to {MAX_IDS - 1}"
        if (other := owners.setdefault(token, text)) != text:
            return f"{other!r} and {text!r} both have the id {token}"
        taken = given.setdefault(text, token) if known is None else known.get(text)
        if taken != token:
            return f"{text!r} has the ids {token} and {taken}"
    return None
