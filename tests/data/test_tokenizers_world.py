"""The World vocabulary: ids that the official code gives, its bytes that are no text, and a package that is missing."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_jax.config import ConfigError
from rwkv_jax.data.tokenizers import Tokenizer, WorldTokenizer, load_tokenizer
from rwkv_jax.data.tokenizers import world as world_module
from tests.data.texts import TEXTS
from tests.shared import shared_data


@pytest.fixture(scope="session")
def world(every_kind: dict[str, Tokenizer]) -> Tokenizer:
    """The tokenizer."""
    return every_kind["world"]


@pytest.fixture(scope="session")
def entries(world: Tokenizer) -> dict[bytes, int]:
    """The id of each entry."""
    return {world.token_bytes(token): token for token in range(1, 65530)}


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("The Eiffel tower is in the city of", [6699, 304, 25740, 109, 39990, 4600, 4596, 22590, 30449, 4706]),
        ("User: hi\n\nAssistant:", [24281, 59, 4571, 261, 5585, 41693, 59]),
        ("\n", [11]),
        ("\n\n", [261]),
        (" ", [33]),
        (":", [59]),
        ("User", [24281]),
        (" A", [300]),
        (" B", [301]),
        (" C", [302]),
        (" D", [303]),
        ("\x00", [1]),
        ("", []),
    ],
)
def test_ids_are_the_official_ones(world: Tokenizer, text: str, tokens: list[int]) -> None:
    assert world.encode(text) == tokens
    assert world.decode(tokens) == text


def test_lambada_has_as_many_tokens_as_for_others(world: Tokenizer) -> None:
    lines = shared_data("lambada_test.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    assert len(texts) == 5153
    assert sum(len(world.encode(text)) for text in texts) == 408657
    targets = [world.encode(" " + text.rsplit(" ", 1)[1]) for text in texts]
    assert sum(len(target) == 1 for target in targets) == 3642
    assert all(world.decode(world.encode(text)) == text for text in texts)


def test_the_vocabulary_is_what_it_is_known_to_be(world: Tokenizer, entries: dict[bytes, int]) -> None:
    """Each entry once, single bytes first, sorted by length; 486 are no text, and none is empty."""
    assert len(entries) == 65529
    assert [entries[bytes([value])] for value in range(256)] == list(range(1, 257))
    assert list(entries) == sorted(entries, key=lambda entry: (len(entry), entry))
    assert max(map(len, entries)) == 128
    assert b"" not in entries
    assert sum(entry.decode("utf-8", "ignore").encode() != entry for entry in entries) == 486


def test_ids_that_name_nothing_can_be_decoded(world: Tokenizer) -> None:
    assert (world.vocab_size, world.end_of_text) == (65536, 0)
    assert world.decode([0]) == ""
    assert world.decode(range(65530, 65536)) == "\ufffd" * 6
    with pytest.raises(IndexError):
        world.decode([65536])


@settings(max_examples=200, deadline=None)
@given(text=TEXTS | st.integers(0, 10**9).map(lambda seed: ("entries", seed)))
def test_the_longest_entry_is_taken_each_time(
    world: Tokenizer, entries: dict[bytes, int], text: str | tuple[str, int]
) -> None:
    if isinstance(text, tuple):  # entries joined, where others that straddle them may fit better
        draws = random.Random(text[1])
        text = b"".join(world.token_bytes(draws.randrange(1, 65530)) for _ in range(20)).decode("utf-8", "ignore")
    content, expected = text.encode(), []
    while content:
        length = next(length for length in range(min(128, len(content)), 0, -1) if content[:length] in entries)
        expected.append(entries[content[:length]])
        content = content[length:]
    assert world.encode(text) == expected


@pytest.mark.parametrize("text", ["x" * 10**6, " " * 10**6, "日本" * 10**5, "\x00" * 10**5, "a b\n" * 10**5])
def test_long_texts(world: Tokenizer, text: str) -> None:
    assert world.decode(world.encode(text)) == text


def test_a_missing_package_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyrwkv_tokenizer", None)
    with pytest.raises(ConfigError, match=r'needs the package pyrwkv-tokenizer: pip install "rwkv-jax\[world\]"'):
        load_tokenizer("world", 65536)


@pytest.mark.parametrize(("content", "message"), [(None, "cannot read"), (b"1 'a' 1\n", "is not the World vocabulary")])
def test_a_package_with_another_vocabulary_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None, message: str
) -> None:
    """The package itself would end the process, or encode with it."""
    import pyrwkv_tokenizer

    monkeypatch.setattr(pyrwkv_tokenizer, "__file__", str(tmp_path / "__init__.py"))
    if content is not None:
        (tmp_path / f"{world_module._VOCABULARY}.txt").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"{message}.*pip install --force-reinstall"):
        WorldTokenizer()
