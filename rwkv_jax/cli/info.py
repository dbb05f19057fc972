"""`rwkv info`: what a file or folder is, and whether it is whole."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from rwkv_jax.cli.flags import PinFlags, Pinned

if TYPE_CHECKING:
    from rwkv_jax.config import ModelConfig
    from rwkv_jax.weights.tensors import MappedTensors


@dataclasses.dataclass(frozen=True)
class Info:
    """Say what weights, a run, a session's state or token files are, and whether they are whole."""

    source: tyro.conf.Positional[str]
    """A file or folder of weights, a run folder, OWNER/NAME[/FILE] on the Hugging Face hub, a file of `Session.save`,
    or token files (.bin and .idx)."""

    verify: bool = False
    """Compare weights with their checksums and hashes, which reads them whole. (States and token files always are.)"""

    hash: bool = False
    """Compute the SHA-256 of a file of weights, which reads it whole: what --sha256 takes."""

    numbers: bool = False
    """Look for NaN, infinity and rescaled layers in a file of weights, which reads it whole."""

    pinned: Pinned = dataclasses.field(default_factory=PinFlags)

    def run(self) -> None:
        """Prints one line for each thing known; of weights only names and shapes are read, unless asked for more."""
        is_pinned = self.pinned != PinFlags()
        source = str(self.pinned.find(self.source)) if is_pinned else self.source
        path = Path(source).expanduser()
        if self._is_plain(path) and self._print_summary(source):
            return
        from rwkv_jax.data.tokens.binidx import find_binidx
        from rwkv_jax.weights.ggml.reading import is_ggml
        from rwkv_jax.weights.shards import is_numbered

        is_weights = source.endswith("pytorch_model.bin") or is_numbered(path.name) or is_ggml(path)
        pair = None if is_weights else find_binidx(source)
        if pair is not None:
            lines = _of_tokens(*pair)
        elif (metadata := _state_metadata(path)) is not None:
            lines = _of_state(path, metadata)
        else:
            lines = self._of_weights(source)
        _print(lines)

    @staticmethod
    def _is_plain(path: Path) -> bool:
        """Whether it may be weights that are read without JAX, by its name."""
        from rwkv_jax.weights.shards import is_numbered

        plain = (".pth", ".safetensors", ".bin.index.json", ".safetensors.index.json", "pytorch_model.bin")
        return path.is_dir() or (path.is_file() and (path.name.endswith(plain) or is_numbered(path.name)))

    def _print_summary(self, source: str) -> bool:
        """Prints what is known of weights whose names are official, maybe behind a prefix; False for others."""
        from rwkv_jax.weights.sources import find_weights, prefix_errors
        from rwkv_jax.weights.summary import summarize, unusual, unusual_numbers

        path = find_weights(source)
        if path.is_dir() or (summary := summarize(path)) is None:
            return False
        if self.verify:
            with prefix_errors(path):
                summary.file.verify()
        odd = unusual(summary) + (unusual_numbers(summary.tensors, summary.file.drop_pages) if self.numbers else [])
        lines = {"weights": f"{path}, {summary.layout} names", **_of_model(summary.model)}
        lines |= _of_tensors(summary.file, verified=summary.file.has_checksums if self.verify else None)
        if not self.verify:
            lines["shapes"] = "not compared one by one, only how many numbers all have; --verify does"
        _print(lines | self._of_file(path, summary.model, summary.file) | {"unusual": "; ".join(odd) or "nothing"})
        if self.verify or not summary.is_regular:
            from rwkv_jax.weights.official import check_tensors

            with prefix_errors(path):
                check_tensors(summary.tensors, summary.model)
        return True

    def _of_file(self, path: Path, model: ModelConfig, file: MappedTensors) -> dict[str, str]:
        from rwkv_jax.weights.hub import origin_of
        from rwkv_jax.weights.pinned import hash_of_weights
        from rwkv_jax.weights.summary import guess_tokenizer, recorded_hash

        known = hash_of_weights(path) if self.hash else recorded_hash(path)
        lines = {"SHA-256": known or "none recorded; --hash computes it"}
        if file.content_sha256 is not None:
            lines["of tensors"] = f"{file.content_sha256}, {'compared' if self.verify else 'not compared'}"
        if (origin := origin_of(path)) is not None:
            lines["from"] = f"{origin.name} on the Hugging Face hub, commit {origin.commit}"
        return lines | {"tokenizer": guess_tokenizer(path, model.vocab_size)}

    def _of_weights(self, source: str) -> dict[str, str]:
        from rwkv_jax.config import from_dict
        from rwkv_jax.run_folder import read_run_file
        from rwkv_jax.weights.ggml.vocabulary import describe_tokenizer
        from rwkv_jax.weights.official import check_tensors
        from rwkv_jax.weights.quantized import DequantizedTensors
        from rwkv_jax.weights.sources import find_weights, open_weights, prefix_errors
        from rwkv_jax.weights.summary import unusual_numbers

        path = find_weights(source)
        if path.is_dir():
            model = from_dict(read_run_file(path)["config"]).model
            return {"run": str(path), **_of_model(model)}
        weights = open_weights(path)
        with prefix_errors(path):
            model = weights.model_config()
            check_tensors(weights.tensors, model)
            if self.verify:
                weights.file.verify()
        odd = [_TIED] if "head.weight" in weights.tensors and _has_no_head(weights.file) else []
        if self.numbers:
            odd = odd + unusual_numbers(weights.tensors, weights.drop_pages) or ["nothing"]
        inside = describe_tokenizer(path)
        packed = weights.tensors.quantization if isinstance(weights.tensors, DequantizedTensors) else None
        return {
            "weights": f"{path}, {weights.layout} names{f', matrices in {packed}' if packed else ''}",
            **_of_model(model),
            **_of_tensors(weights.file, verified=weights.file.has_checksums if self.verify else None),
            **self._of_file(path, model, weights.file),
            **({} if inside is None else {"tokenizer": inside}),
            **({"unusual": "; ".join(odd)} if odd else {}),
        }


_TIED = "tied: there is no head.weight, the embedding is taken"


def _has_no_head(names: Mapping[str, object]) -> bool:
    """Whether a file has no tensor of its own for the head, under any layout's name."""
    heads = ("head.weight", "head.weight.int8", "head.weight.int4")
    return "output.weight" not in names and not any(name.endswith(heads) for name in names)


def _print(lines: Mapping[str, str]) -> None:
    width = max(map(len, lines))
    for name, value in lines.items():
        print(f"{name:{width}}  {value}")


def _of_model(model: ModelConfig) -> dict[str, str]:
    from rwkv_jax.weights.summary import ranks

    told = [
        name.replace("_", " ") + ("" if value is True else f" {value}")
        for name in model.spec.fields_beside_tensors
        if (value := getattr(model.resolved(), name))
    ]
    title = ", ".join([model.title, *told])
    known = ranks(model)
    return {
        "model": f"{title}, {model.num_layers} layers of width {model.width}, vocabulary {model.vocab_size}",
        "parameters": f"{model.num_parameters() / 1e6:.1f}M, computed in {model.dtype}",
        **({"ranks": known} if known else {}),
    }


def _of_tensors(tensors: MappedTensors, *, verified: bool | None) -> dict[str, str]:
    """`verified` None means that checksums were not compared."""
    dtypes = Counter(map(tensors.held_in, tensors))
    listed = ", ".join(f"{count} in {dtype}" for dtype, count in dtypes.most_common())
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    there = "there, not compared; --verify does" if tensors.has_checksums else "none in the file"
    checksums = {"checksums": there} if verified is None else _of_checksums(verified)
    return {"tensors": f"{len(tensors)} ({listed}), {num_bytes / 1e6:.1f} MB", **checksums}


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
