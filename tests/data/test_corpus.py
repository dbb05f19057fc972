"""A corpus of tokens that are there already, mixtures of several sources, and the configs that cannot be either."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rwkv_jax import cli
from rwkv_jax.config import ConfigError, DataConfig
from rwkv_jax.data.corpus import Corpus, prepare_corpus
from rwkv_jax.data.tokenizers import WorldTokenizer
from rwkv_jax.data.tokens import binidx as binidx_module
from rwkv_jax.data.tokens.rows import training_rows
from tests.data.corpora import flat, folder_of, held_out_of, quiet, write_pair

_TEXTS = [f"text number {number}, a café\n" for number in range(20)]


@pytest.fixture(scope="session")
def documents() -> list[list[int]]:
    """Twenty documents as World tokens."""
    tokenizer = WorldTokenizer()
    return [[*tokenizer.encode(text), 0] for text in _TEXTS]


@pytest.fixture
def data(tmp_path: Path, documents: list[list[int]]) -> DataConfig:
    """A pair of token files; its last two documents are held out."""
    path = write_pair(tmp_path / "tokens", documents)
    return DataConfig(source=str(path), held_out=0.1, tokenizer="world", cache_dir=str(tmp_path / "cache"))


def _prepare(data: DataConfig, **changes: Any) -> Corpus:
    return prepare_corpus(dataclasses.replace(data, **changes), 65536, quiet)


class TestBinidx:
    @pytest.mark.parametrize("suffix", [".bin", ".idx", ""])
    def test_the_last_documents_are_held_out(
        self, data: DataConfig, documents: list[list[int]], suffix: str, tmp_path: Path
    ) -> None:
        reports: list[str] = []
        source = str(tmp_path / f"tokens{suffix}")
        corpus = prepare_corpus(dataclasses.replace(data, source=source), 65536, reports.append)
        held_out = held_out_of(corpus)
        assert corpus.train.tokens.tolist() == flat(documents[:18])
        # The end of the document before stands first, so that each held-out token has a predecessor.
        assert held_out.tokens.tolist() == [0, *documents[18], *documents[19]]
        assert (corpus.train.num_documents, held_out.num_documents) == (18, 2)
        assert corpus.held_out_bytes() == "".join(_TEXTS[18:]).encode()
        assert held_out.num_bytes == len(corpus.held_out_bytes())
        assert corpus.train.num_bytes == len("".join(_TEXTS[:18]).encode())
        assert corpus.folder is None
        assert not Path(data.cache_dir).exists()
        assert any("training: 18 documents" in line for line in reports)
        assert any(corpus.fingerprint in line for line in reports)

    def test_nothing_is_copied(self, data: DataConfig) -> None:
        corpus = _prepare(data)
        for file in (corpus.train, held_out_of(corpus)):
            assert isinstance(file.tokens, np.memmap)
            assert file.path == Path(data.source)

    def test_nothing_is_held_out_if_that_is_asked_for(self, data: DataConfig, documents: list[list[int]]) -> None:
        corpus = _prepare(data, held_out=0)
        assert (corpus.held_out, corpus.held_out_bytes()) == (None, b"")
        assert corpus.train.tokens.tolist() == flat(documents)

    def test_the_official_rows_of_a_file(self, data: DataConfig, documents: list[list[int]]) -> None:
        """As the official trainer cuts them from the flat tokens: sample 1 begins at T int(0.618... p)."""
        tokens, length = flat(documents), 5
        num_sequences = len(tokens) // length
        prime = next(p for p in range(num_sequences - 1, 1, -1) if p % 3 == 2 and all(p % d for d in range(2, p)))
        rows = training_rows(_prepare(data, held_out=0), order="official", seed=9, batch_size=2, sequence_length=length)
        for step in range(20):
            for row, found in enumerate(rows.read(step).tokens.tolist()):
                sample = 1 + 2 * step + row
                start = (int(prime * (5**0.5 - 1) / 2) * sample**3) % prime * length
                assert found == tokens[start : start + length + 1]

    def test_the_fingerprint_depends_on_files_and_split_alone(self, data: DataConfig, tmp_path: Path) -> None:
        found = {_prepare(data).fingerprint, _prepare(data, held_out=0.2).fingerprint}
        content = bytearray(Path(data.source).read_bytes())
        content[0] ^= 1
        Path(data.source).write_bytes(content)
        found.add(_prepare(data).fingerprint)
        assert len(found) == 3
        (tmp_path / "moved").mkdir()
        for suffix in ("bin", "idx"):
            (tmp_path / f"tokens.{suffix}").rename(tmp_path / "moved" / f"other.{suffix}")
        assert _prepare(data, source=str(tmp_path / "moved" / "other")).fingerprint in found

    def test_bytes_of_a_large_file_are_estimated(
        self, data: DataConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, documents: list[list[int]]
    ) -> None:
        write_pair(tmp_path / "tokens", documents * 50)
        exact = _prepare(data).train.num_bytes
        monkeypatch.setattr(binidx_module, "_BLOCK_BYTES", 64)
        assert _prepare(data).train.num_bytes == pytest.approx(exact, rel=0.05)

    def test_a_tokenizer_must_be_named(self, data: DataConfig) -> None:
        with pytest.raises(ConfigError, match=r"data.tokenizer = None: .* holds tokens; name the tokenizer"):
            _prepare(data, tokenizer=None)

    @pytest.mark.parametrize("held_out", [0, 0.1])
    def test_tokens_of_another_tokenizer_are_refused(self, data: DataConfig, held_out: float) -> None:
        message = r"tokens\.bin: holds the token \d+, and the tokenizer has 257; name the tokenizer that made the file"
        with pytest.raises(ConfigError, match=message):
            prepare_corpus(dataclasses.replace(data, tokenizer="bytes", held_out=held_out), 257, quiet)

    def test_documents_without_an_end_are_counted(self, data: DataConfig, tmp_path: Path) -> None:
        def reports() -> list[str]:
            lines: list[str] = []
            prepare_corpus(data, 65536, lines.append)
            return [line for line in lines if "do not end with" in line]

        assert reports() == []
        write_pair(tmp_path / "tokens", [[5, 0], [6, 7], [8, 0], [9, 0]])
        (line,) = reports()
        assert "1 of 4 documents looked at do not end with the tokenizer's end of text, 0, the only mark" in line

    def test_one_document_cannot_be_split(self, data: DataConfig, tmp_path: Path) -> None:
        write_pair(tmp_path / "tokens", [[5, 6, 0]])
        with pytest.raises(ConfigError, match=r"has 1 document\(s\), which leaves none to train on; set data.held_out"):
            _prepare(data)
        assert _prepare(data, held_out=0).train.tokens.tolist() == [5, 6, 0]

    @pytest.mark.parametrize("documents_", [[[], [5, 0]], [[5, 0], []]])
    def test_a_side_without_tokens_is_refused(
        self, data: DataConfig, tmp_path: Path, documents_: list[list[int]]
    ) -> None:
        write_pair(tmp_path / "tokens", documents_)
        with pytest.raises(ConfigError, match=r"tokens\.bin has no tokens on one of the two sides"):
            _prepare(data)

    def test_an_idx_of_another_bin_is_refused(self, data: DataConfig, tmp_path: Path) -> None:
        with (tmp_path / "tokens.bin").open("ab") as file:
            file.write(b"\x01\x00")
        with pytest.raises(ConfigError, match=r"tokens\.idx: does not match tokens\.bin, its items have"):
            _prepare(data)


class TestMixture:
    @pytest.fixture
    def mixture(self, data: DataConfig, tmp_path: Path) -> DataConfig:
        """Of the token files and of records of text."""
        records = [json.dumps({"text": f"record {number} says hello"}) for number in range(30)]
        (tmp_path / "x.jsonl").write_text("\n".join(records))
        default = DataConfig().source
        return dataclasses.replace(
            data, source=default, mixture=((data.source, 3.0), (str(tmp_path / "x.jsonl"), 1.0)), held_out=0.2
        )

    def test_both_sides_are_those_of_the_parts(self, mixture: DataConfig, data: DataConfig, tmp_path: Path) -> None:
        reports: list[str] = []
        corpus = prepare_corpus(mixture, 65536, reports.append)
        tokens = _prepare(data, held_out=0.2)
        text = _prepare(data, source=str(tmp_path / "x.jsonl"), held_out=0.2)
        assert [part.tokens.tolist() for part in corpus.sources] == [
            part.train.tokens.tolist() for part in (tokens, text)
        ]
        assert corpus.shares == (3072, 1024)
        held_out = held_out_of(corpus)
        assert corpus.held_out_bytes() == tokens.held_out_bytes() + text.held_out_bytes()
        assert held_out.num_bytes == len(corpus.held_out_bytes())
        joined = [*held_out_of(tokens).tokens.tolist(), *held_out_of(text).tokens.tolist()[1:]]
        assert held_out.tokens.tolist() == joined
        assert joined[0] == 0
        assert any("75.00%" in line and corpus.fingerprint in line for line in reports)
        rows = training_rows(corpus, order="windows", seed=0, batch_size=8, sequence_length=6)
        assert {place.split(",")[0] for place in rows.row_locations(0) + rows.row_locations(1)} == {
            data.source,
            str(folder_of(text) / "train.bin"),
        }

    def test_the_fingerprint_covers_sources_and_weights(self, mixture: DataConfig, tmp_path: Path) -> None:
        (first, _), (second, _) = mixture.mixture
        fingerprints = [
            _prepare(mixture, mixture=pairs).fingerprint
            for pairs in (
                ((first, 3.0), (second, 1.0)),
                ((first, 1.0), (second, 1.0)),
                ((second, 3.0), (first, 1.0)),
                ((first, 1.0),),
            )
        ]
        assert len(set(fingerprints)) == 4
        assert _prepare(mixture, mixture=((first, 75), (second, 25))).fingerprint == fingerprints[0]
        with (tmp_path / "x.jsonl").open("a") as file:
            file.write('\n{"text": "more"}')
        assert _prepare(mixture).fingerprint not in fingerprints

    def test_nothing_is_held_out_if_that_is_asked_for(self, mixture: DataConfig) -> None:
        corpus = _prepare(mixture, held_out=0)
        assert (corpus.held_out, corpus.held_out_bytes()) == (None, b"")

    def test_a_missing_source_is_named(self, mixture: DataConfig) -> None:
        with pytest.raises(ConfigError, match=r"data.source = '/nowhere': there is no such file or folder"):
            _prepare(mixture, mixture=(*mixture.mixture, ("/nowhere", 1.0)))

    def test_a_weight_too_small_is_refused_before_any_work(self, mixture: DataConfig) -> None:
        with pytest.raises(ConfigError, match=r"weight of '/nowhere' = 1e-06: less than a row in 4096"):
            _prepare(mixture, mixture=(*mixture.mixture, ("/nowhere", 1e-6)))
        assert not Path(mixture.cache_dir).exists()


class TestDataConfig:
    def test_a_mixture_on_the_command_line(self) -> None:
        arguments = ["--data.mixture", "a b", "0.7", "c", "3", "--data.tokenizer", "world"]
        assert cli.parse_train_config(arguments).data.mixture == (("a b", 0.7), ("c", 3.0))

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"held_out": 1.0}, "data.held_out = 1.0: must lie in [0, 1); 0 holds out nothing"),
            ({"held_out": -0.1}, "data.held_out = -0.1: must lie in [0, 1)"),
            ({"order": "random"}, "data.order = 'random': must be windows or official"),
            ({"magic_prime": 5}, "data.magic_prime = 5: data.order = 'windows' has no such number; leave it out"),
            (
                {"mixture": (("a", 0.0), ("b", 1.0))},
                "data.mixture, weight of 'a' = 0.0: must be positive; leave out what is not to be read",
            ),
            ({"mixture": (("a", float("nan")),)}, "data.mixture, weight of 'a' = nan: must be positive"),
            ({"mixture": (("a", float("inf")),)}, "data.mixture, weight of 'a' = inf: must be positive"),
            ({"mixture": (("", 1.0),)}, "data.mixture = (('', 1.0),): each source needs a path"),
            ({"mixture": (("a", 1.0), ("a", 2.0))}, "names a source twice; add its weights"),
            (
                {"mixture": (("a", 1.0),), "source": "b"},
                "data.source = 'b': data.mixture names the sources; leave this",
            ),
            ({"mixture": (("a", 1.0),), "tokenizer": None}, "the sources of data.mixture share one tokenizer; name it"),
            ({"mixture": (("a", 1.0),), "order": "official"}, "data.order = 'official': the official order is one of"),
        ],
    )
    def test_what_cannot_be(self, fields: dict[str, Any], message: str) -> None:
        arguments: dict[str, Any] = {"tokenizer": "world"} | fields
        with pytest.raises(ConfigError, match=re.escape(message)):
            DataConfig(**arguments)
