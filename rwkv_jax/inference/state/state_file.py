"""State files: one safetensors file per text, loaded only with the same model and tokenizer.

    blocks.3.att_shift, blocks.3.ffn_shift, blocks.3.wkv    state of layer 3, as in `rwkv_jax.models.state`
    blocks.3.wkv.numerator, .denominator, .max_exponent     RWKV-4's three instead of wkv
    blocks.3.keys, .values, .position                       a Transformer's cache
    blocks.3.shift, blocks.3.wkv                            time mixing in the place of its attention
    logits                                                  of the next token

The metadata are format and version, generation, digests of parameters and tokenizer, the number of tokens, the version
of this library, and checksums of tensors and metadata. Nothing is rounded, so a text continues elsewhere as it would
have here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.typing import NDArray
from safetensors import safe_open

from rwkv_jax.data.tokenizers import Tokenizer
from rwkv_jax.file_kinds import describe_wrong_file
from rwkv_jax.inference.state.snapshot import Snapshot, StateError
from rwkv_jax.models import LanguageModel
from rwkv_jax.models.stacks import FIRST, is_stack, stacked_layers
from rwkv_jax.weights.official import fields_in_metadata
from rwkv_jax.weights.safetensors import (
    parse_safetensors,
    read_safetensors,
    safetensors_bytes,
    write_safetensors,
)
from rwkv_jax.weights.tensors import UnsafeFileError, checksum_of

FORMAT = "rwkv-jax state"
VERSION = "2"
"""Format version (2: with checksums); other versions are rejected."""

_CHECKSUMS = "checksums"
_LOGITS = "logits"
_LAYERS = "blocks"  # for tensors in a file as for parameters in a model
_WKV4_PARTS = ("numerator", "denominator", "max_exponent")
_LISTED = 20  # mismatched tensors listed in an error
_REMEDIES = {
    "generation": "load a model of the file's generation",
    "model": "load the very parameters that it was made with, in the same dtype and quantization",
    "tokenizer": "take the tokenizer that it was made with",
    "adapter": "choose the adapter that it was made with, or none where it is empty",
}
_REMEDY = "a file that a session was saved to"
_DAMAGED = "get another copy of the file, or go back to an earlier state"


@dataclasses.dataclass(frozen=True)
class Identity:
    """The model and tokenizer that a state belongs to."""

    generation: str
    """Of the model's config."""
    model: str
    """Hex digest of all parameters (`parameters_digest`)."""
    tokenizer: str
    """Fingerprint of the tokenizer."""
    state: Any
    """Shape and dtype (`jax.ShapeDtypeStruct`) of each array of a `Snapshot.state`."""
    logits: jax.ShapeDtypeStruct
    """Shape and dtype of `Snapshot.logits`."""
    capacity: int | None = None
    """Maximum tokens in a state; None for no limit."""
    adapter: str = ""
    """Hex digest of the adapter that the text was read with; empty for the model alone."""


def model_identity(model: LanguageModel, tokenizer: Tokenizer) -> Identity:
    """The identity of a model's states; the same with stacked and unstacked layers, on any devices.

    Reads every parameter once, which takes some seconds per gigabyte: compute it on first use and cache it.
    Raises StateError if parts of a parameter are on other hosts.
    """
    config = model.config
    layers = jax.eval_shape(lambda: model.initial_layer_states(config, 1))
    return Identity(
        generation=config.spec.name,
        model=parameters_digest(nnx.to_pure_dict(nnx.state(model, nnx.Param)), tuple(fields_in_metadata(config))),
        tokenizer=tokenizer.fingerprint,
        state=jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), layers),
        logits=jax.ShapeDtypeStruct((config.vocab_size,), jnp.dtype(config.parameter_dtype)),
        capacity=config.sizes().context_length or None,
    )


def parameters_digest(params: Any, fields: tuple[str, ...] = ()) -> str:
    """SHA-256 in hex over the official names, shapes, dtypes and bytes of all parameters.

    It does not depend on devices or on whether layers are stacked. Packed matrices are hashed as packed: quantized or
    in another dtype, a model computes other numbers and counts as another one.

    Args:
      params: nested dict of a model's parameters, layers stacked or not; leaves may be trees of arrays.
      fields: names of what is set in the model's config and changes its numbers without changing its parameters.

    Raises:
      StateError: parts of a parameter are on other hosts.
    """
    lines = [f"{name}\n" for name in fields]
    for name, array in _parameters_by_name(params):
        content = hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).hexdigest()
        lines.append(f"{name} {list(array.shape)} {array.dtype.name} {content}\n")
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def _parameters_by_name(params: Any) -> Iterator[tuple[str, NDArray]]:
    """Layer by layer under official names, one fetched at a time."""
    for path, leaf in jax.tree.leaves_with_path(params):
        folder, *rest = (jax.tree_util.keystr((entry,), simple=True) for entry in path)
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            raise StateError(
                f"{'.'.join([folder, *rest])}: parts of it are on other hosts; gather the parameters first"
            )
        if folder == FIRST:
            yield ".".join([_LAYERS, "0", *rest]), _fetched(leaf)
        elif not is_stack(folder):
            yield ".".join([folder, *rest]), _fetched(leaf)
        elif rest[0].isdecimal():
            yield ".".join([_LAYERS, str(int(rest[0]) + 1), *rest[1:]]), _fetched(leaf)
        else:
            for i, layer in enumerate(stacked_layers(folder, leaf.shape[0] + 1)):
                yield ".".join([_LAYERS, str(layer), *rest]), np.asarray(leaf[i])


def _fetched(leaf: Any) -> NDArray:
    # JAX caches fetched values in the array for good; those of a copy are freed with it.
    return np.asarray(jnp.copy(leaf) if isinstance(leaf, jax.Array) else leaf)


def save_snapshot(path: str | os.PathLike[str], snapshot: Snapshot, identity: Identity) -> None:
    """Writes a state to a new file atomically.

    Raises:
      StateError: the state does not fit the model, has values that are not finite, or a cache with another
        number of tokens.
      WeightsError: the file exists already, or cannot be written there.
    """
    path = Path(path).expanduser()
    write_safetensors(path, *_content(path, snapshot, identity))


def encode_snapshot(snapshot: Snapshot, identity: Identity) -> bytes:
    """The bytes of the file that `save_snapshot` writes; raises StateError as it does."""
    return safetensors_bytes("state", *_content("state", snapshot, identity))


def _content(source: Path | str, snapshot: Snapshot, identity: Identity) -> tuple[dict[str, NDArray], dict[str, str]]:
    """The checked tensors and metadata of a file."""
    tensors = {name: np.asarray(x) for name, x in _by_name(snapshot.state, snapshot.logits).items()}
    _check_tensors(source, tensors, identity)
    _check_finite(source, tensors)
    _check_positions(source, tensors, identity, snapshot.num_tokens)
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "producer": _producer(),
        "generation": identity.generation,
        "model": identity.model,
        "tokenizer": identity.tokenizer,
        "num_tokens": str(snapshot.num_tokens),
    } | ({"adapter": identity.adapter} if identity.adapter else {})
    return tensors, metadata | {_CHECKSUMS: checksums(tensors, metadata)}


def checksums(tensors: Mapping[str, NDArray], metadata: Mapping[str, str]) -> str:
    """CRC-32 of each tensor's bytes by its name, and of the metadata, as JSON.

    Detects damage, not forgery.
    """
    found = {name: checksum_of(x) for name, x in tensors.items()}
    ours = json.dumps({name: x for name, x in metadata.items() if name != _CHECKSUMS}, sort_keys=True)
    return json.dumps(found | {"metadata": zlib.crc32(ours.encode())}, sort_keys=True)


def load_snapshot(path: str | os.PathLike[str], identity: Identity) -> Snapshot:
    """Loads a state written by `save_snapshot` onto the default device; the file is not used afterwards.

    Raises:
      StateError: the file is missing, not a state or of another version; it belongs to another model, generation or
        tokenizer (each difference is listed with the remedy); tensors are missing, unexpected, of another shape or
        dtype, damaged or not finite; or a cache has another number of tokens.
      UnsafeFileError: the file is truncated, or contains anything but plain tensors.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        kind = describe_wrong_file(path, _REMEDY)  # a web address
        raise StateError(f"{path}: {kind or f'there is no such file; name {_REMEDY}'}")
    try:
        found = read_safetensors(path)
    except UnsafeFileError as error:
        if kind := describe_wrong_file(path, _REMEDY, ("safetensors",)):
            raise UnsafeFileError(f"{path}: {kind}") from error
        raise
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata() or {}
    return _snapshot(path, found, metadata, identity)


def decode_snapshot(content: bytes, identity: Identity, *, name: str = "state") -> Snapshot:
    """As `load_snapshot`, from the bytes of a file, which messages call by the name."""
    found, metadata = parse_safetensors(content, name)
    return _snapshot(name, found, metadata, identity)


def _snapshot(
    source: Path | str, found: Mapping[str, NDArray], metadata: Mapping[str, str], identity: Identity
) -> Snapshot:
    num_tokens = _check_metadata(source, metadata, identity)
    _check_tensors(source, found, identity)
    _check_checksums(source, found, metadata)
    _check_finite(source, found)
    _check_positions(source, found, identity, num_tokens)
    # Copies by NumPy: the file may change, and JAX may alias host arrays.
    leaves = [jax.device_put(np.array(found[name])) for name in _by_name(identity.state, identity.logits)]
    *state, logits = leaves
    return Snapshot(jax.tree.structure(identity.state).unflatten(state), logits, num_tokens)


def _by_name(state: Any, logits: Any) -> dict[str, Any]:
    """All arrays of a snapshot by their names in a file: the tree's leaves in order, then the logits."""
    named = {}
    for path, leaf in jax.tree.leaves_with_path(state):
        *names, last = (jax.tree_util.keystr((entry,), simple=True) for entry in path)
        if names[-1:] == ["wkv"] and last.isdecimal():
            last = _WKV4_PARTS[int(last)]
        named[".".join([_LAYERS, *names, last])] = leaf
    return named | {_LOGITS: logits}


def _check_metadata(source: Path | str, metadata: Mapping[str, str], identity: Identity) -> int:
    """The number of tokens, from metadata checked against an identity."""
    if metadata.get("format") != FORMAT:
        raise StateError(
            f"{source}: is not the state of a text (its format is {_quoted(metadata, 'format')}, not {FORMAT!r}); "
            f"name {_REMEDY}"
        )
    if metadata.get("version") != VERSION:
        raise StateError(
            f"{source}: is of version {_quoted(metadata, 'version')}, written by {_quoted(metadata, 'producer')}, "
            f"where version {VERSION!r} is read; use the rwkv-jax that wrote it, or one that is as new"
        )
    if _recorded(metadata).get("metadata") != json.loads(checksums({}, metadata))["metadata"]:
        raise StateError(f"{source}: is damaged, its metadata differ from their checksum; {_DAMAGED}")
    differences = [
        f"{name}: {_quoted(metadata, name)} in the file, {getattr(identity, name)!r} here; {remedy}"
        for name, remedy in _REMEDIES.items()
        if metadata.get(name, "" if name == "adapter" else None) != getattr(identity, name)
    ]
    if differences:
        first = f"{source}: this state does not belong to the model and tokenizer here:"
        raise StateError("\n  ".join([first, *differences]))
    count = metadata.get("num_tokens", "")
    if not (count.isascii() and count.isdecimal() and len(count) < 19 and int(count) > 0):
        shown = _quoted(metadata, "num_tokens")
        raise StateError(f"{source}: num_tokens = {shown} is no number of tokens; save the state again")
    return int(count)


def _quoted(metadata: Mapping[str, str], name: str) -> str:
    return repr(metadata.get(name))[:80]  # a hostile file may have made it arbitrarily long


def _check_tensors(source: Path | str, found: Mapping[str, NDArray], identity: Identity) -> None:
    expected = _by_name(identity.state, identity.logits)
    lines = [f"missing      {name} {_described(spec)}" for name, spec in expected.items() if name not in found]
    lines += [f"not expected {name} {_described(x)}" for name, x in found.items() if name not in expected]
    lines += [
        f"different    {name} is {_described(found[name])}, must be {_described(spec)}"
        for name, spec in expected.items()
        if name in found and (found[name].shape, found[name].dtype) != (spec.shape, spec.dtype)
    ]
    if lines:
        more = [f"and {len(lines) - _LISTED} more"] if len(lines) > _LISTED else []
        first = f"{source}: these are not the tensors of a state of this model; take one that it made:"
        raise StateError("\n  ".join([first, *(line[:200] for line in lines[:_LISTED]), *more]))


def _check_finite(source: Path | str, tensors: Mapping[str, NDArray]) -> None:
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise StateError(
                f"{source}: the tensor {name!r} holds numbers that are not finite, after which a model says nothing; "
                "go back to an earlier state"
            )


def _check_checksums(source: Path | str, tensors: Mapping[str, NDArray], metadata: Mapping[str, str]) -> None:
    recorded, found = _recorded(metadata), json.loads(checksums(tensors, metadata))
    for name in tensors:
        if found[name] != recorded.get(name):
            raise StateError(f"{source}: the tensor {name!r} is damaged, it differs from its checksum; {_DAMAGED}")


def _recorded(metadata: Mapping[str, str]) -> dict[str, Any]:
    """A file's checksums; empty if they are damaged."""
    try:
        recorded = json.loads(metadata.get(_CHECKSUMS, ""))
    except (ValueError, RecursionError):
        return {}
    return recorded if isinstance(recorded, dict) else {}


def _check_positions(source: Path | str, tensors: Mapping[str, NDArray], identity: Identity, num_tokens: int) -> None:
    """Rejects a cache with another number of tokens, which would continue at the wrong position."""
    if identity.capacity is not None and num_tokens > identity.capacity:
        raise StateError(
            f"{source}: num_tokens = {num_tokens}: a state of this model holds {identity.capacity}; go back to an "
            "earlier state"
        )
    for name in _by_name(identity.state, identity.logits):
        if name.endswith(".position") and int(tensors[name]) != num_tokens:
            raise StateError(
                f"{source}: the tensor {name!r} is {int(tensors[name])} after num_tokens = {num_tokens}, and must be "
                "the same; go back to an earlier state"
            )


def _described(tensor: Any) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"


def _producer() -> str:
    try:
        return f"rwkv-jax {importlib.metadata.version('rwkv-jax')}"
    except importlib.metadata.PackageNotFoundError:  # run from a clone without installation
        return "rwkv-jax"
