"""World vocabularies as Hugging Face's tokenizer.json, as the RWKV organization's checkpoints have them.

The longest match over bytes is a WordPiece whose one word is the whole text, in the alphabet of byte-level tokenizers.
The package tokenizers tries all ends of a word at each place and copies what it tries: its time grows with the third
power of a word's length, so such files are read into a tokenizer of our own with the same ids. For those that use the
package, ours cut texts first, wherever no entry has two bytes side by side, which changes no id: the longest entry at a
place before the cut ends there at the latest, and so words are short.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from rwkv_jax.checks import is_whole, shown
from rwkv_jax.config import ConfigError
from rwkv_jax.data.tokenizers.base import NO_TEXT, SavedTokenizer, Tokenizer
from rwkv_jax.data.tokenizers.byte_level import (
    BYTE_OF,
    ENDS_OF_TEXT,
    MAX_PADDING,
    ambiguity,
    missing_bytes,
    spell,
)
from rwkv_jax.data.tokenizers.longest_match import LongestMatchTokenizer
from rwkv_jax.data.tokenizers.world import WorldTokenizer

_END_OF_TEXT = ENDS_OF_TEXT[0]
_PLACEHOLDER = "\ue000{}\ue001"  # of an id without text: of the private use area, and so not in the alphabet
_MAX_WORD = 2**31 - 1
_MIN_MAX_WORD = 2**24  # a longer word would become one token of unknown text
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def read_word_piece(description: Mapping[str, Any], content: bytes, origin: str) -> Tokenizer:
    """The tokenizer of a tokenizer.json whose model is WordPiece: World's if its ids are World's.

    Placeholders, and ids that the file leaves out, decode to U+FFFD as World's unused ids do. Special tokens decode to
    no bytes and are never spelled by a text. The file's settings for truncation, padding and post-processing are
    ignored.

    Args:
      description: the file's JSON object.
      content: its bytes.
      origin: the file, for messages.

    Raises:
      ConfigError: its ids have no exact bytes or are shared by two tokens, a byte has none, it has no end of text, or
        the package tokenizers would give other ids than those of the longest match.
    """
    model = description["model"]
    vocabulary = model.get("vocab")
    if not isinstance(vocabulary, dict) or not vocabulary:
        raise ConfigError(f"{origin} is not a tokenizer.json that can be read (model.vocab is no object); get it again")
    added = _added_tokens(description.get("added_tokens"), origin)
    if reason := ambiguity([*vocabulary.items(), *((text, token["id"]) for text, token in added.items())]):
        raise ConfigError(f"{origin} does not give each token an id of its own: {reason}; get it again")
    specials = {text for text, token in added.items() if token["special"]} | {str(model.get("unk_token"))}
    end = next((text for text in ENDS_OF_TEXT if text in specials and (text in vocabulary or text in added)), None)
    if reason := _inexactness(description, vocabulary, added, specials):
        raise ConfigError(
            f"{origin} is not a WordPiece of which each id has exact bytes: {reason}; those of RWKV's checkpoints are"
        )
    if end is None:
        raise ConfigError(
            f"{origin} has no token to put between documents; its unk_token or one of its special added_tokens must be "
            f"{', '.join(ENDS_OF_TEXT)}"
        )
    ids = {**vocabulary, **{text: token["id"] for text, token in added.items()}}
    table = [NO_TEXT] * (1 + max(ids.values()))
    for text, token in ids.items():
        if text in specials:
            table[token] = b""
        elif text != _PLACEHOLDER.format(token):
            table[token] = bytes(BYTE_OF[character] for character in text)
    if (world := _world_of(table, ids[end])) is not None:
        return world
    saved = SavedTokenizer("tokenizer.json", content)
    try:
        return LongestMatchTokenizer(table + [NO_TEXT] * MAX_PADDING, ids[end], saved, padding=MAX_PADDING)
    except ConfigError as error:
        raise ConfigError(f"{origin}: {error}; use another tokenizer") from error


def word_piece_of(tokenizer: Tokenizer, vocab_size: int | None = None) -> bytes:
    """A tokenizer that takes the longest match, as the bytes of a tokenizer.json.

    The package tokenizers and transformers give texts the ids that `tokenizer` gives them, except that they find the
    end of text where a text spells it, as they find all special tokens.

    Args:
      vocab_size: number of ids to name, at least the tokenizer's; those without text get placeholders.

    Raises:
      ConfigError: a byte of texts has no id, or an entry spells the end of text.
    """
    end = tokenizer.end_of_text
    table = [
        tokenizer.token_bytes(token) if tokenizer.is_named(token) else NO_TEXT for token in range(tokenizer.vocab_size)
    ]
    vocabulary = {_END_OF_TEXT: end}
    for token, text in enumerate(table):
        if token != end:
            vocabulary.setdefault(_PLACEHOLDER.format(token) if text is NO_TEXT or not text else spell(text), token)
    for token in range(len(table), vocab_size or 0):
        vocabulary[_PLACEHOLDER.format(token)] = token
    if len(vocabulary) != max(len(table), vocab_size or 0):
        raise ConfigError(
            f"the tokenizer {tokenizer.saved.name} cannot be written as tokenizer.json: two ids have one text, or one "
            f"has that of {_END_OF_TEXT}; use another tokenizer"
        )
    if reason := missing_bytes(vocabulary):
        raise ConfigError(
            f"the tokenizer {tokenizer.saved.name} cannot be written as tokenizer.json: {reason}, and a text that has "
            "one would be a single unknown token for transformers; use another tokenizer"
        )
    added = {"id": end, "content": _END_OF_TEXT, "single_word": False, "lstrip": False, "rstrip": False}
    description = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added | {"normalized": False, "special": True}],
        "normalizer": None,
        "pre_tokenizer": _pre_tokenizer(vocabulary),
        "post_processor": None,
        "decoder": _BYTE_LEVEL,
        "model": {
            "type": "WordPiece",
            "unk_token": _END_OF_TEXT,
            "continuing_subword_prefix": "",
            "max_input_chars_per_word": _MAX_WORD,
            "vocab": dict(sorted(vocabulary.items(), key=lambda item: item[1])),
        },
    }
    return json.dumps(description, ensure_ascii=False, indent=1).encode()


def _world_of(table: list[bytes], end_of_text: int) -> Tokenizer | None:
    """World's tokenizer if it has this table and is installed."""
    try:
        world = WorldTokenizer()
    except ConfigError:
        return None
    rest = range(len(table), world.vocab_size)
    same = (
        end_of_text == world.end_of_text
        and len(table) <= world.vocab_size
        and all(world.token_bytes(token) == text for token, text in enumerate(table))
        and not any(world.is_named(token) for token in rest)
    )
    return world if same else None


def _added_tokens(listed: Any, origin: str) -> dict[str, Mapping[str, Any]]:
    added: dict[str, Mapping[str, Any]] = {}
    if not isinstance(listed, list | None):
        raise ConfigError(f"{origin} is not a tokenizer.json that can be read (added_tokens is no list); get it again")
    for index, token in enumerate(listed or ()):
        if (
            not isinstance(token, Mapping)
            or not isinstance(token.get("content"), str)
            or not token["content"]
            or not is_whole(token.get("id"))
            or not isinstance(token.get("special", False), bool)
        ):
            raise ConfigError(
                f"{origin} is not a tokenizer.json that can be read (added_tokens[{index}] has no content, no id, or a "
                "special that is neither true nor false); get it again"
            )
        if added.setdefault(token["content"], token)["id"] != token["id"]:
            raise ConfigError(
                f"{origin} does not give each token an id of its own: {token['content']!r} has the ids "
                f"{added[token['content']]['id']} and {token['id']}; get it again"
            )
    return {text: {"id": token["id"], "special": token.get("special", False)} for text, token in added.items()}


def _inexactness(
    description: Mapping[str, Any],
    vocabulary: Mapping[str, int],
    added: Mapping[str, Mapping[str, Any]],
    specials: set[str],
) -> str | None:
    """The reason why ids are not those of the longest match over exact bytes, or None if they are."""
    model = description["model"]
    unknown = model.get("unk_token")
    if not isinstance(unknown, str) or unknown not in vocabulary:
        return f"its unk_token {shown(unknown)} is not in its vocabulary"
    if model.get("continuing_subword_prefix", "##") != "":
        return "its model sets continuing_subword_prefix"
    longest = model.get("max_input_chars_per_word", 100)
    if not is_whole(longest) or longest < _MIN_MAX_WORD:
        return f"a word may have max_input_chars_per_word = {shown(longest)} only, longer ones are unknown to it"
    if description.get("normalizer") is not None:
        return "its normalizer changes texts"
    for text in vocabulary:
        if text not in specials and text != _PLACEHOLDER.format(vocabulary[text]) and not BYTE_OF.keys() >= set(text):
            return f"its entry {text!r} is not written in the byte alphabet"
        if not text:
            return "its vocabulary has an empty entry"
    for text in added:
        if text not in specials:
            return f"its added token {text!r} is looked for before the longest match"
    if reason := missing_bytes(vocabulary.keys() - specials):
        return reason
    if unknown not in ENDS_OF_TEXT and not (unknown in added and added[unknown]["special"]):
        return f"its unk_token {unknown!r} is an entry that texts may spell, and no special added token"
    return _cutting(description.get("pre_tokenizer"), vocabulary)


def _cutting(part: Any, vocabulary: Mapping[str, int]) -> str | None:
    """The reason why a pre-tokenizer may cut a text where an entry fits, or None."""
    steps = part.get("pretokenizers") if isinstance(part, Mapping) and part.get("type") == "Sequence" else [part]
    if not isinstance(steps, list) or not steps or not all(isinstance(step, Mapping) for step in steps):
        return "its pre_tokenizer is not ByteLevel"
    first, *others = steps
    if first.get("type") != "ByteLevel":
        return f"its pre_tokenizer is {shown(first.get('type'))}, not ByteLevel"
    if first.get("add_prefix_space", True) is not False:
        return "its pre_tokenizer puts a space before a text (add_prefix_space)"
    if first.get("use_regex", True) is not False:
        return "its pre_tokenizer cuts texts into words (use_regex)"
    # A pattern of theirs is never run: it may be what takes forever.
    if others and part != _pre_tokenizer(vocabulary):
        return "its pre_tokenizer has more steps than ByteLevel, which cut texts"
    return None


def _pre_tokenizer(vocabulary: Iterable[str]) -> dict[str, Any]:
    """Turns bytes into characters, and cuts between two that no entry has side by side."""
    pattern = {"Regex": _pattern_of_cuts(vocabulary)}
    split = {"type": "Split", "pattern": pattern, "behavior": "MergedWithPrevious", "invert": False}
    return {"type": "Sequence", "pretokenizers": [_BYTE_LEVEL, split]}


def _pattern_of_cuts(vocabulary: Iterable[str]) -> str:
    """A pattern of the characters behind which a text can be cut, each with what follows then."""
    pairs = {text[at : at + 2] for text in vocabulary if BYTE_OF.keys() >= set(text) for at in range(len(text) - 1)}
    following: dict[str, set[str]] = {character: set() for character in sorted(BYTE_OF)}
    for pair in pairs:
        following[pair[0]].add(pair[1])
    alike: dict[frozenset[str], list[str]] = {}
    for character, others in following.items():
        alike.setdefault(frozenset(BYTE_OF.keys() - others), []).append(character)
    return "|".join(f"{_class(begin)}(?={_class(cuts)})" for cuts, begin in alike.items() if cuts)


def _class(characters: Iterable[str]) -> str:
    """A class of characters, as runs of neighbors."""
    runs: list[list[str]] = []
    for character in sorted(characters):
        if runs and ord(runs[-1][-1]) + 1 == ord(character):
            runs[-1].append(character)
        else:
            runs.append([character])
    return "[" + "".join(_escaped(run[0]) + (f"-{_escaped(run[-1])}" if len(run) > 1 else "") for run in runs) + "]"


def _escaped(character: str) -> str:
    return f"\\{character}" if character in "\\[]^-" else character
