"""The World vocabulary of the official RWKV models since RWKV-4 World, from the PyPI package pyrwkv-tokenizer."""

from __future__ import annotations

import ast
import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from typing_extensions import override

from rwkv_jax.config import ConfigError
from rwkv_jax.data.tokenizers.base import NO_TEXT, SavedTokenizer, Tokenizer

_VOCABULARY = "rwkv_vocab_v20230424"
_VOCABULARY_SHA256 = "e6dee3d4e31b4d5c40ac99508ac6c701ceef4bed681bf2167ce9a908552bca89"

_REINSTALL = "pip install --force-reinstall pyrwkv-tokenizer==0.9.1"

_VOCAB_SIZE = 2**16  # rows of the models' embeddings; the vocabulary names ids 1 to 65529


class WorldTokenizer(Tokenizer):
    """Greedy longest match over UTF-8 bytes; preserves every text exactly.

    The 65536 ids are those of the models. Id 0 is end_of_text and decodes to nothing. Ids 65530 to 65535 never occurred
    in training; they decode to U+FFFD.
    """

    def __init__(self) -> None:
        """Takes about a second the first time. Raises ConfigError if pyrwkv-tokenizer is missing or incompatible."""
        try:
            import pyrwkv_tokenizer
        except ImportError as error:
            raise ConfigError(
                'the World tokenizer needs the package pyrwkv-tokenizer: pip install "rwkv-jax[world]"'
            ) from error
        # The package returns texts only, but 486 entries are not valid text: read their bytes from its file.
        table, self._encode = _read_vocabulary(Path(pyrwkv_tokenizer.__file__).with_name(f"{_VOCABULARY}.txt"))
        record = json.dumps({"kind": "world", "vocabulary": _VOCABULARY}) + "\n"
        super().__init__(table, 0, SavedTokenizer("tokenizer.kind.json", record.encode()))

    @override
    def encode(self, text: str) -> list[int]:
        return self._encode(text)


@functools.cache
def _read_vocabulary(path: Path) -> tuple[tuple[bytes, ...], Callable[[str], list[int]]]:
    """The bytes of each id, and the encoder."""
    import pyrwkv_tokenizer

    # The package panics, with an error that `except Exception` does not catch, if its file is invalid.
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the World vocabulary ({error.strerror}); {_REINSTALL}") from error
    if hashlib.sha256(content).hexdigest() != _VOCABULARY_SHA256:
        raise ConfigError(f"{path}: is not the World vocabulary that models are trained with; {_REINSTALL}")
    table = [NO_TEXT] * _VOCAB_SIZE
    table[0] = b""
    # A line is `id literal number-of-bytes`, the literal a Python string or bytes, possibly containing spaces.
    for line in content.decode().rstrip("\n").split("\n"):
        token, literal = line.rpartition(" ")[0].split(" ", 1)
        entry: str | bytes = ast.literal_eval(literal)
        table[int(token)] = entry.encode() if isinstance(entry, str) else entry
    return tuple(table), pyrwkv_tokenizer.RWKVTokenizer(vocab_filepath=str(path)).encode
