"""A corpus of text is built once, whole or not at all, found again, and never used when it is damaged."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rwkv_jax import atomic
from rwkv_jax.config import ConfigError, DataConfig
from rwkv_jax.data import corpus_folder as folder_module
from rwkv_jax.data.corpus import Corpus, prepare_corpus
from rwkv_jax.data.corpus_folder import load_corpus
from tests.data.corpora import folder_of, held_out_of, quiet

_VOCAB_SIZE = 380


@pytest.fixture
def data(tmp_path: Path, lines: str) -> DataConfig:
    """A folder of 40 files, a tenth of them held out."""
    source = tmp_path / "source"
    source.mkdir()
    parts = lines.split("\n\n")
    for i in range(40):
        (source / f"{i:02d}.py").write_text("\n\n".join(parts[5 * i : 5 * i + 5]), encoding="utf-8", newline="")
    return DataConfig(source=str(source), held_out=0.1, cache_dir=str(tmp_path / "cache"))


@pytest.fixture
def corpus(data: DataConfig) -> Corpus:
    """Its corpus."""
    return prepare_corpus(data, _VOCAB_SIZE, quiet)


def _documents(tokens: np.ndarray, corpus: Corpus) -> list[str]:
    assert tokens[0] == tokens[-1] == corpus.tokenizer.end_of_text
    ends = np.flatnonzero(tokens == corpus.tokenizer.end_of_text)
    return [corpus.tokenizer.decode(tokens[a + 1 : b].tolist()) for a, b in itertools.pairwise(ends)]


def test_both_sides_together_are_the_source(data: DataConfig, corpus: Corpus) -> None:
    texts = {path.read_bytes().decode() for path in Path(data.source).iterdir()}
    train, held_out = _documents(corpus.train.tokens, corpus), _documents(held_out_of(corpus).tokens, corpus)
    assert set(train) | set(held_out) == texts
    assert set(train).isdisjoint(held_out)
    assert len(train) + len(held_out) == 40
    assert (corpus.train.num_documents, held_out_of(corpus).num_documents) == (len(train), len(held_out))
    assert corpus.train.num_bytes == sum(len(text.encode()) for text in train)
    assert corpus.held_out_bytes() == "".join(held_out).encode()
    assert held_out_of(corpus).num_bytes == len(corpus.held_out_bytes())
    assert held_out_of(corpus).bytes_per_token == held_out_of(corpus).num_bytes / (len(held_out_of(corpus).tokens) - 1)


def test_tokens_are_memory_mapped_and_small(corpus: Corpus) -> None:
    assert isinstance(corpus.train.tokens, np.memmap)
    assert corpus.train.tokens.dtype == np.uint16
    assert not corpus.train.tokens.flags.writeable
    assert corpus.train.num_tokens == len(corpus.train.tokens)
    assert corpus.tokenizer.vocab_size == _VOCAB_SIZE
    names = sorted(path.name for path in folder_of(corpus).iterdir())
    assert names == ["corpus.json", "held_out.bin", "held_out.txt", "tokenizer.model", "train.bin"]


def test_a_second_call_finds_the_first(data: DataConfig, corpus: Corpus) -> None:
    times = {path: path.stat().st_mtime_ns for path in folder_of(corpus).iterdir()}
    reports: list[str] = []
    again = prepare_corpus(data, _VOCAB_SIZE, reports.append)
    assert (folder_of(again), again.fingerprint) == (folder_of(corpus), corpus.fingerprint)
    assert {path: path.stat().st_mtime_ns for path in folder_of(corpus).iterdir()} == times
    assert not any("tokenized" in line for line in reports)
    assert load_corpus(folder_of(corpus)).fingerprint == corpus.fingerprint


def test_building_again_gives_the_same_bytes(data: DataConfig, corpus: Corpus, tmp_path: Path) -> None:
    other = prepare_corpus(dataclasses.replace(data, cache_dir=str(tmp_path / "other")), _VOCAB_SIZE, quiet)
    for path in folder_of(corpus).iterdir():
        assert (folder_of(other) / path.name).read_bytes() == path.read_bytes()


def test_another_text_share_or_vocabulary_is_another_corpus(data: DataConfig, corpus: Corpus) -> None:
    folders, fingerprints = {folder_of(corpus)}, {corpus.fingerprint}
    path = sorted(Path(data.source).iterdir())[0]
    content = path.read_bytes()
    path.write_bytes(content + b"#")
    changed = [prepare_corpus(data, _VOCAB_SIZE, quiet)]
    path.write_bytes(content)
    changed += [
        prepare_corpus(dataclasses.replace(data, held_out=0.3), _VOCAB_SIZE, quiet),
        prepare_corpus(data, _VOCAB_SIZE - 1, quiet),
    ]
    for other in changed:
        folders.add(folder_of(other))
        fingerprints.add(other.fingerprint)
    path.rename(path.with_name("renamed.py"))
    folders.add(folder_of(prepare_corpus(data, _VOCAB_SIZE, quiet)))
    assert len(folders) == 5
    assert len(fingerprints) == 4


def test_a_single_file_is_split_at_a_line(tmp_path: Path, lines: str) -> None:
    (tmp_path / "book.txt").write_text(lines, encoding="utf-8", newline="")
    data = DataConfig(source=str(tmp_path / "book.txt"), cache_dir=str(tmp_path / "cache"))
    corpus = prepare_corpus(data, _VOCAB_SIZE - 5, quiet)
    assert folder_of(corpus).name.startswith("book-")
    (train,), (held_out,) = _documents(corpus.train.tokens, corpus), _documents(held_out_of(corpus).tokens, corpus)
    assert train + held_out == lines
    assert train.endswith("\n")
    assert abs(len(held_out) / len(lines) - 0.05) < 0.005


def test_nothing_is_held_out_if_that_is_asked_for(data: DataConfig, corpus: Corpus, tmp_path: Path) -> None:
    every = prepare_corpus(dataclasses.replace(data, held_out=0), _VOCAB_SIZE, quiet)
    assert (every.held_out, every.held_out_bytes()) == (None, b"")
    assert every.train.num_documents == 40
    texts = {path.read_bytes().decode() for path in Path(data.source).iterdir()}
    assert set(_documents(every.train.tokens, every)) == texts
    names = sorted(path.name for path in folder_of(every).iterdir())
    assert names == ["corpus.json", "tokenizer.model", "train.bin"]
    assert every.fingerprint != corpus.fingerprint
    (tmp_path / "line.txt").write_text("a single line " * 100)
    single = dataclasses.replace(data, source=str(tmp_path / "line.txt"), held_out=0, tokenizer="bytes")
    assert prepare_corpus(single, 257, quiet).train.num_documents == 1


def test_json_lines_make_a_corpus(tmp_path: Path, lines: str) -> None:
    records = [json.dumps({"text": part}) for part in lines.split("\n\n") if part]
    (tmp_path / "x.jsonl").write_text("\n".join(records), encoding="utf-8")
    data = DataConfig(source=str(tmp_path / "x.jsonl"), held_out=0.2, cache_dir=str(tmp_path / "cache"))
    corpus = prepare_corpus(data, 350, quiet)
    assert corpus.train.num_documents + held_out_of(corpus).num_documents == 200
    assert 20 <= held_out_of(corpus).num_documents <= 60


def test_a_given_tokenizer_is_used_and_kept(data: DataConfig, model_path: Path, corpus: Corpus) -> None:
    given = prepare_corpus(dataclasses.replace(data, tokenizer=str(model_path)), _VOCAB_SIZE, quiet)
    assert folder_of(given) != folder_of(corpus)
    assert (folder_of(given) / "tokenizer.model").read_bytes() == model_path.read_bytes()


def test_a_given_tokenizer_of_another_size_is_refused_before_any_work(data: DataConfig, model_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"it has 380 entries and the model has vocab_size = 512"):
        prepare_corpus(dataclasses.replace(data, tokenizer=str(model_path)), 512, quiet)
    assert not Path(data.cache_dir).exists()


def _cut(folder: Path) -> None:
    os.truncate(folder / "train.bin", 100)


def _change(folder: Path) -> None:
    content = bytearray((folder / "held_out.bin").read_bytes())
    content[10] ^= 1
    (folder / "held_out.bin").write_bytes(content)


def _remove(folder: Path) -> None:
    (folder / "held_out.txt").unlink()


def _empty_json(folder: Path) -> None:
    (folder / "corpus.json").write_text("{}")


def _cut_json(folder: Path) -> None:
    os.truncate(folder / "corpus.json", 30)


def _remove_json(folder: Path) -> None:
    (folder / "corpus.json").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut, r"is damaged: train.bin has 100 bytes, not \d+; delete the folder"),
        (_change, "is damaged: the content of held_out.bin has changed; delete the folder"),
        (_remove, "is damaged: held_out.txt is missing; delete the folder"),
        (_empty_json, "is damaged: corpus.json cannot be understood"),
        (_cut_json, "is damaged: corpus.json cannot be understood"),
        (_remove_json, "is damaged: corpus.json is missing"),
    ],
)
def test_a_damaged_folder_is_never_used(
    data: DataConfig, corpus: Corpus, damage: Callable[[Path], None], message: str
) -> None:
    damage(folder_of(corpus))
    with pytest.raises(ConfigError, match=message):
        prepare_corpus(data, _VOCAB_SIZE, quiet)
    shutil.rmtree(folder_of(corpus))
    assert prepare_corpus(data, _VOCAB_SIZE, quiet).fingerprint == corpus.fingerprint


def test_tokens_beyond_the_vocabulary_are_refused(corpus: Corpus) -> None:
    record = json.loads((folder_of(corpus) / "corpus.json").read_text())
    largest = int(corpus.train.tokens.max())
    record["vocab_size"] = largest
    (folder_of(corpus) / "corpus.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match=f"holds the token {largest}, but the vocabulary has {largest}"):
        load_corpus(folder_of(corpus))


def test_a_corpus_of_another_format_is_refused(corpus: Corpus) -> None:
    record = json.loads((folder_of(corpus) / "corpus.json").read_text())
    record["format_version"] = 99
    (folder_of(corpus) / "corpus.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match="has format 99, this version reads"):
        load_corpus(folder_of(corpus))
    with pytest.raises(ConfigError, match="there is no corpus folder"):
        load_corpus(folder_of(corpus) / "nowhere")


def test_a_failure_leaves_nothing_behind(data: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(written: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic, "flush_to_disk", full)
    with pytest.raises(OSError, match="No space left"):
        prepare_corpus(data, _VOCAB_SIZE, quiet)
    assert list(Path(data.cache_dir).iterdir()) == []


def test_what_a_killed_build_left_is_ignored(data: DataConfig, corpus: Corpus) -> None:
    left = folder_of(corpus).with_name(f".{folder_of(corpus).name}.123-abcd.tmp")
    folder_of(corpus).rename(left)
    os.truncate(left / "train.bin", 100)
    again = prepare_corpus(data, _VOCAB_SIZE, quiet)
    assert again.fingerprint == corpus.fingerprint
    assert folder_of(again) == folder_of(corpus)


def test_a_source_that_changes_while_it_is_read_is_refused(data: DataConfig) -> None:
    def change(line: str) -> None:
        if line.startswith("trained"):
            (Path(data.source) / "00.py").write_text("changed\n")

    with pytest.raises(ConfigError, match="changed while it was read; start again"):
        prepare_corpus(data, _VOCAB_SIZE, change)
    assert list(Path(data.cache_dir).iterdir()) == []


def test_two_processes_at_once_build_one_corpus(data: DataConfig) -> None:
    program = (
        "import sys; from rwkv_jax.config import DataConfig; from rwkv_jax.data.corpus import prepare_corpus\n"
        "data = DataConfig(source=sys.argv[1], held_out=0.1, cache_dir=sys.argv[2])\n"
        "print(prepare_corpus(data, 380, lambda line: None).fingerprint)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(folder_module.__file__).parents[2])}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, data.source, data.cache_dir],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert outputs[0] == outputs[1]
    assert outputs[0][1] == ""
    (folder,) = Path(data.cache_dir).iterdir()
    assert load_corpus(folder).fingerprint == outputs[0][0].strip()


def test_the_loser_of_a_race_takes_what_the_winner_built(
    data: DataConfig, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = shutil.copytree(folder_of(corpus), tmp_path / "winner")
    shutil.rmtree(folder_of(corpus))
    build = folder_module._write_sides

    def write_and_be_overtaken(*arguments: Any) -> dict[str, Any]:
        record = build(*arguments)
        shutil.copytree(kept, folder_of(corpus))
        return record

    monkeypatch.setattr(folder_module, "_write_sides", write_and_be_overtaken)
    assert prepare_corpus(data, _VOCAB_SIZE, quiet).fingerprint == corpus.fingerprint
    assert list(Path(data.cache_dir).iterdir()) == [folder_of(corpus)]


def test_a_cache_that_cannot_be_written_is_named(data: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"data.cache_dir = .*cannot be written \(Not a directory\)"):
        prepare_corpus(dataclasses.replace(data, cache_dir=str(tmp_path / "file" / "cache")), _VOCAB_SIZE, quiet)


def test_a_vocabulary_too_large_for_the_source_is_named(data: DataConfig) -> None:
    with pytest.raises(ConfigError, match=r"model.vocab_size = 60000: .* at most \d+"):
        prepare_corpus(data, 60000, quiet)
    assert list(Path(data.cache_dir).iterdir()) == []


def test_the_standard_library(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    reports: list[str] = []
    corpus = prepare_corpus(DataConfig(cache_dir=str(tmp_path)), 4096, reports.append)
    assert folder_of(corpus).name.startswith("python-stdlib-")
    total = corpus.train.num_bytes + held_out_of(corpus).num_bytes
    assert total > 8e6
    assert 0.04 < held_out_of(corpus).num_bytes / total < 0.07
    assert held_out_of(corpus).bytes_per_token > 3
    assert int(corpus.train.tokens.max()) < 4096
    assert "".join(_documents(held_out_of(corpus).tokens, corpus)).encode() == corpus.held_out_bytes()
    assert capfd.readouterr() == ("", "")
    assert any("trained a tokenizer of 4096 entries" in line for line in reports)
