"""`rwkv generate`: what it prints for runs and weights, its flags, and what is wrong with some."""

from __future__ import annotations

import gc
import json
import re
import shutil
import weakref
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from rwkv_jax import from_pretrained, run_folder
from rwkv_jax.cli.flags import WeightsFlags
from rwkv_jax.config import ModelConfig
from rwkv_jax.data.tokenizers import load_tokenizer
from rwkv_jax.inference.engine.engine import Engine, EngineOptions
from rwkv_jax.inference.sampling.params import SamplingParams
from rwkv_jax.weights.pretrained import convert
from rwkv_jax.weights.pth.file import write_torch_file
from tests.cli.commands import Command
from tests.golden import tiny_model
from tests.weights.files import random_tensors


@pytest.fixture(scope="module")
def engine(run_dir: Path) -> Engine:
    """What the command should run."""
    loaded = run_folder.load_model(run_dir, "newest")
    model = nnx.merge(loaded.graphdef, loaded.params)
    return Engine(model, run_folder.load_run_tokenizer(run_dir), EngineOptions(num_slots=4, batch_sizes=(1, 4)))


@pytest.mark.parametrize("prompt", ["", "def f1(x):", "x" * 40, "é日本"])
def test_prints_the_prompt_and_what_the_model_makes_of_it(
    rwkv: Command, engine: Engine, run_dir: Path, prompt: str
) -> None:
    ids = engine.encode(prompt, begins=True) if prompt else [engine.tokenizer.end_of_text]
    text = engine.generate(ids, max_tokens=20, sampling=SamplingParams(0.8, 0.9), seed=5).text
    assert text
    printed = rwkv("generate", run_dir, "--prompt", prompt, "--tokens", 20, "--seed", 5)
    assert printed == (prompt + text + "\n", "")


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_the_stacked_model_is_not_kept(
    rwkv: Command, run_dir: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    loaded: list[weakref.ref[Any]] = []
    load, stream = WeightsFlags._load_from, Engine.stream

    def noted(flags: WeightsFlags, place: Path) -> Any:
        model, tokenizer = load(flags, place)
        assert model.is_stacked
        loaded.append(weakref.ref(jax.tree.leaves(nnx.state(model.blocks, nnx.Param))[0]))
        return model, tokenizer

    def checked(engine: Engine, *arguments: Any, **options: Any) -> Any:
        gc.collect()
        assert [kept() for kept in loaded] == [None]
        return stream(engine, *arguments, **options)

    monkeypatch.setattr(WeightsFlags, "_load_from", noted)
    monkeypatch.setattr(Engine, "stream", checked)
    rwkv(command, run_dir, "--tokens", 1, stdin="hello\n")
    assert len(loaded) == 1


def test_settings_and_checkpoint(rwkv: Command, run_dir: Path) -> None:
    def generate(*arguments: object) -> str:
        return rwkv("generate", run_dir, "--prompt", "def", "--tokens", 20, *arguments).out

    assert generate("--seed", 0) != generate("--seed", 1)
    greedy = generate("--temperature", 0)
    assert greedy == generate("--top-k", 1, "--temperature", 2, "--preset", "openai")
    assert generate("--temperature", 0, "--checkpoint", "best") != greedy


def test_prompts_from_a_file_and_from_standard_input(rwkv: Command, run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("def\n    é", encoding="utf-8")
    short = ("generate", run_dir, "--tokens", 5)
    expected = rwkv(*short, "--prompt", "def\n    é")
    assert rwkv(*short, "--prompt-file", tmp_path / "prompt.txt") == expected
    assert rwkv(*short, "--prompt", "-", stdin="def\n    é") == expected


def test_stop_strings(rwkv: Command, run_dir: Path) -> None:
    short = ("generate", run_dir, "--prompt", "def", "--tokens", 20, "--temperature", 0)
    whole = rwkv(*short).out
    stop = whole[8:10]
    assert rwkv(*short, "--stop", "never", stop).out == whole[: whole.index(stop, 3)] + "\n"


def test_several_texts(rwkv: Command, engine: Engine, run_dir: Path) -> None:
    short = ("generate", run_dir, "--prompt", "def", "--tokens", 6, "--num", 2)
    texts = [text.text for text in engine.generate(["def"] * 2, max_tokens=6, sampling=SamplingParams(0.8, 0.9))]
    assert rwkv(*short).out == f"--- 1 of 2\ndef{texts[0]}\n--- 2 of 2\ndef{texts[1]}\n"
    best = engine.generate(["def"] * 2, best_of=2, max_tokens=6, sampling=SamplingParams(0.8, 0.9))
    printed = rwkv(*short, "--best-of", 2, "--json", "--logprobs")
    records = [json.loads(line) for line in printed.out.splitlines()]
    for record, expected in zip(records, best, strict=True):
        assert (record["prompt"], record["text"], record["ids"]) == ("def", expected.text, list(expected.ids))
        assert record["logprobs"] == pytest.approx(expected.logprobs, abs=1e-5)
        assert (record["num_prompt_tokens"], record["num_tokens"]) == (expected.num_prompt_tokens, len(expected.ids))
        assert (record["finish_reason"], record["stop"]) == (expected.finish_reason, expected.stop)
    assert [record["index"] for record in records] == [0, 1]


def test_says_how_fast_it_was_if_it_is_to(rwkv: Command, run_dir: Path) -> None:
    printed = rwkv("generate", run_dir, "--tokens", 20, "--verbose")
    assert "20 tokens, " in printed.err
    assert " tokens/s; the first took " in printed.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "0"], "--tokens 0: must be at least 1"),
        (["--num", "0"], "--num 0: must be at least 1"),
        (["--best-of", "0"], "--best-of 0: must be at least 1"),
        (["--temperature", "-1"], "--temperature -1.0"),
        (["--temperature", "nan"], "--temperature nan"),
        (["--top-p", "-1"], "--top-p -1.0"),
        (["--top-p", "1.5"], "--top-p 1.5"),
        (["--top-k", "-3"], "--top-k -3"),
        (["--penalty-decay", "2"], "--penalty-decay 2.0"),
        (["--seed", "-1"], "--seed -1"),
        (["--seed", str(2**64)], f"--seed {2**64}"),
        (
            ["--seed", str(2**32 - 5), "--num", "2", "--best-of", "3"],
            f"--seed {2**32 - 5}: 6 texts take as many seeds from it on, which must all fit in 32 bits; give at most "
            f"{2**32 - 6}",
        ),
        (["--prompt", "caf\udce9"], r"--prompt 'caf\udce9': is not UTF-8; convert it"),
        (["--prompt", "a", "--prompt-file", "b"], "--prompt: is given, and --prompt-file too; leave one"),
        (["--prompt-file", "nowhere.txt"], "--prompt-file 'nowhere.txt': cannot be read (No such file"),
        (["--stop", "a", ""], "stop string 1 = ''"),
        (["--stop", "\udcff"], r"stop string 0 = '\udcff': is not UTF-8"),  # what a shell's $'\xff' arrives as
        (["--logprobs"], "--logprobs: are printed with --json only"),
    ],
    ids=str,
)
def test_values_that_cannot_work_are_named_before_weights_are_looked_for(
    rwkv: Command, arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as exit_:
        rwkv("generate", "nowhere", *arguments)
    assert str(exit_.value.code).startswith(f"rwkv: {message}")


def test_the_last_seed_is_one(rwkv: Command) -> None:
    with pytest.raises(SystemExit, match="nowhere: no such file or folder"):
        rwkv("generate", "nowhere", "--seed", 2**32 - 1)


def test_help_does_not_call_the_values_of_a_preset_none(
    rwkv: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as exit_:
        rwkv("generate", "--help")
    assert exit_.value.code == 0
    words = " ".join(re.sub("[─-╿]", " ", capsys.readouterr().out).split())
    sampled = words[words.index("--temperature FLOAT") : words.index("--penalize-prompt")]
    assert sampled.count("(default: the preset's)") == sampled.count(" --") + 1 == 9


def test_a_prompt_that_is_no_text(rwkv: Command, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_bytes(b"caf\xe9")
    with pytest.raises(SystemExit, match=r"prompt\.txt': is not UTF-8 .*; convert it"):
        rwkv("generate", "nowhere", "--prompt-file", tmp_path / "prompt.txt")


def test_folders_that_are_no_run_or_have_no_checkpoint(rwkv: Command, run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="nothing: no such file or folder, and no name on the Hugging Face hub"):
        rwkv("generate", tmp_path / "nothing")
    for name in ("run.json", "tokenizer.model"):
        shutil.copy(run_dir / name, tmp_path)
    with pytest.raises(SystemExit, match="holds no checkpoint yet; train the run first"):
        rwkv("generate", tmp_path)


def test_unknown_checkpoint_is_named(rwkv: Command, run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        rwkv("generate", run_dir, "--checkpoint", "worst")
    assert exit_.value.code not in (0, None)
    assert "worst" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("4v0-660K", '"ins the the the the th\n'),
        pytest.param("5v2-730K", '"in the stress and the \n', marks=pytest.mark.long),
        # It has learned that a zero byte, here the end of the text, follows each byte.
        pytest.param("6v0-1m", '"in\n', marks=pytest.mark.long),
    ],
)
def test_official_weights_of_other_generations(rwkv: Command, name: str, expected: str) -> None:
    short = ("--tokenizer", "bytes", "--prompt", '"in', "--tokens", 20, "--temperature", 0)
    assert rwkv("generate", tiny_model(f"{name}.pth"), *short).out == expected


@pytest.mark.parametrize(
    "generation", ["7", *(pytest.param(name, marks=pytest.mark.long) for name in ("4", "5.2", "6"))]
)
def test_a_world_model_of_each_generation(rwkv: Command, tmp_path: Path, generation: Any) -> None:
    config = ModelConfig(generation=generation, vocab_size=65536, num_layers=2, width=32, head_dim=16)
    write_torch_file(tmp_path / "world.pth", random_tensors(config, "bfloat16"))
    short = ("--tokenizer", "world", "--prompt", "The Eiffel tower", "--tokens", 4, "--temperature", 0)
    printed = rwkv("generate", tmp_path / "world.pth", *short).out
    # The likeliest token of the whole text so far, read in parallel each time.
    model, tokenizer = from_pretrained(tmp_path / "world.pth"), load_tokenizer("world", 65536)
    graphdef, params = nnx.split(model, nnx.Param)
    forward = jax.jit(lambda params, tokens: nnx.merge(graphdef, params)(tokens)[0])
    text = [0, *tokenizer.encode("The Eiffel tower")]
    for _ in range(4):
        padded = np.array([text + [0] * (16 - len(text))])
        named = np.asarray(forward(params, padded))[0, len(text) - 1, :65530]
        text.append(int(named.argmax()))
    assert printed == tokenizer.decode(text) + "\n"


def test_official_weights_with_the_tokenizer_beside_them(rwkv: Command, run_dir: Path, tmp_path: Path) -> None:
    convert(run_dir, tmp_path / "weights")
    short = ("--prompt", "def", "--tokens", 20, "--seed", 3)
    expected = rwkv("generate", run_dir, *short)
    assert rwkv("generate", tmp_path / "weights", *short) == expected
    assert rwkv("generate", tmp_path / "weights" / "model.safetensors", *short) == expected


@pytest.mark.long
def test_weights_in_fewer_bits(rwkv: Command, run_dir: Path, tmp_path: Path) -> None:
    convert(run_dir, tmp_path / "weights")
    short = ("--prompt", "def", "--tokens", 20, "--temperature", 0)
    assert rwkv("generate", tmp_path / "weights", *short, "--dtype", "bfloat16").out.startswith("def")
    for quantize in ("int8", "int4", "bfloat16"):
        packed = rwkv("generate", run_dir, *short, "--quantize", quantize)
        assert packed.out.startswith("def")
        assert packed == rwkv("generate", tmp_path / "weights", *short, "--quantize", quantize)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"weights\.pth: no tokenizer lies beside it; name one with --tokenizer .*this one has 300\)"),
        (["--tokenizer", "world"], "'world': does not match, it has 65536 entries and the model has .* 300"),
        (["--tokenizer", "nowhere.model"], r"nowhere\.model"),
        (["--checkpoint", "best"], r"--checkpoint 'best': .*weights\.pth is no run"),
    ],
    ids=str,
)
def test_what_does_not_go_with_weights_is_named(
    rwkv: Command, run_dir: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    convert(run_dir, tmp_path / "weights.pth")
    with pytest.raises(SystemExit, match=message):
        rwkv("generate", tmp_path / "weights.pth", *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokenizer", "bytes"], "a run has its own tokenizer and dtype; leave --tokenizer and --dtype out"),
        (["--quantize", "int8", "--checkpoint", "best"], "--quantize 'int8': packs a run's newest checkpoint"),
    ],
    ids=str,
)
def test_what_does_not_go_with_a_run_is_named(rwkv: Command, run_dir: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        rwkv("generate", run_dir, *arguments)
