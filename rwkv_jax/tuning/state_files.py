"""Files of tuned states, which hold the arrays of `initial_state` layer by layer.

    blocks.3.att.time_state   [H, N, N], value axis before key axis, as in the official trainers' files
    blocks.3.att_shift        [C], and ffn_shift, only in ours, and only if they were trained or come from a prompt

The trainers of RWKV-5, 6 and 7 (RWKV-LM, RWKV-PEFT) save a .pth, others the same as safetensors, also named .state.
Theirs do not say of which model they are: only numbers of layers and heads can be compared. Ours, in safetensors, have
the base's digest in their metadata.
"""

from __future__ import annotations

import dataclasses
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from rwkv_jax.checks import ConfigError
from rwkv_jax.config import ModelConfig
from rwkv_jax.models.initial_state import MATRIX, SHIFTS, state_shapes
from rwkv_jax.weights.pth.file import read_torch_file, write_torch_file
from rwkv_jax.weights.safetensors import parse_safetensors, write_safetensors

BASE = "base"
"""Key of the metadata: the base's `weights_digest`."""
_FORMAT = {"format": "rwkv-jax tuned state", "version": "1"}
_MATRIX, _SHIFT = "blocks.{}.att.time_state", "blocks.{}.{}"
_LISTED = 20
_ZIP = b"PK\3\4"


class TunedStateError(ConfigError):
    """A tuned state that cannot be read, or does not fit the model; the message has the problem and the remedy."""


@dataclasses.dataclass(frozen=True, eq=False)
class TunedState:
    """What a file holds."""

    tensors: Mapping[str, NDArray]
    """By their names in the file, of any float dtype."""
    base_digest: str | None = None
    """`weights_digest` of the model that it was trained with; None if the file does not say."""

    def check_base(self, digest: Callable[[], str], name: str, *, allow_other_base: bool = False) -> None:
        """Raises TunedStateError if the state was trained with another base.

        Args:
          digest: computes the base's `weights_digest`; only called if the file says which it must be.
          name: of the file, for the message.
        """
        if self.base_digest is None or allow_other_base or (found := digest()) == self.base_digest:
            return
        raise TunedStateError(
            f"{name}: was trained with another base ({self.base_digest[:16]}...) than this model ({found[:16]}...); "
            "load that base in its own dtype, or say that this one will do (allow_other_base, --allow-other-base)"
        )

    def arrays(self, config: ModelConfig, name: str) -> Any:
        """A nested dict of NumPy arrays like `state_shapes`, with shifts if the file has them.

        Raises:
          TunedStateError: a model without matrix states; tensors are missing, not expected, of another shape or not
            finite.
        """
        has_shifts = any(re.fullmatch(r"blocks\.\d+\.(att|ffn)_shift", key) for key in self.tensors)
        try:
            shapes = state_shapes(config, shifts=has_shifts)
        except ConfigError as error:
            raise TunedStateError(f"{name}: has tuned states, which {config.spec.a_title} cannot begin from") from error
        names = {layer: _names(layer, shapes["first_block"]) for layer in range(config.num_layers)}
        expected = {key: shapes["first_block"][part] for layer in names.values() for part, key in layer.items()}
        _check(self.tensors, expected, name)
        first, *rest = (
            {part: np.asarray(self.tensors[key]).astype(expected[key].dtype) for part, key in layer.items()}
            for layer in names.values()
        )
        return {"first_block": first, "blocks": {part: np.stack([layer[part] for layer in rest]) for part in first}}


def _names(layer: int, parts: Any) -> dict[str, str]:
    """A layer's names in a file, by those of its arrays."""
    return {part: _MATRIX.format(layer) if part == MATRIX else _SHIFT.format(layer, part) for part in parts}


def _check(tensors: Mapping[str, NDArray], expected: Mapping[str, jax.ShapeDtypeStruct], name: str) -> None:
    lines = [f"missing      {key} {list(like.shape)}" for key, like in expected.items() if key not in tensors]
    lines += [f"not expected {key} {list(x.shape)}" for key, x in tensors.items() if key not in expected]
    lines += [
        f"different    {key} is {tensors[key].dtype} {list(tensors[key].shape)}, must be of floats {list(like.shape)}"
        for key, like in expected.items()
        if key in tensors and not _is_like(tensors[key], like)
    ]
    if lines:
        more = [f"and {len(lines) - _LISTED} more"] if len(lines) > _LISTED else []
        first = f"{name}: these are not the tuned states of this model; take those that were trained with it:"
        raise TunedStateError("\n  ".join([first, *(line[:200] for line in lines[:_LISTED]), *more]))
    for key in expected:
        if not np.isfinite(np.asarray(tensors[key], np.float32)).all():
            raise TunedStateError(f"{name}: the tensor {key!r} holds numbers that are not finite; get another file")


def _is_like(tensor: NDArray, like: Any) -> bool:
    return tensor.shape == like.shape and jnp.issubdtype(tensor.dtype, jnp.floating)


def parse_tuned_state(content: bytes, name: str) -> TunedState:
    """The tensors of a .pth or safetensors file's bytes, be they a tuned state's or not; nothing in it is run.

    Raises:
      WeightsError: it holds no tensors, or some of a dtype that is not read.
      UnsafeFileError: it is neither, damaged, or has anything else in it.
    """
    if not content.startswith(_ZIP):
        found = parse_safetensors(content, name)
        return TunedState(found.tensors, found.metadata.get(BASE))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "upload.pth"
        path.write_bytes(content)
        found = read_torch_file(path).tensors
        found.verify()
        return TunedState({key: np.array(tensor) for key, tensor in found.items()})


def is_tuned(tensors: Mapping[str, NDArray]) -> bool:
    """Whether there are matrices of state tuning among the tensors."""
    return any(re.fullmatch(r"blocks\.\d+\.att\.time_state", key) for key in tensors)


def named_tensors(arrays: Any) -> dict[str, NDArray]:
    """The arrays of `initial_state` by their names in a file, shifts only if any is not zero."""
    first, rest = jax.device_get((arrays["first_block"], arrays["blocks"]))
    layers = [first, *({name: x[i] for name, x in rest.items()} for i in range(len(rest[MATRIX])))]
    has_shifts = any(np.any(layer[name]) for layer in layers for name in SHIFTS if name in layer)
    kept = (MATRIX, *SHIFTS) if has_shifts else (MATRIX,)
    return {
        key: np.ascontiguousarray(layer[part])
        for i, layer in enumerate(layers)
        for part, key in _names(i, kept).items()
    }


def save_tuned_state(
    path: str | os.PathLike[str], arrays: Any, *, base_digest: str | None = None, dtype: str = "float32"
) -> None:
    """Writes a tuned state to a new file atomically: FILE.pth as the official trainers do, else safetensors.

    Args:
      arrays: nested dict of `initial_state`.
      base_digest: kept in safetensors; a .pth has no place for it.
      dtype: float32 or bfloat16.

    Raises:
      TunedStateError: another dtype, or shifts that a .pth has no place for.
      WeightsError: the file exists already, or cannot be written there.
    """
    path = Path(path).expanduser()
    dtypes = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
    if dtype not in dtypes:
        raise TunedStateError(f"dtype = {dtype!r}: a tuned state is written in {' or '.join(dtypes)}")
    tensors = {key: x.astype(dtypes[dtype]) for key, x in named_tensors(arrays).items()}
    if path.suffix.lower() == ".pth":
        if len(tensors) > len(arrays["blocks"][MATRIX]) + 1:
            raise TunedStateError(f"{path}: the inputs of token shifts have no place in a .pth; name FILE.safetensors")
        write_torch_file(path, tensors)
        return
    write_safetensors(path, tensors, _FORMAT | ({} if base_digest is None else {BASE: base_digest}))
