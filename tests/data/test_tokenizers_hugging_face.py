"""The tokenizer.json of Hugging Face: ids of GPT-NeoX, special tokens that no text spells, and what is refused."""

from __future__ import annotations

import json
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import example, given, settings

from rwkv_jax.config import ConfigError
from rwkv_jax.data.tokenizers import END_OF_TEXT, HuggingFaceTokenizer, fits_model, load_tokenizer
from tests.data.texts import TEXTS
from tests.shared import shared_data


@pytest.fixture(scope="session")
def neox() -> HuggingFaceTokenizer:
    """That of GPT-NeoX."""
    return HuggingFaceTokenizer(shared_data("20B_tokenizer.json").read_bytes(), "20B_tokenizer.json")


def test_ids_of_gpt_neox(neox: HuggingFaceTokenizer) -> None:
    assert (neox.vocab_size, neox.end_of_text) == (50277, 0)
    assert neox.encode("\n") == [187]
    assert neox.encode("\n\n") == [535]
    assert neox.encode("hello world") == [25521, 1533]
    assert neox.encode(" " * 24) == [50254]


@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
@example(text=f"a{END_OF_TEXT}b<|padding|>" + " " * 50)
@example(text="e\u0301\u212b")
def test_gpt_neox_gives_back_composed_texts_and_composes_others(neox: HuggingFaceTokenizer, text: str) -> None:
    tokens = neox.encode(text)
    assert neox.end_of_text not in tokens
    assert neox.decode(tokens) == unicodedata.normalize("NFC", text)


def test_every_id_of_gpt_neox_reads_as_for_its_own_library(neox: HuggingFaceTokenizer) -> None:
    """As far as that can say: it decodes to text, in which half a character is U+FFFD."""
    theirs = tokenizers.Tokenizer.from_file(str(shared_data("20B_tokenizer.json")))
    different = [token for token in range(50277) if neox.decode([token]) != theirs.decode([token])]
    assert different == []


def test_models_with_padded_embeddings_take_it(neox: HuggingFaceTokenizer) -> None:
    """Those of RWKV-4 Pile, RWKV-7 Pile, and Pythia of 6.9 and 12 billion."""
    assert all(fits_model(neox, size) for size in (50277, 50304, 50432, 50688))
    assert not any(fits_model(neox, size) for size in (50276, 50254, 50278, 50300, 50816, 65536))
    assert neox.decode([50303]) == "\ufffd"


def test_special_tokens_are_never_spelled(json_path: Path) -> None:
    tokenizer = HuggingFaceTokenizer(json_path.read_bytes(), str(json_path))
    text = f"{END_OF_TEXT} x{END_OF_TEXT}<|padding|>\n{END_OF_TEXT}"
    tokens = tokenizer.encode(text)
    assert not {0, 1} & set(tokens)
    assert tokenizer.decode(tokens) == text
    assert tokenizer.token_bytes(1) == b""


def described(path: Path) -> dict[str, Any]:
    return json.loads(path.read_bytes())


def made(description: dict[str, Any]) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(json.dumps(description).encode(), "x.json")


def not_special(description: dict[str, Any]) -> None:
    for token in description["added_tokens"]:
        token["special"] = False


def truncating(description: dict[str, Any]) -> None:
    description["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}


def padding(description: dict[str, Any]) -> None:
    description["padding"] = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None}
    description["padding"] |= {"pad_id": 1, "pad_type_id": 0, "pad_token": "<|padding|>"}


def dropping(description: dict[str, Any]) -> None:
    description["model"]["dropout"] = 0.9


def surrounding(description: dict[str, Any]) -> None:
    description["post_processor"] = json.loads(
        tokenizers.processors.TemplateProcessing(
            single=f"{END_OF_TEXT} $A {END_OF_TEXT}", special_tokens=[(END_OF_TEXT, 0)]
        ).__getstate__()
    )


@pytest.mark.parametrize("change", [not_special, truncating, padding, dropping, surrounding])
def test_settings_that_would_change_a_text_are_not_followed(
    json_path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    plain, description = HuggingFaceTokenizer(json_path.read_bytes(), str(json_path)), described(json_path)
    change(description)
    tokenizer = made(description)
    text = f"def function_1(value: int){END_OF_TEXT} -> int:\n      return"
    assert [tokenizer.encode(text) for _ in range(5)] == [plain.encode(text)] * 5
    assert tokenizer.end_of_text == plain.end_of_text
    assert tokenizer.token_bytes(0) == b""


def test_texts_of_other_peoples_models_begin_and_end_as_they_say(json_path: Path) -> None:
    description = described(json_path)
    plain = made(description)
    assert (plain.begin, plain.ends) == ((0,), {0})
    own = plain.of_hub_model([])
    assert (own.begin, own.ends) == ((), {0})
    surrounding(description)
    own = made(description).of_hub_model([1, 5])
    assert (own.begin, own.ends) == ((0,), {1, 5})
    assert (own.encode("def x"), own.fingerprint) == (made(description).encode("def x"), made(description).fingerprint)
    with pytest.raises(ConfigError, match="eos_token_id = 4000: the ids of the tokenizer are 0 to 404"):
        plain.of_hub_model([0, 4000])


@pytest.mark.parametrize(("normalized", "composed"), [(True, "é!"), (False, "e\u0301!")])
def test_added_tokens_read_as_they_are_found_in_a_text(json_path: Path, normalized: bool, composed: str) -> None:
    description = described(json_path)
    description["normalizer"] = {"type": "NFC"}
    token = description["added_tokens"][-1] | {"id": 405, "content": "e\u0301!", "normalized": normalized}
    description["added_tokens"].append(token)
    tokenizer = made(description)
    assert tokenizer.encode("e\u0301!") == [405]
    assert tokenizer.decode([405]) == composed


@pytest.mark.parametrize("name", ["</s>", "<eos>", "<|end_of_text|>"])
def test_other_names_of_end_of_text(json_path: Path, name: str) -> None:
    content = json_path.read_bytes().replace(END_OF_TEXT.encode(), name.encode())
    tokenizer = HuggingFaceTokenizer(content, "x.json")
    assert tokenizer.end_of_text == 0
    assert 0 not in tokenizer.encode(f"a{name}b")


def word_level(description: dict[str, Any]) -> None:
    description["model"] = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}


def no_pre_tokenizer(description: dict[str, Any]) -> None:
    description["pre_tokenizer"] = None


def words_only(description: dict[str, Any]) -> None:
    steps = [{"type": "WhitespaceSplit"}, description["pre_tokenizer"]]
    description["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}


def removing(description: dict[str, Any]) -> None:
    split = {"type": "Split", "pattern": {"String": "q"}, "behavior": "Removed", "invert": False}
    steps = [split, description["pre_tokenizer"]]
    description["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}


def space_before(description: dict[str, Any]) -> None:
    description["pre_tokenizer"]["add_prefix_space"] = True


def suffixed(description: dict[str, Any]) -> None:
    description["model"]["end_of_word_suffix"] = "</w>"


def byte_missing(description: dict[str, Any]) -> None:
    vocabulary = description["model"]["vocab"]
    vocabulary["new"] = vocabulary.pop("Ā")


def not_in_bytes(description: dict[str, Any]) -> None:
    description["model"]["vocab"]["日本"] = 500


def spelled(description: dict[str, Any]) -> None:
    description["model"]["ignore_merges"] = True


def merged(description: dict[str, Any]) -> None:
    token = description["added_tokens"][0] | {"id": description["model"]["vocab"]["def"], "content": "def"}
    description["added_tokens"].insert(2, token)


def one_character(description: dict[str, Any]) -> None:
    token = description["added_tokens"][0] | {"id": description["model"]["vocab"]["!"], "content": "!"}
    description["added_tokens"].insert(2, token)


def greedy_token(description: dict[str, Any]) -> None:
    description["added_tokens"][-1]["lstrip"] = True


def no_end_of_text(description: dict[str, Any]) -> None:
    description["added_tokens"] = description["added_tokens"][1:]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (word_level, "its model is WordLevel"),
        (no_pre_tokenizer, "its pre_tokenizer has no step ByteLevel"),
        (words_only, "a step WhitespaceSplit that leaves out part of a text"),
        (removing, "a step Split that leaves out part of a text"),
        (space_before, "puts a space before a text"),
        (suffixed, "its model sets end_of_word_suffix"),
        (byte_missing, "1 bytes have no entry, 0x00 is the first"),
        (not_in_bytes, "its entry '日本' is not written in the byte alphabet"),
        (spelled, r"a text can spell its special token '<\|endoftext\|>'"),
        (merged, "a text can spell its special token 'def'"),
        (one_character, "a text can spell its special token '!'"),
        (greedy_token, "its added token '  ' swallows the spaces beside it"),
        (no_end_of_text, "has no token to put between documents"),
    ],
)
def test_a_tokenizer_without_exact_bytes_is_refused(
    json_path: Path, change: Callable[[dict[str, Any]], None], reason: str
) -> None:
    description = described(json_path)
    change(description)
    with pytest.raises(ConfigError, match=f"x.json .*{reason}"):
        made(description)


def test_a_missing_package_is_named_with_the_remedy(json_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ConfigError, match=r'needs the package tokenizers: pip install "rwkv-jax\[tokenizers\]"'):
        load_tokenizer(json_path, 405)


def two_on_one_id(description: dict[str, Any]) -> None:
    vocabulary = description["model"]["vocab"]
    vocabulary["!"] = vocabulary["?"]


def added_on_one_id(description: dict[str, Any]) -> None:
    description["added_tokens"][-1]["id"] = description["model"]["vocab"]["def"]


def negative_id(description: dict[str, Any]) -> None:
    description["added_tokens"][-1]["id"] = -1


def far_id(description: dict[str, Any]) -> None:
    description["model"]["vocab"]["def"] = 2**32 - 1


def two_ids(description: dict[str, Any]) -> None:
    description["added_tokens"][-1]["id"] = 450


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            two_on_one_id,
            r"x\.json does not give each token an id of its own: '[!?]' and '[!?]' both have the id",
        ),
        (added_on_one_id, r"x\.json .*own: 'def' and '  ' both have the id \d+; get it again"),
        (negative_id, r"x\.json is not a tokenizer.json that can be read \(.*; get it again"),
        (far_id, r"x\.json .*own: the id of 'def' is 4294967295, and must be a whole number from 0 to 4194303"),
        (two_ids, r"x\.json .*own: '  ' has the ids 450 and 404"),
    ],
)
def test_each_token_has_an_id_of_its_own(
    json_path: Path, change: Callable[[dict[str, Any]], None], reason: str
) -> None:
    description = described(json_path)
    change(description)
    with pytest.raises(ConfigError, match=reason):
        made(description)


@pytest.mark.parametrize("part", ["model", "added_tokens", "pre_tokenizer"])
@pytest.mark.parametrize("value", [None, 3, "x", [], [3], {}, {"type": 3}, {"type": "BPE"}], ids=repr)
def test_parts_of_another_type_are_named(json_path: Path, part: str, value: Any) -> None:
    description = described(json_path) | {part: value}
    with pytest.raises(ConfigError, match=r"^x\.json "):
        made(description)


def test_a_part_that_is_missing_is_named(json_path: Path) -> None:
    for part in ("model", "added_tokens", "pre_tokenizer"):
        description = described(json_path)
        del description[part]
        with pytest.raises(ConfigError, match=r"^x\.json "):
            made(description)


def test_a_pattern_that_backtracks_without_end_is_no_panic(json_path: Path) -> None:
    description = described(json_path)
    split = {"type": "Split", "pattern": {"Regex": "(q|q)*$"}, "behavior": "Isolated", "invert": False}
    description["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, description["pre_tokenizer"]]}
    tokenizer = made(description)
    assert tokenizer.decode(tokenizer.encode("qq!")) == "qq!"
    with pytest.raises(ConfigError, match=r"tokenizer\.json has a pattern that cannot cut this text of 41 characters"):
        tokenizer.encode("q" * 40 + "!")
