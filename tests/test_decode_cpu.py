"""benchmarks/decode_cpu.py: what it refuses, what its ratios mean, and what it hands to peers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import decode_cpu
from decode_cpu import (
    DECODE,
    DECODE_8,
    PROMPT_512,
    PROMPT_2048,
    Measurement,
    Result,
    as_json,
    check,
    figures,
    main,
    report,
)
from peers_ours import Ours
from peers_protocol import WARM_UP_TOKENS, Peer, Request, answer, outputs
from rwkv_jax.bench.random_model import NumberTokenizer, RandomTensors, random_model
from rwkv_jax.config import ModelConfig
from rwkv_jax.inference.engine.engine import Engine, EngineOptions
from rwkv_jax.weights.ggml.gguf_file import read_gguf
from rwkv_jax.weights.pth.file import write_torch_file
from rwkv_jax.weights.sources import open_weights

VOCAB_SIZE = 11


class Counter(Peer):
    """Its logits are greatest at the token after the sum of all that it has read."""

    def __init__(self) -> None:
        super().__init__()
        self.sums = np.zeros(0, np.int64)
        self.batch_sizes: list[int] = []

    def begin(self, batch_size: int) -> None:
        self.sums = np.zeros(batch_size, np.int64)
        self.batch_sizes.append(batch_size)

    def read(self, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
        self.sums = self.sums + tokens.sum(axis=1)
        return np.eye(VOCAB_SIZE, dtype=np.float32)[(self.sums + 1) % VOCAB_SIZE]


def test_texts_are_written_with_the_likeliest_token_read_each_time() -> None:
    peer = Counter()
    peer.start(np.array([1, 3], np.int32))
    # 1 -> 2, 1 + 2 -> 4, 1 + 2 + 4 -> 8; and 3 -> 4, 3 + 4 -> 8, 3 + 4 + 8 = 15 -> 5.
    assert peer.write(2).tolist() == [[2, 4], [4, 8]]
    assert peer.write(1).tolist() == [[8], [5]]


def test_outputs_are_of_every_way_to_read() -> None:
    tokens = np.arange(1, 6, dtype=np.int32)
    found = outputs(Counter(), tokens, batch_size=3)
    assert found["prefill"].argmax() == (15 + 1) % VOCAB_SIZE
    assert found["decode"].argmax(axis=-1).tolist() == [(total + 1) % VOCAB_SIZE for total in (1, 3, 6, 10, 15)]
    assert found["batch"].shape == (3, VOCAB_SIZE)
    assert found["greedy"].shape == (3, 8)
    assert np.array_equal(found["greedy"], found["greedy_by_reading"])
    assert "batch" not in outputs(Counter(), tokens, batch_size=1)


def test_requests_begin_anew_each_time(tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", np.arange(1, 9, dtype=np.int32))
    peer, tokens = Counter(), str(tmp_path / "tokens.npy")
    assert answer(peer, Request("prefill", tokens, num_tokens=4))["seconds"] > 0
    assert peer.sums.tolist() == [10]
    answer(peer, Request("decode", tokens, batch_size=2, num_tokens=3))
    assert peer.batch_sizes == [1, 2]
    direct = Counter()
    direct.start(np.array([1, 2], np.int32))
    direct.write(WARM_UP_TOKENS + 3)
    assert np.array_equal(peer.sums, direct.sums)
    answer(peer, Request("check", tokens, num_tokens=4, output=str(tmp_path / "found.npz")))
    assert set(np.load(tmp_path / "found.npz").files) == {"prefill", "decode", "greedy", "greedy_by_reading"}
    with pytest.raises(ValueError, match="task = 'guess'"):
        answer(peer, Request("guess", tokens))


def reference() -> dict[str, NDArray]:
    logits = np.random.default_rng(0).standard_normal((5, 40)).astype(np.float32)
    greedy = np.arange(16).reshape(2, 8)
    return {"prefill": logits[-1], "decode": logits, "batch": logits[:2], "greedy": greedy, "greedy_by_reading": greedy}


def test_rows_that_are_the_same_model_pass() -> None:
    ours = reference()
    assert check(ours, ours, "float32") == (0, None)
    without_batches = {name: value for name, value in ours.items() if name != "batch"}
    assert check(without_batches, ours, "float32") == (0, None)
    rounded = ours | {"decode": ours["decode"] * 1.1}
    error, what = check(rounded, ours, "q8_0")
    assert what is None
    assert error == pytest.approx(0.1, rel=0.05)


@pytest.mark.parametrize(
    ("name", "change", "precision", "message"),
    [
        ("decode", lambda x: x + np.float32(2e-3), "float32", r"differ from ours by 2\.0e-03 \(decode\)"),
        ("batch", lambda x: x[::-1], "float32", r"\(batch\)"),
        ("prefill", lambda x: x * np.nan, "q4_0", r"mean nothing \(prefill\)"),
        ("decode", lambda x: np.roll(x, 1, axis=-1), "q4_0", "off ours"),
        ("greedy", lambda x: x + 1, "float32", "chooses other tokens"),
    ],
)
def test_rows_that_are_another_model_are_refused(
    name: str, change: Callable[[NDArray], NDArray], precision: str, message: str
) -> None:
    ours = reference()
    _, what = check(ours | {name: change(ours[name])}, ours, precision)
    assert what is not None
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(what)


def results() -> list[Result]:
    return [
        Result("ours", {DECODE: [40.0, 50.0, 20.0], DECODE_8: [160.0, 150.0, 80.0], PROMPT_2048: [800, 1000, 400]}),
        Result("llama", {DECODE: [44.0, 50.0, 21.0]}),
        Result("rwkv", {DECODE: [20.0, 25.0, 10.0]}, error="its logits differ from ours"),
    ]


def test_ratios_are_taken_within_each_round() -> None:
    lines = dict(line.split(" against ", 1) for line in figures(results()))
    # 1.1, 1 and 1.05, though the machine was half as fast in the last round.
    assert lines["decode, float32: our time"] == "llama.cpp's f32: 1.05 (at most 1.1: yes)"
    assert lines["decode, float32: tokens/s of 8 texts"] == "one: 4.00 (at least 3: yes)"
    assert lines["prompt of 2048: our tokens/s"] == "decoding: 20.00 (at least 10: yes)"
    assert len(lines) == 3  # nothing of a row that was refused, or not measured


def test_targets_that_are_missed_are_said() -> None:
    slow = [Result("ours", {DECODE: [10.0], DECODE_8: [29.0], PROMPT_512: [139.0], PROMPT_2048: [99.0]})]
    peers = [Result("llama", {DECODE: [11.2], PROMPT_512: [100.0]}), Result("ours_int8", {DECODE: [15.9]})]
    targets = [line.partition(" (")[2] for line in figures(slow + peers) if "(" in line]
    assert targets == [
        "at most 1.1: NO)",
        "at least 1.6: NO)",
        "at least 3: NO)",
        "at least 1.4: NO)",
        "at least 10: NO)",
    ]


def never_run(*arguments: object) -> list[Result]:
    raise AssertionError("measured before the command line was looked at")


def test_a_file_is_never_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "found.json"
    monkeypatch.setattr(decode_cpu, "run", lambda *arguments: results())
    assert main(["--json", str(path)]) == 1  # a row has failed
    assert capsys.readouterr().out.splitlines()[2].startswith("| | decode, batch 1, ms a token |")
    assert json.loads(path.read_text())["results"][0]["name"] == "ours"
    monkeypatch.setattr(decode_cpu, "run", never_run)
    before = path.read_text()
    with pytest.raises(SystemExit):
        main(["--json", str(path)])
    assert f"--json: {path} exists, and nothing is overwritten" in capsys.readouterr().err
    assert path.read_text() == before
    with pytest.raises(SystemExit):
        main(["--json", str(tmp_path / "nowhere" / "found.json")])
    assert "nowhere is no folder; make it" in capsys.readouterr().err


@pytest.mark.parametrize("peer", ["rwkv", "llama"])
def test_a_missing_interpreter_is_said(
    peer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(decode_cpu, "run", never_run)
    with pytest.raises(SystemExit):
        main([f"--{peer}-python", str(tmp_path / "python")])
    error = " ".join(capsys.readouterr().err.split())
    assert f"--{peer}-python: {tmp_path / 'python'} is no program that can be run; peers_{peer}.py says how" in error


def test_the_table_has_times_rates_and_what_failed() -> None:
    table = report(results(), [DECODE, PROMPT_2048], "a machine", ["llama.cpp, q4_0 (not installed)"]).splitlines()
    assert table[2].startswith("| | decode, batch 1, ms a token | prompt of 2048, tokens/s |")
    assert table[4].startswith("| this library, float32 | **25.0** (20.0 - 50.0) | **800** (400 - 1,000) | 0.0e+00 |")
    assert "failed: its logits differ from ours" in table[6]
    assert table[-1] == "Not measured: llama.cpp, q4_0 (not installed)"
    written = json.loads(as_json(results(), "a machine", []))
    assert written["results"][1]["tokens_per_second"] == {"decode, batch 1": [44.0, 50.0, 21.0]}


def test_tokens_of_a_repetition() -> None:
    assert (DECODE.tokens, DECODE_8.tokens, PROMPT_512.tokens) == (32, 256, 512)
    assert Measurement("decode", 3, 5).tokens == 15


CONFIG = ModelConfig(
    vocab_size=VOCAB_SIZE, num_layers=2, width=128, decay_rank=4, iclr_rank=5, value_rank=6, gate_rank=7
)


def test_llama_cpp_is_given_the_tensors_of_the_others(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="the extra gguf is not installed")
    write_torch_file(tmp_path / "weights.pth", RandomTensors(CONFIG))
    decode_cpu.write_for_llama(tmp_path / "weights.pth", CONFIG)
    found = read_gguf(tmp_path / "weights.gguf")
    assert {tensor.type.name for tensor in found.tensors.values()} == {"f32"}
    assert found.metadata["tokenizer.ggml.model"] == "none"
    again = open_weights(tmp_path / "weights.gguf").tensors
    for name, tensor in RandomTensors(CONFIG).items():
        np.testing.assert_array_equal(again[name], tensor)


@pytest.mark.long
def test_our_row_writes_what_it_reads() -> None:
    engine = Engine(random_model(CONFIG), NumberTokenizer(VOCAB_SIZE), EngineOptions(num_slots=2, prefix_bytes=0))
    peer = Ours(engine)
    found = outputs(peer, np.array([3, 1, 4, 1, 5], np.int32), batch_size=2)
    np.testing.assert_allclose(found["decode"][-1], found["prefill"], atol=1e-4)
    assert check(found, found, "float32") == (0, None)
    peer.start(np.array([3, 1], np.int32))
    first = peer.write(8)
    assert np.array_equal(first, found["greedy"])
    assert peer.write(16).shape == (2, 16)
