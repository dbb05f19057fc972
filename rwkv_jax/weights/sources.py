"""Finds weights (a file, a folder or a name on the Hugging Face hub) and opens them under official names."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from numpy.typing import NDArray

from rwkv_jax.config import ModelConfig
from rwkv_jax.file_kinds import RUN_FILE
from rwkv_jax.weights.fp8 import open_fp8
from rwkv_jax.weights.hub import fetch
from rwkv_jax.weights.hub_rwkv7 import HEAD, KEEPS_UNUSED, check_config
from rwkv_jax.weights.hub_rwkv7 import LAYOUT as HUGGINGFACE
from rwkv_jax.weights.hugging_face import CONFIG_FILE, read_hub_config
from rwkv_jax.weights.model_config import compute_dtype, read_config
from rwkv_jax.weights.pinned import check_hash, check_revision, require_hash
from rwkv_jax.weights.pth.file import TorchFile, read_torch_file
from rwkv_jax.weights.safetensors import read_safetensors
from rwkv_jax.weights.shards import are_one_set, is_numbered, read_numbered
from rwkv_jax.weights.tensors import (
    MappedTensors,
    WeightsError,
    describe_wrong_weights,
    join_names,
    prefix_errors,
)

_LOG = logging.getLogger(__name__)

# No part begins with a dot: ./NAME and ../NAME are paths.
_HUB_ID = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(?:/(?P<file>[\w./-]+\.(?:pth|safetensors|gguf|bin|json)))?")
_RUNS = "runs"  # `rwkv train`'s default folder for runs
_OF_FILES = (".bin", ".gguf", ".json", ".pt", ".pth", ".safetensors")  # suffixes that are not repository names
_IN_ORDER = (
    "model.safetensors.index.json",
    "model.safetensors",
    "*.safetensors",
    "*.pth",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "pytorch_model-*.bin",
    "*.gguf",
)
_OF_TRAINER = re.compile(r"rwkv-(?:(?P<epoch>[0-9]{1,9})|init|final)\.pth")  # of RWKV-LM, in its project folder
_TRAINER_LOG = "train_log.txt"
_CONFIG, _MAX_CONFIG_BYTES = CONFIG_FILE, 2**20  # of transformers and flash-linear-attention
_HUB_URL = re.compile(
    r"https?:/{1,2}(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<name>[\w.-]+/[\w.-]+)(?:/\w+/[^/]+(?P<file>/[^?#]+))?.*"
)


class Weights(NamedTuple):
    """An opened file of weights."""

    tensors: Mapping[str, NDArray]
    """Under official names, memory-mapped; `DequantizedTensors` for a file with packed ones."""
    layout: str
    """The file's layout, one of `layouts.LAYOUTS`; or gguf or ggmf."""
    drop_pages: Callable[[], None]
    """Drops the pages read so far from memory."""
    file: MappedTensors
    """As stored, with the file's checksums."""
    config: ModelConfig | None = None
    """What something beside the tensors says of the model: a run's, or a config.json; None if they tell it."""
    name: str = ""
    """The file's name, which may tell what no tensor does."""

    def model_config(self) -> ModelConfig:
        """The model's config; raises as `model_config.read_config`."""
        return self.config or read_config(self.tensors, self.file.metadata, self.name)


def find_weights(source: str | os.PathLike[str], *, revision: str | None = None, sha256: str | None = None) -> Path:
    """Finds the file of weights or run folder for a path or the name of a model on the hub.

    A folder stands for its model.safetensors.index.json, model.safetensors, its only .safetensors or .pth file, its
    pytorch_model.bin, in shards or not, or its only .gguf file; the project folder of the official trainer for its
    newest rwkv-N.pth. What is no path here but looks like OWNER/NAME or OWNER/NAME/FILE is fetched from the Hugging
    Face hub, or found in what was fetched before, unless OWNER is a folder here or `runs`, or NAME ends like a file's.

    Args:
      revision: branch, tag or commit of a model on the hub; None is its main branch.
      sha256: what `pinned.hash_of_weights` must be, in hex; compared before anything is opened. None is not asked.

    Raises:
      WeightsError: nothing is there, or more than one thing; the message says what was looked for. Or it has another
        SHA-256, or a path here is to have a revision.
    """
    if revision is not None:
        check_revision(revision)
    if sha256 is not None:
        check_hash(sha256)
    path = _find(source, revision)
    if sha256 is not None:
        require_hash(path, sha256)
    return path


def _find(source: str | os.PathLike[str], revision: str | None) -> Path:
    if not isinstance(source, str | os.PathLike):
        raise WeightsError(f"source = {source!r}: name a file, a folder or OWNER/NAME on the Hugging Face hub")
    if not os.fspath(source):
        raise WeightsError("no weights are named; name a file, a folder or OWNER/NAME on the Hugging Face hub")
    path = Path(source).expanduser()
    if revision is not None and path.exists():
        raise WeightsError(
            f"revision = {revision!r}: {path} is a file or folder here, and only models on the Hugging Face hub have "
            "revisions; leave it out"
        )
    if path.is_dir():
        if (path / RUN_FILE).is_file():
            return path
        return path / _choose([entry.name for entry in path.iterdir()], str(path))
    if path.exists():
        return path
    if url := _HUB_URL.fullmatch(os.fspath(source)):
        raise WeightsError(
            f"{source}: from the Hugging Face hub, name {url['name']}{url['file'] or ''}, without the rest"
        )
    if wrong := describe_wrong_weights(path, ()):
        raise WeightsError(f"{source}: {wrong}")
    match = _HUB_ID.fullmatch(os.fspath(source))
    if match is None:
        raise WeightsError(f"{path}: no such file or folder, and no name on the Hugging Face hub (OWNER/NAME)")
    owner, _, name = match["name"].partition("/")
    if owner == _RUNS:
        raise WeightsError(
            f"{path}: no such run folder; train the run first (rwkv train --run-dir {path}), or name one that is there"
        )
    if name.endswith(_OF_FILES) or Path(owner).is_dir():
        raise WeightsError(
            f"{path}: no such file or run folder; name one that is there, or OWNER/NAME on the Hugging Face hub from "
            "where no folder is called OWNER"
        )
    return fetch(match["name"], match["file"], path, revision, _choose)


def is_hub_name(name: str) -> bool:
    """Whether a text has the shape of OWNER/NAME, whatever is here."""
    match = _HUB_ID.fullmatch(name)
    return match is not None and match["file"] is None


def hub_name(source: str | os.PathLike[str]) -> str | None:
    """The OWNER/NAME that a source stands for on the hub; None for paths, also for those of what is not there."""
    match, path = _HUB_ID.fullmatch(os.fspath(source)), Path(source).expanduser()
    if match is None or path.exists():
        return None
    owner, _, name = match["name"].partition("/")
    return None if owner == _RUNS or name.endswith(_OF_FILES) or Path(owner).is_dir() else match["name"]


def _choose(names: Sequence[str], folder: str) -> str:
    """The file in a folder that contains its weights."""
    for pattern in _IN_ORDER:
        found = sorted(name for name in names if Path(name).match(pattern) and "/" not in name)
        if len(found) == 1 or are_one_set(found):
            return found[0]
        if found and (newest := _newest_of_trainer(found, names)):
            _LOG.warning("%s: holds %d files by the official trainer, of which %s is taken", folder, len(found), newest)
            return newest
        if found:
            raise WeightsError(
                f"{folder}: holds {len(found)} files of weights ({join_names(found, 12)}); name one of them"
            )
    raise WeightsError(f"{folder}: holds no weights; looked for {RUN_FILE} of a run, {', '.join(_IN_ORDER)}")


def weights_among(names: Iterable[str]) -> list[str]:
    """The names of a folder's files that may be weights."""
    return [name for name in names if "/" not in name and any(Path(name).match(pattern) for pattern in _IN_ORDER)]


def _newest_of_trainer(found: Sequence[str], beside: Sequence[str]) -> str | None:
    """The newest of the files that RWKV-LM has written while it trained: the final one, or that of the last epoch.

    None for other files, also for rwkv-4.pth, rwkv-7.pth and such, which may be models of these generations, unless the
    log of the trainer lies beside them.
    """
    matches = [_OF_TRAINER.fullmatch(name) for name in found]
    epochs = {int(match["epoch"]): match[0] for match in matches if match is not None and match["epoch"]}
    looks_like_generations = len(epochs) == len(found) and all(4 <= epoch <= 9 for epoch in epochs)
    if None in matches or (looks_like_generations and _TRAINER_LOG not in beside):
        return None
    return "rwkv-final.pth" if "rwkv-final.pth" in found else epochs[max(epochs)]


def open_weights(path: Path, *, warn: bool = True) -> Weights:
    """Opens a file of weights under official names; reads only names, shapes and dtypes.

    Args:
      warn: about removed prefixes and tied weights; False when opening a file again.

    Raises:
      WeightsError: the file has no weights, an unknown layout, or has been converted for the `rwkv` package; or the
        config.json beside it, as `read_hub_config` or, of the layout huggingface, `check_config`.
      UnsafeFileError: it contains anything but plain tensors.
    """
    # These load JAX, without which a file is found and its names are read.
    from rwkv_jax.weights.ggml.reading import open_ggml
    from rwkv_jax.weights.layout_rules import LLAMA
    from rwkv_jax.weights.layouts import from_layout
    from rwkv_jax.weights.quantized import open_packed

    if (opened := open_ggml(path)) is not None:
        return Weights(opened.tensors, opened.layout, opened.file.drop_pages, opened.file)
    tensors, values = read_tensors(path)
    with prefix_errors(path):
        packed, tied = open_packed(tensors), _is_tied(path.with_name(_CONFIG))
        if packed is not None and tied is None:
            tied = False  # we write packed files, and always with a head
        dequantized = packed or open_fp8(tensors)
        layout, official = from_layout(
            tensors if dequantized is None else dequantized,
            values,
            tied=tied,
            keep_unused=tensors.metadata.get(KEEPS_UNUSED) == "true",
            report=lambda found: _LOG.warning("%s: %s", path, found) if warn else None,
        )
    config = None
    if layout == HUGGINGFACE:
        check_config(path.with_name(_CONFIG), official, has_head=any(name.endswith(HEAD) for name in tensors))
    if layout == LLAMA:
        config = read_hub_config(path.with_name(_CONFIG), dtype=compute_dtype(official))
    return Weights(official, layout, tensors.drop_pages, tensors, config, path.name)


def read_tensors(path: Path) -> TorchFile:
    """Tensors of safetensors or of a file by torch as stored, or of all its shards, and what is beside them.

    Shards are those of an index, or those with numbers in their names of which the path is one.
    Raises as `read_safetensors` and `read_torch_file`, and `read_numbered`.
    """
    if is_numbered(path.name):
        values: dict[str, Any] = {}

        def read(shard: Path) -> MappedTensors:
            found = TorchFile(read_safetensors(shard), {}) if _is_safetensors(shard) else read_torch_file(shard)
            values.update(found.values)
            return found.tensors

        return TorchFile(read_numbered(path, read), values)
    return TorchFile(read_safetensors(path), {}) if _is_safetensors(path) else read_torch_file(path)


def verify_weights(source: str | os.PathLike[str]) -> bool:
    """Compares a file of weights with its checksums, which reads it once.

    Every `.pth` has some, and so do safetensors written here. (Packed weights are compared whenever they are loaded,
    and the checkpoints of a run, too.)

    Returns:
      Whether it has checksums; False for a run.

    Raises:
      WeightsError: the file is damaged, or as `open_weights`.
    """
    path = find_weights(source)
    if path.is_dir():
        return False
    file = open_weights(path, warn=False).file
    with prefix_errors(path):
        file.verify()
    return file.has_checksums


def _is_safetensors(path: Path) -> bool:
    """By content: an index is JSON, a file has JSON after the eight bytes that tell its length."""
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror}); name a file of weights") from error
    if path.name.endswith(".bin.index.json"):
        return False
    return start[:1] == b"{" or start[8:] == b"{" or path.name.endswith((".safetensors", ".json"))


def _is_tied(config: Path) -> bool | None:
    """Whether a config.json beside the weights says that the embedding is tied to the head; None if not stated."""
    try:
        with config.open("rb") as file:
            content = json.loads(file.read(_MAX_CONFIG_BYTES))
    except (OSError, ValueError, RecursionError):  # an invalid config.json is ignored
        return None
    tied = content.get("tie_word_embeddings") if isinstance(content, dict) else None
    return tied if isinstance(tied, bool) else None
