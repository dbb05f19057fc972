"""`rwkv info`: what a file or folder is, and whether it is whole."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

if TYPE_CHECKING:
    from rwkv_jax.config import ModelConfig
    from rwkv_jax.weights.tensors import MappedTensors


@dataclasses.dataclass(frozen=True)
class Info:
    """Say what weights, a run, a session's state or token files are, and compare them with their checksums."""

    source: tyro.conf.Positional[str]
    """A file or folder of weights, a run folder, OWNER/NAME[/FILE] on the Hugging Face hub, a file of `Session.save`,
    or token files (.bin and .idx)."""

    def run(self) -> None:
        """Prints one line for each thing known; reads the whole file."""
        from rwkv_jax.data.tokens.binidx import find_binidx
        from rwkv_jax.weights.ggml.reading import is_ggml

        is_weights = self.source.endswith("pytorch_model.bin") or is_ggml(Path(self.source).expanduser())
        pair = None if is_weights else find_binidx(self.source)
        if pair is not None:
            lines = _of_tokens(*pair)
        elif (metadata := _state_metadata(Path(self.source).expanduser())) is not None:
            lines = _of_state(Path(self.source).expanduser(), metadata)
        else:
            lines = _of_weights(self.source)
        width = max(map(len, lines))
        for name, value in lines.items():
            print(f"{name:{width}}  {value}")


def _of_weights(source: str) -> dict[str, str]:
    from rwkv_jax.config import from_dict
    from rwkv_jax.run_folder import read_run_file
    from rwkv_jax.weights.official import check_tensors
    from rwkv_jax.weights.quantized import DequantizedTensors
    from rwkv_jax.weights.sources import find_weights, open_weights, prefix_errors

    path = find_weights(source)
    if path.is_dir():
        model = from_dict(read_run_file(path)["config"]).model
        return {"run": str(path), **_of_model(model)}
    weights = open_weights(path)
    with prefix_errors(path):
        model = weights.model_config()
        check_tensors(weights.tensors, model)
        weights.file.verify()
    packed = weights.tensors.quantization if isinstance(weights.tensors, DequantizedTensors) else None
    return {
        "weights": f"{path}, {weights.layout} names{f', matrices in {packed}' if packed else ''}",
        **_of_model(model),
        **_of_tensors(weights.file, verified=weights.file.has_checksums),
    }


def _of_model(model: ModelConfig) -> dict[str, str]:
    told = [
        name.replace("_", " ") + ("" if value is True else f" {value}")
        for name in model.spec.fields_beside_tensors
        if (value := getattr(model.resolved(), name))
    ]
    title = ", ".join([model.title, *told])
    return {
        "model": f"{title}, {model.num_layers} layers of width {model.width}, vocabulary {model.vocab_size}",
        "parameters": f"{model.num_parameters() / 1e6:.1f}M, computed in {model.dtype}",
    }


def _of_tensors(tensors: MappedTensors, *, verified: bool) -> dict[str, str]:
    dtypes = Counter(map(tensors.held_in, tensors))
    listed = ", ".join(f"{count} in {dtype}" for dtype, count in dtypes.most_common())
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    return {"tensors": f"{len(tensors)} ({listed}), {num_bytes / 1e6:.1f} MB", **_of_checksums(verified)}


def _of_checksums(verified: bool) -> dict[str, str]:
    return {"checksums": "all are right" if verified else "none in the file, so damage cannot be told"}


def _state_metadata(path: Path) -> dict[str, str] | None:
    """The metadata of a state file; None for any other."""
    from safetensors import SafetensorError, safe_open

    from rwkv_jax.inference.state.state_file import FORMAT

    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError):
        return None
    return metadata if metadata.get("format") == FORMAT else None


def _of_state(path: Path, metadata: Mapping[str, Any]) -> dict[str, str]:
    from rwkv_jax.weights.safetensors import read_safetensors
    from rwkv_jax.weights.sources import prefix_errors

    tensors = read_safetensors(path)
    with prefix_errors(path):
        tensors.verify()
    return {
        "state": f"{path}, by {metadata.get('producer')}",
        "model": f"RWKV-{metadata.get('generation')}, {metadata.get('model')}",
        "tokens": str(metadata.get("num_tokens")),
        **_of_tensors(tensors, verified=tensors.has_checksums),
    }


def _of_tokens(bin_path: Path, idx_path: Path) -> dict[str, str]:
    from rwkv_jax.data.tokens.binidx import fingerprint, open_binidx
    from rwkv_jax.data.tokens.digest_file import check_fingerprint, verify_whole

    opened = open_binidx(bin_path, idx_path)
    found = fingerprint(opened)
    check_fingerprint(opened, found)
    return {
        "tokens": f"{bin_path} and {idx_path.name}, {len(opened.tokens)} in {opened.tokens.dtype}",
        "documents": str(opened.num_documents),
        "fingerprint": found,
        **_of_checksums(verify_whole(opened)),
    }
