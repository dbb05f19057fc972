"""Initial states by state tuning: a matrix for each head in the official files, from which a text begins.

    blocks.3.att.time_state    [H, N, N], value axis before key axis, as in `rwkv_jax.models.state`

The trainers of RWKV-5, 6 and 7 (RWKV-LM, RWKV-PEFT) save these tensors as .pth, others the same as safetensors. They do
not train the inputs of the token shift, which begin at zero. A file does not say of which model it is: only the numbers
of layers and heads can be compared.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from rwkv_jax.inference.state.snapshot import Snapshot, StateError
from rwkv_jax.inference.state.state_file import Identity
from rwkv_jax.weights.pth.file import read_torch_file
from rwkv_jax.weights.safetensors import parse_safetensors

_NAME = "blocks.{}.att.time_state"
_LISTED = 20
_ZIP = b"PK\3\4"


def tuned_tensors(content: bytes, name: str) -> dict[str, NDArray]:
    """The tensors of a .pth or safetensors file's bytes; nothing in it is run.

    Raises:
      WeightsError: it holds no tensors, or some of a dtype that is not read.
      UnsafeFileError: it is neither, damaged, or has anything else in it.
    """
    if not content.startswith(_ZIP):
        return parse_safetensors(content, name).tensors
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "upload.pth"
        path.write_bytes(content)
        found = read_torch_file(path).tensors
        found.verify()
        return {key: np.array(tensor) for key, tensor in found.items()}


def is_tuned(tensors: Mapping[str, NDArray]) -> bool:
    """Whether there are matrices of state tuning among the tensors."""
    return any(re.fullmatch(r"blocks\.\d+\.att\.time_state", key) for key in tensors)


def tuned_snapshot(tensors: Mapping[str, NDArray], identity: Identity, name: str) -> Snapshot:
    """The state from which a text begins. It has read nothing: the logits are zeros, so a prompt must follow.

    Args:
      tensors: as of `tuned_tensors`, of any float dtype.
      name: of the file, for messages.

    Raises:
      StateError: a model without matrix states; tensors are missing, not expected, of another shape or not finite.
    """
    expected = {
        _NAME.format(layer): part.wkv
        for layer, part in enumerate(identity.state)
        if isinstance(getattr(part, "wkv", None), jax.ShapeDtypeStruct)
    }
    if not expected:
        raise StateError(f"{name}: has tuned states, which a model of {identity.generation} cannot begin from")
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
        raise StateError("\n  ".join([first, *(line[:200] for line in lines[:_LISTED]), *more]))
    matrices = {key: tensors[key].astype(like.dtype) for key, like in expected.items()}
    for key, matrix in matrices.items():
        if not np.isfinite(matrix).all():
            raise StateError(f"{name}: the tensor {key!r} holds numbers that are not finite; get another file")
    state = [
        jax.tree.map_with_path(lambda path, like, i=i: _part(path, like, matrices[_NAME.format(i)]), part)
        for i, part in enumerate(identity.state)
    ]
    return Snapshot(tuple(state), jax.numpy.zeros(identity.logits.shape, identity.logits.dtype), 0)


def _is_like(tensor: NDArray, like: Any) -> bool:
    return tensor.shape == like.shape and jax.numpy.issubdtype(tensor.dtype, jax.numpy.floating)


def _part(path: tuple[Any, ...], like: Any, matrix: NDArray) -> jax.Array:
    is_matrix = jax.tree_util.keystr(path[-1:], simple=True) == "wkv"
    return jax.device_put(matrix if is_matrix else np.zeros(like.shape, like.dtype))
