"""Hugging Face's tokenizer.json with byte-level BPE: GPT-NeoX of the Pile models, GPT-2, Qwen and others."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from typing_extensions import override

from rwkv_jax.config import ConfigError
from rwkv_jax.data.tokenizers.base import NO_TEXT, PROBE, SavedTokenizer, Tokenizer
from rwkv_jax.data.tokenizers.byte_level import BYTE_OF, ENDS_OF_TEXT, MAX_PADDING, ambiguity, missing_bytes, spell
from rwkv_jax.json_object import parse_object

_KEEP_ALL_TEXT = ("ByteLevel", "Digits", "Punctuation", "Split")  # pre-tokenizers that only split


class HuggingFaceTokenizer(Tokenizer):
    """A byte-level BPE, in which every id stands for exact bytes.

    `decode(encode(text))` is the text after the file's normalizer: with NFC, as in GPT-NeoX, composed text is returned
    exactly. Special tokens are ids only: a text that spells one is encoded like any other text, and they decode to no
    bytes. The file's settings for truncation, padding, dropout and post-processing are ignored. The vocabulary includes
    all added tokens.
    """

    def __init__(self, content: bytes, origin: str) -> None:
        """From the bytes of a tokenizer.json; `origin` names it in errors.

        Raises ConfigError if they are not one, if its ids have no exact bytes or are shared by two tokens, if it has no
        end of text, or if the package tokenizers is missing.
        """
        try:
            import tokenizers
        except ImportError as error:
            raise ConfigError(f'{origin} needs the package tokenizers: pip install "rwkv-jax[tokenizers]"') from error
        with _named(origin):
            self._load(tokenizers, content, origin)

    def _load(self, tokenizers: Any, content: bytes, origin: str) -> None:
        self._tokenizer = tokenizers.Tokenizer.from_str(content.decode())
        description = parse_object(content, origin)
        if reason := _inexactness(description):
            raise ConfigError(
                f"{origin} is not a byte-level BPE whose ids have exact bytes: {reason}; "
                "those of GPT-2, GPT-NeoX and Qwen are"
            )
        ids = [*description["model"]["vocab"].items()]
        ids += [(token["content"], token["id"]) for token in description["added_tokens"]]
        if reason := ambiguity(ids, self._tokenizer.get_vocab(with_added_tokens=True)):
            raise ConfigError(f"{origin} does not give each token an id of its own: {reason}; get it again")
        added = {token["content"]: token for token in description["added_tokens"]}
        end_of_text = next((content for content in ENDS_OF_TEXT if content in added), None)
        if end_of_text is None:
            raise ConfigError(
                f"{origin} has no token to put between documents; one of its added_tokens must be "
                f"{', '.join(ENDS_OF_TEXT)}"
            )
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.model.dropout = None
        # Texts are not searched for special tokens, so end_of_text must be one.
        self._tokenizer.add_special_tokens([tokenizers.AddedToken(end_of_text, special=True, normalized=False)])
        self._tokenizer.encode_special_tokens = True
        added[end_of_text]["special"] = True
        table = self._table_of(description["model"]["vocab"], added)
        super().__init__(
            table=table + [NO_TEXT] * MAX_PADDING,
            end_of_text=added[end_of_text]["id"],
            saved=SavedTokenizer("tokenizer.json", content),
            padding=MAX_PADDING,
        )
        probe = PROBE + "".join(content for content, token in added.items() if token["special"])
        if self.decode(self.encode(probe)) != self._normalize(probe):
            raise ConfigError(f"{origin} does not give back the text it is given; use another tokenizer")

    @override
    def encode(self, text: str) -> list[int]:
        text.encode()  # the package raises another error for them
        try:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        except BaseException as error:
            if not _is_panic(error):
                raise
            raise ConfigError(
                f"the tokenizer {self.saved.name} has a pattern that cannot cut this text of {len(text)} characters "
                f"({error}); use another tokenizer"
            ) from error

    def of_hub_model(self, ends: Collection[int]) -> HuggingFaceTokenizer:
        """The same for a model of other people, which begins texts as the file's template says, if it has one.

        Args:
          ends: the ids with which the model ends its texts; of none, this tokenizer's own.

        Raises:
          ConfigError: an id that is not in the vocabulary.
        """
        if unknown := sorted(token for token in ends if not 0 <= token < self.vocab_size):
            raise ConfigError(f"eos_token_id = {unknown[0]}: the ids of the tokenizer are 0 to {self.vocab_size - 1}")
        result = copy.copy(self)
        text = "x"
        own = self._tokenizer.encode(text, add_special_tokens=False).ids
        whole = self._tokenizer.encode(text, add_special_tokens=True).ids
        result.begin = tuple(whole[: next(i for i in range(len(whole)) if whole[i : i + len(own)] == own)])
        result.ends = frozenset(ends) or self.ends
        return result

    def _normalize(self, text: str) -> str:
        normalizer = self._tokenizer.normalizer
        return text if normalizer is None else normalizer.normalize_str(text)

    def _table_of(self, vocabulary: Mapping[str, int], added: Mapping[str, Mapping[str, Any]]) -> list[bytes]:
        table = [NO_TEXT] * (1 + max([*vocabulary.values(), *(token["id"] for token in added.values())]))
        for piece, token in vocabulary.items():
            if piece not in added:
                table[token] = bytes(BYTE_OF[character] for character in piece)
        for content, token in added.items():
            text = self._normalize(content) if token["normalized"] else content
            table[token["id"]] = b"" if token["special"] else text.encode()
        return table


@contextlib.contextmanager
def _named(origin: str) -> Iterator[None]:
    """Turns what a damaged file makes Python and the package raise into ConfigError; the package even panics."""
    try:
        yield
    except (ConfigError, MemoryError, OSError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and not _is_panic(error):
            raise
        reason = f"{type(error).__name__}: {error}"[:200]
        raise ConfigError(f"{origin} is not a tokenizer.json that can be read ({reason}); get it again") from error


def _is_panic(error: BaseException) -> bool:
    """Whether Rust code gave up, as on a pattern that backtracks without end; no Exception, and of no public type."""
    return type(error).__name__ == "PanicException"


def _inexactness(description: Mapping[str, Any]) -> str | None:
    """The reason why ids do not stand for exact bytes of a text, or None if they do."""
    model = description["model"]
    if model["type"] != "BPE":
        return f"its model is {model['type']}"
    for affix in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(affix):
            return f"its model sets {affix}"
    steps = _steps(description.get("pre_tokenizer"))
    if "ByteLevel" not in [step["type"] for step in steps]:
        return "its pre_tokenizer has no step ByteLevel"
    for step in steps:
        if step["type"] not in _KEEP_ALL_TEXT or step.get("behavior") == "Removed":
            return f"its pre_tokenizer has a step {step['type']} that leaves out part of a text"
        if step.get("add_prefix_space"):
            return "its pre_tokenizer puts a space before a text (add_prefix_space)"
    return _inexact_entry(model, {token["content"]: token for token in description["added_tokens"]})


def _inexact_entry(model: Mapping[str, Any], added: Mapping[str, Mapping[str, Any]]) -> str | None:
    vocabulary = model["vocab"]
    if reason := missing_bytes(vocabulary):
        return reason
    for piece in vocabulary:
        if piece not in added and not BYTE_OF.keys() >= set(piece):
            return f"its entry {piece!r} is not written in the byte alphabet"
    merged = {merge.replace(" ", "") if isinstance(merge, str) else "".join(merge) for merge in model["merges"]}
    for content, token in added.items():
        if token["special"] or content in ENDS_OF_TEXT:
            piece = spell(content.encode())
            if piece in vocabulary and (len(piece) == 1 or piece in merged or model.get("ignore_merges")):
                return f"a text can spell its special token {content!r}"
        elif token["lstrip"] or token["rstrip"]:
            return f"its added token {content!r} swallows the spaces beside it"
    return None


def _steps(part: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """The steps of a pre-tokenizer, which may be a sequence of sequences."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [step for inner in part["pretokenizers"] for step in _steps(inner)]
    return [part]
