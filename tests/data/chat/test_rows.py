"""Rows of chats: every chat once an epoch, whole and alone with itself, the same in every process and after a stop."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rwkv_jax.config import ConfigError, DataConfig, ModelConfig, StepConfig, TrainConfig
from rwkv_jax.data.chat.rows import (
    ChatRows,
    PackedRows,
    StreamedRows,
    evaluation_rows,
    pack,
    packed_rows,
    streamed_rows,
)
from rwkv_jax.data.chat.samples import Sample, Samples
from rwkv_jax.data.chat.source import chat_rows, held_out_rows, prepare_chats
from rwkv_jax.data.tokens.rows import Rows

END, T, B = 0, 16, 4
LENGTHS = [5, 16, 3, 9, 7, 7, 2, 12, 4, 4, 11]


def made(lengths: list[int]) -> Samples:
    """Samples whose tokens tell which one they are of: 100 i + 1, 100 i + 2, ... The later half of each counts."""
    samples = []
    for index, length in enumerate(lengths):
        tokens = np.array([END, *(100 * index + place for place in range(1, length))], np.int32)
        mask = np.arange(length) >= length // 2
        samples.append(Sample(tokens, np.append(tokens[1:], END).astype(np.int32), mask))
    return Samples.of(samples, [f"chats.jsonl: line {index}" for index in range(len(lengths))])


SAMPLES = made(LENGTHS)
SHAPE = {"batch_size": B, "sequence_length": T, "end_of_text": END}


def texts(rows: Rows) -> list[tuple[list[int], list[int], list[float]]]:
    """The texts in rows that begin with END and hold more than that: tokens, targets, mask."""
    assert rows.mask is not None
    assert rows.targets is not None
    found = []
    for tokens, targets, mask in zip(rows.tokens[:, :-1], rows.targets, rows.mask, strict=True):
        for part in np.split(np.arange(T), np.flatnonzero(tokens == END))[1:]:
            if len(part) > 1:
                found.append((tokens[part].tolist(), targets[part].tolist(), mask[part].tolist()))
            else:
                assert not mask[part].any()
    return found


def expected(index: int) -> tuple[list[int], list[int], list[float]]:
    sample = SAMPLES[index]
    return sample.tokens.tolist(), sample.targets.tolist(), sample.mask.astype(float).tolist()


def test_packing_leaves_out_nothing_and_little_room() -> None:
    rows = pack(LENGTHS, T, range(len(LENGTHS)))
    assert sorted(item for row in rows for item in row) == list(range(len(LENGTHS)))
    assert all(sum(LENGTHS[item] for item in row) <= T for row in rows)
    assert len(rows) == -(-sum(LENGTHS) // T)  # as few as can be, here
    draws = np.random.default_rng(0)
    lengths = draws.integers(1, 65, 2000).tolist()
    assert len(pack(lengths, 64, draws.permutation(2000).tolist())) <= 1.02 * sum(lengths) / 64


@pytest.mark.parametrize("apart", [False, True])
def test_an_epoch_has_every_sample_once_and_whole(apart: bool) -> None:
    rows = packed_rows(SAMPLES, apart=apart, seed=3, **SHAPE)
    an_epoch = len(rows.packed)
    assert an_epoch == (len(LENGTHS) if apart else 5)
    found = [text for step in range(an_epoch) for text in texts(rows.read(step))]  # B epochs of rows
    wanted = [expected(index) for index in range(len(LENGTHS))]
    assert sorted(found) == sorted(wanted * B)
    if apart:
        assert all(len(texts(rows.read(step, slice(row, row + 1)))) == 1 for step in range(3) for row in range(B))


def test_the_order_is_one_of_the_seed_and_another_in_each_epoch() -> None:
    rows, same = (packed_rows(SAMPLES, apart=True, seed=3, **SHAPE) for _ in range(2))
    first = [rows.row_locations(step) for step in range(11)]
    assert first == [same.row_locations(step) for step in range(11)]
    epochs = np.array(first).reshape(4, 11)
    assert all(sorted(epoch) == sorted(SAMPLES.places) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 4
    assert first[0] != packed_rows(SAMPLES, apart=True, seed=4, **SHAPE).row_locations(0)


def streams(**fields: Any) -> StreamedRows:
    return streamed_rows(SAMPLES, seed=3, **SHAPE | fields)


@pytest.mark.parametrize("rows", [packed_rows(SAMPLES, apart=False, seed=3, **SHAPE), streams()])
def test_any_part_of_any_step_is_read_alone(rows: ChatRows) -> None:
    """As processes read them, and a run that goes on."""
    for step in (7, 0, 123456):
        whole = rows.read(step)
        part = rows.read(step, slice(1, 3))
        assert all(np.array_equal(x, y) for x, y in zip(whole.select(slice(1, 3)), part, strict=True))  # type: ignore
        assert rows.row_locations(step)[1:3] == rows.row_locations(step, slice(1, 3))


def test_streams_go_on_from_step_to_step_and_begin_anew() -> None:
    rows = streams()
    lengths = np.diff(rows.stream_starts)
    assert lengths.sum() == sum(LENGTHS)
    assert lengths.max() - lengths.min() <= max(LENGTHS)
    steps = int(np.lcm.reduce(lengths)) // int(np.gcd.reduce(lengths))
    for stream, length in enumerate(lengths.tolist()):
        read = [rows.read(step, slice(stream, stream + 1)) for step in range(3 * length // T + 1)]
        tokens = np.concatenate([part.tokens[0, :-1] for part in read])
        assert tokens[0] == END
        assert np.array_equal(tokens[:length], tokens[length : 2 * length])
    assert steps  # the streams' ends do not meet for long
    members = Counter(token // 100 for token in rows.samples.tokens.tolist() if token != END)
    assert members == Counter({index: length - 1 for index, length in enumerate(LENGTHS)})


def test_streams_need_a_chat_each() -> None:
    with pytest.raises(ConfigError, match=r"training.batch_size = 12: .* and there are 11"):
        streams(batch_size=12)


@pytest.mark.parametrize("layout", ["packed", "apart", "windows"])
def test_an_evaluation_predicts_what_counts_once(layout: Any) -> None:
    batches = list(evaluation_rows(SAMPLES, layout=layout, **SHAPE))
    assert all(batch.tokens.shape == (B, T + 1) for batch in batches)
    targets = [int(x) for b in batches for x in b.targets[b.mask > 0]]  # type: ignore[index]
    assert Counter(targets) == Counter(SAMPLES.targets[SAMPLES.mask].tolist())
    some = list(evaluation_rows(SAMPLES, layout=layout, num_batches=1, **SHAPE))
    assert np.array_equal(some[0].tokens, batches[0].tokens)
    if layout != "windows":
        assert sorted(text for batch in batches for text in texts(batch)) == sorted(map(expected, range(len(LENGTHS))))


def test_windows_of_which_nothing_counts_are_left_out() -> None:
    samples = dataclasses.replace(SAMPLES, mask=np.arange(len(SAMPLES.tokens)) < 5)
    (batch,) = evaluation_rows(samples, layout="windows", **SHAPE)
    assert batch.mask is not None
    assert batch.mask.sum() == 5
    assert batch.tokens[1:].sum() == 0


def write_chats(path: Path, answers: list[str]) -> str:
    lines = [{"instruction": f"What is {i}?", "output": answer} for i, answer in enumerate(answers)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def run_of(path: Path, length: int = 64, *, carry: bool = False, **data: Any) -> TrainConfig:
    answers = ["b" * (10 + i) for i in range(20)] + ["long " * 20]
    fields: dict[str, Any] = {
        "source": write_chats(path / "chats.jsonl", answers),
        "chat": "auto",
        "tokenizer": "bytes",
    }
    return TrainConfig(
        model=ModelConfig(vocab_size=257),
        data=DataConfig(**fields | data),
        training=StepConfig(batch_size=4, sequence_length=length, carry_state=carry),
    )


def test_long_chats_are_refused_or_counted(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'refuse': 1 of 21 .*_length = 64 .*chats.jsonl: line 21, 130; raise"):
        prepare_chats(run_of(tmp_path), lambda line: None)
    lines: list[str] = []
    dropped = prepare_chats(run_of(tmp_path, chat_too_long="drop"), lines.append)
    assert (dropped.counts.too_long, dropped.counts.dropped, dropped.counts.truncated) == (1, 1, 0)
    assert dropped.counts.training + dropped.counts.held_out == 20
    assert "longer than training.sequence_length = 64: 1 of 21 chats; 1 left out, 0 cut" in "\n".join(lines)
    cut = prepare_chats(run_of(tmp_path, chat_too_long="truncate", held_out=0.0), lines.append)
    assert (cut.counts.truncated, cut.counts.cut_tokens, cut.training.lengths.max()) == (1, 130 - 64, 64)
    assert "1 cut at their end, which lost 66 tokens" in lines[-2]
    longest = cut.training[20]
    assert longest.targets[-1] != cut.tokenizer.end_of_text  # what was cut has no end
    assert cut.held_out is None
    # Too long for anything of the reply to be left.
    none = prepare_chats(run_of(tmp_path, 40, chat_too_long="truncate"), lines.append)
    assert none.counts.dropped == 0
    with pytest.raises(ConfigError, match=r"none of 21 chats fits into training\.sequence_length = 20"):
        prepare_chats(run_of(tmp_path, 20, chat_too_long="truncate"), lines.append)
    whole = prepare_chats(run_of(tmp_path, carry=True), lines.append)
    assert whole.counts.too_long == 0
    assert isinstance(chat_rows(whole, run_of(tmp_path, carry=True)), StreamedRows)


def test_held_out_chats_are_a_share_that_stays_and_copies_are_on_one_side(tmp_path: Path) -> None:
    config = run_of(tmp_path, 200, held_out=0.3)
    corpus = prepare_chats(config, lambda line: None)
    assert corpus.held_out is not None
    assert not set(corpus.training.places) & set(corpus.held_out.places)
    assert len(corpus.training) + len(corpus.held_out) == 21
    source = Path(config.data.source)
    source.write_text(source.read_text() * 2)
    twice = prepare_chats(config, lambda line: None)
    assert twice.held_out is not None
    assert len(twice.held_out) == 2 * len(corpus.held_out)
    (rows, *_) = held_out_rows(corpus, config, None)
    assert rows.tokens.shape == (4, 201)


def test_the_fingerprint_knows_the_chats_and_what_becomes_of_them(tmp_path: Path) -> None:
    def fingerprint(**data: Any) -> str:
        return prepare_chats(run_of(tmp_path, 200, **data), lambda line: None).fingerprint

    assert fingerprint() == fingerprint()
    others: list[dict[str, Any]] = [
        {"chat_format": "raven"},
        {"chat_loss": "all"},
        {"chat_rows": "apart"},
        {"chat_too_long": "drop"},
        {"held_out": 0.3},
    ]
    assert len({fingerprint(), *(fingerprint(**other) for other in others)}) == 6


def test_packed_rows_say_how_full_they_are() -> None:
    rows = packed_rows(SAMPLES, apart=False, seed=0, **SHAPE)
    assert isinstance(rows, PackedRows)
    assert rows.describe(10) == "8.00 epochs of 11 chats in 5 rows, 100.0% full"
    assert streams().describe(10) == "8.00 epochs of 11 chats, 80 tokens"
