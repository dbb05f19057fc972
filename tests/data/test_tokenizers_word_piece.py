"""World vocabularies as tokenizer.json: written and read with the ids of World, and what is refused."""

from __future__ import annotations

import json
import random
import sys
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rwkv_jax.config import ConfigError
from rwkv_jax.data.tokenizers import (
    END_OF_TEXT,
    ByteTokenizer,
    LongestMatchTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    WorldTokenizer,
    hugging_face_files,
    load_tokenizer,
    write_hugging_face_tokenizer,
)
from rwkv_jax.data.tokenizers.base import NO_TEXT
from rwkv_jax.data.tokenizers.byte_level import spell
from rwkv_jax.data.tokenizers.word_piece import read_word_piece
from tests.data.texts import TEXTS

WORLD = WorldTokenizer()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with World's tokenizer.json."""
    folder = tmp_path_factory.mktemp("world")
    files = write_hugging_face_tokenizer(WORLD, folder / "new", chat_template="{{ messages }}")
    assert [path.name for path in files] == ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
    return folder / "new"


@pytest.fixture(scope="module")
def theirs(written: Path) -> Any:
    """That file, loaded by the package tokenizers."""
    return tokenizers.Tokenizer.from_file(str(written / "tokenizer.json"))


@pytest.fixture(scope="module")
def ours(written: Path) -> LongestMatchTokenizer:
    """The same vocabulary with our own search."""
    entries = [WORLD.token_bytes(token) if WORLD.is_named(token) else NO_TEXT for token in range(65536)]
    return LongestMatchTokenizer(entries, 0, WORLD.saved)


def blocks() -> list[str]:
    """Characters of every script: 24 from each 128 code points of all planes that have any, and all that are hard."""
    chosen = random.Random(0)
    texts = []
    for start in range(0, 0x110000, 128):
        block = [chr(code) for code in range(start, start + 128) if not 0xD800 <= code < 0xE000]
        block = [character for character in block if unicodedata.category(character) not in ("Cn", "Co")]
        if block:
            texts.append("".join(chosen.choices(block, k=24)))
    return texts


HARD = {
    "whitespace": " " * 700 + "\t" * 300 + "\u3000" * 90 + "\u00a0 \u2028\u2029" * 9,
    "newlines": "\r\n\n\r\r\n\n\n\n\r" * 40 + "a\r\n  b\n\n\n\tc\r" * 9,
    "zeros": "\x00\x00a\x00 \x00\n\x01\x7f\x80" * 20,
    "emoji": "\U0001f469\u200d\U0001f467\U0001f3fd\U0001f1e9\U0001f1ea\ufe0f\u20e3" * 20,
    "marks": "e\u0301\u0323 \u212b \u1e9b\u0323 \u0e01\u0e33 \u1112\u1161\u11ab" * 9,
    "private": "\ue000" + "65530\ue001 \ue000\ue001\ufffd\uffff\U0010ffff",
    "names": "<|endoftext <|padding|> </s> <unk> [UNK] ## \u0120 \u010a \u0100\u0143",
    "digits": "0123456789" * 60,
    "one letter": "a" * 900,
    "nothing": "",
}


@pytest.mark.parametrize("name", HARD)
def test_hard_texts_have_the_ids_of_world(theirs: Any, ours: LongestMatchTokenizer, name: str) -> None:
    wanted = WORLD.encode(HARD[name])
    assert theirs.encode(HARD[name], add_special_tokens=True).ids == wanted
    assert theirs.decode(wanted) == HARD[name]
    assert ours.encode(HARD[name]) == wanted


def test_every_script_has_the_ids_of_world(theirs: Any, ours: LongestMatchTokenizer) -> None:
    texts = blocks()
    assert len(texts) > 1000
    for text in (*texts, *(" ".join(texts[at : at + 9]) for at in range(0, len(texts), 99))):
        wanted = WORLD.encode(text)
        assert theirs.encode(text).ids == wanted, ascii(text)
        assert ours.encode(text) == wanted, ascii(text)


@settings(max_examples=150, deadline=None)
@given(text=TEXTS | st.binary(max_size=60).map(lambda content: content.decode("utf-8", "replace")))
@example(text="\ufffd" * 20)
def test_any_text_has_the_ids_of_world(theirs: Any, ours: LongestMatchTokenizer, text: str) -> None:
    """Bytes that are no UTF-8 have no text, so tokenizers takes what they are decoded to."""
    text = text.replace(END_OF_TEXT, "<|endoftext")
    wanted = WORLD.encode(text)
    assert theirs.encode(text).ids == wanted
    assert ours.encode(text) == wanted


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**9))
def test_entries_that_straddle_others_have_the_ids_of_world(
    theirs: Any, ours: LongestMatchTokenizer, seed: int
) -> None:
    """Entries one after the other and cut anywhere, so that longer ones fit across their ends."""
    chosen = random.Random(seed)
    parts = [WORLD.token_bytes(chosen.randrange(1, 65530)) for _ in range(30)]
    text = b"".join(part[: chosen.randint(1, len(part))] for part in parts).decode("utf-8", "replace")
    wanted = WORLD.encode(text)
    assert theirs.encode(text).ids == wanted
    assert ours.encode(text) == wanted


def test_our_search_takes_what_no_text_has(ours: LongestMatchTokenizer) -> None:
    """Each entry is one token, those that are half a character, too, whatever its neighbors."""
    for token in range(1, 65530, 7):
        text = WORLD.token_bytes(token)
        if text.decode("utf-8", "ignore").encode() == text:
            assert ours.encode(text.decode()) == [token]


def test_what_is_written_is_read_as_world(written: Path) -> None:
    found = load_tokenizer(written, 65536)
    assert isinstance(found, WorldTokenizer)
    assert (found.fingerprint, found.begin, found.ends) == (WORLD.fingerprint, (0,), {0})
    config = json.loads((written / "tokenizer_config.json").read_text())
    assert (config["padding_side"], config["eos_token"], config["pad_token"]) == ("left", END_OF_TEXT, END_OF_TEXT)
    assert "bos_token" not in config
    assert (written / "chat_template.jinja").read_text() == "{{ messages }}"
    with pytest.raises(ConfigError, match=r"tokenizer\.json: exists already and is not overwritten"):
        write_hugging_face_tokenizer(WORLD, written)


def test_without_its_package_world_is_read_from_the_file(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyrwkv_tokenizer", None)
    found = load_tokenizer(written / "tokenizer.json", 65536)
    assert type(found) is LongestMatchTokenizer
    text = "".join(HARD.values())
    assert found.encode(text) == WORLD.encode(text)
    assert [found.token_bytes(token) for token in range(65536)] == [WORLD.token_bytes(token) for token in range(65536)]
    assert [token for token in range(65536) if not found.is_named(token)] == [*range(65530, 65536)]
    assert found.end_of_text == 0


def test_unused_ids_may_be_left_out(written: Path) -> None:
    description = json.loads((written / "tokenizer.json").read_bytes())
    vocabulary = description["model"]["vocab"]
    assert vocabulary["\ue00065535\ue001"] == 65535
    description["model"]["vocab"] = {text: token for text, token in vocabulary.items() if token < 65530}
    description["pre_tokenizer"] = description["pre_tokenizer"]["pretokenizers"][0]  # the organization's form
    assert isinstance(made(description), WorldTokenizer)
    del description["model"]["vocab"]["Ġthe"]
    assert type(made(description)) is LongestMatchTokenizer


def test_bytes_are_written_too(tmp_path: Path) -> None:
    write_hugging_face_tokenizer(ByteTokenizer(), tmp_path, vocab_size=320)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = "é\x00\n"
    assert theirs.encode(text).ids == ByteTokenizer().encode(text)
    assert (theirs.get_vocab_size(), theirs.token_to_id(END_OF_TEXT)) == (320, 256)
    found = load_tokenizer(tmp_path, 320)
    assert (found.encode(text), found.end_of_text, found.decode([256, 257, 319])) == (
        ByteTokenizer().encode(text),
        256,
        "\ufffd" * 2,
    )


def test_what_is_a_tokenizer_json_stays_as_it_is(word_piece_path: Path, json_path: Path) -> None:
    for path in (word_piece_path, json_path):
        files = hugging_face_files(load_tokenizer(path, None))
        assert files["tokenizer.json"] == path.read_bytes()
        assert json.loads(files["tokenizer_config.json"])["eos_token"] == END_OF_TEXT


@pytest.mark.parametrize("added", [{}, {"added_tokens": None}])
def test_a_file_without_added_tokens_stays_as_it_is_too(word_piece_path: Path, added: dict[str, None]) -> None:
    description = described(word_piece_path)
    del description["added_tokens"]
    files = hugging_face_files(made(description | added))
    assert json.loads(files["tokenizer_config.json"])["eos_token"] == END_OF_TEXT


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_nothing_is_written_beside_a_file_that_is_there(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(ConfigError, match=rf"{name}: exists already and is not overwritten"):
        write_hugging_face_tokenizer(ByteTokenizer(), tmp_path, chat_template="{{ messages }}")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_what_cannot_be_written_is_refused(tokenizer: SentencePieceTokenizer) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.kind\.json cannot be written .*: 1 bytes have no entry, 0x00"):
        hugging_face_files(ByteTokenizer(256))
    with pytest.raises(ConfigError, match=r"tokenizer tokenizer\.model cannot be written as tokenizer\.json; World"):
        hugging_face_files(tokenizer)


def test_long_texts_take_time_in_proportion(theirs: Any, ours: LongestMatchTokenizer) -> None:
    """The package takes the third power of a word's length; in one word this would be hours."""
    text = "The quick brown fox jumps over the lazy dog, 42 times.\n" * 2000
    wanted = WORLD.encode(text)
    for encode in (ours.encode, lambda text: theirs.encode(text).ids):
        begin = time.perf_counter()
        assert encode(text) == wanted
        assert time.perf_counter() - begin < 20


def described(path: Path) -> dict[str, Any]:
    return json.loads(path.read_bytes())


def made(description: dict[str, Any]) -> Tokenizer:
    content = json.dumps(description).encode()
    return read_word_piece(json.loads(content), content, "x.json")


def test_the_organizations_form_is_read(word_piece_path: Path) -> None:
    found, theirs = load_tokenizer(word_piece_path, 430), tokenizers.Tokenizer.from_file(str(word_piece_path))
    text = "def function_1(value: int) -> int:\n    日本 \x00\r\n" + HARD["marks"] + HARD["newlines"]
    assert found.encode(text) == theirs.encode(text).ids
    assert found.encode("日本") != found.encode("日")
    assert (found.decode([0, 428, 429]), found.is_named(429), found.token_bytes(257)) == (
        "\ufffd" * 2,
        False,
        b"\xe6\x97",
    )


def test_the_unknown_text_alone_can_be_the_end_of_text(word_piece_path: Path) -> None:
    found = made(described(word_piece_path) | {"added_tokens": []})
    assert (found.end_of_text, found.decode(found.encode(END_OF_TEXT))) == (0, END_OF_TEXT)


def test_special_tokens_beyond_the_vocabulary_are_ids_only(word_piece_path: Path) -> None:
    description = described(word_piece_path)
    description["added_tokens"].append(description["added_tokens"][0] | {"id": 430, "content": "<|im_start|>"})
    found = made(description)
    assert (found.vocab_size, found.token_bytes(430)) == (431, b"")
    text = f"<|im_start|>{END_OF_TEXT}"
    assert not {0, 430} & set(found.encode(text))
    assert found.decode(found.encode(text)) == text


def change_model(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda description: description["model"].update(values)


def change_vocabulary(*removed: str, **added: Any) -> Callable[[dict[str, Any]], None]:
    def change(description: dict[str, Any]) -> None:
        for text in removed:
            del description["model"]["vocab"][text]
        description["model"]["vocab"] |= added

    return change


def change(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda description: description.update(values)


def add(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda description: description["added_tokens"].append(description["added_tokens"][0] | values)


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
BACKTRACKS = {"type": "Split", "pattern": {"Regex": "(a|a)*$"}, "behavior": "Isolated", "invert": False}
SAME = r"x\.json is not a WordPiece of which each id has exact bytes: "
NO_ID = r"x\.json does not give each token an id of its own: "
UNREAD = r"x\.json is not a tokenizer\.json that can be read \("

HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "unknown text missing": (change_model(unk_token="[UNK]"), SAME + r"its unk_token '\[UNK\]' is not in its voc"),
    "unknown text none": (change_model(unk_token=None), SAME + "its unk_token None is not in its vocabulary"),
    "no vocabulary": (change_model(vocab={}), UNREAD + "model.vocab is no object"),
    "vocabulary a list": (change_model(vocab=["a"] * 9), UNREAD + "model.vocab is no object"),
    "prefix": (change_model(continuing_subword_prefix="##"), SAME + "its model sets continuing_subword_prefix"),
    "short words": (change_model(max_input_chars_per_word=100), SAME + "a word may have max_input_.* = 100 only"),
    "words of text": (change_model(max_input_chars_per_word="9" * 999), SAME + "a word may have max_input_chars_"),
    "huge id": (change_vocabulary(q=10**9), NO_ID + "the id of 'q' is 1000000000, and must be a whole number from 0"),
    "id without end": (change_vocabulary(q=10**4000), NO_ID + "the id of 'q' is 1000000"),
    "negative id": (change_vocabulary(q=-1), NO_ID + "the id of 'q' is -1, and must"),
    "fraction": (change_vocabulary(q=1.5), NO_ID + r"the id of 'q' is 1\.5, and must"),
    "text for an id": (change_vocabulary(q="1"), NO_ID + "the id of 'q' is '1', and must"),
    "truth for an id": (change_vocabulary(q=True), NO_ID + "the id of 'q' is True, and must"),
    "list for an id": (change_vocabulary(q=[[[]]]), NO_ID + r"the id of 'q' is \[\[\[\]\]\], and must"),
    "id twice": (change_vocabulary(q=5), NO_ID + "'.*' and 'q' both have the id 5"),
    "byte missing": (change_vocabulary("Ā"), SAME + "1 bytes have no entry, 0x00 is the first"),
    "byte is unknown text": (change_model(unk_token="a"), SAME + "1 bytes have no entry, 0x61 is the first"),
    "entry is unknown text": (
        change_model(unk_token=spell("日本".encode())),
        SAME + "its unk_token '.*' is an entry that texts may spell, and no special added token",
    ),
    "no alphabet": (change_vocabulary(**{"日": 430}), SAME + "its entry '日' is not written in the byte alphabet"),
    "space": (change_vocabulary(**{"a b": 430}), SAME + "its entry 'a b' is not written in the byte alphabet"),
    "empty": (change_vocabulary(**{"": 430}), SAME + "its vocabulary has an empty entry"),
    "surrogate": (change_vocabulary(**{"\ud800": 430}), SAME + "its entry .* is not written in the byte alphabet"),
    "placeholder of another": (change_vocabulary(**{"\ue0007\ue001": 430}), SAME + "its entry .* is not written in"),
    "long entry": (
        change_vocabulary(**{"a" * 1025: 430}),
        r"x\.json: the entry of id 430 has 1025 bytes; at",
    ),
    "added otherwise": (add(id=7), NO_ID + r"'<\|endoftext\|>' has the ids 0 and 7"),
    "added on another": (add(id=430, content="q"), NO_ID + "'q' has the ids 430 and 114"),
    "added on a taken id": (add(id=7, content="<x>"), NO_ID + "'.*' and '<x>' both have the id 7"),
    "added far away": (add(id=2**40, content="<x>"), NO_ID + "the id of '<x>' is 1099511627776, and must"),
    "added text": (add(id=430, content="abc", special=False), SAME + "its added token 'abc' is looked for before"),
    "added nothing": (add(id=430, content=""), UNREAD + r"added_tokens\[1\] has no content, no id"),
    "added a number": (change(added_tokens=[3]), UNREAD + r"added_tokens\[0\] has no content, no id"),
    "added an object": (change(added_tokens={"a": 1}), UNREAD + "added_tokens is no list"),
    "perhaps special": (add(id=430, content="<x>", special="no"), UNREAD + r"added_tokens\[1\] .* neither true nor"),
    "normalized": (change(normalizer={"type": "NFC"}), SAME + "its normalizer changes texts"),
    "no pre-tokenizer": (change(pre_tokenizer=None), SAME + "its pre_tokenizer is not ByteLevel"),
    "words of Bert": (change(pre_tokenizer={"type": "BertPreTokenizer"}), SAME + "its pre_tokenizer is 'BertPre"),
    "space before": (change(pre_tokenizer=BYTES | {"add_prefix_space": True}), SAME + "its pre_tokenizer puts a space"),
    "words": (change(pre_tokenizer=BYTES | {"use_regex": True}), SAME + "its pre_tokenizer cuts texts into words"),
    "backtracking": (
        change(pre_tokenizer={"type": "Sequence", "pretokenizers": [BYTES, BACKTRACKS]}),
        SAME + "its pre_tokenizer has more steps than ByteLevel",
    ),
    "backtracking first": (
        change(pre_tokenizer={"type": "Sequence", "pretokenizers": [BACKTRACKS, BYTES]}),
        SAME + "its pre_tokenizer is 'Split', not ByteLevel",
    ),
    "steps of none": (change(pre_tokenizer={"type": "Sequence", "pretokenizers": [None]}), SAME + "its pre_tokenizer"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_would_have_other_ids_is_refused(word_piece_path: Path, name: str) -> None:
    description = described(word_piece_path)
    alter, message = HOSTILE[name]
    alter(description)
    begin = time.perf_counter()
    with pytest.raises(ConfigError, match=message):
        made(description)
    assert time.perf_counter() - begin < 5


def test_an_end_of_text_by_another_name_is_none(word_piece_path: Path) -> None:
    content = word_piece_path.read_bytes().replace(END_OF_TEXT.encode(), b"<|over|>")
    with pytest.raises(ConfigError, match=r"x\.json has no token to put between documents; its unk_token or one"):
        read_word_piece(json.loads(content), content, "x.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"model": {"type": "WordPiece"}}', "model.vocab is no object"),
        (b'{"model": {"type": "WordPiece", "vocab": {"a": 1, "a": 2}}}', "names twice: a"),
        (b'{"model": {"type": "WordPiece", "vocab": ' + b'{"a":' * 100_000, "its JSON cannot be understood"),
        (b'{"model": {"type": "WordPiece", "vocab": {"a": ' + b"9" * 9999 + b"}}}", "its JSON cannot be understood"),
        (b'{"model": {"type": "WordPiece", "vocab": {"\xff": 1}}}', "its JSON cannot be understood"),
        (b'{"model": {"type": "WordPiece", "vocab": {"a": 1}', "its JSON cannot be understood"),
        (b'{"model": [' + b"[" * 100_000, "its JSON cannot be understood"),
    ],
    ids=["no vocabulary", "twice", "deep", "long number", "not UTF-8", "cut", "deep lists"],
)
def test_files_that_are_no_json_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load_tokenizer(tmp_path, None)
    assert "tokenizer.json" in str(caught.value)


def test_a_file_of_any_size_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with path.open("wb") as file:
        file.write(b'{"model": {"type": "WordPiece", "vocab": {' + b" " * 5000)
        file.truncate(2**40)
    with pytest.raises(ConfigError, match=r"tokenizer\.json.*larger than 134217728 bytes, so it is no tokenizer"):
        load_tokenizer(path, None)


def test_the_alphabet_is_that_of_the_package() -> None:
    assert {spell(bytes([value])) for value in range(256)} == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
