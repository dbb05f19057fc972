"""Documents and their split into training and held-out ones."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable

from rwkv_jax.config import ConfigError

# Any salt gives a valid split. A share of 5% of the standard library's files is 2% to 7% of its bytes, depending on
# the salt; with this one, 2%, 5%, 10% and 20% of the files are within a tenth of the same share of the bytes.
_SPLIT_SALT = b"3"


@dataclasses.dataclass(frozen=True)
class Document:
    """One text, named by its path inside the source (for a record or row, by a digest of the text)."""

    name: str
    text: str


def choose_held_out(names: Iterable[str], share: float) -> frozenset[str]:
    """Selects the names to hold out: about `share` of them, at least one, never all.

    Selection is by a hash of each name, so adding or removing a document does not move others, unless training or
    held-out text would be empty. Raises ConfigError if all names are the same.
    """
    positions = {name: _position(name) for name in names}
    if len(positions) < 2:
        raise ConfigError(
            f"data.held_out = {share}: the source has {len(positions)} distinct document(s), and two are needed to "
            "hold one out; add documents, or give the text as one file, which is split at a line"
        )
    chosen = {name for name, position in positions.items() if position < share}
    if not chosen:
        chosen = {min(positions, key=positions.__getitem__)}
    elif len(chosen) == len(positions):
        chosen.remove(max(positions, key=positions.__getitem__))
    return frozenset(chosen)


def split_document(document: Document, share: float) -> tuple[Document, Document]:
    """Splits one document at a line boundary, holding out about the last `share` of its UTF-8 bytes.

    Raises ConfigError if no line boundary leaves text in both parts.
    """
    content = document.text.encode()
    target = min(max(round(len(content) * (1 - share)), 1), len(content) - 1)
    # A newline is one byte in UTF-8 and never part of another character, so every cut leaves two valid texts.
    before, after = content.rfind(b"\n", 0, target) + 1, content.find(b"\n", target - 1) + 1
    cuts = [cut for cut in (before, after) if 0 < cut < len(content)]
    if not cuts:
        raise ConfigError(
            f"data.held_out = {share}: {document.name} has {len(content)} bytes without a line break that leaves text "
            "on both sides, so nothing can be held out; add lines, or give a folder of several files"
        )
    cut = min(cuts, key=lambda position: abs(position - target))
    return (
        Document(document.name, content[:cut].decode()),
        Document(document.name, content[cut:].decode()),
    )


def _position(name: str) -> float:
    """A hash of the name, in [0, 1)."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8, salt=_SPLIT_SALT).digest()
    return int.from_bytes(digest, "big") / 2**64
