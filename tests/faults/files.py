"""Twelve kinds of file, made small, broken by seeded faults and read again: what comes of each."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import tokenizers

from rwkv_jax.config import ConfigError, ModelConfig, TrainConfig, from_dict, to_dict
from rwkv_jax.data.corpus import corpus_of_binidx
from rwkv_jax.data.tokenizers import ByteTokenizer, load_tokenizer, save_tokenizer, train_sentencepiece
from rwkv_jax.data.tokens.binidx import BinidxWriter, open_binidx
from rwkv_jax.inference.state.snapshot import Snapshot
from rwkv_jax.inference.state.state_file import load_snapshot, save_snapshot
from rwkv_jax.run_folder import identity, read_run_file, write_run
from rwkv_jax.weights.official import check_tensors, read_config
from rwkv_jax.weights.pretrained import from_pretrained, save_pretrained
from rwkv_jax.weights.pth.file import write_torch_file
from rwkv_jax.weights.safetensors import write_safetensors
from rwkv_jax.weights.sources import find_weights, open_weights, prefix_errors
from tests.faults.mutations import JSON, SAFETENSORS, Mutation, mutated
from tests.inference.small_identities import SEVEN, identity_of
from tests.weights.files import CONFIGS, random_tensors
from tests.weights.forged_ggml import ggmf_model, gguf_model
from tests.weights.rwkv7_folders import SEVEN as HUB_SEVEN
from tests.weights.rwkv7_folders import foreign, write_folder, zeros

_TEXT = "".join(f"def function_{i}(value):\n    return value + {i}  # café 日本\n\n" for i in range(200))
_SAMPLES = (_TEXT[:500], "a  b\r\n\t x日本語\0 e\u0301 <|endoftext|>")


class Kind(NamedTuple):
    """A kind of file."""

    write: Callable[[Path], list[Path]]
    """Writes files of it into a folder; faults go into each in turn."""
    read: Callable[[Path], Any]
    """Everything that is used of such a file, to be compared."""
    own: dict[str, Mutation] | None = None
    """Faults of its format."""
    has_digest: bool = True
    """Whether every change is found; of the others docs/weights.md says so."""


class Outcome(NamedTuple):
    """What came of one fault."""

    fault: str
    result: Literal["unchanged", "named", "silent", "traceback"]
    """It changed nothing; it was refused by name; other numbers were read; something else was raised."""
    message: str = ""


def outcomes(kind: str, count: int, seed: int) -> Iterator[Outcome]:
    """Puts seeded faults into files of a kind, a name in `KINDS`, and reads each."""
    write, read, own, _ = KINDS[kind]
    with tempfile.TemporaryDirectory() as folder:
        paths = write(Path(folder))
        whole = [(path, path.read_bytes(), read(path)) for path in paths]
        faults = [mutated(content, count, seed + i, own) for i, (_, content, _) in enumerate(whole)]
        for number in range(count):
            path, content, expected = whole[number % len(whole)]
            fault, broken = next(faults[number % len(whole)])
            path.unlink()  # what is mapped must not change
            path.write_bytes(broken)
            yield _outcome(fault, path, read, expected)
            path.unlink()
            path.write_bytes(content)


def _outcome(fault: str, path: Path, read: Callable[[Path], Any], expected: Any) -> Outcome:
    try:
        found = read(path)
    except ConfigError as error:
        message = str(error)
        try:
            message.encode()  # or it cannot be printed
        except UnicodeEncodeError:
            return Outcome(fault, "traceback", ascii(message))
        return Outcome(fault, "named", message)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # also what panics in Rust
        return Outcome(fault, "traceback", f"{type(error).__name__}: {error}"[:300])
    return Outcome(fault, "unchanged" if found == expected else "silent")


# Tokenizers


def _write_tokenizer_json(folder: Path) -> list[Path]:
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator([_TEXT], trainer)
    made.add_tokens(["    ", "  "])
    (folder / "tokenizer.json").write_text(made.to_str(), encoding="utf-8")
    return [folder / "tokenizer.json"]


def _write_sentencepiece(folder: Path) -> list[Path]:
    train_sentencepiece([_TEXT], 320, folder / "tokenizer.model")
    return [folder / "tokenizer.model"]


def _read_tokenizer(vocab_size: int) -> Callable[[Path], Any]:
    def read(path: Path) -> Any:
        tokenizer = load_tokenizer(path, vocab_size)
        table = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
        return table, tokenizer.end_of_text, [tokenizer.encode(text) for text in _SAMPLES]

    return read


# Runs


def _write_run(folder: Path) -> list[Path]:
    tokenizer = ByteTokenizer()
    config = TrainConfig()
    write_run(folder, config, identity(config, "corpus", tokenizer.fingerprint), tokenizer)
    return [folder / "run.json"]


def _read_run(path: Path) -> Any:
    content = read_run_file(path.parent)
    return to_dict(from_dict(content["config"])), content["identity"]


# Weights


def _write_pth(folder: Path) -> list[Path]:
    write_torch_file(folder / "model.pth", random_tensors(CONFIGS["7"], "bfloat16"))
    return [folder / "model.pth"]


def _write_official(folder: Path) -> list[Path]:
    write_safetensors(folder / "model.safetensors", random_tensors(CONFIGS["7"]))
    return [folder / "model.safetensors"]


def _write_hub_folder(folder: Path) -> list[Path]:
    write_folder(folder, foreign(random_tensors(HUB_SEVEN) | zeros()), max_shard_bytes=20_000)
    return [folder / "config.json", folder / "model.safetensors.index.json"]


def _write_ggml(suffix: str, model: Callable[[ModelConfig], Any]) -> Callable[[Path], list[Path]]:
    def write(folder: Path) -> list[Path]:
        path = (folder / "model").with_suffix(suffix)
        path.write_bytes(model(CONFIGS["7"]).bytes())
        return [path]

    return write


def _write_packed(folder: Path) -> list[Path]:
    _write_official(folder)
    paths = [folder / "int8.safetensors", folder / "int4.safetensors"]
    for path in paths:
        save_pretrained(from_pretrained(folder / "model.safetensors", quantize=path.stem), path)  # pyright: ignore[reportArgumentType]
    return paths


def _read_weights(path: Path) -> Any:
    tensors = open_weights(path).tensors
    with prefix_errors(path):
        config = read_config(tensors)
        check_tensors(tensors, config)
        return dataclasses.asdict(config), {name: _content(tensors[name]) for name in tensors}


def _read_folder(path: Path) -> Any:
    return _read_weights(find_weights(path.parent))


def _content(array: Any) -> tuple[str, tuple[int, ...], bytes]:
    values = np.asarray(array)
    return values.dtype.name, values.shape, values.tobytes()


# States


def _write_state(folder: Path) -> list[Path]:
    own, rng = identity_of(SEVEN), np.random.default_rng(0)
    state, logits = jax.tree.map(
        lambda x: rng.standard_normal(x.shape).astype(x.dtype), (own.state, own.logits), is_leaf=None
    )
    save_snapshot(folder / "state", Snapshot(state, logits, 7), own)
    return [folder / "state"]


def _read_state(path: Path) -> Any:
    found = load_snapshot(path, identity_of(SEVEN))
    return found.num_tokens, [_content(x) for x in jax.tree.leaves((found.state, found.logits))]


# Tokens


def _write_tokens(folder: Path) -> list[Path]:
    rng = np.random.default_rng(0)
    with BinidxWriter(folder / "tokens", 257) as writer:
        for size in rng.integers(1, 40, 60):
            writer.write([*rng.integers(0, 256, size).tolist(), 256])
            writer.end_document()
    return [folder / "tokens.idx", folder / "tokens.bin"]


def _read_tokens(path: Path) -> Any:
    opened = open_binidx(path.with_suffix(".bin"), path.with_suffix(".idx"))
    corpus = corpus_of_binidx(opened, ByteTokenizer(), 0.2)
    assert corpus.held_out is not None
    sides = [(side.tokens.tolist(), side.num_bytes, side.num_documents) for side in (corpus.train, corpus.held_out)]
    return sides, corpus.held_out_bytes()


KINDS: dict[str, Kind] = {
    "tokenizer.json": Kind(_write_tokenizer_json, _read_tokenizer(302), JSON, has_digest=False),
    "sentencepiece": Kind(_write_sentencepiece, _read_tokenizer(320), has_digest=False),
    "tokenizer.kind.json": Kind(
        lambda folder: [save_tokenizer(ByteTokenizer(), folder)],
        _read_tokenizer(257),
        JSON,
    ),
    "run.json": Kind(_write_run, _read_run, JSON),
    ".pth": Kind(_write_pth, _read_weights, has_digest=False),
    ".safetensors": Kind(_write_official, _read_weights, SAFETENSORS, has_digest=False),
    ".gguf": Kind(_write_ggml(".gguf", gguf_model), _read_weights, has_digest=False),
    "ggmf": Kind(_write_ggml(".bin", ggmf_model), _read_weights, has_digest=False),
    "config.json and index": Kind(_write_hub_folder, _read_folder, JSON),
    "packed weights": Kind(_write_packed, _read_weights, SAFETENSORS),
    "state": Kind(_write_state, _read_state, SAFETENSORS),
    "tokens": Kind(_write_tokens, _read_tokens),
}
