"""Chats and texts in one run: shares, masks, and rows that are those of each source by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rwkv_jax.config import ConfigError, DataConfig, ModelConfig, StepConfig, TrainConfig
from rwkv_jax.data.chat.mixture import MixedCorpus, MixedRows, mixed_rows, prepare_mixed
from rwkv_jax.data.corpus import prepare_corpus
from rwkv_jax.data.tokens.mixture import PERIOD

B, T = 4, 48


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    chats = ({"prompt": f"What is {i}?", "completion": "It is it."} for i in range(20))
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    (tmp_path / "more.jsonl").write_text('{"prompt": "And?", "completion": "No."}\n' * 2)
    (tmp_path / "texts.jsonl").write_text("".join(f'{{"text": "{i} " }}\n' * 9 for i in range(99)))
    return tmp_path


def config_of(folder: Path, mixture: dict[str, float], training: Any = None, **data: Any) -> TrainConfig:
    paths = tuple((name.replace("@", f"{folder}/"), share) for name, share in mixture.items())
    settings = {"chat": "auto", "tokenizer": "bytes", "held_out": 0.1, "chat_format": "raven"} | data
    return TrainConfig(
        model=ModelConfig("4", vocab_size=257, num_layers=2, width=16),
        data=DataConfig(mixture=paths, cache_dir=str(folder / "cache"), **settings),
        training=StepConfig(num_steps=20, batch_size=B, sequence_length=T, **training or {}),
    )


def prepared(config: TrainConfig) -> tuple[MixedCorpus, MixedRows]:
    corpus = prepare_mixed(config, lambda line: None)
    return corpus, mixed_rows(corpus, config)


BOTH = {"chat:@chats.jsonl": 3.0, "@texts.jsonl": 1.0}


def test_texts_count_whole_and_chats_where_they_count(folder: Path) -> None:
    config = config_of(folder, BOTH)
    corpus, rows = prepared(config)
    alone = prepare_corpus(config.data.of_source(str(folder / "texts.jsonl")), 257, lambda line: None)
    assert corpus.parts[1].fingerprint == alone.fingerprint
    for step in range(20):
        found, places = rows.read(step), rows.row_locations(step)
        assert found.mask is not None
        assert found.targets is not None
        for row, place in enumerate(places):
            is_text = ".jsonl: line" not in place
            assert found.mask[row].all() == is_text
            assert found.mask[row].any()
            if is_text:
                np.testing.assert_array_equal(found.targets[row], found.tokens[row, 1:])
    sources = np.concatenate([rows._locate(step, slice(None))[0] for step in range(PERIOD // B)])
    assert np.bincount(sources).tolist() == [3 * PERIOD // 4, PERIOD // 4]


def test_each_source_has_the_rows_that_it_has_by_itself(folder: Path) -> None:
    _, rows = prepared(config_of(folder, BOTH))
    sources = [rows._locate(step, slice(None)) for step in range(50)]
    for step, (source, members) in enumerate(sources):
        found = rows.read(step)
        for row in range(B):
            own = rows.parts[source[row]].read_rows(members[row : row + 1])
            np.testing.assert_array_equal(found.tokens[row], own.tokens[0])
        np.testing.assert_array_equal(rows.read(step, slice(1, 3)).tokens, found.tokens[1:3])
    for part in range(2):  # in order, none left out
        read = np.concatenate([members[source == part] for source, members in sources])
        assert read.tolist() == list(range(len(read)))


def test_each_epoch_of_a_few_chats_reads_all_of_them_once(folder: Path) -> None:
    _, rows = prepared(config_of(folder, BOTH, chat_rows="apart", held_out=0))
    places = [place for step in range(25) for place in rows.row_locations(step) if ".jsonl: line" in place]
    first, second = places[:20], places[20:40]
    assert len(set(first)) == len(set(second)) == 20
    assert first != second


def test_what_was_read_of_all_chats_is_added_up(folder: Path) -> None:
    corpus, rows = prepared(config_of(folder, {**BOTH, "chat:@more.jsonl": 1.0}, held_out=0))
    assert (corpus.counts.chats, corpus.counts.training) == (22, 22)
    assert corpus.counts.longest == max(part.counts.longest for part in corpus.chats)
    assert corpus.held_out is corpus.held_out_texts is None
    assert "chats.jsonl 60.01% (" in rows.describe(100)
    other, _ = prepared(config_of(folder, {**BOTH, "chat:@more.jsonl": 2.0}, held_out=0))
    assert other.fingerprint != corpus.fingerprint


def test_streams_and_texts_without_a_row_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"^training\.carry_state = True: rows of a mixture do not go on"):
        prepared(config_of(folder, BOTH, {"carry_state": True}))
    (folder / "texts.jsonl").write_text('{"text": "a"}')
    with pytest.raises(ConfigError, match=r"^data\.mixture: .* training tokens, less than one sequence"):
        prepared(config_of(folder, BOTH, held_out=0))


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"chat": None}, r"^data\.mixture = .*: \['chat:a'\] are chats; set data\.chat, to auto or their form"),
        ({"mixture": (("a", 1.0),)}, r"^data\.mixture = .* no source is of chats; write chat:PATH"),
        ({"mixture": (("chat:", 1.0),)}, r"^data\.mixture = .*: each source needs a path"),
        ({"mixture": (), "source": "chat:a"}, r"^data\.source = 'chat:a': chat: is for data\.mixture"),
        ({"order": "official"}, r"^data\.order = 'official': chats have an order of their own"),
    ],
)
def test_what_a_mixture_with_chats_cannot_be(fields: dict[str, Any], error: str) -> None:
    base: dict[str, Any] = {"mixture": (("chat:a", 1.0), ("b", 2.0)), "chat": "auto", "tokenizer": "world"}
    with pytest.raises(ConfigError, match=error):
        DataConfig(**base | fields)
