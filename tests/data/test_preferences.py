"""Preferences: their records, checked; tokens, masks, splits and orders; what is left out is counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rwkv_jax.chat.formats import G1
from rwkv_jax.config import (
    ConfigError,
    DataConfig,
    ModelConfig,
    ObjectiveName,
    PreferenceConfig,
    StepConfig,
    TrainConfig,
)
from rwkv_jax.data.preference.pairs import PairCorpus, prepare_pairs
from rwkv_jax.data.preference.records import read_labeled, read_pair

USER, GOOD, BAD = (
    {"role": role, "content": text} for role, text in (("user", "Hi"), ("assistant", "Yes"), ("assistant", "No"))
)


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "Hi", "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "Hi", "chosen": [USER, GOOD], "rejected": [USER, BAD], "score": 3},
    ],
)
def test_conversations_are_written_by_the_chat_format(record: Any) -> None:
    pair = read_pair(record, G1)
    assert pair.prompt == "User: Hi\n\nAssistant:"
    assert (pair.first, pair.second) == (" Yes", " No")


def test_texts_are_taken_as_they_are() -> None:
    pair = read_pair({"prompt": "1+1=", "chosen": "2", "rejected": "3"}, G1)
    assert (pair.prompt, pair.first, pair.second) == ("1+1=", "2", "3")
    labeled = read_labeled({"prompt": "1+1=", "completion": "2", "label": True}, G1)
    assert (labeled.prompt, labeled.first, labeled.second, labeled.label) == ("1+1=", "2", None, True)


OTHER = {"role": "user", "content": "Bye"}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, r"rejected: is missing; the record has chosen, prompt"),
        ({"chosen": "b", "rejected": "c"}, r"prompt: is missing, and chosen is a text"),
        ({"prompt": "a", "chosen": "", "rejected": "c"}, r"chosen: the reply is empty"),
        ({"prompt": "a", "chosen": "c", "rejected": "c"}, r"chosen, rejected: are the same reply"),
        ({"chosen": [USER, GOOD], "rejected": [OTHER, BAD]}, r"their prompts differ, 'User: Hi.*' and 'User: Bye"),
        ({"prompt": "Ho", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, r"chosen: .* their prompts differ"),
        ({"prompt": [USER], "chosen": [USER], "rejected": [BAD]}, r"chosen: ends with a message of the user"),
        ({"prompt": [USER], "chosen": [{"role": "bot", "content": "x"}], "rejected": [BAD]}, r"chosen\[0\].*'bot'"),
        ({"prompt": [USER], "chosen": 3, "rejected": [BAD]}, r"chosen: must be a text or a list of messages, not int"),
        ({"prompt": [USER], "chosen": "b", "rejected": "c"}, r"prompt: must be a text, as chosen is, not list"),
        ({"prompt": "a", "chosen": "\ud83d", "rejected": "c"}, r"chosen: has half a surrogate pair at character 0"),
    ],
)
def test_wrong_pairs_are_refused_by_field(record: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_pair(record, G1)


def test_a_label_is_true_or_false() -> None:
    with pytest.raises(ConfigError, match=r"^label = 1: must be true \(desirable\) or false$"):
        read_labeled({"prompt": "a", "completion": "b", "label": 1}, G1)


def config_of(path: Path, *, objective: ObjectiveName = "dpo", held_out: float = 0.0, length: int = 8) -> TrainConfig:
    return TrainConfig(
        model=ModelConfig("4", vocab_size=256, num_layers=2, width=16),
        data=DataConfig(source=str(path), tokenizer="bytes", held_out=held_out),
        initial_weights="base",
        training=StepConfig(objective=objective, sequence_length=length),
    )


def corpus_of(records: list[Any], folder: Path, **settings: Any) -> tuple[PairCorpus, list[str]]:
    path, lines = folder / "data.jsonl", list[str]()
    path.write_text("\n".join(map(json.dumps, records)))
    return prepare_pairs(config_of(path, **settings), lines.append), lines


def test_the_reply_and_its_end_count(tmp_path: Path) -> None:
    corpus, _ = corpus_of([{"prompt": "ab", "chosen": "cd", "rejected": "e"}], tmp_path)
    end = corpus.tokenizer.end_of_text
    first, second = corpus.training.rows([0, 1])  # and one that fills up
    assert first.tokens[0].tolist() == [end, *b"abcd", 0, 0, 0]
    assert first.targets[0].tolist() == [*b"abcd", end, 0, 0, 0]
    assert first.mask.tolist() == [[0, 0, 1, 1, 1, 0, 0, 0], [0] * 8]
    assert second.targets[0].tolist()[:4] == [*b"abe", end]
    assert second.mask[0].tolist() == [0, 0, 1, 1, 0, 0, 0, 0]


def test_long_pairs_are_counted_and_left_out(tmp_path: Path) -> None:
    short, long = ({"prompt": "a", "chosen": "b" * n, "rejected": "c"} for n in (6, 7))
    corpus, lines = corpus_of([long, short], tmp_path)
    assert len(corpus.training) == 1
    assert "1 of 2 pairs are longer than training.sequence_length = 8" in lines[0]
    with pytest.raises(ConfigError, match=r"none of its 1 pairs fits into training\.sequence_length = 8"):
        corpus_of([long], tmp_path)


def test_errors_name_file_and_line(tmp_path: Path) -> None:
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    with pytest.raises(ConfigError, match=r"data\.jsonl.*line 2: rejected: is missing"):
        corpus_of([good, {"prompt": "a", "chosen": "b"}], tmp_path)
    with pytest.raises(ConfigError, match=r"line 1: label: is missing; kto reads single replies"):
        corpus_of([good], tmp_path, objective="kto")


def test_tables_are_read_as_json_is(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    records = [{"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, {"prompt": [USER], "chosen": [GOOD]}]
    path = tmp_path / "data.parquet"
    of_json, _ = corpus_of(records[:1], tmp_path, length=64)
    parquet.write_table(pyarrow.Table.from_pylist(records[:1]), path)
    assert prepare_pairs(config_of(path, length=64), print).fingerprint == of_json.fingerprint
    parquet.write_table(pyarrow.Table.from_pylist(records), path)  # a null where a record has no such field
    with pytest.raises(ConfigError, match=r"data\.parquet: row 1: rejected: is missing"):
        prepare_pairs(config_of(path, length=64), print)
    (tmp_path / "data.txt").write_text("a")
    with pytest.raises(ConfigError, match=r"data\.source = .*data\.txt': has no records of preferences; give files of"):
        prepare_pairs(config_of(tmp_path / "data.txt"), print)


def test_a_prompt_is_on_one_side_of_the_split(tmp_path: Path) -> None:
    records = [{"prompt": f"{i % 20}", "chosen": f"{i}", "rejected": "-"} for i in range(60)]
    corpus, _ = corpus_of(records, tmp_path, held_out=0.3)
    assert corpus.held_out is not None
    prompts = [
        {bytes(each.first[1 : 1 + each.prompt].astype(np.uint8)) for each in side.examples}
        for side in (corpus.training, corpus.held_out)
    ]
    assert len(corpus.training) + len(corpus.held_out) == 60
    assert not prompts[0] & prompts[1]


def test_an_epoch_reads_each_pair_once(tmp_path: Path) -> None:
    records = [{"prompt": "a", "chosen": f"{i}", "rejected": "-"} for i in range(12)]
    corpus, _ = corpus_of(records, tmp_path)
    epochs = [
        np.concatenate([corpus.order(step, batch_size=4, seed=0) for step in steps]) for steps in ((0, 1, 2), (3, 4, 5))
    ]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert epochs[0].tolist() != epochs[1].tolist()
    assert corpus.fingerprint != corpus_of(records[::-1], tmp_path)[0].fingerprint


def test_kto_pairs_a_prompt_with_the_reply_to_another(tmp_path: Path) -> None:
    records = [{"prompt": p, "completion": c, "label": c == "x"} for p, c in (("a", "x"), ("a", "y"), ("b", "z"))]
    corpus, _ = corpus_of(records, tmp_path, objective="kto")
    texts = [bytes(each.second[1:-1].astype(np.uint8)) for each in corpus.training.examples]
    assert texts == [b"az", b"az", b"bx"]
    assert corpus.training.labels is not None
    assert corpus.training.labels.tolist() == [True, False, False]


def test_a_long_neighbor_costs_no_labeled_reply(tmp_path: Path) -> None:
    """The reply to another prompt is the next one that fits, and cut if none does."""
    records = [{"prompt": p, "completion": c, "label": True} for p, c in (("a", "x"), ("b", "y" * 9), ("c", "z" * 6))]
    corpus, lines = corpus_of(records, tmp_path, objective="kto")
    texts = [bytes(each.second[1:].astype(np.uint8)) for each in corpus.training.examples]
    end = bytes([corpus.tokenizer.end_of_text])
    assert texts == [b"azzzzzz" + end, b"cx" + end]
    assert "1 of 3 labeled replies are longer" in lines[0]
    corpus, _ = corpus_of([records[2], records[1], {**records[0], "prompt": "c"}], tmp_path, objective="kto")
    texts = [bytes(each.second[1:].astype(np.uint8)) for each in corpus.training.examples]
    assert texts == [b"cyyyyyyy"] * 2
    _, second = corpus.training.rows([0])
    assert second.targets[0].tolist() == [*b"cyyyyyyy"]


@pytest.mark.parametrize(
    ("objective", "preference", "training", "message"),
    [
        (
            "next_token",
            {"beta": 0.2},
            {},
            r"preference\.beta = 0\.2: training\.objective = 'next_token' does not read it",
        ),
        ("orpo", {"loss": "ipo"}, {}, r"preference\.loss = 'ipo': .*leave it out, or train dpo"),
        ("dpo", {"loss": "ipo", "label_smoothing": 0.1}, {}, r"preference\.label_smoothing = 0\.1: .*has none"),
        ("dpo", {"reference": "adapter_off"}, {}, r"preference\.reference = 'adapter_off': needs an adapter"),
        ("dpo", {}, {"fused_loss": True}, r"training\.fused_loss = True: training\.objective = 'dpo' has none"),
        ("dpo", {}, {"l2wrap": 0.1}, r"training\.l2wrap = 0\.1: training\.objective = 'dpo' has none"),
        ("dpo", {}, {"carry_state": True}, r"training\.carry_state = True: each reply is a text of its own"),
        ("kto", {}, {"accumulation_steps": 2}, r"training\.accumulation_steps = 2: kto estimates"),
    ],
)
def test_settings_that_are_not_read_are_refused(objective: Any, preference: Any, training: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(
            data=DataConfig(source="pairs.jsonl", tokenizer="world"),
            initial_weights="base",
            preference=PreferenceConfig(**preference),
            training=StepConfig(objective=objective, **training),
        )


def test_a_reference_needs_a_model_and_preferences_a_source() -> None:
    training = StepConfig(objective="dpo")
    with pytest.raises(ConfigError, match=r"^data\.source = 'python-stdlib': .* reads preferences"):
        TrainConfig(training=training)
    with pytest.raises(ConfigError, match=r"^initial_weights = None: .* compares with a model"):
        TrainConfig(training=training, data=DataConfig(source="pairs.jsonl", tokenizer="world"))
