"""The command lines: the config of train.py and the `rwkv` command, their help and their errors."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache

from rwkv_jax import cli, from_pretrained
from rwkv_jax.config import ConfigError, DataConfig, ModelConfig, TrainConfig
from rwkv_jax.data.corpus import prepare_corpus
from rwkv_jax.data.tokenizers import load_tokenizer
from rwkv_jax.inference.generate import Generator
from rwkv_jax.inference.sampling import Sampling
from rwkv_jax.training import checkpoints as ckpt
from rwkv_jax.training.step import make_trainer
from rwkv_jax.weights.pretrained import convert
from rwkv_jax.weights.torch_file import write_torch_file
from tests.golden import GOLDEN_DIR, load_golden
from tests.weights.files import random_tensors

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module", autouse=True)
def compiled_programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keeps compiled programs on disk: every `rwkv generate` would compile the same one again, for seconds."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.getbasetemp() / "programs"),  # for all modules
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that messages are not broken into lines."""
    monkeypatch.setenv("COLUMNS", "400")


def fields_of(kind: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every field of a config and of the configs in it, as (flag without dashes, type)."""
    types = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(types[field.name]):
            yield from fields_of(typing.cast(type, types[field.name]), f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", types[field.name]


FIELDS = dict(fields_of(TrainConfig))


def fail(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What `train.py` says about arguments that it does not take."""
    with pytest.raises(SystemExit) as exit_:
        cli.parse_train_config(arguments)
    assert exit_.value.code not in (0, None)
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed.err


class TestTrainHelp:
    @pytest.fixture(scope="module")
    @staticmethod
    def help_text() -> str:
        """Its words, without line breaks and frames; a much wider terminal would get two columns."""
        command, narrow = [sys.executable, "train.py", "--help"], os.environ | {"COLUMNS": "120"}
        done = subprocess.run(command, cwd=REPOSITORY, env=narrow, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        return " ".join(re.sub("[─-╿]", " ", done.stdout).split())

    def test_walk_finds_fields_of_every_kind(self) -> None:
        """What the tests below rely on."""
        assert {"run_dir", "model.width", "optimizer.clip_norm", "checkpoint.keep", "profile"} <= FIELDS.keys()
        assert len(FIELDS) > 40

    @pytest.mark.parametrize("name", FIELDS)
    def test_every_field_has_help_and_default(self, help_text: str, name: str) -> None:
        flag = "--" + name.replace("_", "-")
        # The flag, its negation if it has one, what it takes, and its help up to the default.
        found = re.search(rf" {re.escape(flag)}(?:, --\S+)?((?: (?!--)\S+)+?) \(default: ([^)]*)\)", help_text)
        assert found is not None
        assert len(found[1].split()) >= 3
        value: Any = TrainConfig()
        for part in name.split("."):
            value = getattr(value, part)
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        assert found[2].strip("'") == shown

    def test_defaults_are_those_of_the_config_file(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = write_config(tmp_path, "model=ModelConfig(width=192)")
        with pytest.raises(SystemExit) as exit_:
            cli.parse_train_config([str(path), "--help"])
        assert exit_.value.code == 0
        assert re.search(r"--model\.width[^\n]*\n[^\n]*\(default: 192\)", capsys.readouterr().out)


def write_config(folder: Path, arguments: str) -> Path:
    path = folder / "config.py"
    path.write_text(f"from rwkv_jax.config import *\n\ndef config():\n    return TrainConfig({arguments})\n")
    return path


class TestTrainConfig:
    def test_nothing_gives_the_defaults(self) -> None:
        assert cli.parse_train_config([]) == TrainConfig()

    def test_file_and_overrides(self, tmp_path: Path) -> None:
        path = write_config(tmp_path, "seed=3, model=ModelConfig(width=192, num_layers=5)")
        config = cli.parse_train_config([str(path), "--model.num-layers", "7", "--run-dir", "elsewhere"])
        assert (config.seed, config.model.width, config.model.num_layers) == (3, 192, 7)
        assert config.run_dir == "elsewhere"

    @pytest.mark.parametrize("flag", ["--model.num-layers", "--model.num_layers"])
    def test_hyphens_and_underscores(self, flag: str) -> None:
        assert cli.parse_train_config([flag, "9"]).model.num_layers == 9

    @pytest.mark.parametrize(
        ("arguments", "field", "value"),
        [
            (["--profile", "2", "3"], "profile", (2, 3)),
            (["--profile", "None"], "profile", None),
            (["--training.remat", "operator"], "training.remat", "operator"),
            (["--training.carry-state"], "training.carry_state", True),
            (["--training.no-reset-at-documents"], "training.reset_at_documents", False),
            (["--parallel.fsdp", "4"], "parallel.fsdp", 4),
            (["--parallel.data", "auto"], "parallel.data", "auto"),
            (["--training.loss-chunk", "64"], "training.loss_chunk", 64),
            (["--model.ffn-width", "None"], "model.ffn_width", None),
            (["--optimizer.learning-rate", "1e-3"], "optimizer.learning_rate", 1e-3),
            (["--optimizer.schedule", "wsd"], "optimizer.schedule", "wsd"),
            (["--logging.wandb", "project"], "logging.wandb", "project"),
            (["--evaluation.sample-prompts", "a", "b c"], "evaluation.sample_prompts", ("a", "b c")),
            (["--data.source", "-"], "data.source", "-"),
        ],
    )
    def test_values_of_every_type(self, arguments: list[str], field: str, value: object) -> None:
        config: Any = cli.parse_train_config(arguments)
        for part in field.split("."):
            config = getattr(config, part)
        assert config == value

    @pytest.mark.parametrize("arguments", [["--model.widht", "64"], ["--width", "64"], ["--lr=1"]])
    def test_unknown_field_is_named(self, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        assert arguments[0].split("=")[0] in fail(arguments, capsys)

    @pytest.mark.parametrize(
        "arguments",
        [
            ["--model.width", "wide"],
            ["--model.width", "1.5"],
            ["--optimizer.learning-rate", "fast"],
            ["--model.dtype", "float16"],
            ["--training.remat", "maybe"],
            ["--profile", "3"],
            ["--data.source"],
        ],
    )
    def test_ill_typed_value_is_named(self, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        message = fail(arguments, capsys)
        assert arguments[-1] in message
        assert arguments[0] in message or "Unrecognized" in message

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--model.width", "100"], "model.width = 100: must be a multiple of model.head_dim = 64; the nearest are"),
            (["--model.num-layers", "1"], "model.num_layers = 1: RWKV needs at least 2 layers"),
            (["--training.accumulation-steps", "3"], "training.batch_size = 8: must be a multiple of"),
            (["--training.num-steps", "5"], "optimizer.warmup_steps = 10: must be less than training.num_steps = 5"),
            (["--optimizer.final-learning-rate", "1"], "optimizer.final_learning_rate = 1.0: must not exceed"),
            (["--data.held-out", "1.5"], "data.held_out = 1.5"),
            (["--profile", "3", "2"], "profile = (3, 2): must be FIRST LAST"),
            (["--seed", "-1"], "seed = -1: must fit in 32 bits"),
            (["--run-dir", ""], "run_dir = '': name a folder"),
        ],
    )
    @pytest.mark.parametrize("with_file", [False, True])
    def test_contradictions_are_told_in_our_words(
        self,
        arguments: list[str],
        message: str,
        with_file: bool,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        file = [str(write_config(tmp_path, "seed=1"))] if with_file else []
        assert message in fail([*file, *arguments], capsys)

    def test_process_fails_without_a_traceback(self) -> None:
        command = [sys.executable, "train.py", "--model.width", "100"]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
        assert done.returncode != 0
        assert "model.width = 100" in done.stderr
        assert "Traceback" not in done.stderr + done.stdout


class TestConfigFile:
    def test_missing(self) -> None:
        with pytest.raises(ConfigError, match=r"'configs/nothing\.py': no such config file; configs/ holds"):
            cli.parse_train_config(["configs/nothing.py", "--seed", "1"])

    @pytest.mark.parametrize("source", ["", "config = 3", "def config():\n    return {'seed': 1}\n"])
    def test_without_a_config(self, tmp_path: Path, source: str) -> None:
        (tmp_path / "c.py").write_text(source)
        with pytest.raises(ConfigError, match=r"c\.py': must define config\(\) -> TrainConfig"):
            cli.parse_train_config([str(tmp_path / "c.py")])

    def test_contradiction_inside(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"model\.width = 100"):
            cli.parse_train_config([str(write_config(tmp_path, "model=ModelConfig(width=100)"))])


CONFIG = TrainConfig(model=ModelConfig(vocab_size=300, num_layers=2, width=32, head_dim=16))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints, the best and the newest, of different random parameters."""
    folder = tmp_path_factory.mktemp("generate")
    source = folder / "source.py"
    source.write_text("".join(f"def f{i}(x):\n    return x * {i} + {i * i}\n\n" for i in range(200)))
    data = DataConfig(source=str(source), cache_dir=str(folder / "cache"))
    corpus = prepare_corpus(data, 300, lambda line: None)
    run_dir = folder / "run"
    ckpt.prepare_run_dir(run_dir)
    ckpt.write_run(run_dir, dataclasses.replace(CONFIG, data=data), {}, corpus)
    init = jax.jit(make_trainer(CONFIG).init)
    with ckpt.Checkpoints(run_dir, 2, print) as checkpoints:
        checkpoints.save_best(init(jax.random.key(1)), 4, 2.0)
        checkpoints.save(init(jax.random.key(2)), 8)
    return run_dir


class TestGenerate:
    @pytest.fixture
    def generate(
        self, run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> typing.Callable[..., str]:
        """What `rwkv generate SOURCE ...` prints."""

        def generate(*arguments: str, folder: Path = run_dir) -> str:
            monkeypatch.setattr(sys, "argv", ["rwkv", "generate", str(folder), *arguments])
            cli.main()
            printed = capsys.readouterr()
            assert printed.err == ""
            return printed.out

        return generate

    @pytest.mark.parametrize("prompt", ["", "def f1(x):", "x" * 40, "é日本"])
    def test_prints_the_prompt_and_what_the_model_makes_of_it(
        self, generate: typing.Callable[..., str], run_dir: Path, prompt: str
    ) -> None:
        loaded = ckpt.load_model(run_dir, "newest")
        generator = Generator(loaded.graphdef, loaded.config.model, ckpt.load_run_tokenizer(run_dir))
        text = generator.generate(loaded.params, prompt, 20, Sampling(0.8, 0.9), seed=5)
        assert text
        assert generate("--prompt", prompt, "--tokens", "20", "--seed", "5") == prompt + text + "\n"

    def test_settings_and_checkpoint(self, generate: typing.Callable[..., str]) -> None:
        short = ("--prompt", "def", "--tokens", "20")
        newest, again, other = (generate(*short, "--seed", seed) for seed in ("0", "0", "1"))
        assert newest == again != other
        greedy = generate(*short, "--temperature", "0")
        assert greedy == generate(*short, "--temperature", "0", "--seed", "9") != newest
        assert greedy == generate(*short, "--top-k", "1", "--temperature", "2")
        assert generate(*short, "--temperature", "0", "--checkpoint", "best") != greedy

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--tokens", "0"], "tokens = 0: must be at least 1"),
            (["--temperature", "-1"], "temperature = -1.0"),
            (["--temperature", "nan"], "temperature = nan"),
            (["--top-p", "0"], "top_p = 0.0"),
            (["--top-p", "1.5"], "top_p = 1.5"),
            (["--top-k", "-3"], "top_k = -3"),
            (["--seed", "-1"], "seed = -1"),
            (["--seed", str(2**64)], f"seed = {2**64}"),
            (["--prompt", "caf\udce9"], r"prompt = 'caf\udce9': is not UTF-8"),
        ],
    )
    def test_values_that_cannot_work_are_named(
        self, generate: typing.Callable[..., str], arguments: list[str], message: str
    ) -> None:
        with pytest.raises(SystemExit) as exit_:
            generate(*arguments)
        assert str(exit_.value.code).startswith(f"rwkv: {message}")

    def test_folders_that_are_no_run_or_have_no_checkpoint(
        self, generate: typing.Callable[..., str], run_dir: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(SystemExit) as exit_:
            generate(folder=tmp_path / "nothing")
        assert "nothing: no such file or folder, and no name on the Hugging Face hub" in str(exit_.value.code)
        for name in ("run.json", "tokenizer.model"):
            (tmp_path / name).write_bytes((run_dir / name).read_bytes())
        with pytest.raises(SystemExit) as exit_:
            generate(folder=tmp_path)
        assert "holds no checkpoint yet; train the run first" in str(exit_.value.code)

    def test_unknown_checkpoint_is_named(
        self, generate: typing.Callable[..., str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as exit_:
            generate("--checkpoint", "worst")
        assert exit_.value.code not in (0, None)
        assert "worst" in capsys.readouterr().err

    @pytest.mark.parametrize("name", ["4v0-660K", "5v2-730K", "6v0-1m"])
    def test_official_weights_of_other_generations(self, generate: typing.Callable[..., str], name: str) -> None:
        load_golden(f"tiny/{name}.golden.npz")  # skips where they are absent
        weights = GOLDEN_DIR / "tiny" / f"{name}.pth"
        short = ("--tokenizer", "bytes", "--prompt", '"in', "--tokens", "20", "--temperature", "0")
        assert (
            generate(*short, folder=weights)
            == {
                "4v0-660K": '"ins the the the the th\n',
                "5v2-730K": '"in the stress and the \n',
                "6v0-1m": '"in\n',  # it has learned that a zero byte, here the end of the text, follows each byte
            }[name]
        )

    @pytest.mark.parametrize("generation", ["4", "5.2", "6", "7"])
    def test_a_world_model_of_each_generation(
        self, generate: typing.Callable[..., str], tmp_path: Path, generation: typing.Any
    ) -> None:
        config = ModelConfig(generation=generation, vocab_size=65536, num_layers=2, width=32, head_dim=16)
        write_torch_file(tmp_path / "world.pth", random_tensors(config, "bfloat16"))
        short = ("--tokenizer", "world", "--prompt", "The Eiffel tower", "--tokens", "4", "--temperature", "0")
        printed = generate(*short, folder=tmp_path / "world.pth")
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

    def test_official_weights_with_the_tokenizer_beside_them(
        self, generate: typing.Callable[..., str], run_dir: Path, tmp_path: Path
    ) -> None:
        convert(run_dir, tmp_path / "weights")
        short = ("--prompt", "def", "--tokens", "20", "--seed", "3")
        assert generate(*short, folder=tmp_path / "weights") == generate(*short)
        assert generate(*short, folder=tmp_path / "weights" / "model.safetensors") == generate(*short)
        assert generate(*short, "--dtype", "bfloat16", folder=tmp_path / "weights").startswith("def")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], r"weights\.pth: no tokenizer lies beside it; name one with --tokenizer .*this one has 300\)"),
            (["--tokenizer", "world"], "'world': does not match, it has 65536 entries and the model has .* 300"),
            (["--tokenizer", "nowhere.model"], r"nowhere\.model"),
            (["--checkpoint", "best"], r"checkpoint = 'best': .*weights\.pth is no run"),
        ],
        ids=str,
    )
    def test_what_does_not_go_with_weights_is_named(
        self,
        generate: typing.Callable[..., str],
        run_dir: Path,
        tmp_path: Path,
        arguments: list[str],
        message: str,
    ) -> None:
        convert(run_dir, tmp_path / "weights.pth")
        with pytest.raises(SystemExit, match=message):
            generate(*arguments, folder=tmp_path / "weights.pth")

    def test_a_run_has_its_own_tokenizer(self, generate: typing.Callable[..., str]) -> None:
        with pytest.raises(
            SystemExit, match="a run has its own tokenizer and dtype; leave --tokenizer and --dtype out"
        ):
            generate("--tokenizer", "bytes")


class TestConvert:
    @pytest.fixture
    def rwkv(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> typing.Callable[..., str]:
        """What `rwkv convert ...` prints."""

        def rwkv(*arguments: object) -> str:
            monkeypatch.setattr(sys, "argv", ["rwkv", "convert", *map(str, arguments)])
            cli.main()
            return capsys.readouterr().out

        return rwkv

    def test_a_run_becomes_official_weights_and_says_so(
        self, rwkv: typing.Callable[..., str], run_dir: Path, tmp_path: Path
    ) -> None:
        printed = rwkv(run_dir, tmp_path / "a", "--layout", "flash-linear-attention")
        assert printed.startswith(f"{tmp_path / 'a'}: RWKV-7 2 x 32, ")
        assert printed.endswith("vocabulary 300, flash-linear-attention names\n")
        assert {"config.json", "model.safetensors", "tokenizer.model"} == {p.name for p in (tmp_path / "a").iterdir()}
        rwkv(tmp_path / "a", tmp_path / "b.pth", "--dtype", "bfloat16")
        newest = ckpt.load_model(run_dir, "newest")
        ours = from_pretrained(tmp_path / "b.pth", dtype="float32")
        expected = jax.tree.map(lambda x: x.astype("bfloat16").astype("float32"), newest.params)
        jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(ours, nnx.Param)), expected)

    def test_what_cannot_be_done_is_said(self, rwkv: typing.Callable[..., str], run_dir: Path, tmp_path: Path) -> None:
        (tmp_path / "there").mkdir()
        for arguments, message in (
            ((run_dir, tmp_path / "there"), "there: exists already and is not overwritten"),
            ((tmp_path / "nowhere.pth", tmp_path / "a"), r"nowhere\.pth: no such file or folder"),
            ((run_dir, tmp_path / "a", "--layout", "transformers"), "RWKV-7"),
        ):
            with pytest.raises(SystemExit, match=message):
                rwkv(*arguments)
        assert [path.name for path in tmp_path.iterdir()] == ["there"]
