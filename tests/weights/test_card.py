"""The text of a model card: YAML that the hub reads, and Markdown in which nobody's names mean anything."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_jax.data.tokenizers import ByteTokenizer
from rwkv_jax.weights.card import (
    CARD_FILE,
    About,
    Files,
    Provenance,
    check_license,
    front_matter,
    model_card,
    yaml_text,
)
from rwkv_jax.weights.pretrained import convert, from_pretrained, save_pretrained
from rwkv_jax.weights.safetensors import read_safetensors, write_safetensors
from rwkv_jax.weights.tensors import WeightsError
from tests.weights.files import CONFIGS, random_tensors

MODEL = CONFIGS["7"]
FILES = Files("name", "official", {"float32": 90, "bfloat16": 3}, 123_456, "ab" * 32, "tokenizer.json, 29 ids")
EVIL = "a|b\n# c `x` [l](http://x) <script>*&\\ \u202e\x1b é 日本"


def fields_of(text: str) -> dict[str, Any]:
    """The front matter, as YAML has it."""
    matched = re.match(r"---\n(.*?\n)---\n", text, re.DOTALL)
    assert matched is not None
    return yaml.safe_load(matched[1])


def rows_of(text: str) -> dict[str, str]:
    """Cells of all tables."""
    lines = [line for line in text.splitlines() if line.startswith("| ") and line != "| | |"]
    assert all(re.fullmatch(r"\| [^|]+ \| [^|]* \|", line) for line in lines)
    return {name: value for name, value in (line[2:-2].split(" | ") for line in lines)}


def test_a_card_says_what_is_known(tmp_path: Path) -> None:
    origin = Provenance(
        source="owner/base on the Hugging Face hub",
        base_model="owner/base",
        relation="finetune",
        changes=("cast to bfloat16", "vocabulary made 29"),
        training={"steps": "8 of 10", "fingerprint of the data": "ff"},
        settings={"training.batch_size": "4"},
        results={"bits a byte, held out": "1.25, after step 8"},
        trained_with={"jax": "0.10.2"},
    )
    text = model_card(MODEL, FILES, About("apache-2.0", origin), {"rwkv-jax": "0.1.0"})
    assert fields_of(text) == {
        "license": "apache-2.0",
        "library_name": "rwkv-jax",
        "pipeline_tag": "text-generation",
        "base_model": "owner/base",
        "base_model_relation": "finetune",
        "tags": ["rwkv", "rwkv-7", "jax"],
    }
    rows = rows_of(text)
    for name, value in {
        "kind": "RWKV-7",
        "layers": "3",
        "width": "32",
        "head size": "8",
        "vocabulary": "29",
        "gate rank": "7",
        "parameters": f"{MODEL.num_parameters():,}",
        "tensors": "93 (90 in float32, 3 in bfloat16), 0.1 MB",
        "names of tensors": "official",
        "SHA-256 of the tensors": "ab" * 32,
        "tokenizer": "tokenizer.json, 29 ids",
        "made of": "owner/base on the Hugging Face hub",
        "changes": "cast to bfloat16; vocabulary made 29",
        "steps": "8 of 10",
        "fingerprint of the data": "ff",
        "training.batch_size": "4",
        "bits a byte, held out": "1.25, after step 8",
        "jax": "0.10.2",
        "rwkv-jax": "0.1.0",
    }.items():
        assert rows[name] == value, name
    assert text.endswith("## License\n\napache-2.0\n")
    (tmp_path / CARD_FILE).write_text(text)
    assert huggingface_hub.metadata_load(tmp_path / CARD_FILE) == fields_of(text)


def test_what_is_not_known_is_left_out() -> None:
    text = model_card(MODEL, dataclasses.replace(FILES, content_sha256=None, tokenizer=None), About(), {})
    assert fields_of(text).keys() == {"library_name", "pipeline_tag", "tags"}
    for absent in ("SHA-256", "tokenizer |", "## Origin", "## Training", "## Settings", "None"):
        assert absent not in text
    assert "Not stated: nothing in these files says what others may do with them." in text
    assert "rwkv push --license" in text


@settings(max_examples=40, deadline=None)
@given(st.text(st.characters(codec="utf-8")))
def test_any_text_is_one_line_of_yaml(text: str) -> None:
    found = yaml_text(text)
    assert found.isprintable()
    assert yaml.safe_load(f"name: {found}") == {"name": text}


@pytest.mark.parametrize(
    "text", ["", "null", "1.0", "2026-12-01", "- a", "# b", 'a": b', "\\", "\n---\n", "!!python/x"]
)
def test_texts_stay_texts(text: str) -> None:
    matter = front_matter(MODEL, About(provenance=Provenance(base_model=text)))
    assert fields_of(f"{matter}\n")["base_model"] == text
    assert yaml.safe_load(yaml_text("a\ud800b")) == "a\N{REPLACEMENT CHARACTER}b"


def test_nobody_s_names_mean_anything() -> None:
    origin = Provenance(source=EVIL, training={EVIL: EVIL}, results={"x" * 1000: "y" * 1000})
    text = model_card(MODEL, dataclasses.replace(FILES, name=EVIL, tokenizer=EVIL), About(None, origin), {EVIL: EVIL})
    rows = rows_of(text)  # which fails for a broken table
    assert "<script>" not in text
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert not re.search(r"(?m)^# c", text)
    assert "é 日本" in rows["made of"]
    assert max(map(len, rows.values())) < 1000
    assert fields_of(text).keys() == {"library_name", "pipeline_tag", "tags"}


@pytest.mark.parametrize("license", ["apache-2.0", "mit", "cc-by-nc-4.0", "llama3.1", "bsd-3-clause"])
def test_licenses(license: str) -> None:
    check_license(license)
    assert fields_of(f"{front_matter(MODEL, About(license))}\n")["license"] == license


@pytest.mark.parametrize("license", ["", "Apache-2.0", "Apache 2.0", "mit\n", "-mit", "a" * 65, "a: b", None, 5, "é"])
def test_what_is_no_license(license: Any) -> None:
    with pytest.raises(WeightsError, match=r"license = .*: must be the hub's identifier of a license, in small"):
        check_license(license)


@pytest.mark.parametrize("license", ["other", "unknown", "none"])
def test_what_says_of_no_license_which(license: str) -> None:
    with pytest.raises(WeightsError, match=rf"license = '{license}': does not say which; give an identifier, or write"):
        check_license(license)


# Folders that are written


@pytest.fixture
def source(tmp_path: Path) -> Path:
    config = dataclasses.replace(MODEL, vocab_size=257)
    write_safetensors(tmp_path / "a.safetensors", random_tensors(config), is_model=True)
    return tmp_path / "a.safetensors"


def test_a_folder_has_a_card_that_can_be_followed(source: Path, tmp_path: Path) -> None:
    save_pretrained(from_pretrained(source), tmp_path / "b", tokenizer=ByteTokenizer(), license="mit", source=source)
    text = (tmp_path / "b" / CARD_FILE).read_text(encoding="utf-8")
    assert fields_of(text)["license"] == "mit"
    rows = rows_of(text)
    assert rows["SHA-256 of the tensors"] == read_safetensors(tmp_path / "b" / "model.safetensors").content_sha256
    assert rows["made of"].startswith("the file a.safetensors, SHA-256 of its tensors ")
    assert rows["tokenizer"].startswith("tokenizer.kind.json, 257 ids, fingerprint ")
    assert str(tmp_path) not in text
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(code.splitlines()) == 3
    seen: dict[str, Any] = {"tokens": np.zeros((1, 2), np.int32)}
    exec(code.replace("PATH", str(tmp_path / "b")), seen)
    assert seen["logits"].shape == (1, 2, 257)


def test_what_was_converted_says_what_was_done(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "b", dtype="bfloat16", resize_vocab=300)
    text = (tmp_path / "b" / CARD_FILE).read_text(encoding="utf-8")
    assert rows_of(text)["changes"] == "cast to bfloat16; vocabulary made 300"
    assert "license" not in fields_of(text)
    model = from_pretrained(source, quantize="int8")
    save_pretrained(model, tmp_path / "c", source="owner/base")
    fields = fields_of((tmp_path / "c" / CARD_FILE).read_text(encoding="utf-8"))
    assert (fields["base_model"], fields["base_model_relation"]) == ("owner/base", "quantized")


def test_a_license_is_refused_before_anything_is_written(source: Path, tmp_path: Path) -> None:
    model = from_pretrained(source)
    for target, license, message in (
        ("b", "Apache 2", "must be the hub's identifier"),
        ("b.safetensors", "mit", r"license = 'mit': only a folder has a model card, which states it; name a folder"),
        ("b.gguf", "mit", "only a folder has a model card"),
    ):
        for write in (
            lambda path, license: save_pretrained(model, path, license=license),
            lambda path, license: convert(source, path, license=license),
        ):
            with pytest.raises(WeightsError, match=message):
                write(tmp_path / target, license)
    with pytest.raises(WeightsError, match=r"source = 'nowhere': is no file or folder here, and no name on the"):
        save_pretrained(model, tmp_path / "b", source="nowhere")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
